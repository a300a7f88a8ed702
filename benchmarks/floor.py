"""How close a plain step is to what this machine could do, stage by stage.

The model counts, for every stage, the flops of its products and the bytes that it has to move when
everything elementwise of the stage is one pass. A stage can't be faster than its flops at the rate
of batched products, nor than its bytes at the bandwidth of memory: its floor is the larger of the
two, summed over stacks and sides. Both rates are measured here, in the same process.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import funshampoo as fs
from benchmarks.methods import BETAS, LR
from benchmarks.section import Cell, Column, Rows, Section, Settings
from benchmarks.timing import repeated, synchronize, times
from benchmarks.works import GPT2, RESNET, TRANSFORMER, Work
from funshampoo.blocks.layout import Layout, layout_of
from funshampoo.core.applying import applied

FLOAT = 4  # bytes
SIDES = (16, 32, 64, 128, 256, 512, 1024)
STAGES = ("copies, update", "guard", "statistics", "filter", "roots applied", "grafting")

ABOUT = """A plain step by update_in_place, as the wrapper takes it. The stages
of one chain are each surrounded by a clock, whose time is that of the stage without the stages
inside it; the chain is the recipe's, put together here from its parts. Floor: per stack and side
the larger of flops / (rate of batched products at that size) and bytes / bandwidth, both as
measured just before (the first rows). Bytes are those of one pass over each operand: gradients
into stacks 8 a number (none where a stack is one whole parameter), updates into parameters 12,
guard 4, statistics 4 a side and 8 d² a factor,
filter 12, roots 8 a side and 4 d² a root, grafting 20 (second moment, gradient, filtered gradient,
direction). A tile of a step stays in cache, so that stages that only move bytes can be faster than
that. Statistics count the whole product, of which from side 512 on only one triangle is
computed: their share can be above 100 %. The gap is what the stage takes above its floor."""


class Need(NamedTuple):
    """What one operation cannot do without.

    Attributes:
        flops: of products.
        bytes: read and written once.
        size: geometric mean of the product's three sides, which decides on the rate.
    """

    flops: float
    bytes: float
    size: float = 0.0


class Rates(NamedTuple):
    """What the machine can do: bytes a second, and flops a second by side of square products."""

    bandwidth: float
    products: dict[int, float]

    def seconds(self, need: Need) -> float:
        """The least time for it."""
        moving = need.bytes / self.bandwidth
        if not need.flops:
            return moving
        side = min(self.products, key=lambda s: abs(math.log(s / need.size)))
        return max(moving, need.flops / self.products[side])


def needs_of(layout: Layout) -> dict[str, list[Need]]:
    """{stage: what it needs}, for a plain step of Shampoo, without momentum and decay."""
    pieces = Counter(region.stack for p in layout.parameters for region in p.regions)
    whole = {
        region.stack
        for p in layout.parameters
        for region in p.regions
        if region.block == p.merged and pieces[region.stack] == 1
    }
    found: dict[str, list[Need]] = defaultdict(list)
    for name, stack in layout.stacks.items():
        block, rows = stack.block, stack.rows
        n = math.prod(block)
        if name not in whole:
            found["copies, update"].append(Need(0, 2 * FLOAT * n * rows))
        found["guard"].append(Need(0, FLOAT * n * rows))
        found["filter"].append(Need(0, 3 * FLOAT * n * rows))
        found["grafting"].append(Need(0, 5 * FLOAT * n * rows))
        found["copies, update"].append(Need(0, 3 * FLOAT * n * rows))
        for d in block:
            flops, size = 2 * n * d * rows, (n * d) ** (1 / 3)
            statistics = FLOAT * rows * (n + 2 * d * d)
            found["statistics"].append(Need(flops, statistics, size))
            roots = FLOAT * rows * (2 * n + d * d)
            found["roots applied"].append(Need(flops, roots, size))
    return dict(found)


def layout_for(shapes: Mapping[str, tuple[int, ...]], size: int) -> Layout:
    """The recipe's blocks."""
    leaves = tuple((shape, torch.float32, torch.device("cpu")) for shape in shapes.values())
    return layout_of(leaves, size, "small", 2)


