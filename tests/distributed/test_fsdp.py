"""FSDP2, HSDP, tensor parallelism and both together: nothing to say, and the same numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import funshampoo as fs
from funshampoo.core.wholes import placed_as
from tests.distributed.ranks import Ranks
from tests.releases import wrong_before
from tests.sooner import these

STEPS = 4  # refreshed at the first and the third
SLOW = [pytest.mark.slow]
BOTH = "fsdp2 x tp"
UNEVEN = "full_tensor() is wrong where FSDP2 × tensor parallelism does not divide evenly"
NORMS = ("clip", "grafted")  # of whole parameters: sums over ranks, in another order


class Model(nn.Module):
    """Sides that no number of ranks divides, a vector and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 10)
        self.up = nn.Linear(10, 22)
        self.down = nn.Linear(22, 10, bias=False)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(self.norm(x))


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def rows(model: nn.Module, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model.down, mesh=mesh)
    fully_shard(model, mesh=mesh)


def hybrid(model: nn.Module, size: int) -> None:
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)


def tensor(model: nn.Module, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def both(model: nn.Module, size: int) -> None:
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("rows", "tensor"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model.up, mesh=mesh["rows"])
    fully_shard(model, mesh=mesh["rows"])


def as_it_is(model: nn.Module, size: int) -> None:
    pass


WAYS: dict[str, Callable[[nn.Module, int], None]] = {
    "plain": as_it_is,
    "data parallel": as_it_is,
    "owners": as_it_is,  # data parallel, with blocks shared out
    "fsdp2": rows,
    "hsdp": hybrid,
    "tp": tensor,
    "fsdp2 x tp": both,
}

METHODS: dict[str, Callable[..., Any]] = {
    "shampoo": lambda p, **options: fs.Shampoo(
        p, lr=0.01, every=3, max_size=8, momentum=0.9, weight_decay=0.1, **options
    ),
    "soap": lambda p, **options: fs.Optimizer(p, fs.soap, lr=0.01, every=3, max_size=8, **options),
    "muon": lambda p: fs.Optimizer(p, fs.muon, lr=0.01),
    "adamw": lambda p, **options: fs.Optimizer(p, fs.adamw, lr=0.01, **options),
    "clip": lambda p: fs.Optimizer(p, fs.chain(fs.clip_by_global_norm(0.1), fs.adamw(0.01))),
    "grafted": lambda p: fs.Optimizer(p, fs.graft(fs.scale_by_adam(), fs.scale_by_sgd()), lr=0.01),
}


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x.detach().clone()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(p) for name, p in model.named_parameters()}


def backward(model: nn.Module, step: int) -> None:
    tokens = torch.randint(0, 13, (4, 5), generator=torch.Generator().manual_seed(step))
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), (tokens % 7).flatten()).backward()


def train(rank: int, size: int, way: str, method: str) -> list[str]:
    """A sharded model, and in every process a plain one with the same gradients."""
    plain, sharded = model(), model()
    WAYS[way](sharded, size)
    ours, theirs = METHODS[method](sharded.parameters()), METHODS[method](plain.parameters())
    differing = []
    for step in range(STEPS):
        backward(sharded, step)
        for p, q in zip(plain.parameters(), sharded.parameters()):
            p.grad = full(q.grad)
        ours.step()
        theirs.step()
        ours.zero_grad()
        expected = dict(plain.named_parameters())
        found = whole(sharded)
        for name, x in found.items():
            near = method in NORMS and torch.allclose(x, expected[name], rtol=1e-4, atol=1e-6)
            if not near and not torch.equal(x, expected[name]):
                differing.append(f"{name} at {step}")
    before = model()
    assert not any(torch.equal(p, q) for p, q in zip(before.parameters(), plain.parameters()))
    return differing


