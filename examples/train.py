"""Train a small network with Shampoo, AdamW and Nesterov SGD, and compare them.

Each optimizer is tried at the same learning rates and with the same seeds (which fix the initial
parameters and the order of the batches), and judged at its own best rate. Prints a table; writes a
plot and all numbers beside it. `python examples/train.py --help` lists the options.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import plot
import report
from loops import DEFAULT, LOOPS, RECIPES, join_ranks, leave_ranks, loss_of, share_of
from runs import Point, Run, summarize
from tasks import TASKS, Examples, Task


def train(task: Task, optimizer: str, rate: float, seed: int, loop: str) -> Run:
    """One training run; what a program of your own would have is in loops.py."""
    torch.manual_seed(seed)
    network = task.build_network().to(task.train.inputs.device)
    step_on, predict = LOOPS[loop](network, optimizer, task.schedule(rate, task.steps))
    points: list[Point] = []
    losses: list[Tensor] = []
    seconds, since = 0.0, time.perf_counter()
    batches = itertools.islice(shuffled_batches(task, seed), task.steps)
    for step, batch in enumerate(batches, start=1):
        losses.append(step_on(share_of(batch)))
        if step % task.evaluate_every == 0 or step == task.steps:
            train_loss = torch.stack(losses).mean().item()  # waits for the device
            seconds += time.perf_counter() - since
            with torch.no_grad():
                logits = predict(task.test.inputs)
            test_loss = loss_of(logits, task.test.targets).item()
            accuracy = (logits.argmax(-1) == task.test.targets).float().mean().item()
            points.append(Point(step, train_loss, test_loss, accuracy))
            losses, since = [], time.perf_counter()
    return Run(optimizer, rate, seed, points, milliseconds=1e3 * seconds / task.steps)


def shuffled_batches(task: Task, seed: int) -> Iterator[Examples]:
    """Batches without end; every pass over the examples is in a new order."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same order on every device
    inputs, targets = task.train
    while True:
        order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
        for rows in torch.split(order, task.batch_size):
            if len(rows) == task.batch_size:
                yield Examples(inputs[rows], targets[rows])


def compare(task: Task, optimizers: Sequence[str], loop: str, quiet: bool) -> list[Run]:
    """A run for every rate, seed and optimizer."""
    # torch loads parts of itself at the first gradient, which is nobody's time per step.
    train(replace(task, steps=1), optimizers[0], task.rates[0], seed=0, loop=loop)
    runs = []
    # The optimizers take turns, so that a busy minute of the machine slows all of them alike.
    settings = list(itertools.product(task.rates, range(task.seeds), optimizers))
    with tqdm(settings, unit="run", disable=quiet) as progress:
        for rate, seed, optimizer in progress:
            progress.set_description(f"{optimizer} {rate:g}")
            runs.append(train(task, optimizer, rate, seed, loop))
    return runs


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare optimizers, each at its own best learning rate.",
        epilog="What is not given is the task's own choice: about two minutes on two CPU cores. "
        "Under torchrun each process trains on its share of every batch, and Shampoo's blocks are "
        "shared out.",
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="digits",
        help="digits: handwritten digits, convolutional network (the default); "
        "text: next character of Python's documentation, transformer",
    )
    parser.add_argument("--steps", type=positive, help="training steps of each run")
    parser.add_argument("--seeds", type=positive, help="how many seeds, from 0")
    parser.add_argument("--learning-rates", type=float, nargs="+", metavar="RATE")
    parser.add_argument("--optimizers", choices=RECIPES, nargs="+", default=list(DEFAULT))
    parser.add_argument(
        "--loop",
        choices=LOOPS,
        default="functional",
        help="functional: torch.func and a chain (the default); wrapper: backward() and "
        "funshampoo.Optimizer, with DistributedDataParallel under torchrun",
    )
    parser.add_argument("--device", help="cpu, cuda, ...; by default the GPU if there is one")
    parser.add_argument("--output", type=Path, default=Path("results"), help="default: results/")
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds: few steps, one seed, two rates"
    )
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, ranks = join_ranks(device)
    if device == "cuda" and ranks > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    task = TASKS[options.task]().to(device)
    if task.batch_size % ranks:
        raise SystemExit(f"a batch of {task.batch_size} examples can't be shared by {ranks} ranks")
    if options.quick:
        task = replace(task, steps=30, seeds=1, rates=(0.01, 0.1))
    task = replace(
        task,
        steps=options.steps or task.steps,
        seeds=options.seeds or task.seeds,
        rates=tuple(sorted(options.learning_rates or task.rates)),
    )
    # Networks this small gain little from more, and so sums don't depend on the number of cores.
    torch.set_num_threads(1)
    runs = compare(task, options.optimizers, options.loop, quiet=rank > 0)
    leave_ranks()
    if rank > 0:  # all ranks have the same
        return
    results = summarize(task, runs)
    print(report.table(task, results))
    options.output.mkdir(parents=True, exist_ok=True)
    picture, numbers = (options.output / f"{task.name}.{suffix}" for suffix in ("png", "json"))
    plot.save(task, results, picture)
    report.write_numbers(task, results, numbers)
    print(f"\nwrote {picture} and {numbers}")


if __name__ == "__main__":
    main()
