"""Which power of each factor matrix preconditions a block of order k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from funshampoo.core.checks import check_range

Exponents: TypeAlias = Mapping[int, float | Mapping[int, float]]


def inverse_exponents(order: int, override: Exponents | None = None) -> tuple[float, ...]:
    """The e_i of X_i = L_i^(-e_i), one a side of a block of this order.

    By default 1/(2k) for all k sides: order 1 → 1/2 (full-matrix AdaGrad), 2 → 1/4, 3 → 1/6
    (Gupta et al., arXiv 1802.09568).

    Args:
        order: number of sides of the block, after merging.
        override: {order: exponent, or {side: exponent}}; what it leaves out keeps the default. 0
            leaves the side alone: it has no factor matrix.

    >>> inverse_exponents(2)
    (0.25, 0.25)
    >>> inverse_exponents(2, {2: {0: 0.5, 1: 0.0}})
    (0.5, 0.0)
    """
    default = 1 / (2 * max(order, 1))
    given = (override or {}).get(order, {})
    if isinstance(given, Mapping):
        return tuple(float(given.get(side, default)) for side in range(order))
    return (float(given),) * order


def check_exponents(override: Exponents | None) -> None:
    """Raises ValueError for a negative exponent or a side that the order does not have."""
    for order, given in (override or {}).items():
        sides = given if isinstance(given, Mapping) else {0: given}
        for side, exponent in sides.items():
            if not 0 <= side < max(order, 1):
                raise ValueError(f"exponents[{order}] names side {side}; order {order} has none.")
            check_range(f"exponents[{order}]", exponent, 0.0)
