"""What people do with sharded models: the numbers are those of one process."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.func import functional_call, grad

import funshampoo as fs
from funshampoo.recipes import RECIPES
from funshampoo.state import Checkpoint, health, load_state_dict, merged, state_dict, summary
from tests.distributed.ranks import Ranks
from tests.distributed.test_fsdp import METHODS, Model, full, model, rows, whole

Pair = tuple[nn.Module, nn.Module]  # a sharded model, and a plain one


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def fsdp(**options: Any) -> Callable[[], Pair]:
    def pair() -> Pair:
        sharded = model()
        fully_shard(sharded, mesh=mesh(), **options)
        return sharded, model()

    return pair


def in_half_precision() -> Pair:
    sharded = model().bfloat16()
    fully_shard(sharded, mesh=mesh())
    return sharded, model().bfloat16()


def tied_and_frozen() -> Pair:
    pair = model(), model()
    for one in pair:
        torch.manual_seed(1)
        one.head = nn.Linear(10, 13)
        one.head.weight = one.embedding.weight
        one.norm.weight.requires_grad_(False)
        one.up.weight.requires_grad_(False)
    fully_shard(pair[0].up, mesh=mesh())
    fully_shard(pair[0], mesh=mesh())
    return pair


def made_on_meta() -> Pair:
    with torch.device("meta"):
        sharded = Model()
    fully_shard(sharded.up, mesh=mesh())
    fully_shard(sharded, mesh=mesh())
    sharded.to_empty(device="cpu")
    with torch.no_grad():
        for p, q in zip(sharded.parameters(), model().parameters()):
            p.copy_(distribute_tensor(q.detach(), p.device_mesh, p.placements))
    return sharded, model()


def sequence_parallel() -> Pair:
    """The norm's gradients are partial sums, the embedding's are whole."""
    sharded, along = model(), Shard(1)
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=along),
        "up": ColwiseParallel(input_layouts=along),
        "down": RowwiseParallel(output_layouts=along),
        "norm": SequenceParallel(sequence_dim=1),
        "head": ColwiseParallel(input_layouts=along, output_layouts=Replicate()),
    }
    parallelize_module(sharded, mesh(), plan)
    return sharded, model()


PAIRS: dict[str, Callable[[], Pair]] = {
    "mixed precision": fsdp(
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ),
    "CPU offload": fsdp(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "half precision": in_half_precision,
    "tied and frozen": tied_and_frozen,
    "meta": made_on_meta,
    "sequence parallel": sequence_parallel,
}


def batch(network: nn.Module, step: int) -> None:
    """With as many tokens as ranks can share."""
    tokens = torch.randint(0, 13, (4, 6), generator=torch.Generator().manual_seed(step))
    found = network(tokens).flatten(0, 1).float()
    nn.functional.cross_entropy(found, (tokens % 7).flatten()).backward()


def stepped(pair: Pair, optimizers: Any, steps: range, batches: int = 1) -> list[str]:
    """Both with the gradients of the sharded one; what differs afterwards."""
    (sharded, plain), (ours, theirs) = pair, optimizers
    for step in steps:
        for k in range(batches):
            if batches > 1:
                sharded.set_requires_gradient_sync(k == batches - 1)
            batch(sharded, 10 * step + k)
        for p, q in zip(plain.parameters(), sharded.parameters()):
            p.grad = None if q.grad is None else full(q.grad)
        ours.step()
        theirs.step()
        ours.zero_grad()
    expected = dict(plain.named_parameters())
    return [name for name, x in whole(sharded).items() if not torch.equal(x, expected[name])]


def moved(plain: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(p, before[name]) != p.requires_grad for name, p in plain.named_parameters()
    )


def all_pairs(rank: int) -> dict[tuple[str, str], list[str]]:
    found = {}
    for what, make in PAIRS.items():
        for method in ("shampoo", "muon"):
            pair = make()
            before = {n: p.detach().clone() for n, p in pair[1].named_parameters()}
            optimizers = [METHODS[method](one.parameters()) for one in pair]
            found[what, method] = stepped(pair, optimizers, range(4))
            assert moved(pair[1], before), what
    pair = model(), model()
    rows(pair[0], 2)
    optimizers = [METHODS["shampoo"](one.parameters()) for one in pair]
    found["accumulation", "shampoo"] = stepped(pair, optimizers, range(3), batches=3)
    return found


@pytest.mark.slow
def test_models_as_people_shard_them(ranks: Ranks) -> None:
    for found in ranks(2, all_pairs):
        assert found == {key: [] for key in found}


def all_recipes(rank: int) -> dict[str, list[str]]:
    found = {}
    for name in RECIPES:
        pair = model(), model()
        rows(pair[0], 2)
        optimizers = [fs.for_model(one, name, lr=0.01) for one in pair]
        rates = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in optimizers]
        found[name] = stepped(pair, optimizers, range(2))
        for rate in rates:
            rate.step()
        found[name] += stepped(pair, optimizers, range(2, 4))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_every_recipe_by_the_front_door(ranks: Ranks) -> None:
    for found in ranks(2, all_recipes):
        assert found == {name: [] for name in RECIPES}


def table_and_own(rank: int) -> tuple[str, int, int]:
    """The table's last line, its bytes, and those of this rank's state after a step."""
    one = model()
    rows(one, 2)
    optimizer = fs.for_model(one, "soap", lr=0.01)
    table = fs.routing_table(optimizer)
    for p in one.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.chain_states()
    own = sum(sum(summary(part, file=io.StringIO()).parameters.values()) for part in state)
    return str(table).splitlines()[-1], table.state_bytes, own


def test_the_routing_table_counts_the_state_of_all_ranks(ranks: Ranks) -> None:
    found = ranks(2, table_and_own)
    (words, total, _), own = found[0], sum(own for *_, own in found)
    assert words.endswith("of state on all ranks together.")
    assert own == pytest.approx(total, rel=0.05)
    assert max(own for *_, own in found) < 0.8 * total


# Functional code: trees of DTensors.


def random_tree(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"experts": (5, 6, 4), "w": (12, 10), "b": (7,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def placed(tree: dict[str, Tensor]) -> dict[str, Any]:
    return {name: distribute_tensor(x, mesh(), [Shard(0)]) for name, x in tree.items()}


def chains() -> Iterator[tuple[str, fs.GradientTransformation]]:
    rate = fs.schedules.warmup_cosine(0.1, warmup_steps=2, steps=8)
    matrices = {"experts": True, "w": True, "b": False}
    yield "schedule", fs.shampoo(rate, every=2, weight_decay=0.1)
    yield "multi_steps", fs.multi_steps(fs.shampoo(0.1, every=2), 2)
    yield "multi_steps of leaves", fs.multi_steps(fs.adamw(rate), 2)
    yield "global norm", fs.chain(fs.clip_by_global_norm(0.5), fs.guarded(fs.sgd(0.1)))
    yield "hyperparameters", fs.inject_hyperparams(fs.shampoo)(0.1)
    yield "masked", fs.masked(fs.shampoo(0.1), matrices)
    yield "muon", fs.muon(0.1)
    yield "guarded leaves", fs.guarded(fs.adamw(0.1), by_leaf=True)
    yield "guarded", fs.guarded(fs.adamw(0.1))
    one_by_one = fs.shampoo(0.1, every=2, merge=fs.blocks.Stacked(0))
    roles = {"experts": "stack", "w": "rest", "b": "rest"}
    yield "experts", fs.partition({"stack": one_by_one, "rest": fs.shampoo(0.1)}, roles)


def near(a: Tensor, b: Tensor) -> bool:
    """Up to the order in which a norm is added up."""
    return torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def functional(rank: int) -> dict[str, list[str]]:
    """In the third of seven steps one rank has a number that is none."""
    found = {}
    for name, tx in chains():
        plain, sharded = random_tree(0), placed(random_tree(0))
        state, own = tx.init(plain), tx.init(sharded)
        for t in range(1, 8):
            gradients = random_tree(t)
            if t == 3:
                gradients["w"][11, 9] = float("nan")
            updates, state = tx.update(gradients, state, plain)
            plain = fs.apply_updates(plain, updates)
            if t % 2:
                own = fs.update_in_place(tx, placed(gradients), own, sharded)
            else:
                updates, own = tx.update(placed(gradients), own, sharded)
                assert all(u.placements == sharded[n].placements for n, u in updates.items())
                sharded = fs.apply_updates(sharded, updates)
        same = near if name == "global norm" else torch.equal
        found[name] = [n for n, x in sharded.items() if not same(full(x), plain[n])]
        assert all(torch.isfinite(x).all() for x in plain.values()), name
        assert not any(torch.equal(x, plain[n]) for n, x in random_tree(0).items() if n != "b")
    return found


def through_a_function(rank: int) -> list[str]:
    """torch.func.grad through functional_call gives DTensors, placed as torch likes."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5))
    plain = {name: p.detach().clone() for name, p in network.named_parameters()}
    sharded, tx = placed(plain), fs.shampoo(0.1, every=2)
    state, own = tx.init(plain), tx.init(sharded)
    for t in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
        x = distribute_tensor(x, mesh(), [Replicate()])
        gradients = grad(lambda p, x=x: functional_call(network, p, (x,)).square().mean())(sharded)
        own = fs.update_in_place(tx, gradients, own, sharded)
        state = fs.update_in_place(tx, {n: full(g) for n, g in gradients.items()}, state, plain)
    return [n for n, x in sharded.items() if not torch.equal(full(x), plain[n])]


