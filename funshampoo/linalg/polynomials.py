"""Odd polynomials a x + b x³ + c x⁵ whose composition takes singular values to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from funshampoo.core.checks import check_count

Polynomial: TypeAlias = tuple[float, float, float]
Polynomials: TypeAlias = str | Sequence[Polynomial]

_JORDAN = (3.4445, -4.7750, 2.0315)

TABLES: dict[str, tuple[Polynomial, ...]] = {
    # Steepest at 0; afterwards it stays within 0.7 to 1.2: Jordan et al.,
    # kellerjordan.github.io/posts/muon, and torch.optim.Muon.
    "newton_schulz": (_JORDAN,),
    # p(1) = 1 with two more derivatives of 0: the classical quintic (Higham, Functions of
    # Matrices, 2008, 8.3), with c for b; the SOAP-Muon record repeats it twelve times.
    "converging": ((2.0, -1.5, 0.5),),
    # Polar Express, optimal on an interval that is updated from step to step: Amsel et al., arXiv
    # 2505.16932. It starts at 1e-3, with a margin of 2 %, as in microsoft/dion.
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    # The same with eight entries, as in NVIDIA-NeMo/Emerging-Optimizers.
    "polar_express_8": (
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ),
    # Chebyshev-optimal: Grishina, Smirnov, Rakhuba, arXiv 2506.10935; Emerging-Optimizers.
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    # Five found by gradient descent: Cesista, leloykun.github.io/ponder/muon-opt-coeffs; in
    # Emerging-Optimizers, and in microsoft/dion without Polar Express.
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Eight steps that grow and two that settle: DeepSeek-V4, in Emerging-Optimizers.
    "deepseek": (_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2,
    # For a start scaled by row sums, Boissin et al., arXiv 2512.04632; Emerging-Optimizers uses
    # them after a division by the norm. The first is negative from 0.88 on: if one singular value
    # dominates, its direction comes out with the wrong sign.
    "aol": (
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    ),
}
"""By name. Every entry is (a, b, c)."""

_CYCLES = ("quintic", "aol")
"""Tables that start over if more steps are requested than they have; of others the last repeats."""


def polynomials_of(given: Polynomials, steps: int | None = None) -> tuple[Polynomial, ...]:
    """One polynomial per step.

    Args:
        given: a name of `TABLES`, or (a, b, c) for each step; if there are fewer than steps, the
            last one repeats.
        steps: how many; by default as many as are listed, or 5 of a single one.

    Raises:
        ValueError: the name is unknown, or an entry does not have three numbers.
        TypeError, ValueError: steps is not an int of at least 1.

    >>> polynomials_of("converging", 2)
    ((2.0, -1.5, 0.5), (2.0, -1.5, 0.5))
    >>> [a for a, b, c in polynomials_of("quintic", 6)]
    [4.0848, 3.9505, 3.7418, 2.8769, 2.8366, 4.0848]
    """
    if isinstance(given, str):
        if given not in TABLES:
            raise ValueError(f"polynomials is {given!r}; choose one of {', '.join(TABLES)}.")
        entries = TABLES[given]
    elif not hasattr(given, "__iter__") or getattr(given, "ndim", 1) == 0:
        raise TypeError(f"polynomials is {given!r}; give a name, or (a, b, c) for each step.")
    else:
        entries = tuple(_checked(entry) for entry in given)
        if not entries:
            raise ValueError("polynomials is empty; give (a, b, c) for each step.")
    listed = len(entries)
    if steps is None:
        steps = listed if listed > 1 else 5
    check_count("steps", steps)
    cycles, last = isinstance(given, str) and given in _CYCLES, listed - 1
    return tuple([entries[i % listed if cycles else min(i, last)] for i in range(steps)])


def _checked(entry: Sequence[float]) -> Polynomial:
    if isinstance(entry, (int, float)) or len(entry) != 3:
        raise ValueError(
            f"polynomials has {entry!r} in it; expected a sequence of (a, b, c), one for each step."
        )
    a, b, c = map(float, entry)
    if not all(map(math.isfinite, (a, b, c))):
        raise ValueError(f"polynomials has {entry!r} in it; coefficients must be finite.")
    return a, b, c
