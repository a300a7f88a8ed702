"""Which sides of a block are preconditioned, and with which power of their factor matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

from torch import Tensor

from funshampoo.core.checks import check_choice, check_range
from funshampoo.core.text import plural

Exponents: TypeAlias = (
    float | Literal["shampoo", "shampoo_squared"] | Mapping[int, float | Mapping[int, float]]
)

Sides: TypeAlias = Literal["smaller"] | Callable[[tuple[int, ...]], Sequence[bool]]

NAMED = {"shampoo": 1 / 4, "shampoo_squared": 1 / 2}
"""The exponent of each of two sides.

"shampoo": L ⊗ R bounds the square of full-matrix AdaGrad's Σ g gᵀ (Gupta et al., arXiv 1802.09568).
"shampoo_squared": L ⊗ R itself approximates Σ g gᵀ (Morwani et al., arXiv 2406.17748).
"""


def side_exponents(
    block: Sequence[int], exponents: Exponents | None = None, sides: Sides | None = None
) -> tuple[float, ...]:
    """The e_i of X_i = L_i^(-e_i), one per side of a block of this shape; 0 leaves a side alone.

    With k preconditioned sides each gets e_i = 2 e / k, where e is its exponent in a matrix: 1/4 by
    default, so that e_i = 1/(2k). A side that is left alone passes its share on: if only one side
    of a matrix is preconditioned, it gets 2 e, by default 1/2 (one-sided Shampoo; Xie et al., arXiv
    2503.10537; An et al., arXiv 2503.20762).

    Args:
        block: lengths of the sides, after merging and cutting.
        exponents: e, or a name of `NAMED`; or {number of sides: e_i, or {side: e_i}}, with the
            default for those it omits.
        sides: "smaller": only the shortest, of equal ones the first; or a function of the shape
            that returns one bool per side. By default all.

    Raises:
        ValueError: the function does not return one bool per side.

    >>> side_exponents((3, 5)), side_exponents((3, 5), "shampoo_squared"), side_exponents((3,), 1/3)
    ((0.25, 0.25), (0.5, 0.5), (0.6666666666666666,))
    >>> side_exponents((5, 3), sides="smaller")
    (0.0, 0.5)
    >>> side_exponents((3, 5), {2: {0: 0.5, 1: 0.0}})
    (0.5, 0.0)
    """
    wanted = wanted_sides(tuple(block), sides)
    each = 2 * _of_matrices(exponents) / max(sum(wanted), 1)
    given = exponents.get(len(wanted), {}) if isinstance(exponents, Mapping) else {}
    by_side = given if isinstance(given, Mapping) else dict.fromkeys(range(len(wanted)), given)
    return tuple([float(by_side.get(i, each)) if w else 0.0 for i, w in enumerate(wanted)])


def _of_matrices(exponents: Exponents | None) -> float:
    """The exponent of each of two sides."""
    if exponents is None or isinstance(exponents, Mapping):
        return NAMED["shampoo"]
    return NAMED[exponents] if isinstance(exponents, str) else exponents


def wanted_sides(block: tuple[int, ...], sides: Sides | None) -> list[bool]:
    """Whether each side is preconditioned at all; see `side_exponents`."""
    if sides is None:
        return [True] * len(block)
    if callable(sides):
        found = [bool(side) for side in sides(block)]
        if len(found) != len(block):
            raise ValueError(
                f"sides returned {plural(len(found), 'value')} for a block of the shape {block}; "
                "it has to return a bool for each of its sides."
            )
        return found
    shortest = block.index(min(block)) if block else None
    return [i == shortest for i in range(len(block))]


def chosen_sides(vectors: str, sides: Sides | None = None) -> Sides | None:
    """The sides given by a recipe's arguments `vectors` and `sides` together.

    "diagonal": these sides for blocks that have two or more, and no side of the others.

    Raises:
        ValueError: vectors is neither "diagonal" nor "blocks"; sides is invalid.
    """
    check_choice("vectors", vectors, ("diagonal", "blocks"))
    check_sides(sides)
    if vectors == "blocks":
        return sides
    return lambda block: wanted_sides(block, sides) if len(block) > 1 else [False] * len(block)


def check_exponents(exponents: Exponents | None, sides: Sides | None) -> None:
    """Raises ValueError or TypeError for an invalid exponent, or a side that no block has.

    Also for invalid sides; see `check_sides`.
    """
    if isinstance(exponents, Mapping):
        _check_by_order(exponents)
    elif isinstance(exponents, str):
        check_choice("exponents", exponents, tuple(NAMED))
    elif isinstance(exponents, Tensor):
        raise TypeError("exponents is a tensor; give a number, which is fixed when it is built.")
    elif exponents is not None:
        check_range("exponents", exponents, 0.0)
    check_sides(sides)


def _check_by_order(exponents: Mapping[int, float | Mapping[int, float]]) -> None:
    for order, given in exponents.items():
        by_side = given if isinstance(given, Mapping) else {0: given}
        for side, exponent in by_side.items():
            for key in (order, side):
                if not isinstance(key, int):
                    raise ValueError(f"exponents has the key {key!r}; orders and sides are ints")
            if not 0 <= side < max(order, 1):
                raise ValueError(f"exponents[{order}] names side {side}; order {order} has none.")
            check_range(f"exponents[{order}]", exponent, 0.0)


def check_sides(sides: Sides | None) -> None:
    """Raises ValueError unless it is None or a value of `Sides`."""
    if sides is not None and not callable(sides):
        check_choice("sides", sides, ("smaller",))
