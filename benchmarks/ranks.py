"""Measure what sharing Shampoo's blocks over two processes saves of the optimizer's time.

Two processes with one thread each, which talk by gloo over the loopback. One rank and two take
turns, an interval between refreshes at a time, so that a busy moment of the machine slows both; the
second process sleeps while the first works alone. Prints, for each model, the optimizer's time per
step (mean of an interval with its refresh, median of the intervals) on one rank and on two; and of
a step on two, the time outside the collective (of the rank that has more to do), inside it (of the
rank that waits less), and the bytes that it gathers.
`python benchmarks/ranks.py --help` lists the options. It needs two idle cores.
"""

from __future__ import annotations

import argparse
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
from funshampoo.distributed.shapes import model_shapes

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
    """Seconds per step, means over an interval; bytes gathered by a step."""

    total: float
    collective: float
    gathered: int


class Collective:
    """Times `all_gather_into_tensor`, by whichever name this release of torch has."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0
        name = "all_gather_single" if hasattr(dist, "all_gather_single") else None
        self._name = name or "all_gather_into_tensor"
        self._original = getattr(dist, self._name)
        setattr(dist, self._name, self)

    def __call__(self, output: Tensor, shard: Tensor, **keywords: Any) -> None:
        """Gather, and count."""
        since = time.perf_counter()
        self._original(output, shard, **keywords)
        self.seconds += time.perf_counter() - since
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
        collective.seconds, collective.bytes = 0.0, 0
        since = time.perf_counter()
        for _ in range(self.every):
            g = self.gradients[self.done % len(self.gradients)]
            updates, self.state = self.tx.update(g, self.state, self.params, donate=True)
            self.params = fs.apply_updates(self.params, updates)
            self.done += 1
        seconds = time.perf_counter() - since
        steps = self.every
        return Interval(seconds / steps, collective.seconds / steps, collective.bytes // steps)


def work(rank: int, store: str, options: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    collective = Collective()
    for model in options.models:
        shapes = MODELS[model]()
        alone = Job(shapes, None, options) if rank == 0 else None
        shared = Job(shapes, fs.sharded, options)
        for round_ in range(options.rounds + 1):
            single = alone.interval(collective) if alone else None
            dist.barrier()  # the other waits here, without a core
            both = shared.interval(collective)
            dist.barrier()
            if round_ > 0:  # the first one warms up
                results.put((model, rank, single, both))
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Optimizer time on one rank and on two.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7, help="intervals of each (default: 7)")
    parser.add_argument("--every", type=int, default=10, help="steps between refreshes")
    parser.add_argument("--max-size", type=int, default=512, help="longest side of a block")
    parser.add_argument("--stagger", action="store_true", help="spread the refreshes")
    return parser.parse_args()


def main() -> None:
    options = parse()
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        workers = mp.spawn(work, (f"{folder}/store", options, results), nprocs=2, join=False)
        count = 2 * options.rounds * len(options.models)
        found = [results.get() for _ in range(count)]
        while not workers.join():
            pass
    print(
        f"{'model':<14}{'1 rank':>10}{'2 ranks':>10}{'ratio':>7}"
        f"{'own work':>11}{'gather':>10}{'gathered':>11}"
    )
    for model in options.models:
        print(row(model, [result for result in found if result[0] == model]))


def row(model: str, results: list[Any]) -> str:
    single = statistics.median(s.total for _, rank, s, _ in results if rank == 0)
    ranks = [[both for _, rank, _, both in results if rank == r] for r in (0, 1)]
    shared = statistics.median(b.total for b in ranks[0])
    # The rank that has less to do waits in the collective: the smaller time is the transfer's.
    work = max(statistics.median(b.total - b.collective for b in mine) for mine in ranks)
    transfer = min(statistics.median(b.collective for b in mine) for mine in ranks)
    return (
        f"{model:<14}{1e3 * single:>7.1f} ms{1e3 * shared:>7.1f} ms{shared / single:>7.2f}"
        f"{1e3 * work:>8.1f} ms{1e3 * transfer:>7.1f} ms{ranks[0][0].gathered / 2**20:>7.1f} MiB"
    )


if __name__ == "__main__":
    main()