def measure_rates(device: torch.device, *, quick: bool) -> Rates:
    """Bandwidth of copying and averaging large tensors (the better), and the rates of products.

    A product's rate is of a stack of square matrices, without allocation.
    """
    numbers = 2**22 if quick else 2**26
    a, b = (torch.randn(numbers, device=device) for _ in range(2))
    moves = {"copy": lambda: a.copy_(b), "lerp": lambda: a.lerp_(b, 0.1)}
    moved = {"copy": 2 * FLOAT * numbers, "lerp": 3 * FLOAT * numbers}
    found = repeated(moves, device, 0.1 if quick else 2.0, 5)
    bandwidth = max(moved[name] / spread.median for name, spread in found.items())

    products: dict[str, Callable[[], Tensor]] = {}
    flops: dict[str, float] = {}
    for d in SIDES:
        rows = max(1, (2**18 if quick else 2**22) // d**2)
        x, y, out = (torch.randn(rows, d, d, device=device) for _ in range(3))
        products[str(d)] = lambda x=x, y=y, out=out: torch.bmm(x, y, out=out)
        flops[str(d)] = 2.0 * rows * d**3
    found = repeated(products, device, 0.2 if quick else 5.0, 5)
    return Rates(bandwidth, {int(d): flops[d] / spread.median for d, spread in found.items()})


def section(settings: Settings) -> Section:
    """A cell for the rates, and one for each work and block size."""
    works = (TRANSFORMER,) if settings.quick else (TRANSFORMER, RESNET, GPT2)
    sizes = (256,) if settings.quick else (256, 1024)
    rates: list[Rates] = []

    def measure() -> Rows:
        rates.append(measure_rates(settings.device, quick=settings.quick))
        listed = {"memory, GB/s": rates[0].bandwidth / 1e9}
        for side, rate in rates[0].products.items():
            listed[f"products of {side}, GFLOP/s"] = rate / 1e9
        return [
            {"work": "this machine", "stage": what, "rate": number}
            for what, number in listed.items()
        ]

    cells = [Cell("rates", measure)]
    for work in works:
        for size in sizes:
            cells.append(Cell(f"{work.name}, blocks of {size}", _cell(work, size, rates, settings)))
    columns = [
        Column("work", "work"),
        Column("size", "block size"),
        Column("stage", "stage"),
        Column("rate", "rate", "number"),
        Column("gflop", "GFLOP", "number"),
        Column("mb", "MB", "number"),
        Column("floor", "floor, ms", "number"),
        Column("time", "measured, ms", "ms"),
        Column("share", "share of the floor", "share"),
        Column("gap", "gap, ms", "number"),
    ]
    return Section("floor", "A plain step against its floor", ABOUT, columns, cells, together=True)


def _cell(work: Work, size: int, rates: list[Rates], settings: Settings) -> Callable[[], Rows]:
    def run() -> Rows:
        device = settings.device
        spent = _stage_times(work, size, device, 4 if settings.quick or work is GPT2 else 20)
        needs = needs_of(layout_for(work.sizes(), size))
        rows: Rows = []
        for stage in STAGES:
            wanted = needs.get(stage, [])
            rows.append(
                {
                    "stage": stage,
                    "gflop": sum(need.flops for need in wanted) / 1e9,
                    "mb": sum(need.bytes for need in wanted) / 1e6,
                    "floor": 1e3 * sum(map(rates[0].seconds, wanted)),
                    "time": times(spent[stage]).in_ms,
                }
            )
        total: dict[str, Any] = {"stage": "all"}
        for key in ("gflop", "mb", "floor"):
            total[key] = sum(row[key] for row in rows)
        total["time"] = times(map(sum, zip(*spent.values()))).in_ms
        for row in [*rows, total]:
            row["share"] = row["floor"] / row["time"]["ms"]
            row["gap"] = row["time"]["ms"] - row["floor"]
        return [{"work": work.name, "size": size, **row} for row in [*rows, total]]

    return run


class Clock:
    """Seconds by stage, each without the stages inside it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge what happens here to `name`."""
        self._inside.append(0.0)
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        elapsed = time.perf_counter() - start
        self.spent[name] += elapsed - self._inside.pop()
        if self._inside:
            self._inside[-1] += elapsed


def charged(stage: fs.GradientTransformation, clock: Clock, name: str) -> fs.GradientTransformation:
    """The same stage, on the clock."""

    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        with clock.stage(name):
            return stage.run(updates, state, params, context)

    def apply(updates: Any, state: Any, params: Any, context: Any) -> Any:
        with clock.stage(name):
            return applied(stage, updates, state, params, context)

    return fs.GradientTransformation(
        stage.init,
        update,
        stage.name,
        apply=apply,
        parts={"inner": stage},
        state_of=lambda state, part: state,
    )


def clocked_shampoo(size: int, clock: Clock) -> fs.GradientTransformation:
    """`funshampoo.shampoo` of `methods`, with a clock around every stage."""
    beta1, beta2 = BETAS
    parts = fs.chain(
        charged(fs.kronecker_statistics(beta2), clock, "statistics"),
        charged(fs.ema(beta1), clock, "filter"),
        charged(
            fs.graft(
                charged(fs.root_inverse(10), clock, "roots applied"),
                onto=charged(fs.scale_by_adam(0.0, beta2, 1e-8), clock, "grafting"),
            ),
            clock,
            "grafting",
        ),
        charged(fs.scale_by_learning_rate(LR), clock, "copies, update"),
    )
    guard = charged(fs.guarded(parts), clock, "guard")
    return charged(fs.blocked(guard, size, tile="auto"), clock, "copies, update")


def _stage_times(work: Work, size: int, device: torch.device, steps: int) -> dict[str, list[float]]:
    params = {name: p.detach() for name, p in work.parameters(device).items()}
    sets = [dict(zip(params, g)) for g in work.gradients(device, 2)]
    clock = Clock(device)
    tx = clocked_shampoo(size, clock)
    state = tx.init(params)
    spent: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for t in range(steps + 2):
        clock.spent.clear()
        # Roots stay the identity, which is as dear to apply as any other.
        state = fs.update_in_place(tx, sets[t % 2], state, params, refresh=False)
        if t >= 2:
            for stage in STAGES:
                spent[stage].append(clock.spent[stage])
    return spent