def test_trees_of_dtensors(ranks: Ranks) -> None:
    for found in ranks(2, functional):
        assert found == {key: [] for key in found}
    assert ranks(2, through_a_function) == [[], []]


def norms_by_dtype(rank: int) -> list[list[torch.dtype]]:
    """Dtypes of leaves whose norm together is not that of whole tensors."""
    wrong, narrow, wide = [], torch.bfloat16, torch.float32
    for first, others in [(wide, wide), (narrow, wide), (wide, narrow), (narrow, narrow)]:
        tree = {n: x.to(others if n != "w" else first) for n, x in random_tree(1).items()}
        found, expected = fs.global_norm(placed(tree)), fs.global_norm(tree)
        if found.dtype != expected.dtype or not near(found, expected):
            wrong.append([first, others])
    return wrong


def test_a_norm_of_dtensors_of_every_dtype(ranks: Ranks) -> None:
    assert ranks(2, norms_by_dtype) == [[], []]


# What is saved, read and copied.


def differing(found: dict[Any, Any], expected: dict[Any, Any]) -> list[str]:
    """Entries of a wrapper's state dict that are not those of one process."""
    wrong = []
    for i, entries in expected.items():
        names = {name for name in {*entries, *found[i]} if not name.startswith("shared/funshampoo")}
        for name in names:
            x, y = entries.get(name), found[i].get(name)
            if x is None or type(y) is not Tensor or not torch.equal(x, y):
                wrong.append(f"{i}/{name}")
    return wrong


