"""The optimizer's step: plain, with a refresh of the roots, and on average."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from benchmarks.methods import BASELINE, EVERY, FAMILY, METHODS, Method
from benchmarks.section import Cell, Column, Rows, Section, Settings
from benchmarks.timing import Contender, interleave, times_of
from benchmarks.works import CONVNET, GPT2, MLP, RESNET, SMALL, TRANSFORMER, WORKS, Work

INTERVALS = (1, 10, 50)
SECONDS = {
    MLP.name: 5.0,
    TRANSFORMER.name: 9.0,
    CONVNET.name: 5.0,
    RESNET.name: 15.0,
    GPT2.name: 1.0,
    SMALL.name: 3.0,
}

ABOUT = f"""The optimizer's step alone, given gradients. A step is plain or refreshes the roots (or
bases); refreshes were {EVERY} steps apart, and the average at interval f is
((f - 1) plain + refresh) / f, of medians. All methods of one work and block size took turns, step
by step, in another order each time: who follows whom decides what is in the caches. Methods without
a block size were run once, beside block size 1,024. [q1, q3] are quartiles, ×n the number of runs.
Gradients of the networks are those of random data, of the shapes random; each method steps through
several sets of them. The reference implementation (facebookresearch/optimizers) is on no package
index: it is timed where its source is on the path. The committed tables have that of August 2026,
put there without its distributed parts and checked against tests/reference."""


ABOUT_FAMILY = f"""Every recipe beside Shampoo, with its own defaults but for decay, refreshed
{EVERY} steps apart, measured as the steps above: Muon and its kin on the matrices alone. What
`soap` has to be held against is SOAP of pytorch_optimizer at the same block size, 1,024, and what
`muon` has, torch's; each cell's methods took turns."""


def section(settings: Settings) -> Section:
    """A cell for every work and block size."""
    works = (MLP, CONVNET, SMALL) if settings.quick else WORKS
    sizes = (256,) if settings.quick else (1024, 256)
    # The smallest blocks are whole at every size; one refresh of GPT-2's at 1,024 takes 42 s.
    other = {SMALL.name: sizes[:1], GPT2.name: sizes[-1:]}
    if not settings.quick:
        other |= {work.name: (*sizes, 128) for work in (MLP, TRANSFORMER, CONVNET)}
    cells = [
        Cell(
            f"{work.name}, blocks of {size}",
            _cell(METHODS, work, size, size == sizes[0], settings),
        )
        for work in works
        for size in other.get(work.name, sizes)
    ]
    return Section("steps", "The optimizer's step", ABOUT, _columns(), cells)


def family(settings: Settings) -> Section:
    """A cell for every work, of the methods that are no Shampoo."""
    works = (MLP,) if settings.quick else (MLP, TRANSFORMER, CONVNET)
    cells = [Cell(work.name, _cell(FAMILY, work, 1024, True, settings)) for work in works]
    return Section("family", "The family's steps", ABOUT_FAMILY, _columns(), cells)


def _columns() -> list[Column]:
    return [
        Column("work", "work"),
        Column("size", "block size"),
        Column("method", "method"),
        Column("plain", "plain, ms", "ms"),
        Column("refresh", "refresh, ms", "ms"),
        *(Column(f"average_{f}", f"every {f}, ms", "number") for f in INTERVALS),
        Column("ratio", "plain / AdamW", "number"),
        Column("note", ""),
    ]


def _cell(
    methods: Sequence[Method], work: Work, size: int, first: bool, settings: Settings
) -> Callable[[], Rows]:
    def run() -> Rows:
        device = settings.device
        params = work.parameters(device)
        gradients = work.gradients(device, 2 if work.heavy else 8)
        contenders: list[Contender] = []
        rows: Rows = []
        for method in methods:
            if not _is_timed(method, work, first) or (method.compiles and settings.quick):
                continue
            row = {"work": work.name, "cell": size, "size": size if method.blocks else None}
            row["method"] = method.label(params)
            rows.append(row)
            if method.share(params) < 0.5:
                row["note"] = "too few matrices to compare"
                continue
            try:
                contenders.append(_begun(method.contender(params, size, gradients)))
            except ImportError as error:
                row["note"] = f"not installed ({error.name})"
            except Exception as error:  # another project's optimizer, with a work it can't do
                row["note"] = f"does not run here: {type(error).__name__}"
                settings.log(f"{row['method']}: {error}")
        least = {"plain": 3, "refresh": 1} if work.heavy else {"plain": 5, "refresh": 3}
        runs = interleave(
            contenders,
            device=device,
            seconds=1.0 if settings.quick else SECONDS[work.name],
            least=least,
            first=2,
            warmup=1,
            shuffled=True,
        )
        baseline = times_of(runs, BASELINE)
        for row in rows:
            plain = times_of(runs, row["method"])
            refresh = times_of(runs, row["method"], "refresh")
            if plain is not None:
                row["plain"] = plain.in_ms
                row["ratio"] = plain.median / baseline.median
            if plain is not None and refresh is not None:
                row["refresh"] = refresh.in_ms
                for f in INTERVALS:
                    average = ((f - 1) * plain.median + refresh.median) / f
                    row[f"average_{f}"] = 1e3 * average
        return rows

    return run


def _is_timed(method: Method, work: Work, first: bool) -> bool:
    if sum(map(math.prod, work.sizes().values())) > method.most:
        return False
    # The baseline is in every cell: the ratio is of runs that took turns.
    return first or method.blocks or method.name == BASELINE


def _begun(contender: Contender) -> Contender:
    """The contender after its first step: one that can't do this work fails here, not later."""
    contender.prepare()
    contender.step()
    return contender
