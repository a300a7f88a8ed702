"""Run the groups, each in a process of its own with a limit, and pass their lines on."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.device.group import Setting, emit, in_a_line, run_group
from benchmarks.device.machine import described

ROOT = Path(__file__).parents[2]
LIMITS = {
    "tests": 150,
    "products": 90,
    "solvers": 90,
    "steps": 90,
    "family": 100,
    "training": 90,
    "compiled": 150,
}
"""Seconds from the start of a group's process to its end by force; the last has what is left."""
MODULES = {"tests": "suite"}
SPARE = 8.0  # seconds before that, by which a group should end by itself
WHOLE = 525.0  # seconds for all


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: all groups, or, in a child's process, one."""
    options = parsed(arguments)
    device = torch.device("cpu" if options.rehearse else "cuda")
    if options.child:
        setting = Setting(device, options.rehearse, options.deadline)
        module = MODULES.get(options.child, options.child)
        cells = importlib.import_module(f"benchmarks.device.{module}").cells(setting)
        run_group(options.child, cells, setting)
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here. --rehearse runs the same code on a CPU.", file=sys.stderr)
        return 2
    begun = time.monotonic()
    with _written_to(options.out):
        emit(described(device) | {"rehearsal": options.rehearse})
        for name in options.groups:
            limit = min(LIMITS[name], WHOLE - (time.monotonic() - begun))
            _run_child(name, limit, options)
        emit({"group": "all", "took_s": round(time.monotonic() - begun, 1)})
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=list(LIMITS),
        default=list(LIMITS),
        metavar="GROUP",
        help=f"which, in this order; of {', '.join(LIMITS)}",
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with small sizes")
    folder = os.environ.get("OUT")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(folder) / "device.jsonl" if folder else None,
        help="a file for the lines; default: $OUT/device.jsonl where OUT is set, else none",
    )
    parser.add_argument("--child", choices=list(LIMITS), help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _run_child(name: str, limit: float, options: argparse.Namespace) -> None:
    """One group's lines, as they come, until it ends or its time is over."""
    if limit < 2 * SPARE:
        emit({"group": name, "skipped": "no time is left"})
        return
    begun = time.monotonic()
    deadline = begun + limit - SPARE  # one clock for all processes of a machine
    command = [sys.executable, "-m", "benchmarks.device"]
    command += ["--child", name, "--deadline", str(deadline)]
    command += ["--rehearse"] * options.rehearse
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    over = threading.Event()

    def end() -> None:
        over.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with the compilers that it has started

    alarm = threading.Timer(limit, end)
    alarm.start()
    assert child.stdout is not None
    try:
        for line in child.stdout:
            if line.startswith("{"):
                print(line, end="", flush=True)
        status = child.wait()
    except BaseException:
        end()
        raise
    finally:
        alarm.cancel()
    row: dict[str, object] = {"group": name, "all_s": round(time.monotonic() - begun, 1)}
    if over.is_set():
        row["error"] = f"ended after {limit:.0f} s"
    elif status:
        row["error"] = f"ended with status {status}"
    emit(row)


@contextlib.contextmanager
def _written_to(path: Path | None) -> Iterator[None]:
    """What is printed goes to the file too, line by line."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file, contextlib.redirect_stdout(Both(sys.stdout, file)):
        yield


class Both:
    """Writes to two."""

    def __init__(self, *files: TextIO) -> None:
        self.files = files

    def write(self, text: str) -> int:
        """To both."""
        for file in self.files:
            file.write(text)
        return len(text)

    def flush(self) -> None:
        """Both."""
        for file in self.files:
            file.flush()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        emit({"group": "all", "error": in_a_line(error)})
        raise