def kept(rank: int, method: str, folder: str) -> tuple[Any, ...]:
    """Train, save in all ways, go on from each; returns one process's checkpoint and weights."""
    pair = model(), model()
    rows(pair[0], 2)
    ours, theirs = optimizers = [METHODS[method](one.parameters()) for one in pair]
    assert all(ours.state[p] for p in pair[0].parameters() if p.requires_grad) or method != "adamw"
    assert stepped(pair, optimizers, range(3)) == []
    shown = io.StringIO()
    (state,) = ours.chain_states()
    assert summary(state, file=shown).total < summary(theirs.chain_states()[0], file=shown).total
    assert health(state, file=shown).held == 0
    own = copy.deepcopy(ours.state_dict())
    torch.save(own, f"{folder}/rank{rank}.pt")
    ours.consolidate_state_dict()
    if rank == 0 or method == "adamw":
        consolidated = copy.deepcopy(ours.state_dict())
        assert differing(consolidated["state"], theirs.state_dict()["state"]) == []
    for how in ("own", "merged", "copied", "pickled"):
        (network, optimizer), there = (pair[0], ours), copy.deepcopy((pair[1], theirs))
        if how == "copied":
            parameters, optimizer = copy.deepcopy((list(network.parameters()), optimizer))
        elif how == "pickled":
            parameters, optimizer = pickle.loads(pickle.dumps((list(network.parameters()), ours)))
        else:
            dist.barrier()
            parts = [torch.load(f"{folder}/rank{r}.pt", weights_only=True) for r in range(2)]
            saved = own if how == "own" else {**own, "state": merged(p["state"] for p in parts)}
            parameters = [nn.Parameter(p.detach().clone()) for p in network.parameters()]
            optimizer = METHODS[method](parameters)
            optimizer.load_state_dict(saved)
        for p, q in zip(parameters, there[0].parameters()):
            q.grad = torch.ones(q.shape)
            p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
        optimizer.step()
        there[1].step()
        same = [torch.equal(full(p), q) for p, q in zip(parameters, there[0].parameters())]
        assert all(same), (how, same)
    return theirs.state_dict(), [p.detach() for p in pair[1].parameters()]