PLACES = [("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("tp", 2), ("fsdp2 x tp", 4)]
# By `make test`: every method where both ways meet, and in all places one whose state lies with
# blocks, and one whose norm is summed over ranks.
SOONER = {("fsdp2 x tp", 4): METHODS.keys()}


@pytest.mark.parametrize(
    ("way", "size", "method"),
    [
        pytest.param(
            *place,
            method,
            marks=[] if method in SOONER.get(place, ("shampoo", "clip")) else SLOW,
        )
        for place in PLACES
        for method in METHODS
    ],
)
def test_a_sharded_model_trains_as_in_one_process(
    ranks: Ranks, way: str, size: int, method: str
) -> None:
    """Bitwise, on the gradients that there are."""
    wrong_before("2.10", UNEVEN, way == BOTH)
    assert ranks(size, train, size, way, method) == [[]] * size


def apart(rank: int, size: int, way: str, method: str) -> tuple[float, float]:
    """How far first gradients and last parameters are from one process that trains by itself."""
    plain, sharded = model(), model()
    WAYS[way](sharded, size)
    ours, theirs = METHODS[method](sharded.parameters()), METHODS[method](plain.parameters())
    gaps = []
    for step in range(STEPS):
        for network, optimizer in ((sharded, ours), (plain, theirs)):
            optimizer.zero_grad()
            backward(network, step)
            optimizer.step()
        pairs = zip(sharded.parameters(), plain.parameters())
        gaps.append(max(float((full(p.grad) - q.grad).abs().max()) for p, q in pairs))
    expected = dict(plain.named_parameters())
    last = max(float((x - expected[name]).abs().max()) for name, x in whole(sharded).items())
    return gaps[0], last


@pytest.mark.parametrize(
    ("way", "size", "method"),
    [
        ("fsdp2", 2, "shampoo"),
        pytest.param("fsdp2", 2, "soap", marks=SLOW),
        pytest.param("hsdp", 4, "shampoo", marks=SLOW),
        ("tp", 2, "muon"),  # which magnifies no rounding: see docs/sharding.md
        pytest.param("fsdp2 x tp", 4, "muon", marks=SLOW),
        pytest.param("fsdp2 x tp", 4, "adamw", marks=SLOW),
    ],
)
def test_a_training_is_that_of_one_process(ranks: Ranks, way: str, size: int, method: str) -> None:
    """What differs comes with torch's gradients, which are sums in another order."""
    wrong_before("2.9", "FSDP2 over gloo sums gradients", way != "tp")
    wrong_before("2.10", UNEVEN, way == BOTH)
    for gradients, parameters in ranks(size, apart, size, way, method):
        assert gradients < 1e-7
        assert parameters < 1e-6


LONG = METHODS | {
    "shampoo": lambda p: fs.Shampoo(p, lr=0.01, every=3, max_size=8, momentum=0.9, stagger=True),
    "leaf by leaf": lambda p: fs.Optimizer(p, fs.guarded(fs.adamw(0.01), by_leaf=True)),
    "in portions": lambda p: fs.Shampoo(
        p, lr=0.01, every=3, max_size=8, distribute=functools.partial(fs.sharded, overlap=3)
    ),
}


def train_long(
    rank: int, size: int, way: str, method: str, steps: int, dtypes: dict[str, torch.dtype]
) -> list[str]:
    """As `train`, with gradients that are missing or not finite, and parts in other dtypes."""
    plain, sharded = model(), model()
    for network in (plain, sharded):
        for name, dtype in dtypes.items():
            network.get_submodule(name).to(dtype)
    if dtypes:  # FSDP2 shards together what is alike
        for child in sharded.children():
            fully_shard(child, mesh=init_device_mesh("cpu", (size,)))
    else:
        WAYS[way](sharded, size)
    ours, theirs = LONG[method](sharded.parameters()), LONG[method](plain.parameters())
    for step in range(steps):
        for i, (p, q, g) in enumerate(
            zip(plain.parameters(), sharded.parameters(), gradients(step))
        ):
            g = g.to(p.dtype)
            if i == 1 and step in (4, 7):
                g[-1, -1] = torch.nan
            if i == 3 and step == 9:
                g[0, 0] = torch.inf
            missing = i == 2 and step % 5 == 1
            p.grad, q.grad = (None, None) if missing else (g, placed_as(q, g))
        ours.step()
        theirs.step()
    expected = dict(plain.named_parameters())
    return [name for name, x in whole(sharded).items() if not torch.equal(x, expected[name])]


@pytest.mark.parametrize(
    ("way", "size", "method", "steps"),
    [
        # Counters on two meshes are looked at on the tenth step.
        ("fsdp2 x tp", 4, "leaf by leaf", 12),
        ("fsdp2", 3, "in portions", 10),
        pytest.param("hsdp", 4, "in portions", 20, marks=SLOW),
        *[
            pytest.param(*place, method, 20, marks=SLOW)
            for place in [*PLACES, ("fsdp2", 4)]
            for method in ("shampoo", "soap", "muon")
        ],
    ],
)
def test_twenty_steps_with_bad_gradients(
    ranks: Ranks, way: str, size: int, method: str, steps: int
) -> None:
    """Bitwise, staggered, with gradients of None, NaN and inf."""
    wrong_before("2.10", UNEVEN, way == BOTH)
    assert ranks(size, train_long, size, way, method, steps, {}) == [[]] * size


@pytest.mark.slow
@pytest.mark.parametrize("method", ["shampoo", "soap", "muon"])
def test_dtypes_side_by_side(ranks: Ranks, method: str) -> None:
    """Of three dtypes, in one exchange."""
    dtypes = {"up": torch.bfloat16, "head": torch.float64}
    assert ranks(2, train_long, 2, "fsdp2", method, 12, dtypes) == [[]] * 2


def limited(rank: int, size: int, method: str) -> str:
    """The gradient of a parameter on one of two meshes is NaN until it is too much."""
    network = model()
    WAYS["fsdp2 x tp"](network, size)
    optimizer = fs.Optimizer(network.named_parameters(), LIMITED[method], lr=0.01)
    for step in range(12):
        for i, (p, g) in enumerate(zip(network.parameters(), gradients(step))):
            p.grad = placed_as(p, g * torch.nan if i == 1 else g)
        try:
            optimizer.step()
        except fs.FailureLimitError as error:
            return str(error)[:160]
    return "no error"


LIMITED: dict[str, Any] = {
    "by leaf": lambda learning_rate: fs.guarded(
        fs.adamw(learning_rate), by_leaf=True, max_failures=3
    ),
    "muon": lambda learning_rate: fs.muon(learning_rate, max_failures=3),
}


@pytest.mark.parametrize("method", LIMITED)
def test_too_many_failures_on_two_meshes(ranks: Ranks, method: str) -> None:
    found = ranks(4, limited, 4, method)
    assert len(set(found)) == 1
    assert "up.weight" in found[0]
    assert "gradient not finite" in found[0]


def on_two_meshes(rank: int, size: int) -> list[str]:
    """One transformation, and then the same shapes and placements on a mesh turned over."""
    tx, differing = fs.shampoo(0.1, max_size=8), []
    for order in ([[0, 1], [2, 3]], [[0, 2], [1, 3]]):
        mesh, places = DeviceMesh("cpu", order), [Shard(0), Replicate()]
        params = {"w": torch.ones(13, 10), "b": torch.ones(7)}
        sharded = {n: distribute_tensor(p, mesh, places) for n, p in params.items()}
        alone, state = fs.shampoo(0.1, max_size=8), tx.init(sharded)
        expected = alone.init(params)
        for step in range(3):
            grads = {n: torch.full_like(p, step + 1.0).cumsum(0) for n, p in params.items()}
            parts = {n: distribute_tensor(g, mesh, places) for n, g in grads.items()}
            updates, state = tx.update(parts, state, sharded)
            sharded = fs.apply_updates(sharded, updates)
            updates, expected = alone.update(grads, expected, params)
            params = fs.apply_updates(params, updates)
        differing += [f"{n} {order}" for n in params if not full(sharded[n]).equal(params[n])]
    return differing


def test_one_transformation_on_two_meshes(ranks: Ranks) -> None:
    assert ranks(4, on_two_meshes, 4) == [[]] * 4


PUBLISHED = ("Muon", "NorMuon", "SOAP", "KL-SOAP", "KL-SOAP-H (hyperball)", "REKLS", "SPlus")


def published(rank: int, size: int) -> list[str]:
    """Methods of others, on half of a matrix and on all of it."""
    mesh, differing = init_device_mesh("cpu", (size,)), []
    for method in PUBLISHED:
        tx, generator = fs.from_published(method), torch.Generator().manual_seed(0)
        w, *grads = torch.randn(4, 6, 4, generator=generator)
        sharded, state = distribute_tensor(w, mesh, [Shard(0)]), tx.init([w])
        parts = tx.init([sharded])
        for g in grads:
            (u,), parts = tx.update([distribute_tensor(g, mesh, [Shard(0)])], parts, [sharded])
            (v,), state = tx.update([g], state, [w])
            sharded, w = fs.apply_updates([sharded, w], [u, v])
        differing += [] if full(sharded).equal(w) else [method]
    return differing


def test_published_methods_take_sharded_parameters(ranks: Ranks) -> None:
    assert ranks(2, published, 2) == [[]] * 2


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator) for p in model().parameters()]


