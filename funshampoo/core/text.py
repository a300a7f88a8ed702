"""Formatting of sizes, times and tables for people."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def counted(number: float) -> str:
    """A count, possibly an average.

    >>> counted(1234.5)
    '1,234'
    """
    return f"{number:,.0f}"


def plural(number: int, one: str, several: str = "") -> str:
    """A count with its noun, whose plural has an s unless given.

    >>> plural(1, "step"), plural(1234, "step"), plural(0, "entry", "entries")
    ('1 step', '1,234 steps', '0 entries')
    """
    return f"{counted(number)} {one if number == 1 else several or one + 's'}"


def readable(size: float) -> str:
    """Bytes in a readable unit.

    >>> readable(136), readable(3 * 2**20), readable(999.7 * 2**10)
    ('136 B', '3 MiB', '0.976 MiB')
    """
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 999.5:  # above, four digits would round to an exponent
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """Milliseconds below a second, else seconds, in four digits; longer ones in whole seconds.

    >>> duration(0.0123456), duration(1.5), duration(123456)
    ('12.35 ms', '1.5 s', '123,456 s')
    """
    if seconds < 1:
        return f"{1e3 * seconds:.4g} ms"
    return f"{seconds:.4g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Lines of a table, each column as wide as its widest cell.

    Args:
        rows: of equal length, the heading first.
        left: which columns are left-aligned, like words; the others are right-aligned.

    >>> aligned([("a", "b"), ("long", "1,000")])
    ['a         b', 'long  1,000']
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            f"{cell:<{width}}" if i in left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
