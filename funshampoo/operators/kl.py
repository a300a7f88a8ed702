"""KL-Shampoo's statistics of one leaf: each side of a block, whitened along the others.

Eigenvalues λ_i, and their roots h_i = λ_i^(-1/2), are tensors (N, d_i), or (d_i,) outside block
space.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funshampoo.core.checks import check_choice, check_range
from funshampoo.core.contract import Hyper, Tree
from funshampoo.core.live import is_exactly
from funshampoo.core.tree import compute_dtype, map_leaves
from funshampoo.linalg.products import aligned, multiply
from funshampoo.operators.exponents import Sides, wanted_sides
from funshampoo.operators.leaf_ops import lerp, on_device, per_block
from funshampoo.operators.mode_products import bias_corrected, mode_flops, precondition, rotate
from funshampoo.operators.turning import matrices_of

Least: TypeAlias = float | Callable[[int], float]

_FRESH_FOR_FACTORS: dict[int, tuple[tuple[int, ...], ...]] = {3: ((1,), (), ())}
_FRESH_FOR_EIGENVALUES: dict[int, tuple[tuple[int, ...], ...]] = {3: ((1,), (2,), ())}
"""By side: the sides whose new eigenvalues its statistics use, where sides take turns."""


def others(sides: Sequence[Tensor | None], side: int) -> list[Tensor | None]:
    """The list with None in place of this side."""
    return [None if i == side else x for i, x in enumerate(sides)]


def first_eigenvalues(params: Tree, block_ndim: int, value: float) -> Tree:
    """λ_i before the first gradient. A leaf without sides has one, as for a side of length 1."""

    def leaf(x: Tensor) -> tuple[Tensor, ...]:
        lead, sides, dtype = x.shape[:block_ndim], x.shape[block_ndim:] or (1,), compute_dtype(x)
        return tuple([x.new_full((*lead, d), value, dtype=dtype) for d in sides])

    return map_leaves(leaf, params)


def inverse_root(eigenvalues: Tensor) -> Tensor:
    """λ^(-1/2); 0 where λ is 0: directions without any gradient so far are left out.

    >>> inverse_root(torch.tensor([4.0, 0.0]))
    tensor([0.5000, 0.0000])
    """
    seen = eigenvalues > 0
    return torch.where(seen, torch.where(seen, eigenvalues, 1.0).rsqrt(), 0.0)


def weighted(x: Tensor, h: Sequence[Tensor], side: int | None = None) -> Tensor:
    """x ×_j diag(h_j) over all sides, or over all but `side`.

    >>> weighted(torch.ones(2, 2), [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], side=0)
    tensor([[3., 4.],
            [3., 4.]])
    """
    for i, values in enumerate(h):
        if i != side:
            x = x * _along(values, i, len(h))
    return x


def outer(h: Sequence[Tensor]) -> Tensor:
    """h_1 ⊗ … ⊗ h_k, (N, d_1, ..., d_k).

    >>> outer([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
    tensor([[3., 4.],
            [6., 8.]])
    """
    return functools.reduce(torch.mul, [_along(x, i, len(h)) for i, x in enumerate(h)])


def _along(values: Tensor, side: int, order: int) -> Tensor:
    """(N, d_i), viewed so that it broadcasts over the blocks."""
    lead, d = values.shape[:-1], values.shape[-1]
    return values.reshape(*lead, *[1] * side, d, *[1] * (order - 1 - side))


def mean_square(x: Tensor, side: int, block_ndim: int) -> Tensor:
    """(N, d_i): the mean of x² over all other sides.

    >>> mean_square(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), 0, 0)
    tensor([5., 4.])
    """
    axes = [k for k in range(block_ndim, x.ndim) if k != block_ndim + side]
    return _mean(x.square(), axes) if axes else x.square()


def bounded(x: Tensor) -> Tensor:
    """x within ±2^-10 √max, for the largest number of its dtype, so that its squares can be added.

    After thousands of gradients of zeros, eigenvalues have decayed so far that what is whitened by
    them may overflow; and a factor matrix of infinity never recovers.

    >>> bounded(torch.tensor([1e20, -2.0]))
    tensor([ 1.8014e+16, -2.0000e+00])
    """
    limit: float = 2.0**-10 * torch.finfo(x.dtype).max ** 0.5
    return torch.clamp(x, -limit, limit)


def _mean(x: Tensor, axes: list[int]) -> Tensor:
    """The mean; 0 if empty, where torch's is NaN."""
    return x.mean(axes) if x.numel() else x.sum(axes)


def ritz_values(Q: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    """diag(Qᵀ L Q / weight)."""
    image = multiply(aligned(bias_corrected(factor, weight)), aligned(Q))
    return (Q * image).sum(-2)


def clamped_at(limit: int) -> Callable[[int], float]:
    """The floor 1 / max(10, min(d, limit))² of the eigenvalues of a side of length d.

    >>> clamped_at(4000)(20)
    0.0025
    """
    return lambda d: 1 / max(10, min(d, limit)) ** 2


def floored(eigenvalues: Tensor, least: Least) -> Tensor:
    """Eigenvalues raised to at least `least`, except 0; it may depend on the side's length.

    And to 2^20 times the smallest normal number, so that a million inverses have a finite sum.
    """
    floor = least(eigenvalues.shape[-1]) if callable(least) else least
    floor = max(floor, 2.0**20 * torch.finfo(eigenvalues.dtype).tiny)
    return torch.where(eigenvalues > 0, torch.clamp(eigenvalues, min=floor), eigenvalues)


def renewed_eigenvalues(
    coordinates: Tensor,
    old: Sequence[Tensor],
    known: Tensor,
    moves: Tensor,
    *,
    beta: Hyper,
    damping: Hyper,
    least: Least,
    in_turn: bool,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The eigenvalues after a step, and for each side the h_j with which its gradient is whitened.

        λ_i ← beta λ_i + (1 - beta) (mean over the other sides of (R ×_j h_j)²
                                     + damping Π_j mean(h_j²))

    Args:
        coordinates: R (N, d_1, ..., d_k).
        old: λ_i.
        known: (N,), bool: whether there are bases; elsewhere h is 1.
        moves: (N,), bool: whether λ is updated.
        beta, damping, least, in_turn: as in `kl_statistics`.
    """
    order, block_ndim = len(old), known.ndim
    before = [torch.where(known[..., None], inverse_root(x), 1.0) for x in old]
    sizes = [_mean(h.square(), [-1]) for h in before]
    turns = in_turn and order in _FRESH_FOR_FACTORS
    new, after, through = list(old), list(before), [before] * order

    def mixed(fresh: Sequence[int]) -> list[Tensor]:
        return [after[j] if j in fresh else before[j] for j in range(order)]

    for i in reversed(range(order)):
        h = mixed(_FRESH_FOR_EIGENVALUES[order][i]) if turns else before
        target = mean_square(bounded(weighted(coordinates, h, i)), i, block_ndim)
        shift = on_device(damping, target)
        for j in range(order):
            shift = shift * sizes[j] if j != i else shift
        shifted = target + (per_block(shift, target) if isinstance(shift, Tensor) else shift)
        shifted = torch.clamp(shifted, max=2.0**-20 * torch.finfo(shifted.dtype).max)
        average = floored(lerp(old[i], shifted, 1 - beta, False), least)
        new[i] = torch.where(per_block(moves, old[i]), average, old[i])
        after[i] = torch.where(known[..., None], inverse_root(new[i]), 1.0)
        if turns:
            through[i] = mixed(_FRESH_FOR_FACTORS[order][i])
    return new, through


class Block(NamedTuple):
    """The data of one leaf.

    Attributes:
        gradient, block_ndim: G, and how many axes count blocks.
        units: `Kept` per side, or (), of the later stage, from before this step.
        seen: (N,) int64, how many gradients have entered its bases, or ().
        fine: [(N,): 0 where this step must change nothing], or empty if all are 1.
        weight, factors, eigenvalues: those of `kl_statistics`, from before this step.
    """

    gradient: Tensor
    block_ndim: int
    units: Any
    seen: Any
    fine: list[Tensor]
    weight: Tensor
    factors: Any
    eigenvalues: Any


Whitened: TypeAlias = tuple[list[Tensor], Any]
"""G_i for every side, and the new eigenvalues."""


def _by_roots(block: Block, **unused: Any) -> Whitened:
    X = matrices_of(block.units)
    return [_whitened_by(X, i, block) for i in range(len(X))], ()


def _whitened_by(X: Sequence[Tensor | None], side: int, block: Block) -> Tensor:
    """The gradient times the roots of all sides but this, bounded before each may overflow."""
    x = block.gradient
    for j in range(len(X)):
        if j != side and X[j] is not None:
            own = [root if k == j else None for k, root in enumerate(X)]
            x = bounded(precondition(x, own, block.block_ndim))
    return x


def _by_ritz_values(block: Block, *, least: Least, **unused: Any) -> Whitened:
    Q, g = matrices_of(block.units), block.gradient
    h = []
    for i, L in enumerate(block.factors):
        d = g.shape[block.block_ndim + i]
        basis = Q[i]
        ritz = g.new_ones(d) if basis is None else ritz_values(basis, L, block.weight)
        h.append(inverse_root(torch.clamp(ritz, min=least(d) if callable(least) else least)))
    parts = [rotate(g, others(Q, i), block.block_ndim) for i in range(len(Q))]
    return [bounded(weighted(x, h, i)) for i, x in enumerate(parts)], ()


def _by_eigenvalues(block: Block, *, starts_whole: bool, **numbers: Any) -> Whitened:
    Q, g, ndim = matrices_of(block.units), block.gradient, block.block_ndim
    if not Q:  # no sides: one entry, treated as a side
        Q, g = [None], g[..., None]
    if isinstance(block.seen, Tensor):
        known = block.seen > 0
    else:  # bases exist from the start
        known = g.new_ones(g.shape[:ndim], dtype=torch.bool)
    moves = known & (block.fine[0] > 0) if block.fine else known
    parts = [rotate(g, others(Q, i), ndim) for i in range(len(Q))]
    R = rotate(parts[0], [Q[0], *[None] * (len(Q) - 1)], ndim)
    new, h = renewed_eigenvalues(R, block.eigenvalues, known, moves, **numbers)
    found = [bounded(weighted(x, h[i], i)) for i, x in enumerate(parts)]
    if starts_whole:
        ones = g.new_ones(known.shape)
        whole = ones * on_device((1 - numbers["beta"]) ** -0.5, ones)
        found = [x * per_block(torch.where(known, ones, whole), x) for x in found]
    return found, tuple(new)


WHITENED: dict[str, Callable[..., Whitened]] = {
    "eigenvalues": _by_eigenvalues,
    "ritz": _by_ritz_values,
    "roots": _by_roots,
}
"""{`through` of `kl_statistics`: how to compute G_i of a block, with its numbers by keyword}."""


def check_through(through: str, least: Least, bias_correction: bool, **flags: bool) -> None:
    """Raises ValueError for arguments of `kl_statistics` that do not go together.

    Args:
        flags: {argument: whether it is given}, of those that only "eigenvalues" reads.
    """
    check_choice("through", through, tuple(WHITENED))
    if not callable(least):
        check_range("least_eigenvalue", least, 0.0)
    if through == "ritz" and is_exactly(least, 0):
        raise ValueError(
            f'least_eigenvalue is {least}; with through="ritz" it must be above 0, since Ritz '
            "values may be 0: give 1e-8, say."
        )
    if through == "roots" and not is_exactly(least, 0):
        raise ValueError(
            'least_eigenvalue is not read with through="roots": bound the roots by the epsilon of '
            "root_inverse."
        )
    for name, flag in flags.items():
        if flag and through != "eigenvalues":
            raise ValueError(f'{name} stands with through="eigenvalues" alone: leave it out.')
    if flags.get("starts_whole") and bias_correction:
        raise ValueError("starts_whole stands with bias_correction=False alone: give that too.")


def kl_flops(
    through: str, sides: Sides | None, block: tuple[int, ...], kept: tuple[int, ...]
) -> float:
    """FLOPs of the products of `kl_statistics` on a block of this shape.

    Each side is whitened along all others, and enters its factor matrix; R needs one more rotated
    side, and Ritz values one product with the factor matrix.

    Args:
        through, sides: as in `kl_statistics`.
        kept: lengths of the sides that have a root or a basis.

    >>> kl_flops("roots", None, (2, 3), (2, 3))
    120.0
    """
    wanted = wanted_sides(block, sides)
    own = [d for d, w in zip(block, wanted) if w]
    if through == "eigenvalues" and wanted[:1] == [True]:
        own.append(block[0])  # R
    ritz = sum([2.0 * d**3 for d in kept]) if through == "ritz" else 0.0
    return mode_flops(block, own) + (len(block) - 1) * mode_flops(block, kept) + ritz
