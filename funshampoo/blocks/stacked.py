"""Parameters that consist of several matrices: stacked experts, fused projections, heads."""

from __future__ import annotations

from dataclasses import dataclass

from funshampoo.core.checks import check_count


@dataclass(frozen=True)
class Stacked:
    """A `merge` for `blocked`: the parameter is a stack of matrices, each cut separately.

    No block spans two matrices, and stages inside see matrices only, so factor matrices, step
    lengths and polar factors are those of separate parameters.

    Args:
        axis: along which they are stacked, counted from 0.
        parts: the number of matrices along it, of equal size: an axis of size n becomes (parts, n /
            parts). None: every index is its own matrix, as in stacked experts.

    Raises:
        ValueError, TypeError: a number out of range. When called, a shape without the axis, not
            divisible into the parts, or in which no matrices are left.

    >>> experts = Stacked()
    >>> experts((8, 64, 16)), experts.axis
    ((8, 64, 16), 0)
    >>> Stacked(parts=3)((192, 64)), Stacked(axis=1, parts=3)((64, 192))
    ((3, 64, 64), (64, 3, 64))
    """

    axis: int = 0
    parts: int | None = None

    def __post_init__(self) -> None:
        check_count("axis", self.axis, least=0)
        if self.parts is not None:
            check_count("parts", self.parts)

    def __call__(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which a parameter is cut: `axis` counts the matrices."""
        if self.axis >= len(shape):
            raise ValueError(f"merge is {self}, and the shape {shape} has no such axis.")
        found = tuple(shape)
        if self.parts is not None:
            if shape[self.axis] % self.parts:
                raise ValueError(
                    f"merge is {self}, which does not divide side {self.axis} of the shape {shape}."
                )
            each = shape[self.axis] // self.parts
            found = (*shape[: self.axis], self.parts, each, *shape[self.axis + 1 :])
        if len(found) != 3:
            raise ValueError(
                f"merge is {self}, which makes {found} of the shape {shape}: no stack of matrices. "
                "Give this parameter to a chain of its own, by partition(...)."
            )
        return found
