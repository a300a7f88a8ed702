"""What a GPU is given in other passes than a CPU: the same numbers, here on the CPU, and fewer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo.blocks.regions import _lines
from funshampoo.linalg.products import gram_in_pieces, operand_of_gram
from funshampoo.operators.leaf_ops import add_gram, zeroed_by_pairs
from funshampoo.operators.over_root import _by_one_sum, _joins
from tests.test_launches import counted
from tests.traffic import Traffic
from tests.trees import assert_equal

LONG = [(3, 9, 5000), (2, 64, 2048), (20, 9, 2500), (1, 1, 4096), (9, 2049), (2, 2, 3, 3000)]


@pytest.mark.parametrize("shape", LONG, ids=str)
def test_a_gram_matrix_of_pieces(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = gram_in_pieces(x)
    torch.testing.assert_close(found, x @ x.mT, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(found, found.mT, rtol=1e-12, atol=1e-10)
    if len(shape) == 3:  # what is not finite stays with its matrix, though others share its product
        x[0, 0, 7] = math.nan
        torch.testing.assert_close(gram_in_pieces(x)[1:], found[1:], rtol=0, atol=0)


@pytest.mark.parametrize("donate", [True, False])
def test_few_long_rows_are_multiplied_in_pieces_on_a_gpu(donate: bool) -> None:
    """And nothing else is: not sides of which a product fills a GPU, nor what would be copied."""

    def longest(x: Tensor) -> int:
        """Of the rows that are multiplied."""
        old = torch.empty(*x.shape[:-1], x.shape[-2], device=x.device)
        asked: list[int] = []

        class Watched(Traffic):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kw: Any = None):  # type: ignore[no-untyped-def]
                if "mm" in str(function):
                    asked.append(args[-1].shape[-2])
                return super().__torch_dispatch__(function, types, args, kw)

        with Watched():
            assert add_gram(old, x, 0.9, 0.1, donate).shape == old.shape
        return max(asked)

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    assert longest(meta(3, 9, 262144)) == longest(meta(9, 65536)) == 512
    for plain in (meta(3, 9, 1024), meta(7, 512, 4096), meta(500, 64, 4096)):
        assert longest(plain) == plain.shape[-1]
    across = meta(3, 4096, 9).mT
    assert longest(across) == 4096
    for shape in ((2, 8, 262144), (8, 262144)):
        assert operand_of_gram(torch.empty(shape)) is not None, "a CPU keeps its bits"


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("blocks", [True, False])
def test_the_quotient_of_adam_by_one_sum(filtered: bool, blocks: bool) -> None:
    make = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 5), (4, 2)] if blocks else [(3, 5), (2,), ()]
    u, root = [[torch.randn(s, generator=make) for s in shapes] for _ in range(2)]
    v = [(x * 10.0 ** (4 - i)).square() for i, x in enumerate(root)]
    ones = [(4,) + (1,) * (len(s) - 1) if blocks else () for s in shapes]
    weight, divisor = [[torch.rand(s, generator=make) * 0.9 + 1e-3 for s in ones] for _ in range(2)]
    tiny = torch.finfo(torch.float32).tiny
    for column, value in ((u, 0.0), (v, 0.0), (weight, tiny), (divisor, tiny)):
        column[0][-1 if blocks else ...] = value  # has had no gradient yet; see `seen`
    found = _by_one_sum(u, v, 1e-8, weight, divisor if filtered else None)
    for x, y, z, w, d in zip(found, u, v, weight, divisor):
        y, z, w, d = (t.double() for t in (y, z, w, d if filtered else torch.ones_like(d)))
        torch.testing.assert_close(x.double(), y / d / ((z / w).sqrt() + 1e-8), rtol=1e-6, atol=0)
    assert not found[0][-1 if blocks else ...].any()
    large, one = [torch.empty(2**15)], [torch.ones(())]
    assert _joins(large, 1e-8, one, one)
    assert not _joins(v, 1e-8, weight, divisor), "more launches, and little to read"
    for epsilon in (0.0, 1e-20):  # of which a product with a weight could be 0
        assert not _joins(large, epsilon, one, one)
    assert not _joins([torch.empty(2**15, device="meta")], 1e-8, one, None), "of everyone"


def test_adam_moves_its_moments_and_updates_less_often_on_a_gpu() -> None:
    """In units of the parameters' bytes; 28 with two quotients, a root and a sum of their own."""
    params = {f"w{i}": torch.empty(300, 400, device="meta") for i in range(3)}
    assert counted(fs.adamw(1e-3), params).bytes <= 24.01 * sum([p.nbytes for p in params.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zeros_by_pairs_leave_the_bits_of_all_others(dtype: torch.dtype) -> None:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    whole = torch.randn(3, 4, 8).to(dtype)
    whole[0, 0, :4] = torch.tensor([math.nan, -0.0, math.inf, 1e-40])
    whole[1, 0] = math.nan
    dead = torch.tensor([False, True, False])
    odd = whole.flatten()[1:].clone()[:21].view(3, 7)
    shifted = whole.flatten()[1:25].view(3, 8)
    for x in (whole, odd, shifted, whole.mT, whole[..., 0], whole[:, :, ::2]):
        mask = dead.view(3, *[1] * (x.ndim - 1))
        found = zeroed_by_pairs(x, mask)
        assert found.dtype == dtype
        expected = torch.where(mask, torch.zeros((), dtype=dtype), x)
        assert_equal(found.contiguous().view(bits), expected.contiguous().view(bits))
    assert not zeroed_by_pairs(whole, torch.tensor(True)).any()
    assert not zeroed_by_pairs(whole, torch.ones(3, 4, 8, dtype=torch.bool)).any()


def test_blocks_are_gathered_in_few_launches_on_a_gpu() -> None:
    """And those of every grid in their order."""
    x = torch.arange(6.0 * 4 * 5 * 2).view(6, 4, 5, 2)
    for view, order in ((x, 3), (x, 2), (x[:1], 2), (x[:, :1], 2), (x.permute(1, 0, 3, 2), 2)):
        lines = _lines([view, view], order, x.dtype)
        assert lines is not None
        assert_equal(torch.cat(lines), torch.stack([view, view]).reshape(-1, *view.shape[-order:]))
    assert _lines([x], 1, x.dtype) is None  # three dimensions of a grid
    assert _lines([x], 2, torch.float64) is None

    params = {f"w{i}": torch.empty(96, 128, device="meta") for i in range(12)}
    seen = counted(fs.shampoo(0.1, max_size=64), params)
    assert not seen.launches["_foreach_copy_"]
    assert seen.launches["cat"] <= 4


@pytest.mark.gpu
def test_a_gpu_finds_what_a_cpu_finds() -> None:
    make = torch.Generator().manual_seed(0)
    x = torch.randn(3, 9, 70_000, generator=make)
    found = add_gram(torch.zeros(3, 9, 9, device="cuda"), x.cuda(), 0.5, 0.5, donate=True)
    expected = (0.5 * (x.double() @ x.double().mT)).float()
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=0.5)

    shapes = {"cut": (96, 128), "whole": (64, 64), "bias": (7,)}
    start = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
    adamw = fs.guarded(fs.adamw(0.01))
    for tx in (adamw, fs.blocked(adamw, max_size=64, with_params=True)):
        ends = []
        for device in ("cpu", "cuda"):
            params = {name: p.to(device, copy=True) for name, p in start.items()}
            state = tx.init(params)
            steps = torch.Generator().manual_seed(1)
            for t in range(5):
                grads = {n: torch.randn(p.shape, generator=steps) for n, p in start.items()}
                grads["cut"][0, 0] = math.nan if t == 3 else 1.0
                grads = {name: g.to(device) for name, g in grads.items()}
                state = fs.update_in_place(tx, grads, state, params)
            ends.append({name: p.cpu() for name, p in params.items()})
        for name, p in ends[0].items():
            torch.testing.assert_close(ends[1][name], p, rtol=1e-3, atol=1e-3)
