"""The few operations that update a state tensor: pure, or in place if it is donated.

Each is the same sequence of roundings either way, so donate=True gives bitwise the same numbers.
Only `old`, a state tensor, is ever written to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch

from funshampoo.core.contract import Hyper
from funshampoo.core.modes import constant, is_traced, may_reuse
from funshampoo.core.placed import is_in_parts
from funshampoo.core.tree import cast
from funshampoo.linalg.products import gram, is_plain_memory, operand_of_gram
from funshampoo.operators.graph_ops import accumulate_gram_, implement


def lerp(old: Tensor, new: Tensor, weight: Hyper, donate: bool) -> Tensor:
    """(1 - weight) old + weight new, in one pass. The result has old's dtype."""
    if isinstance(weight, Tensor):
        weight = sent(weight, old)
    if donate and _may_write(old, new, weight):
        return old.lerp_(new, weight)
    return torch.lerp(old, new, weight)


def add(old: Tensor, new: Tensor, donate: bool) -> Tensor:
    """old + new."""
    return old.add_(new) if donate and _may_write(old, new) else torch.add(old, new)


def multiply(old: Tensor, factor: Hyper, donate: bool) -> Tensor:
    """factor old, in old's dtype, whatever the factor's dtype."""
    factor = on_device(factor, old)
    if donate and _may_write(old, factor):
        return old.mul_(factor)
    return cast(torch.mul(old, factor), old.dtype)


def add_gram(old: Tensor, x: Tensor, beta: Hyper, weight: Hyper, donate: bool) -> Tensor:
    """beta old + weight x xᵀ, old (..., d, d), x (..., d, n).

    Fused if beta is a number and the product is plain (see `linalg.products`).
    """
    d, n = x.shape[-2:]
    if n == 1:  # a vector: elementwise, where the only new tensor is as small as x
        y = x * (weight.sqrt() if isinstance(weight, Tensor) else math.sqrt(weight))
        return add_product(multiply(old, beta, donate), y.to(old.dtype), y.mT.to(old.dtype))
    live = isinstance(beta, Tensor) or isinstance(weight, Tensor)
    operand = None if live else operand_of_gram(x)
    if operand is None:
        added = multiply(gram(x), weight, donate=False)
        return add(multiply(old, beta, donate), added, donate)
    assert not isinstance(beta, Tensor)
    assert not isinstance(weight, Tensor)
    x = operand
    stacked = old.ndim == 3
    if donate and stacked and torch.compiler.is_dynamo_compiling() and old.numel() >= _WORTH_A_NODE:
        return accumulate_gram_(old, x, beta, weight)
    if stacked and d >= LARGE and n >= LONG and is_plain_memory(old, x):
        return _add_triangle(old if donate else old.clone(), x, beta, weight)
    if donate and _may_write(old, x):
        fused = old.baddbmm_ if stacked else old.addmm_
    else:
        fused = old.baddbmm if stacked else old.addmm
    return fused(x, x.mT, beta=beta, alpha=weight)


implement(functools.partial(add_gram, donate=True))  # outside a graph it writes into `old`


