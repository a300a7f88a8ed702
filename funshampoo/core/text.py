"""Sizes, times and tables as people read them."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def counted(number: float) -> str:
    """How many, perhaps on average.

    >>> counted(1234.5)
    '1,234'
    """
    return f"{number:,.0f}"


def plural(number: int, one: str, several: str = "") -> str:
    """So many of what is called so, several of which are with an s where nothing else is said.

    >>> plural(1, "step"), plural(1234, "step"), plural(0, "entry", "entries")
    ('1 step', '1,234 steps', '0 entries')
    """
    return f"{counted(number)} {one if number == 1 else several or one + 's'}"


def readable(size: float) -> str:
    """Bytes as people write them.

    >>> readable(136), readable(3 * 2**20), readable(999.7 * 2**10)
    ('136 B', '3 MiB', '0.976 MiB')
    """
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 999.5:  # what rounds to four digits is written with an exponent
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """Milliseconds below a second, seconds from there on, in four digits; more seconds in whole.

    >>> duration(0.0123456), duration(1.5), duration(123456)
    ('12.35 ms', '1.5 s', '123,456 s')
    """
    if seconds < 1:
        return f"{1e3 * seconds:.4g} ms"
    return f"{seconds:.4g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Lines of a table, every column as wide as its widest cell.

    Args:
        rows: of equally many cells, the heading first.
        left: which columns begin below each other, as words do; the others end so.

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
