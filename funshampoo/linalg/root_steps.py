"""Polynomials whose composition takes an interval to 1: the steps of an inverse p-th root."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """N = Σ coefficients[j] M^j or, if around one, of (I - M)^j."""

    coefficients: tuple[float, ...]
    around_one: bool = False


class Table(NamedTuple):
    """The best polynomials e of degree 4 for x e(x^p), on two intervals.

    Attributes:
        grow: the best with x grow(x^p) in [grown, 0.99] for x in [grows_from, 1]; increasing for
            smaller x. Only up to 0.99, since the slope is steep at 1, and amplifies rounding.
        settle: the best for x in [grown, 1]: within `settled` of 1.
    """

    grow: tuple[float, ...]
    grows_from: float
    grown: float
    settle: tuple[float, ...]
    settled: float


TABLES = {
    2: Table(
        (6.998198728, -60.52606906, 193.7978937, -244.4565663, 105.1765429),
        0.04,
        0.276,
        (4.767023587, -19.78725115, 45.27216331, -47.18502347, 17.96649098),
        0.0335,
    ),
    3: Table(
        (3.935257738, -29.79689076, 98.30585744, -127.5205215, 56.06629683),
        0.14,
        0.5395,
        (2.570022606, -6.1447679, 11.28913899, -10.28662021, 3.576398225),
        0.0042,
    ),
    4: Table(
        (3.152843456, -29.11323948, 106.5862925, -146.2213986, 66.58550191),
        0.11,
        0.3463,
        (2.844410811, -13.28407629, 39.37865403, -48.78910066, 20.9284818),
        0.0784,
    ),
    6: Table(
        (2.198101621, -16.19913839, 60.34059682, -84.12243192, 38.77287167),
        0.265,
        0.581,
        (1.852537212, -4.649051665, 11.83697318, -13.61595003, 5.593330987),
        0.0179,
    ),
    8: Table(
        (1.833720693, -11.84324853, 45.07713397, -63.72694752, 29.64934119),
        0.36,
        0.6589,
        (1.602922641, -3.274982326, 8.427000541, -9.804064914, 4.062898333),
        0.0138,
    ),
    9: Table(
        (1.72213555, -10.44533874, 40.05246688, -56.89421285, 26.55494896),
        0.4,
        0.6877,
        (1.525907784, -2.856011503, 7.382345678, -8.62667319, 3.586863334),
        0.0125,
    ),
}
"""By p: for the exponents 1/2, 1/3 (9 for 2/9, of three sides), and 1/(2k) of 1 to 4 sides.

Found by Remez exchange. Each `grows_from` is the one with the fewest products in total for a
condition of 1e6.
"""


def root_steps(p: int, lower: float, tolerance: float) -> list[Step]:
    """Steps x ← x N(x^p) that bring all x in [lower, 1] to within `tolerance` of 1.

    A p without a table uses the series of M^(-1/p) around 1 only.
    """
    steps, low, high = [], lower, 1.0
    if p in TABLES:
        grow, grows_from, grown, settle, settled = TABLES[p]
        while low < grown:
            steps.append(Step(grow))
            low = low * _value(grow, low**p) if low < grows_from else grown
        if 1 - low > tolerance:
            steps.append(Step(settle))
            low, high = 1 - settled, 1 + settled
    while max(1 - low, high - 1) > tolerance:
        reached = {k: _reached(p, k, low, high) for k in (1, 2, 4)}
        errors = {k: max(1 - low, high - 1) for k, (low, high) in reached.items()}
        # Not next(), which torch 2.8 can't trace.
        k = min([k for k in errors if errors[k] <= tolerance] or [4])
        steps.append(Step(series(p, k), around_one=True))
        low, high = reached[k]
    return steps


def series(p: int, k: int) -> tuple[float, ...]:
    """The first k + 1 coefficients of (1 - y)^(-1/p), by powers of y."""
    found = [1.0]
    for j in range(1, k + 1):
        found.append(found[-1] * (1 + (j - 1) * p) / (j * p))
    return tuple(found)


def _reached(p: int, k: int, low: float, high: float) -> tuple[float, float]:
    """The range of x (series of k)(1 - x^p) for x in [low, high] ∋ 1.

    It increases up to 1; beyond, it keeps increasing for even k and decreases for odd k.
    """
    ends = [x * _value(series(p, k), 1 - x**p) for x in (low, high)]
    return min(ends), max(*ends, 1.0)


def _value(coefficients: tuple[float, ...], t: float) -> float:
    found = 0.0
    for c in reversed(coefficients):  # a graph with dynamic sides can't raise t to 0
        found = found * t + c
    return found
