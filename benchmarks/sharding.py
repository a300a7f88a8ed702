"""Measure what sharded parameters cost a step, beside whole ones whose state is shared out.

Processes with one thread each, which talk by gloo over the loopback, have the same transformer
twice: as DTensors of which each holds some rows, as FSDP2 makes them, and whole, as under
DistributedDataParallel, with distribute=sharded. Their steps take turns. Prints, for plain steps
and for refreshes, the median of the slowest rank's time; of a sharded step the time spent putting
pieces into messages and taking them out, and in the two all-to-alls, also as shares; the bytes that
leave a rank; and how long the two all-to-alls take if nothing but them is done, from buffers of
those lengths: what bytes over the loopback's bandwidth come to. Time in a collective is also time
that a rank waits for others: with fewer idle cores than ranks that is most of it. With --overlap
the sharded step is also done with gradients that come in so many portions.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import funshampoo as fs
from benchmarks.ranks import transformer
from funshampoo.distributed import transfer
from funshampoo.distributed.gathering import spreads

WAYS = ("whole", "sharded", "overlap")


class Step(NamedTuple):
    """Seconds of a rank.

    Attributes:
        packing: of the pieces, in and out, on both ways.
        collective: in the two all-to-alls.
        alone: of the two, if nothing else is done.
        sent: bytes that leave the rank.
        pieces: that go through messages.
    """

    total: float
    packing: float = 0.0
    collective: float = 0.0
    alone: float = 0.0
    sent: int = 0
    pieces: int = 0


class Clocks:
    """Times the two ways of `Transfer` and the collective in them."""

    def __init__(self) -> None:
        self.ways, self.collective = 0.0, 0.0
        self.calls: list[tuple[Any, ...]] = []
        transfer.all_to_all_into = self._timed(transfer.all_to_all_into, "collective", True)
        transfer.Transfer.gather = self._timed(transfer.Transfer.gather, "ways")  # type: ignore
        put = transfer.Transfer._put_together
        transfer.Transfer._put_together = self._timed(put, "ways")  # type: ignore
        exchange = transfer.Transfer.exchange_updates
        transfer.Transfer.exchange_updates = self._timed(exchange, "ways")  # type: ignore

    def _timed(self, function: Any, clock: str, notes: bool = False) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            if notes:
                self.calls.append(arguments)
            since = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                setattr(self, clock, getattr(self, clock) + time.perf_counter() - since)

        return timed

    def begin(self) -> None:
        """From nothing."""
        self.ways, self.collective, self.calls = 0.0, 0.0, []


class Job:
    """One of the two ways at work on one rank."""

    def __init__(self, way: str, options: argparse.Namespace) -> None:
        self.way = way
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        portions = options.overlap if way == "overlap" else 1
        in_portions = functools.partial(fs.sharded, whole=False, overlap=portions)
        self.tx = fs.shampoo(
            1e-3,
            every=options.every,
            max_size=options.max_size,
            weight_decay=0.1 if options.decay else 0.0,
            distribute=fs.sharded if way == "whole" else in_portions,
        )
        generator = torch.Generator().manual_seed(0)

        def tree() -> dict[str, Any]:
            found = {n: torch.randn(s, generator=generator) for n, s in transformer().items()}
            if way == "whole":
                return found
            return {n: distribute_tensor(x, mesh, [Shard(0)]) for n, x in found.items()}

        self.params, self.gradients = tree(), [tree() for _ in range(2)]
        self.state = self.tx.init(self.params)
        self.done = 0

    def step(self, clocks: Clocks) -> Step:
        """One step, and its collectives once more, alone."""
        clocks.begin()
        g = self.gradients[self.done % len(self.gradients)]
        dist.barrier()
        since = time.perf_counter()
        self.state = fs.update_in_place(self.tx, g, self.state, self.params)
        total = time.perf_counter() - since
        self.done += 1
        if self.way != "sharded":
            return Step(total)
        packing, collective = clocks.ways - clocks.collective, clocks.collective
        calls = clocks.calls
        dist.barrier()
        since = time.perf_counter()
        for call in calls:
            transfer.all_to_all_into.__wrapped__(*call)  # type: ignore[attr-defined]
        alone = time.perf_counter() - since
        rank, sent = dist.get_rank(), 0
        for _, _, _, splits, _ in calls:
            sent += sum(splits) - splits[rank]
        return Step(total, packing, collective, alone, sent, self.pieces())

    def pieces(self) -> int:
        """How many pieces go through this rank's messages, both ways."""
        (spread,) = spreads(self.tx)
        *_, known = spread.known_parts.values()
        *_, ways = known._step_routes.values()  # of steps, after those of `init`
        routes = [*[incoming.route for incoming in ways.incoming], ways.scatter]
        return sum(len(slots) for route in routes for slots in (*route.out, *route.into))


def work(rank: int, size: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    clocks, results = Clocks(), []
    jobs = [Job(way, options) for way in options.ways]
    for t in range(1, options.rounds * options.every + 1):
        for job in jobs if t % 2 else reversed(jobs):
            found = job.step(clocks)
            if t > options.every:  # the first interval warms up
                kind = "refresh" if t % options.every == 0 else "plain"
                results.append((job.way, kind, t, tuple(found)))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def measured(size: int, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (size, folder, options), nprocs=size)
        found = [r for rank in range(size) for r in torch.load(f"{folder}/{rank}.pt")]
    for kind in ("plain", "refresh"):
        for way in options.ways:
            print(row(size, kind, way, [r for r in found if r[:2] == (way, kind)]))


def row(size: int, kind: str, way: str, results: list[Any]) -> str:
    """Medians over the steps, of the slowest rank's total and the mean over ranks of the rest."""
    steps: dict[int, list[Step]] = {}
    for _, _, t, found in results:
        steps.setdefault(t, []).append(Step(*found))
    total = statistics.median(max(s.total for s in ranks) for ranks in steps.values())
    line = f"{size:<6}{kind:<9}{way:<9}{1e3 * total:>8.1f} ms"
    if way != "sharded":
        return line

    def mean(field: str) -> float:
        each = [statistics.mean(getattr(s, field) for s in ranks) for ranks in steps.values()]
        return statistics.median(each)

    packing, collective = mean("packing"), mean("collective")
    return (
        f"{line}{1e3 * packing:>8.1f} ms{packing / total:>6.0%}{1e3 * collective:>9.1f} ms"
        f"{collective / total:>6.0%}{1e3 * mean('alone'):>8.1f} ms"
        f"{mean('sent') / 2**20:>8.2f} MiB{mean('pieces'):>8.0f}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sharded parameters beside whole ones.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5, help="intervals, of which one warms up")
    parser.add_argument("--every", type=int, default=10, help="steps between refreshes")
    parser.add_argument("--max-size", type=int, default=256, help="longest side of a block")
    parser.add_argument("--decay", action="store_true", help="decay: parameters travel, too")
    parser.add_argument("--overlap", type=int, default=1, help="portions, beside one")
    options = parser.parse_args()
    options.ways = WAYS if options.overlap > 1 else WAYS[:2]
    return options


def main() -> None:
    options = parse()
    print(
        f"{'ranks':<6}{'step':<9}{'way':<9}{'total':>11}{'packing':>11}{'':>6}{'collective':>12}"
        f"{'':>6}{'alone':>11}{'sent':>12}{'pieces':>8}"
    )
    for size in options.ranks:
        measured(size, options)


if __name__ == "__main__":
    main()
