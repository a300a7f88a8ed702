"""Polynomials whose composition takes all of an interval to 1: the steps of a square root."""

from __future__ import annotations

from typing import NamedTuple

_GROW = (6.998198728, -60.52606906, 193.7978937, -244.4565663, 105.1765429)
"""x e(x²) is in [0.276, 0.99] for x in [0.04, 1], the best such, and 7 x near 0.

Up to 0.99 and not 1, since it rises steeply there, and so would rounding.
"""

_GROWS_FROM, _GROWN = 0.04, 0.276

_SETTLE = (4.767023587, -19.78725115, 45.27216331, -47.18502347, 17.96649098)
"""The best for x in [0.276, 1]: within 0.0335 of 1."""

_SETTLED = 0.0335


class Step(NamedTuple):
    """E = Σ coefficients[j] M^j, M = Z Y or, around one, I - Z Y."""

    coefficients: tuple[float, ...]
    around_one: bool = False


def square_root_steps(lower: float, tolerance: float) -> list[Step]:
    """Those that bring all x in [lower, 1] within `tolerance` of 1, by x ← x E(x²)."""
    steps = []
    while lower < _GROWN:
        steps.append(Step(_GROW))
        lower = lower * _value(_GROW, lower * lower) if lower < _GROWS_FROM else _GROWN
    if 1 - lower <= tolerance:
        return steps
    steps.append(Step(_SETTLE))
    error = _SETTLED
    while error > tolerance:
        reached = {k: _error_of_series(k, error) for k in (1, 2, 4)}
        # Not by next(), at which torch 2.8 stops tracing.
        k = min([k for k in reached if reached[k] <= tolerance] or [4])
        steps.append(Step(_series(k), around_one=True))
        error = reached[k]
    return steps


def _series(k: int) -> tuple[float, ...]:
    """The first k + 1 coefficients of (1 - y)^(-1/2), by powers of y."""
    found = [1.0]
    for j in range(1, k + 1):
        found.append(found[-1] * (2 * j - 1) / (2 * j))
    return tuple(found)


def _error_of_series(k: int, error: float) -> float:
    """How far x (series of k)(1 - x²) is from 1 at most, where x is off by `error` at most."""
    return max(abs(1 - x * _value(_series(k), 1 - x * x)) for x in (1 - error, 1 + error))


def _value(coefficients: tuple[float, ...], t: float) -> float:
    return sum(c * t**j for j, c in enumerate(coefficients))
