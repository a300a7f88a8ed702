"""Measure what sharing Shampoo's blocks over processes saves of the optimizer's time.

Processes with one thread each, which talk by gloo over the loopback. One rank and several take
turns, an interval between refreshes at a time, so that a busy moment of the machine slows all; the
other processes sleep while some work. Prints, for each model and number of ranks, the optimizer's
time per step (mean of an interval with its refresh, median of the intervals) on one rank and on
all; and of a step on several, the processor's time outside the collective (of the rank that has
most to do), also as a share of one rank's, the time inside it (of the rank that waits least), and
the bytes that it gathers. `python benchmarks/ranks.py --help` lists the options. Times need as many
idle cores as there are ranks; the processor's time does not.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import funshampoo as fs
from funshampoo.plan.shapes import model_shapes

Shapes = dict[str, tuple[int, ...]]
WIDTH = 256


def transformer() -> Shapes:
    """GPT-2 with four layers of width 256 and a vocabulary of 4096."""
    shapes: Shapes = {"wte": (4096, WIDTH), "wpe": (256, WIDTH), "ln_f.weight": (WIDTH,)}
    for layer in range(4):
        for name, sides in {"attn": (1, 3), "proj": (1, 1), "fc": (1, 4), "out": (4, 1)}.items():
            rows, columns = (side * WIDTH for side in sides)
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            shapes[f"{layer}.{name}.bias"] = (columns,)
    return shapes


def convolutions() -> Shapes:
    """The first and second stage of ResNet-50."""
    everything = model_shapes("resnet-50")
    kept = ("conv1", "bn1", "layer1", "layer2")
    return {name: shape for name, shape in everything.items() if name.startswith(kept)}


MODELS: dict[str, Callable[[], Shapes]] = {
    "transformer": transformer,
    "convolutions": convolutions,
}


class Interval(NamedTuple):
    """Seconds per step, means over an interval; bytes gathered by a step.

    Attributes:
        work: of the processor, outside the collective.
    """

    total: float
    work: float
    collective: float
    gathered: int


class Collective:
    """Times `all_gather_into_tensor`, by whichever name this release of torch has."""

    def __init__(self) -> None:
        self.seconds, self.work, self.bytes = 0.0, 0.0, 0
        name = "all_gather_single" if hasattr(dist, "all_gather_single") else None
        self._name = name or "all_gather_into_tensor"
        self._original = getattr(dist, self._name)
        setattr(dist, self._name, self)

    def __call__(self, output: Tensor, shard: Tensor, **keywords: Any) -> None:
        """Gather, and count."""
        since, work = time.perf_counter(), time.thread_time()
        self._original(output, shard, **keywords)
        self.seconds += time.perf_counter() - since
        self.work += time.thread_time() - work
        self.bytes += output.nbytes


class Job:
    """One transformation at work on one rank."""

    def __init__(self, shapes: Shapes, distribute: Any, options: argparse.Namespace) -> None:
        self.every: int = options.every
        self.tx = fs.shampoo(
            1e-3,
            every=self.every,
            max_size=options.max_size,
            stagger=options.stagger,
            distribute=distribute,
        )
        generator = torch.Generator().manual_seed(0)
        self.params = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        self.gradients = [
            {n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(3)
        ]
        self.state = self.tx.init(self.params)
        self.done = 0

    def interval(self, collective: Collective) -> Interval:
        """`every` steps, one refresh among them."""
        collective.seconds, collective.work, collective.bytes = 0.0, 0.0, 0
        since, work = time.perf_counter(), time.thread_time()
        for _ in range(self.every):
            g = self.gradients[self.done % len(self.gradients)]
            self.state = fs.update_in_place(self.tx, g, self.state, self.params)
            self.done += 1
        seconds = time.perf_counter() - since
        work = time.thread_time() - work - collective.work
        n = self.every
        return Interval(seconds / n, work / n, collective.seconds / n, collective.bytes // n)


def work(rank: int, store: str, options: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    size = max(options.ranks)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    groups = {n: dist.new_group(list(range(n))) for n in options.ranks}
    collective = Collective()
    for model in options.models:
        shapes = MODELS[model]()
        jobs = {1: Job(shapes, None, options)} if rank == 0 else {}
        for n, group in groups.items():
            if rank < n:
                jobs[n] = Job(shapes, functools.partial(fs.sharded, process_group=group), options)
        for round_ in range(options.rounds + 1):
            for n in (1, *groups):
                if n in jobs:
                    found = jobs[n].interval(collective)
                    if round_ > 0:  # the first one warms up
                        results.put((model, n, rank, found))
                dist.barrier()  # the others wait here, without a core
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Optimizer time on one rank and on two.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="how many (default: 2)")
    parser.add_argument("--rounds", type=int, default=7, help="intervals of each (default: 7)")
    parser.add_argument("--every", type=int, default=10, help="steps between refreshes")
    parser.add_argument("--max-size", type=int, default=512, help="longest side of a block")
    parser.add_argument("--stagger", action="store_true", help="spread the refreshes")
    return parser.parse_args()


def main() -> None:
    options = parse()
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"{folder}/store", options, results)
        workers = mp.spawn(work, arguments, nprocs=max(options.ranks), join=False)
        count = (1 + sum(options.ranks)) * options.rounds * len(options.models)
        found = [results.get() for _ in range(count)]
        while not workers.join():
            pass
    print(
        f"{'model':<14}{'ranks':>5}{'1 rank':>11}{'all ranks':>12}{'ratio':>8}"
        f"{'own work':>11}{'share':>7}{'gather':>11}{'gathered':>11}"
    )
    for model in options.models:
        for n in options.ranks:
            print(row(n, [result for result in found if result[0] == model]))


def row(ranks: int, results: list[Any]) -> str:
    def of(n: int, rank: int, field: str) -> float:
        mine = [getattr(i, field) for _, ranks, r, i in results if (ranks, r) == (n, rank)]
        return statistics.median(mine)

    single, shared = of(1, 0, "total"), of(ranks, 0, "total")
    work = max(of(ranks, rank, "work") for rank in range(ranks))
    # The rank that has less to do waits in the collective: the smaller time is the transfer's.
    transfer = min(of(ranks, rank, "collective") for rank in range(ranks))
    return (
        f"{results[0][0]:<14}{ranks:>5}{1e3 * single:>8.1f} ms{1e3 * shared:>9.1f} ms"
        f"{shared / single:>8.2f}{1e3 * work:>8.1f} ms{work / of(1, 0, 'work'):>7.2f}"
        f"{1e3 * transfer:>8.1f} ms{of(ranks, 0, 'gathered') / 2**20:>7.1f} MiB"
    )


if __name__ == "__main__":
    main()
