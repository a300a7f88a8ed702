"""What the optimizer's step alone takes on a task: processor time and bytes, methods in turns."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.func import grad

import funshampoo as fs
from benchmarks.ensemble import Task, loss_of
from benchmarks.run import Others, processor
from benchmarks.study import Entry, Store

RATE = 0.001
GRADIENTS = 10
STEPS, ROUNDS = 100, 3


def measure(store: Store, task: Task, entries: Mapping[str, Entry], quick: bool) -> None:
    """Add them to the file, with where that was, and how many cores were others' meanwhile.

    All of them where one is missing, since only what took turns can be compared.
    """
    if not entries.keys() <= store.costs(task.name).keys():
        others = Others()
        lines = list(costs(task, entries, *((2, 1) if quick else (STEPS, ROUNDS))))
        where = {"where": machine(), "others": others.cores()}
        store.add({"task": task.name, **line, **where} for line in lines)


def machine() -> str:
    """What the numbers depend on besides the code."""
    return f"{processor(torch.device('cpu'))}, torch {torch.__version__}"


def costs(
    task: Task, entries: Mapping[str, Entry], steps: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """{"ms", "bytes"} of each method, and of the gradient, whose name is "".

    Milliseconds a step are the mean over `steps`, refreshes included, of the quickest round. It is
    processor time, of all threads, since others use the machine.
    """
    params = task.start(0)
    loss = loss_of(task, task.build())
    batches = [[part[rows] for part in task.train] for rows in task.order(0)[:GRADIENTS]]
    gradients = [grad(loss)(params, x, y) for x, y in batches]
    least: dict[str, float] = {}

    def note(name: str, began: float, count: int) -> None:
        spent = 1e3 * (time.process_time() - began) / count
        least[name] = min(spent, least.get(name, spent))

    for _ in range(rounds):
        began = time.process_time()
        for x, y in batches:
            grad(loss)(params, x, y)
        note("", began, len(batches))
        for name, entry in entries.items():
            tx = entry.method(RATE, task)
            own = {key: p.clone() for key, p in params.items()}
            state = fs.update_in_place(tx, gradients[-1], tx.init(own), own)  # what is done once
            began = time.process_time()
            for t in range(steps):
                state = fs.update_in_place(tx, gradients[t % len(gradients)], state, own)
            note(name, began, steps)
    yield {"method": "", "ms": round(least[""], 3)}
    for name, entry in entries.items():
        state = entry.method(RATE, task).init(params)
        size = fs.state.summary(state, file=io.StringIO()).total
        yield {"method": name, "ms": round(least[name], 3), "bytes": size}
