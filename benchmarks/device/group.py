"""What a group of measurements is made of, and how one is run."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

Row = dict[str, Any]


class Setting(NamedTuple):
    """What every group is told.

    Attributes:
        device: where everything runs.
        rehearse: small sizes, to see whether it works.
        deadline: of `time.monotonic()`: no cell begins that is not done by then.
    """

    device: torch.device
    rehearse: bool
    deadline: float

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def pick(self, real: Any, small: Any) -> Any:
        """One for the GPU, the other for the rehearsal."""
        return small if self.rehearse else real


class Cell(NamedTuple):
    """One part of a group.

    Attributes:
        name: in its lines.
        run: yields the lines, each as soon as it is known.
        least: seconds that have to be left for it to begin.
    """

    name: str
    run: Callable[[], Iterable[Row]]
    least: float = 2.0


def run_group(name: str, cells: Iterable[Cell], setting: Setting) -> None:
    """Cell after cell, as long as there is time. One that raises leaves a line and is over."""
    for cell in cells:
        head = {"group": name, "cell": cell.name}
        if setting.left() < cell.least:
            emit(head | {"skipped": f"{setting.left():.0f} s left of {cell.least:.0f} s"})
            continue
        begun = time.monotonic()
        try:
            for row in cell.run():
                emit(head | row)
        except Exception as error:
            emit(head | {"error": in_a_line(error)})
        emit(head | {"took_s": round(time.monotonic() - begun, 2)})
        gc.collect()
        if setting.device.type == "cuda":
            try:
                torch.cuda.empty_cache()
            except Exception as error:  # of the kind after which nothing works any more
                emit(head | {"error": in_a_line(error)})


def emit(row: Row) -> None:
    """One line, at once."""
    print(json.dumps({key: short(value) for key, value in row.items()}), flush=True)


def short(value: Any) -> Any:
    """Four digits are enough for a float, and JSON has none for infinity.

    >>> short(0.123456), short([1234567.0]), short(float("nan"))
    (0.1235, [1235000.0], 'nan')
    """
    if isinstance(value, float):
        rounded = float(f"{value:.4g}")
        return rounded if abs(rounded) < float("inf") else str(value)
    if isinstance(value, list | tuple):
        return [short(x) for x in value]
    return value


def in_a_line(error: BaseException) -> str:
    """The kind of an error and the beginning of what it says.

    >>> in_a_line(ValueError("one   two"))
    'ValueError: one two'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
