"""Scaling factors that fit an update with bounded singular values to its matrix's shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from funshampoo.core.checks import check_choice, check_range

Scale: TypeAlias = (
    Literal["muon", "adam", "spectral", "unit_rms"]
    | float
    | Callable[[tuple[int, ...]], float]
    | None
)
"""By rows r and columns c: "muon" √max(1, r/c) (Jordan), "adam" 0.2 √max(r, c), with which entries
are about as large as Adam's (Liu et al., arXiv 2502.16982), "spectral" √max(r, c), "unit_rms"
√(r/c), which maps inputs of RMS 1 to outputs of RMS 1 (Bernstein); a number; None for 1; or a
function of the shape of the leaf, or block."""

SCALES: dict[str, Callable[[int, int], float]] = {
    "muon": lambda r, c: math.sqrt(max(1.0, r / c)),
    "adam": lambda r, c: 0.2 * math.sqrt(max(r, c)),
    "spectral": lambda r, c: math.sqrt(max(r, c)),
    "unit_rms": lambda r, c: math.sqrt(r / c),
}


def check_scale(scale: Scale) -> None:
    """Raises ValueError or TypeError unless it is a `Scale`."""
    if isinstance(scale, str):
        check_choice("scale", scale, (*SCALES, None))
    elif scale is not None and not callable(scale):
        check_range("scale", scale, 0.0)


def is_of_no_shape(scale: Scale) -> bool:
    """Whether the factor is the same for all shapes, so for a part of a leaf too."""
    return not isinstance(scale, str) and not callable(scale)


def shape_factor(scale: Scale, matrix: Sequence[int], shape: Sequence[int]) -> float:
    """The factor for a leaf of this shape, viewed as this matrix (r, c).

    >>> shape_factor("muon", (8, 2), (8, 2)), shape_factor(lambda shape: len(shape), (8, 2), (8, 2))
    (2.0, 2)
    """
    if isinstance(scale, str):
        r, c = matrix
        return SCALES[scale](r, c) if r and c else 1.0  # if empty, r/c has no value
    if scale is None:
        return 1.0
    return scale(tuple(shape)) if callable(scale) else scale
