"""Sharded runs in other people's hands: saved and resumed by what they call, on any ranks."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import funshampoo as fs
from funshampoo.state import merged
from tests.distributed.ranks import Ranks
from tests.trees import assert_equal

MISSING = "needs the extra: pip install 'funshampoo[integrations]'"
OPTIONS: dict[str, Any] = {"lr": 0.02, "max_size": 8, "every": 2, "momentum": 0.9, "stagger": True}
SAVED_AT, STEPS = 5, 9


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 3))


def optimizer(network: nn.Module, **options: Any) -> fs.Shampoo:
    several = dist.is_initialized() and dist.get_world_size() > 1
    sharding = {"distribute": fs.sharded} if several else {}
    return fs.Shampoo(network.parameters(), **OPTIONS, **sharding, **options)


def backward(network: Callable[[Tensor], Tensor], t: int) -> None:
    """The same on every rank, so that a mean over two or four of them is exact."""
    x = torch.randn(16, 10, generator=torch.Generator().manual_seed(t))
    (network(x) - x[:, :3].square()).square().mean().backward()


def steps(network: nn.Module, opt: Any, ts: range) -> None:
    for t in ts:
        opt.zero_grad()
        backward(network, t)
        opt.step()


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {n.removeprefix("module."): p.detach().clone() for n, p in network.named_parameters()}


def uninterrupted() -> dict[str, Tensor]:
    network = model()
    steps(network, optimizer(network), range(STEPS))
    return weights(network)


def resumed_with(rank: int, saved: Any) -> Any:
    """Parameters at the end, of a run that goes on from (parameters, the optimizer's state)."""
    network = model()
    network.load_state_dict(saved[0])
    opt = optimizer(network)
    opt.load_state_dict(saved[1])
    steps(network, opt, range(SAVED_AT, STEPS))
    return weights(network)


def consolidated(rank: int, to: int | None) -> Any:
    network = model()
    opt = optimizer(network)
    steps(network, opt, range(SAVED_AT))
    opt.consolidate_state_dict(to)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    saved = weights(network)
    opt.load_state_dict(opt.state_dict())  # the whole, or this rank's own part
    steps(network, opt, range(SAVED_AT, STEPS))
    return saved, file.getvalue(), weights(network)


@pytest.mark.parametrize("to", [0, None])
def test_a_consolidated_state_resumes_on_any_number_of_ranks(ranks: Ranks, to: int | None) -> None:
    expected = uninterrupted()
    found = ranks(3, consolidated, to)
    for *_, end in found:
        assert_equal(end, expected)
    dicts = [torch.load(io.BytesIO(saved), weights_only=True) for _, saved, _ in found]
    if to is None:
        for one in dicts[1:]:
            assert one["state"].keys() == dicts[0]["state"].keys()
            assert all(one["state"][i].keys() == e.keys() for i, e in dicts[0]["state"].items())
    single = model()
    alone = optimizer(single)
    steps(single, alone, range(SAVED_AT))
    for i, entries in alone.state_dict()["state"].items():
        mine = {n: x for n, x in dicts[0]["state"][i].items() if n in entries}
        assert_equal(mine, entries)
    for size in (1, 2, 4):
        for end in ranks(size, resumed_with, (found[0][0], dicts[0])):
            assert_equal(end, expected)


def own_part(rank: int) -> Any:
    network = model()
    opt = optimizer(network)
    steps(network, opt, range(SAVED_AT))
    before = weights(network)
    mine = copy.deepcopy(opt.state_dict())
    steps(network, opt, range(SAVED_AT, STEPS))
    end = weights(network)
    network.load_state_dict(before)
    opt.load_state_dict(mine)
    steps(network, opt, range(SAVED_AT, STEPS))
    assert_equal(weights(network), end)
    return before, mine


def refused(rank: int, saved: Any) -> str:
    network = model()
    opt = optimizer(network)
    try:
        opt.load_state_dict(saved)
    except ValueError as error:
        return str(error)
    return ""


def test_a_rank_loads_its_own_part_and_nobody_elses(ranks: Ranks) -> None:
    parts = ranks(2, own_part)
    first, second = ranks(2, refused, parts[0][1])
    assert "rank 1 of 2 could not load what it was given" in first  # at once, not at a timeout
    for error in (second, *ranks(1, refused, parts[0][1]), ranks(3, refused, parts[0][1])[2]):
        assert "part of rank 0 of 2" in error
        assert "merged" in error
    whole = merged([part for _, part in parts])
    for size in (1, 2, 3):
        for end in ranks(size, resumed_with, (parts[0][0], whole)):
            assert_equal(end, uninterrupted())
    with pytest.raises(ValueError, match="rank"):
        merged([parts[0][1], parts[0][1]])
    with pytest.raises(ValueError, match="rank"):
        merged([parts[0][1]])


def edited(rank: int) -> Any:
    """Groups change on every rank alike; owners change with them, and the state goes to them."""
    network = model()
    params = list(network.parameters())
    opt = optimizer(network)
    steps(network, opt, range(3))
    opt.param_groups[0]["params"] = params[2:]
    steps(network, opt, range(3, 5))
    opt.param_groups[0]["params"] = params[:1:-1]
    opt.param_groups.append({**opt.param_groups[0], "params": params[:2]})
    steps(network, opt, range(5, 8))
    del opt.state[params[3]]
    steps(network, opt, range(8, 10))
    return weights(network)


def test_state_follows_the_tensor_over_ranks(ranks: Ranks) -> None:
    expected = edited(0)
    for size in (2, 3):
        for found in ranks(size, edited):
            assert_equal(found, expected)


def through_dcp(rank: int, folder: str, flat: bool, ts: range, load: bool) -> Any:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    network = model()
    opt = optimizer(network)
    if load:
        state = {
            "model": network.state_dict(),
            "optimizer": get_optimizer_state_dict(network, opt, options=options),
        }
        dcp.load(state, checkpoint_id=f"{folder}/{ts.start}")
        network.load_state_dict(state["model"])
        set_optimizer_state_dict(network, opt, state["optimizer"], options=options)
    steps(network, opt, ts)
    state = {
        "model": network.state_dict(),
        "optimizer": get_optimizer_state_dict(network, opt, options=options),
    }
    dcp.save(state, checkpoint_id=f"{folder}/{ts.stop}")
    return weights(network)


@pytest.mark.filterwarnings("ignore")  # of torch.distributed.checkpoint on one process
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoint_on_2_1_and_3_ranks(
    ranks: Ranks, tmp_path: Path, flat: bool
) -> None:
    where = str(tmp_path)
    ranks(2, through_dcp, where, flat, range(3), False)
    ranks(1, through_dcp, where, flat, range(3, 6), True)
    for found in ranks(3, through_dcp, where, flat, range(6, STEPS), True):
        assert_equal(found, uninterrupted())


def environment(rank: int) -> None:
    """What torchrun sets, for programs that look there."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29555, "ACCELERATE_USE_CPU": "true"}
    os.environ.update({name: str(value) for name, value in found.items()})


def accelerated(rank: int, folder: str, ts: range, load: bool) -> Any:
    import accelerate
    from accelerate.state import AcceleratorState, GradientState, PartialState

    environment(rank)
    for known in (AcceleratorState, GradientState, PartialState):
        known._reset_state()  # type: ignore[no-untyped-call]
    accelerator = accelerate.Accelerator(cpu=True)
    network = model()
    prepared, opt = accelerator.prepare(network, optimizer(network, consolidate=True))
    if load:
        accelerator.load_state(folder)
    steps(prepared, opt, ts)
    if not load:
        accelerator.save_state(folder)
    return type(prepared).__name__, weights(prepared)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_accelerate_on_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason=MISSING)
    for name, _ in ranks(2, accelerated, str(tmp_path), range(SAVED_AT), False):
        assert name == "DistributedDataParallel"
    for size in (1, 2):
        for _, found in ranks(size, accelerated, str(tmp_path), range(SAVED_AT, STEPS), True):
            assert_equal(found, uninterrupted())


def lightning_module() -> Any:
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = model()

        def training_step(self, batch: Any, index: int) -> Tensor:
            x = torch.randn(16, 10, generator=torch.Generator().manual_seed(self.global_step))
            return (self.network(x) - x[:, :3].square()).square().mean()

        def configure_optimizers(self) -> Any:
            return optimizer(self.network)

    return Module()


def with_lightning(rank: int, folder: str, until: int, checkpoint: str | None) -> Any:
    import lightning
    from lightning.pytorch.strategies import DDPStrategy

    environment(rank)
    size = dist.get_world_size()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=DDPStrategy(process_group_backend="gloo") if size > 1 else "auto",
        max_steps=until,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
    )
    module = lightning_module()
    loader: Any = torch.utils.data.DataLoader(torch.zeros(100, 1), batch_size=1)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=checkpoint)
    if checkpoint is None:
        trainer.save_checkpoint(f"{folder}/saved.ckpt")
    return weights(module.network)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_on_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason=MISSING)
    where = str(tmp_path)
    ranks(2, with_lightning, where, SAVED_AT, None)
    for size in (1, 2):
        for found in ranks(size, with_lightning, where, STEPS, f"{where}/saved.ckpt"):
            assert_equal(found, uninterrupted())


def written_after(rank: int) -> Any:
    """What is written after the whole was brought together is not lost."""
    network = model()
    opt = optimizer(network)
    steps(network, opt, range(2))
    opt.consolidate_state_dict(to=None)
    p = next(network.parameters())
    opt.state[p]["rho"] = 0.5
    return opt.state_dict()["state"][0].get("rho")


def test_a_note_after_consolidation_is_saved(ranks: Ranks) -> None:
    assert ranks(2, written_after) == [0.5, 0.5]


EVEN = {**OPTIONS, "stagger": False}  # the blocks of other parameters count in a staggered turn


def in_zero(rank: int) -> Any:
    """The end under ZeroRedundancyOptimizer, by whole parameters, and that of a resumed run."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def wrapped(network: nn.Module) -> Any:
        return ZeroRedundancyOptimizer(list(network.parameters()), fs.Shampoo, **EVEN)

    network = model()
    opt = wrapped(network)
    steps(network, opt, range(SAVED_AT))
    before = weights(network)
    opt.consolidate_state_dict()
    saved = [copy.deepcopy(opt.state_dict()) if rank == 0 else None]
    dist.broadcast_object_list(saved)
    steps(network, opt, range(SAVED_AT, STEPS))
    again = model()
    again.load_state_dict(before)
    opt = wrapped(again)
    opt.load_state_dict(saved[0])
    steps(again, opt, range(SAVED_AT, STEPS))
    return weights(network), weights(again)


def test_under_zero_redundancy_optimizer(ranks: Ranks) -> None:
    network = model()
    steps(network, fs.Shampoo(network.parameters(), **EVEN), range(STEPS))
    for end, resumed in ranks(2, in_zero):
        assert_equal(end, weights(network))
        assert_equal(resumed, weights(network))
