"""Run every notebook of this folder, each in a fresh kernel and in limited time.

The files stay as they are, unless --write asks for the outputs to be stored. A notebook stops at
its first cell that fails; the error goes to standard error, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path, limit: float, write: bool) -> None:
    """Run one notebook in at most `limit` seconds, showing how far it is on a terminal."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    start = time.perf_counter()

    def report(cell_index: int, **_: object) -> None:
        if sys.stdout.isatty():
            seconds = time.perf_counter() - start
            cells = f"cell {cell_index + 1} of {len(notebook.cells)}"
            print(f"\r\033[K{path.name}: {cells}, {seconds:.0f} s", end="", flush=True)

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        timeout_func=lambda cell: max(1, int(start + limit - time.perf_counter())),
        extra_arguments=["--log-level=ERROR"],
        record_timing=False,
        on_cell_start=report,
    )
    client.execute()
    if write:
        notebook.metadata.clear()  # the kernel's version of Python, which would differ every time
        notebook.metadata.update(METADATA)
        nbformat.write(notebook, path)  # type: ignore[no-untyped-call]
    clear = "\r\033[K" if sys.stdout.isatty() else ""
    print(f"{clear}{path.name}: ok, {time.perf_counter() - start:.1f} s", flush=True)


def main() -> int:
    """Return 0 if every notebook ran, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="store the outputs in the files")
    parser.add_argument(
        "--limit", type=float, default=180.0, help="seconds for each notebook (180)"
    )
    args = parser.parse_args()
    failed = False
    for path in sorted(FOLDER.glob("*.ipynb")):
        try:
            execute(path, args.limit, args.write)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
            print(f"\n{path.name}: failed\n{plain}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
