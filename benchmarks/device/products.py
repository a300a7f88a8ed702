"""Matrix products: how fast the device multiplies, alone and into a sum."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.device.clock import summary, turns, working
from benchmarks.device.group import Cell, Row, Setting

SIDES = (256, 1024, 512, 2048, 4096)
FEW = 8  # matrices in a small stack
NUMBERS = 2**25  # in one operand of a full stack
CALLS = 5  # between two readings of the clock, so that a launch hides behind the one before
BETA = 0.99
PANELS = 4


def cells(setting: Setting) -> Iterator[Cell]:
    """One for every side: full stacks, then small ones."""
    sides = setting.pick(SIDES, (32, 64))
    numbers = setting.pick(NUMBERS, 2**14)
    stacks = [(numbers // side**2, side) for side in sides]
    stacks += [(FEW, side) for count, side in stacks if count > FEW]
    for count, side in stacks:
        yield Cell(f"{count} of {side}", partial(_cell, count, side, setting))


def _cell(count: int, side: int, setting: Setting) -> Iterator[Row]:
    functions, errors = working(_functions(count, side, setting.device))
    yield from errors
    calls = setting.pick(CALLS, 1)

    def repeated(function: Callable[[], Tensor]) -> None:
        for _ in range(calls):
            function()

    readings = turns(
        {name: partial(repeated, function) for name, function in functions.items()},
        setting.device,
        seconds=setting.pick(1.0, 0.05),
        most=setting.pick(50, 5),
    )
    for name, found in readings.items():
        row = summary(found)
        for key in ("ms", "ms_low", "ms_high", "host_ms"):
            row[key] /= calls
        flops = 2 * count * side**3
        yield {"of": name, "tflops": 1e-9 * flops / row["ms"]} | row


def symmetric(x: Tensor, y: Tensor) -> Tensor:
    """x y, if that is symmetric, from panels of its lower triangle: 5/8 of the work of a product.

    What the products of `linalg.newton_schulz` would take if it made them so.
    """
    side = x.shape[-1]
    product = torch.empty_like(x)
    for first in range(0, side, max(side // PANELS, 1)):
        last = min(first + max(side // PANELS, 1), side)
        product[:, first:last, :last] = torch.bmm(x[:, first:last], y[:, :, :last])
        product[:, :first, first:last] = product[:, first:last, :first].mT
    return product


def _functions(count: int, side: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    make = torch.Generator(device).manual_seed(0)
    x, y = (torch.randn(count, side, side, generator=make, device=device) for _ in range(2))
    L = torch.zeros_like(x)
    a, b, C = (z.to(torch.bfloat16) for z in (x, y, L))
    functions: dict[str, Callable[[], Tensor]] = {
        "x y, bfloat16": lambda: torch.bmm(a, b),
        "x y, TF32": lambda: in_tf32(lambda: torch.bmm(x, y)),
        "x y, float32": lambda: torch.bmm(x, y),
        "x y, float32, of a symmetric product": lambda: symmetric(x, y),
        "L + x x', bfloat16": lambda: torch.baddbmm(C, a, a.mT, beta=BETA, alpha=1 - BETA),
        "L + x x', TF32": lambda: in_tf32(
            lambda: torch.baddbmm(L, x, x.mT, beta=BETA, alpha=1 - BETA)
        ),
        "L + x x', float32": lambda: torch.baddbmm(L, x, x.mT, beta=BETA, alpha=1 - BETA),
    }
    if device.type == "cuda":  # torch has these kernels there alone
        wide = torch.float32
        functions |= {
            "x x', bfloat16 to float32": lambda: torch.bmm(a, a.mT, out_dtype=wide),
            "L + x x', bfloat16 to float32": lambda: torch.baddbmm(
                L, a, a.mT, out_dtype=wide, beta=BETA, alpha=1 - BETA
            ),
        }
    return functions


def in_tf32(function: Callable[[], Tensor]) -> Tensor:
    """Its products of float32 with operands rounded to TF32, where the device has that."""
    with tf32():
        return function()


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """A setting of the process; put back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
