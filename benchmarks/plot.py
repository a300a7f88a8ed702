"""Results as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.methods import BASELINE, OURS
from benchmarks.table import rows_of


def draw(results: Mapping[str, Any], path: Path) -> None:
    """A panel for each section that has one."""
    known: dict[str, Callable[[Axes, list[dict[str, Any]]], None]] = {
        "steps": _steps,
        "whole": _whole,
        "floor": _floor,
        "roots": _roots,
        "curves": _curves,
    }
    panels = [name for name in known if name in results["sections"]]
    if not panels:
        return
    figure, grid = pyplot.subplots(
        len(panels), 1, figsize=(12, 5 * len(panels)), layout="constrained", squeeze=False
    )
    for axes, name in zip(grid[:, 0], panels):
        section = results["sections"][name]
        known[name](axes, rows_of(section))
        axes.set_title(f"{section['title']}: {results['device']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _steps(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Plain steps as multiples of AdamW's, refreshes above them."""
    timed = [row for row in rows if row.get("plain") and row["method"] != BASELINE]
    groups = list(dict.fromkeys((r["work"], r["cell"]) for r in timed))
    methods = list(dict.fromkeys(map(_name, timed)))
    colors = pyplot.get_cmap("tab20")(range(len(methods)))
    for method, color in zip(methods, colors):
        mine = [r for r in timed if _name(r) == method]
        places = [groups.index((r["work"], r["cell"])) for r in mine]
        mark = "o" if method.startswith("funshampoo") else "s" if "reference" in method else "^"
        line = axes.plot(
            [r["ratio"] for r in mine], places, mark, color=color, label=method, alpha=0.8
        )[0]
        both = [(r, place) for r, place in zip(mine, places) if r.get("refresh")]
        ratios = [r["ratio"] * r["refresh"]["ms"] / r["plain"]["ms"] for r, _ in both]
        axes.plot(ratios, [place for _, place in both], "|", color=line.get_color(), ms=12)
    axes.set_yticks(range(len(groups)), [f"{work}\nblocks of {size}" for work, size in groups])
    axes.set_xscale("log")
    axes.set_xlabel("plain step (circle, square, triangle) and refresh (bar), × AdamW foreach")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _name(row: Mapping[str, Any]) -> str:
    return str(row["method"]).split(" (matrices")[0]


def _whole(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """What a training step is made of, as multiples of one with AdamW."""
    for i, row in enumerate(rows):
        passes = row["passes"]["ms"]
        unit = passes + row["adamw"]["ms"]
        for offset, own, name in ((-0.2, row["adamw"]["ms"], "AdamW"), (0.2, row["mean"], OURS)):
            label = "forward and backward" if i == 0 and offset < 0 else "_"
            axes.barh(i + offset, passes / unit, 0.35, color="0.8", label=label)
            label = f"{name}'s step" if i == 0 else "_"
            color = f"C{int(offset > 0)}"
            axes.barh(i + offset, own / unit, 0.35, left=passes / unit, color=color, label=label)
    names = []
    for row in rows:
        option = row["method"].removeprefix(OURS).strip(", ") or "float32"
        names.append(f"{row['work']}\n{option}: {row['ratio']:.2f}")
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="k", lw=0.5)
    axes.set_xlabel("training step, multiples of AdamW foreach's")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _floor(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Measured time of every stage, and the floor in it."""
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("time") and row["stage"] != "all":
            cells.setdefault((row["work"], row["size"]), []).append(row)
    for i, stages in enumerate(cells.values()):
        whole = sum(row["time"]["ms"] for row in stages)
        left = 0.0
        for k, row in enumerate(stages):
            width = 100 * row["time"]["ms"] / whole
            reached = width * min(1.0, row["share"])
            label = row["stage"] if i == 0 else "_"
            axes.barh(i, reached, left=left, color=f"C{k}", label=label)
            axes.barh(i, width - reached, left=left + reached, color=f"C{k}", alpha=0.35)
            left += width
    names = [f"{work}\nblocks of {size}" for work, size in cells]
    axes.set_yticks(range(len(cells)), names)
    axes.invert_yaxis()
    axes.set_xlabel("% of a plain step; full colour is the floor")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _roots(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Time against error, a marker for each stack."""
    stacks = list(dict.fromkeys(row["stack"] for row in rows))
    for i, solver in enumerate(dict.fromkeys(row["solver"] for row in rows)):
        mine = [row for row in rows if row["solver"] == solver]
        ms, errors = [r["time"]["ms"] for r in mine], [r["error"] for r in mine]
        axes.plot(ms, errors, color=f"C{i}", alpha=0.4, label=solver)
        for row in mine:
            marker = "os^D"[stacks.index(row["stack"]) % 4]
            axes.plot(row["time"]["ms"], row["error"], marker, color=f"C{i}")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yscale("log")
    axes.set_xlabel("ms; circle, square, triangle, diamond: " + ", ".join(stacks))
    axes.set_ylabel("error of the preconditioned gradient")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _curves(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Median test loss of every option, and the spread of the plain path's seeds."""
    for i, row in enumerate(rows):
        steps = [int(t) for t in row["curves"][0]]
        seeds = [list(curve.values()) for curve in row["curves"]]
        middle = [statistics.median(at) for at in zip(*seeds)]
        if i == 0:
            low, high = ([f(at) for at in zip(*seeds)] for f in (min, max))
            axes.fill_between(steps, low, high, color="0.85", label="seeds of the plain path")
        axes.plot(steps, middle, label=row["option"], color="k" if i == 0 else f"C{i}", lw=1)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("test loss, median over seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