def resumed(
    rank: int, size: int, way: str, method: str, folder: str, flat: bool, ts: range
) -> dict[str, Tensor]:
    """Some steps, from a checkpoint if these are not the first, and a checkpoint."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    network = model()
    WAYS[way](network, size)
    options_of_way = {"distribute": fs.sharded} if way == "owners" else {}
    optimizer = METHODS[method](network.parameters(), **options_of_way)
    if ts.start:
        weights, state = get_state_dict(network, optimizer, options=options)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{ts.start}")
        set_state_dict(
            network,
            optimizer,
            model_state_dict=weights,
            optim_state_dict=state,
            options=options,
        )
    for t in ts:
        for p, g in zip(network.parameters(), gradients(t)):
            p.grad = placed_as(p, g)
        optimizer.step()
    weights, state = get_state_dict(network, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{ts.stop}")
    return whole(network)


def gathered(rank: int, size: int, method: str, offload: bool) -> list[str]:
    """A checkpoint of whole tensors, given to a new run by all ranks or by rank 0."""
    saving = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    loading = StateDictOptions(full_state_dict=True, broadcast_from_rank0=offload)
    networks = [model() for _ in range(3)]
    plain, before, after = networks
    for network in (before, after):
        WAYS["fsdp2"](network, size)
    alone, first, second = [METHODS[method](m.parameters(), consolidate=True) for m in networks]

    def go(network: nn.Module, optimizer: Any, ts: range) -> None:
        for t in ts:
            for p, g in zip(network.parameters(), gradients(t)):
                p.grad = placed_as(p, g)
            optimizer.step()

    go(plain, alone, range(4))
    go(before, first, range(2))
    weights, state = get_state_dict(before, first, options=saving)
    set_model_state_dict(after, weights, options=loading)
    set_optimizer_state_dict(after, second, state, options=loading)
    go(after, second, range(2, 4))
    expected = dict(plain.named_parameters())
    return [name for name, x in whole(after).items() if not torch.equal(x, expected[name])]


@pytest.mark.parametrize("method", these(["shampoo", "soap", "adamw"], sooner=["shampoo"]))
@pytest.mark.parametrize("offload", [False, True], ids=["on all", "from rank 0"])
def test_a_full_state_dict_is_whole_if_consolidated(
    ranks: Ranks, method: str, offload: bool
) -> None:
    assert ranks(2, gathered, 2, method, offload) == [[], []]


def for_one_step(size: int, way: str) -> Any:
    """In two groups, whose states all ranks have to make even if one refuses the first."""
    network = model()
    WAYS[way](network, size)
    sharing = {"distribute": fs.sharded} if way == "owners" and size > 1 else {}
    first, *others = network.parameters()
    optimizer = METHODS["shampoo"]([{"params": [first]}, {"params": others}], **sharing)
    for p, g in zip(network.parameters(), gradients(0)):
        p.grad = placed_as(p, g)
    return network, optimizer


def in_full(rank: int, way: str) -> Any:
    """What the helper makes of a run that does not consolidate: rank 0's part."""
    network, optimizer = for_one_step(2, way)
    optimizer.step()
    options = StateDictOptions(full_state_dict=True)
    return get_optimizer_state_dict(network, optimizer, options=options)


