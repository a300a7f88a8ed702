"""docs/gpu.md's tables, from the lines of `make device`: `python -m benchmarks.device.page`.

A file of results holds the lines of one or more runs, each with its number as "run" and, in the
line about the machine, the commit that was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.device.group import Row
from benchmarks.page import filled

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h100.jsonl"
PAGE = ROOT / "docs" / "gpu.md"
PLAIN, REFRESH = "gpt2, blocks of 1024, plain", "gpt2, blocks of 1024, refresh"
GRAPHS = "gpt2, blocks of 1024, graph"  # of other models, too
MODELS = {"text": "transformer, width 512", "resnet-50": "ResNet-50", "gpt2": "GPT-2"}
SOLVERS = (
    "eigh",
    "newton_schulz",
    "coupled_newton",
    "QR of the old basis",
    "Cholesky-QR of the old basis",
)
KINDS = ("eager", "replayed")
SIDES, COUNTS = (64, 128, 256, 512, 1024, 2048), (1, 8, 64)


def main() -> None:
    """Rewrite the page's tables."""
    PAGE.write_text(filled(PAGE.read_text(), sections(lines())))


def lines() -> list[Row]:
    """Of all runs."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def sections(rows: Sequence[Row]) -> dict[str, str]:
    """{mark: table}."""
    return {
        "runs": "\n".join(_runs(rows)),
        "plain": "\n".join(_plain(rows)),
        "refresh": "\n".join(_refreshes(rows)),
        "graphs": "\n".join(_graphs(rows)),
        "resnet": "\n".join(_resnet(rows)),
        "solvers": "\n".join(_solvers(rows)),
        "training": "\n".join(_training(rows)),
    }


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    found = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return found + ["| " + " | ".join(cells) + " |" for cells in body]


def _runs(rows: Sequence[Row]) -> list[str]:
    heads = [row for row in rows if row["group"] == "machine"]
    return _table(
        ("run", "commit", "device", "torch", "driver"),
        [
            (str(r["run"]), r["commit"], r["device"], r["torch"], r["driver"])  # in that order
            for r in heads
        ],
    )


def _cell(rows: Sequence[Row], name: str, kind: str) -> list[Row]:
    """The last run's lines of a cell; of `kind`, with a time."""
    found = [r for r in rows if r.get("cell") == name and r.get("kind") == kind and "ms" in r]
    last = max(r["run"] for r in found)
    return [r for r in found if r["run"] == last]


def _plain(rows: Sequence[Row]) -> list[str]:
    head = ("step", "ms", "kernels, ms", "host, ms", "launches", "state, MiB", "peak, MiB")
    return _table(
        head,
        [
            (
                r["of"],
                f"{r['ms']:.1f}",
                f"{r['busy_ms']:.1f}",
                f"{r['host_ms']:.1f}",
                str(r["kernels"] + r["copies"]),
                f"{r['state_mib']:,.0f}" if "state_mib" in r else "",
                f"{r['peak_mib']:,.0f}",
            )
            for r in sorted(_cell(rows, PLAIN, "plain"), key=lambda r: r["ms"])
        ],
    )


def _refreshes(rows: Sequence[Row]) -> list[str]:
    found = _cell(rows, "gpt2, blocks of 1024", "refresh")
    found = [r for r in found if not r["of"].endswith(("TF32", "eigh"))]
    found += _cell(rows, REFRESH, "refresh")
    return _table(("step with a refresh", "ms"), [(r["of"], f"{r['ms']:.0f}") for r in found])


def _graphs(rows: Sequence[Row]) -> list[str]:
    """Plain steps and refreshes, as they are and replayed, of each model and method."""
    found = {(r["of"], r["kind"]): r for r in rows if r.get("cell") == GRAPHS and "ms" in r}
    body = []
    for model, title in MODELS.items():
        names = dict.fromkeys(of.rpartition(", ")[0] for of, _ in found if of.startswith(model))
        for name in names:
            keys = [(f"{name}, {how}", k) for k in ("plain", "refresh") for how in KINDS]
            cells = [f"{found[key]['ms']:.1f}" if key in found else "" for key in keys]
            body.append((title, name.removeprefix(f"{model}, "), *cells))
    head = ("model", "method", "plain, ms", "replayed", "with a refresh, ms", "replayed")
    return _table(head, body)


def _resnet(rows: Sequence[Row]) -> list[str]:
    body = []
    for size in (1024, 256):
        cell = f"resnet-50, blocks of {size}"
        plain = next(r for r in _cell(rows, cell, "plain") if r["of"] == "shampoo")
        refresh = next(r for r in _cell(rows, cell, "refresh") if r["of"].endswith("newton_schulz"))
        times = (plain["ms"], plain["busy_ms"], refresh["ms"], refresh["busy_ms"])
        body.append((str(size), *[f"{x:.1f}" for x in times]))
    return _table(("blocks of", "plain, ms", "kernels", "with a refresh, ms", "kernels"), body)


def _solvers(rows: Sequence[Row]) -> list[str]:
    known = {
        (r["of"], r["cell"]): r for r in rows if r["group"] == "solvers" and "of" in r and "ms" in r
    }
    body = []
    for side in SIDES:
        for count in COUNTS:
            found = [known.get((name, f"{count} of {side}")) for name in SOLVERS]
            cells = ["" if r is None else f"{r['ms']:.1f}" for r in found]
            errors = ["" if r is None else f"{r['worst']:.0e}" for r in found[:3]]
            body.append((str(side), str(count), *cells, *errors))
    head = ("side", "matrices", "eigh", "Newton-Schulz", "coupled Newton", "QR", "Cholesky QR")
    return _table((*head, "error of eigh", "Newton-Schulz", "coupled Newton"), body)


def _training(rows: Sequence[Row]) -> list[str]:
    last = [r for r in rows if r["group"] == "training" and r.get("steps") == 200]
    run = max(r["run"] for r in last)
    best: dict[str, Row] = {}
    for r in last:
        if (
            r["run"] == run
            and r["test_loss"] < best.get(r["of"], r | {"test_loss": 9.0})["test_loss"]
        ):
            best[r["of"]] = r
    return _table(
        ("", "rate", "test loss", "plain step, ms", "every 20th, ms", "training step, ms"),
        [
            (
                name,
                f"{r['rate']:g}",
                f"{r['test_loss']:.3f}",
                f"{r['plain_ms'][1]:.1f}",
                f"{r['every_20th_ms'][1]:.1f}",
                f"{r['ms_a_step']:.1f}",
            )
            for name, r in sorted(best.items(), key=lambda item: item[1]["test_loss"])
        ],
    )


if __name__ == "__main__":
    main()
