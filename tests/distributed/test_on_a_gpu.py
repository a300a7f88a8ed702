"""Ranks whose tensors are on a GPU: the numbers of one process there, but for rounding.

A GPU rounds the products of a stack by how many there are, and ranks cut stacks.

Two ranks share one GPU and talk by gloo, for NCCL refuses that; NCCL is shown with one rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import funshampoo as fs
from funshampoo.distributed.collectives import all_gather_into, all_to_all_into, gathered_objects
from tests.distributed.problems import optimizer, train, tree
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.gpu

STEPS = range(1, 10)


def on_gpu(t: int) -> dict[str, Tensor]:
    return {name: x.cuda() for name, x in tree(t).items()}


def in_rows(t: int) -> dict[str, Any]:
    """Rows of what has axes; the scalar is whole on both."""
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    return {
        name: distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None) if x.ndim else x
        for name, x in on_gpu(t).items()
    }


def one_process(rank: int) -> dict[str, Tensor]:
    params, _ = train(optimizer(), on_gpu(0), STEPS, on_gpu)
    return {name: x.cpu() for name, x in params.items()}


def data_parallel(rank: int) -> dict[str, Tensor]:
    params, _ = train(optimizer({"whole": True}), on_gpu(0), STEPS, on_gpu)
    return {name: x.cpu() for name, x in params.items()}


def parts(rank: int) -> dict[str, Tensor]:
    """What this rank has of every parameter."""
    params, _ = train(optimizer({}), in_rows(0), STEPS, in_rows)
    return {n: (x.to_local() if isinstance(x, DTensor) else x).cpu() for n, x in params.items()}


def assert_near(found: Tensor, expected: Tensor, name: str) -> None:
    """Ill-conditioned roots make more of a rounding; a wrong row is another number altogether."""
    way = (expected - tree(0)[name]).norm()
    assert (found - expected).norm() <= 0.02 * way, name


@pytest.fixture
def expected(ranks: Ranks) -> dict[str, Tensor]:
    return ranks(1, one_process)[0]


def test_data_parallel_ranks(ranks: Ranks, expected: dict[str, Tensor]) -> None:
    for found in ranks(2, data_parallel):
        for name, x in expected.items():
            assert_near(found[name], x, name)


def test_parts_of_parameters(ranks: Ranks, expected: dict[str, Tensor]) -> None:
    first, second = ranks(2, parts)
    for name, x in expected.items():
        found = torch.cat([first[name], second[name]]) if x.ndim else first[name]
        assert_near(found, x, name)


def over_nccl(rank: int, store: str) -> dict[str, dict[str, Tensor]]:
    """One model sharded by FSDP2 and one that is not, of the same seed."""
    dist.destroy_process_group()
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    mine = torch.arange(6, dtype=torch.uint8, device="cuda")
    gathered, sent = torch.zeros_like(mine), torch.zeros_like(mine)
    all_gather_into(gathered, mine, None)
    all_to_all_into(sent, [6], mine, [6], None)
    assert torch.equal(gathered, mine)
    assert torch.equal(sent, mine)
    assert gathered_objects(("a", 1), None) == [("a", 1)]

    def trained(sharded: bool, recipe: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 7)).cuda()
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
        tx = fs.Optimizer(model.named_parameters(), recipe, lr=0.01, every=3, max_size=16)
        for t in range(6):
            torch.manual_seed(t)
            x = torch.randn(8, 20, device="cuda")
            tx.zero_grad()
            model(x).square().mean().backward()
            tx.step()
        whole = {n: getattr(p, "full_tensor", p.detach)() for n, p in model.named_parameters()}
        return {name: p.detach().cpu() for name, p in whole.items()}

    found = {}
    for recipe in (fs.shampoo, fs.soap):
        found |= {f"{recipe.__name__} {kind}": trained(kind == "fsdp2", recipe) for kind in WAYS}
    return found


WAYS = ("plain", "fsdp2")


def test_fsdp2_over_nccl(ranks: Ranks, tmp_path: Path) -> None:
    (found,) = ranks(1, over_nccl, str(tmp_path / "store"))
    for recipe in ("shampoo", "soap"):
        plain, fsdp2 = (found[f"{recipe} {kind}"] for kind in WAYS)
        for name, x in plain.items():
            torch.testing.assert_close(fsdp2[name], x, rtol=1e-5, atol=1e-6)
