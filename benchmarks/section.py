"""What a section of the benchmarks is: cells to run, and columns to show their rows in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

Rows = list[dict[str, Any]]


class Settings(NamedTuple):
    """What the command line said.

    Attributes:
        device: where everything runs.
        quick: less of everything, to see whether it works.
        log: prints a line without breaking the progress bar.
    """

    device: torch.device
    quick: bool
    log: Callable[[str], object]


class Cell(NamedTuple):
    """One part of a section, and what it is called in the progress bar."""

    label: str
    run: Callable[[], Rows]


class Column(NamedTuple):
    """One column: the key in the rows, the header, and how to write a value.

    "ms" is for what `Times.in_ms` makes.
    """

    key: str
    header: str
    form: Literal["text", "number", "share", "ms", "bytes", "error"] = "text"


class Section(NamedTuple):
    """A table in the making.

    Attributes:
        name: for --only and the JSON.
        title: over the table.
        about: what was measured and how.
        columns: of the table; rows may hold more, for the JSON.
        cells: run one after the other, in this order.
        together: the cells need one another, so they are measured together or not at all.
    """

    name: str
    title: str
    about: str
    columns: list[Column]
    cells: list[Cell]
    together: bool = False