def given_in_full(rank: int, size: int, way: str, state: Any) -> tuple[str, bool]:
    """The error, and whether the optimizer steps as if nothing had been given to it."""
    network, optimizer = for_one_step(size, way)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=size > 1)
    error = ""
    try:
        set_optimizer_state_dict(network, optimizer, state, options=options)
    except ValueError as refusal:
        error = str(refusal)
    optimizer.step()
    twin, alone = for_one_step(1, "plain")
    alone.step()
    expected = dict(twin.named_parameters())
    return error, all(torch.equal(x, expected[n]) for n, x in whole(network).items())


@pytest.mark.filterwarnings("ignore")  # of torch.distributed.checkpoint on one process
@pytest.mark.parametrize("way", ["fsdp2", "owners"])
def test_a_full_state_dict_that_is_not_whole_is_refused(ranks: Ranks, way: str) -> None:
    """It was loaded, and every block that rank 0 does not own started from nothing."""
    state = ranks(2, in_full, way)[0]
    for size, how in ((2, way), (1, "plain")):
        for error, unchanged in ranks(size, given_in_full, size, how, state):
            assert "consolidate=True" in error or "could not load" in error
            assert unchanged


LEGS = [("fsdp2", 4), ("plain", 1), ("fsdp2 x tp", 4), ("data parallel", 2), ("hsdp", 4)]