@pytest.mark.parametrize("method", ["shampoo", "muon", "adamw"])
def test_what_is_saved_and_copied_goes_on(ranks: Ranks, tmp_path: Path, method: str) -> None:
    (expected, weights), _ = ranks(2, kept, method, str(tmp_path))
    parts = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    together = merged(part["state"] for part in parts)
    assert differing(together, expected["state"]) == []
    alone = METHODS[method]([nn.Parameter(x) for x in weights])
    alone.load_state_dict({**parts[0], "state": together})
    assert differing(alone.state_dict()["state"], expected["state"]) == []
    for wrong, message in [
        (lambda: merged([parts[0]["state"]]), "rank 1 is missing"),
        (lambda: alone.load_state_dict(parts[0]), "missing from|part of a DTensor.*merged"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()


def kept_by_functions(rank: int, folder: str) -> None:
    for name, tx in [("shampoo", fs.shampoo(0.1)), ("adamw", fs.adamw(0.1))]:
        plain, sharded = random_tree(0), placed(random_tree(0))
        state, own = tx.init(plain), tx.init(sharded)
        for t in (1, 2):
            state = fs.update_in_place(tx, random_tree(t), state, plain)
            own = fs.update_in_place(tx, placed(random_tree(t)), own, sharded)
        torch.save(state_dict(own), f"{folder}/{name}{rank}.pt")
        dcp.save({"optimizer": Checkpoint(own)}, checkpoint_id=f"{folder}/{name}")
        parts = [torch.load(f"{folder}/{name}{r}.pt", weights_only=True) for r in range(2)]
        united, expected = merged(parts), state_dict(state)
        assert united.keys() == expected.keys()
        assert all(torch.equal(united[n], x) for n, x in expected.items())
        for params, mine in [(sharded, own), (plain, state)]:
            checkpoint = Checkpoint(tx.init(params))
            dcp.load({"optimizer": checkpoint}, checkpoint_id=f"{folder}/{name}")
            for loaded in (checkpoint.state, load_state_dict(tx.init(params), united).state):
                entries = state_dict(loaded)
                for n, x in state_dict(mine).items():
                    assert type(entries[n]) is type(x), n
                    if n != "funshampoo/part":  # the run has its number from the next step on
                        assert torch.equal(full(entries[n]), full(x)), n


def test_functional_states_outlive_the_sharding(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, kept_by_functions, str(tmp_path))


# Ctrl-C in the middle of a step.


def interrupting(after: int) -> fs.GradientTransformation:
    calls = {"n": 0}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        calls["n"] += 1
        if calls["n"] > after:
            raise KeyboardInterrupt
        return updates, state

    return fs.GradientTransformation(lambda params: (), update, "interrupting")


def interrupted(rank: int) -> dict[str, bool]:
    """Whether the next step says that the state is half done."""
    first = {"experts": "first", "w": "first", "b": "second"}
    moves = {"first": fs.scale(-0.1), "second": fs.chain(interrupting(0), fs.trace(0.9))}
    cases = {
        "state, of leaves": fs.chain(fs.scale_by_adam(), interrupting(0)),
        "state, by one operator": fs.chain(fs.trace(0.9), interrupting(0)),
        "parameters": fs.partition(moves, first),
        "before anything": fs.chain(interrupting(0), fs.scale_by_adam()),
    }
    found = {}
    for name, tx in cases.items():
        params = placed(random_tree(0))
        state = tx.init(params)
        with pytest.raises(KeyboardInterrupt):
            fs.update_in_place(tx, placed(random_tree(1)), state, params)
        try:
            fs.update_in_place(tx, placed(random_tree(1)), state, params)
        except fs.InterruptedStepError:
            found[name] = True
        except KeyboardInterrupt:
            found[name] = False
    return found


def test_a_step_on_dtensors_that_was_interrupted_is_known(ranks: Ranks) -> None:
    for found in ranks(2, interrupted):
        assert found == {name: name != "before anything" for name in found}