def add_product(new: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """new + y z, elementwise; into `new`, which has no other user, if possible."""
    return new.addcmul_(y, z) if may_reuse(new, y, z) else torch.addcmul(new, y, z)


_WORTH_A_NODE = 2**16  # numbers that a graph would otherwise copy back and forth

LARGE, LONG = 512, 256  # d and n from which a triangle is less work than the whole
_PANEL = 192  # rows: enough for full-speed products, few enough to skip half of the work


def _add_triangle(old: Tensor, x: Tensor, beta: float, weight: float) -> Tensor:
    """beta old + weight x xᵀ, in place, from the lower triangle only: half a product's work.

    Panel by panel from the diagonal to the left, each mirrored above the diagonal. torch has no
    such routine. Including the mirroring it takes 0.7 to 0.8 of the time for sides of 512 to 1,024
    (one CPU thread); smaller or thinner blocks gain nothing.
    """
    d = old.shape[-1]
    for first in range(0, d, _PANEL):
        last = min(first + _PANEL, d)
        panel = old[:, first:last, :last]
        panel.baddbmm_(x[:, first:last], x[:, :last].mT, beta=beta, alpha=weight)
        old[:, :first, first:last].copy_(panel[:, :, :first].mT)
    return old


def _may_write(old: Tensor, *operands: Hyper) -> bool:
    """Whether a donated state tensor can be written to: no operand is wrapped by torch.func.

    Under vmap a batched operand does not fit into unbatched memory, and most in-place operations
    have no batching rule; under grad the old value is still needed.
    """
    if torch.compiler.is_dynamo_compiling() or not is_traced():
        return True
    tensors = [t for t in (old, *operands) if isinstance(t, Tensor)]
    return not any(_functorch.is_functorch_wrapped_tensor(t) for t in tensors)


def add_weight(total: Tensor, beta: Hyper, donate: bool) -> Tensor:
    """The recursion of an average's total weight: beta total + (1 - beta)."""
    return lerp(total, torch.ones_like(total), 1 - beta, donate)


def share(weight: Hyper, alive: Tensor, like: Tensor) -> Tensor:
    """The weight of a new value in an average: (N,), 0 in the rows that are not alive.

    Args:
        alive: (N,), 0 or 1.
        like: for the dtype.
    """
    return cast(cast(alive, like.dtype) * on_device(weight, like), like.dtype)


def kept_share(beta: Hyper, alive: Tensor, like: Tensor) -> Tensor:
    """(N,): beta, or 1 in the rows that are not alive."""
    fine = cast(alive, like.dtype)
    return cast(fine * on_device(beta, like) + (1 - fine), like.dtype)


def per_block(values: Tensor, like: Tensor) -> Tensor:
    """A view of one value per block, (N,) or (), that broadcasts over the blocks (N, ...)."""
    if values.ndim == 0:  # it may be on the CPU wherever the blocks are
        return values
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def zeroed(x: Tensor, dead: Tensor) -> Tensor:
    """x with zeros where `dead`, which broadcasts over it, is True.

    In one pass and one kernel: masked_fill copies x first.
    """
    if is_in_parts(x) or dead.device != x.device:
        return x.masked_fill(dead, 0.0)
    return torch.where(dead, scalar(0.0, x.dtype, x.device), x)


def zeroed_by_pairs(x: Tensor, dead: Tensor) -> Tensor:
    """The same for a plain x on a GPU: two or four entries at a time, a fifth faster.

    A kernel that has to look up the `dead` of each entry takes them one by one, at 0.8 of the
    memory bandwidth. Entries are selected, not computed: the bits are the same.
    """
    unit = torch.float64.itemsize // x.itemsize
    plain = type(x) is Tensor and dead.device == x.device and x.is_contiguous() and x.ndim > 0
    across = dead.ndim == 0 or (dead.ndim == x.ndim and dead.shape[-1] == 1)
    if unit < 2 or not (plain and across) or x.shape[-1] % unit or x.storage_offset() % unit:
        return zeroed(x, dead)
    zero = scalar(0.0, torch.float64, x.device)
    return torch.where(dead, zero, x.view(torch.float64)).view(x.dtype)


@constant
def scalar(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A read-only () tensor with this number, made on the device, not copied from the host."""
    return torch.full((), number, dtype=dtype, device=device)


def sqrt(x: Tensor) -> Tensor:
    """√x with a finite derivative at 0.

    The argument is at least the smallest normal number, so that d√x/dx · 0 = 0 where plain sqrt
    gives inf · 0 = NaN: a zero gradient must not poison hyperparameter gradients.
    """
    return torch.sqrt(torch.clamp(x, min=torch.finfo(x.dtype).tiny))


def clamp(x: Tensor, limit: Hyper) -> Tensor:
    """Clamped to [-limit, limit]; NaN stays."""
    if isinstance(limit, Tensor):
        limit = sent(limit, x)
        return torch.clamp(x, -limit, limit)
    limit = in_range(limit, x.dtype)
    return torch.clamp(x, -limit, limit)


def in_range(number: float, dtype: torch.dtype) -> float:
    """The number, or inf if the dtype can't hold it, where torch would raise an error."""
    return number if number <= torch.finfo(dtype).max else float("inf")


def on_device(factor: Hyper, like: Tensor) -> Hyper:
    """A factor that `like` can be multiplied by, moved to its device only if necessary.

    A 0-dimensional CPU tensor works with a tensor on any device, without a copy or a sync. Inside
    vmap it may really be a vector, which does not.
    """
    if not isinstance(factor, Tensor) or factor.device == like.device:
        return factor
    moves = factor.ndim > 0 or _functorch.is_functorch_wrapped_tensor(factor)
    return sent(factor, like, factor.dtype) if moves else factor


def filled(like: Tensor, number: Hyper) -> Tensor:
    """A tensor like `like`, filled with this number, in like's dtype.

    torch takes the number's dtype if both are 0-dimensional.
    """
    return cast(torch.zeros_like(like) + on_device(number, like), like.dtype)


def sent(number: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The number on like's device, in like's dtype or another.

    A CPU number is read before this returns, without waiting for a GPU's stream.
    """
    return number.to(like.device, dtype or like.dtype, non_blocking=number.is_cpu)


def sent_once(number: Tensor) -> Callable[[Tensor], Tensor]:
    """`sent`, as a function of the tensor: one copy per device and dtype."""
    there: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def at(like: Tensor) -> Tensor:
        place = like.device, like.dtype
        if place not in there:
            there[place] = sent(number, like)
        return there[place]

    return at