def through(ranks: Ranks, where: str, method: str, flat: bool, legs: list[tuple[str, int]]) -> None:
    """Two steps under every sharding, from the checkpoint of the one before, as in one process."""
    wrong_before("2.10", UNEVEN, (BOTH, 4) in legs)
    plain = model()
    optimizer = METHODS[method](plain.parameters())
    for t in range(2 * len(legs)):
        for p, g in zip(plain.parameters(), gradients(t)):
            p.grad = g
        optimizer.step()
    for i, (way, size) in enumerate(legs):
        found = ranks(size, resumed, size, way, method, where, flat, range(2 * i, 2 * i + 2))
    for weights in found:
        for name, p in plain.named_parameters():
            assert torch.equal(weights[name], p), name


@pytest.mark.filterwarnings("ignore")  # of torch.distributed.checkpoint on one process
@pytest.mark.parametrize(
    ("method", "flat"), [("shampoo", False), pytest.param("adamw", True, marks=SLOW)]
)
def test_a_checkpoint_outlives_the_sharding(
    ranks: Ranks, tmp_path: Path, method: str, flat: bool
) -> None:
    """The state of blocks, and DTensors outside of them; in both of torch's forms."""
    through(ranks, str(tmp_path), method, flat, LEGS[:3])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("method", ["shampoo", "soap", "adamw"])
def test_a_checkpoint_outlives_every_sharding(
    ranks: Ranks, tmp_path: Path, method: str, flat: bool
) -> None:
    through(ranks, str(tmp_path), method, flat, LEGS)


PLACES_OF_STATE = [("fsdp2", 4), ("hsdp", 4), ("owners", 2), ("plain", 1)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["shampoo", "soap"])
@pytest.mark.parametrize("after", PLACES_OF_STATE, ids=lambda place: place[0])
@pytest.mark.parametrize("before", PLACES_OF_STATE, ids=lambda place: place[0])
def test_saved_here_and_resumed_there(
    ranks: Ranks, tmp_path: Path, before: tuple[str, int], after: tuple[str, int], method: str
) -> None:
    through(ranks, str(tmp_path), method, False, [before, after])
