"""Measure what blocks cost on this machine, and fit the weights of `CostModel`.

Times the products, the roots and the elementwise stages apart, on stacks of blocks of many shapes,
then whole steps of Shampoo, which the fit has not seen. Prints measured against modelled and the
line to paste into funshampoo/distributed/cost.py, or to pass as `cost=`. On a CPU it uses one
thread. `python benchmarks/cost_model.py --help` lists the options.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import funshampoo as fs
from funshampoo.distributed.cost import CostModel
from funshampoo.operators.leaf_ops import add_gram
from funshampoo.operators.mode_products import precondition, unfold
from funshampoo.plan.planner import plan

Block = tuple[int, ...]

PRODUCTS: list[Block] = [
    (64, 64),
    (128, 128),
    (256, 256),
    (512, 512),
    (1024, 1024),
    (64, 147),
    (64, 1024),
    (1024, 256),
    (1024, 8),
    (128, 128, 9),
    (512, 512, 9),
    (64,),
    (256,),
    (1024,),
]
ROOTS = [8, 16, 32, 64, 128, 256, 512, 768, 1024]
ELEMENTWISE = [64, 128, 256, 512, 1024]
STEPS: list[tuple[Block, int]] = [
    ((2048, 1024), 128),
    ((2048, 1024), 256),
    ((2048, 2048), 1024),
    ((256, 256, 3, 3), 1024),
    ((8192,), 1024),
]


class Case(NamedTuple):
    """Something to time: `run` does `number` times what `model` gives the seconds of."""

    kind: str
    name: str
    number: int
    run: Callable[[], object]
    model: Callable[[CostModel], float]


def product_case(block: Block, device: torch.device) -> Case:
    """Statistics of every side and both applications of the roots, as the stages do them."""
    largest = max(math.prod(block), sum(d * d for d in block))
    count = max(2, 2**21 // largest)
    x = random((count, *block), device)
    factors = [random((count, d, d), device) for d in block]

    def run() -> None:
        for side, factor in enumerate(factors):
            add_gram(factor, unfold(x, side, 1), 0.99, 0.01, donate=True)
        precondition(x, factors, 1)

    def model(cost: CostModel) -> float:
        factor_elements = sum(d * d for d in block)
        return cost.per_factor_element * factor_elements + cost.products(block)

    return Case("products", name_of(block), count, run, model)


def root_case(d: int, device: torch.device) -> Case:
    """The default solver, with its estimate of the residual, on a decaying spectrum.

    The eigenvectors are in general position: LAPACK is up to 20 % faster where they are axes.
    """
    count = max(1, min(256, 2**18 // d**2))
    scales = torch.logspace(0, -3, d, device=device)
    x = random((count, d, d), device) * scales
    A = x @ x.mT
    solve = fs.linalg.eigh(relative_epsilon=1e-6)
    return Case("roots", f"{d}", count, lambda: solve(A, 4, 0.0), lambda cost: cost.root(d))


def elementwise_case(size: int, device: torch.device) -> Case:
    """A whole step with all sides left alone: copies, filter, grafting, learning rate."""
    params = {"w": random((2048, 1024), device)}
    tx = fs.shampoo(1e-3, max_size=size, exponents={2: 0.0})
    return Case(
        "elementwise",
        f"2048x1024 at {size}",
        params["w"].numel(),
        stepper(tx, params, refresh=False),
        lambda cost: cost.per_element,
    )


def step_case(shape: Block, size: int, refresh: bool, device: torch.device) -> Case:
    """A whole step of Shampoo. The fit does not see it."""
    params = {"w": random(shape, device)}
    tx = fs.shampoo(1e-3, max_size=size, vectors="blocks")
    stacks = plan({"w": shape}, world_size=1, max_size=size).stacks.values()

    def model(cost: CostModel) -> float:
        return sum(
            stack.rows
            * (
                cost.memory(stack.block)
                + cost.products(stack.block)
                + (cost.roots(stack.block) if refresh else 0.0)
            )
            for stack in stacks
        )

    kind = "step with refresh" if refresh else "step"
    name = f"{name_of(shape)} at {size}"
    return Case(kind, name, 1, stepper(tx, params, refresh), model)


def stepper(
    tx: fs.GradientTransformation, params: dict[str, Tensor], refresh: bool
) -> Callable[[], None]:
    """A function that makes a step with fresh parameters, as a training loop would."""
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    state = tx.init(params)

    def run() -> None:
        nonlocal state
        updates, state = tx.update(grads, state, params, refresh=refresh, donate=True)
        fs.apply_updates(params, updates)

    return run


def random(shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def name_of(shape: Block) -> str:
    return "x".join(map(str, shape))


def measure(cases: Sequence[Case], repeats: int, device: torch.device) -> list[float]:
    """Median seconds of every case's unit. Rounds over all cases, so that drift hits all alike."""
    times: list[list[float]] = [[] for _ in cases]
    rounds = itertools.product(range(repeats + 1), range(len(cases)))
    total = (repeats + 1) * len(cases)
    for i, k in tqdm(rounds, total=total, desc="measuring", unit="run", dynamic_ncols=True):
        synchronize(device)
        start = time.perf_counter()
        cases[k].run()
        synchronize(device)
        if i > 0:  # the first round warms up
            times[k].append(time.perf_counter() - start)
    return [statistics.median(t) / case.number for t, case in zip(times, cases)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fit(
    cases: Sequence[Case], seconds: Sequence[float], weights: Sequence[str]
) -> dict[str, float]:
    """The weights, none negative, with the least sum of squared relative errors.

    The model is linear in its weights, so a column of the design is the model with one weight at 1
    and the others at 0. Few enough weights to solve for each subset that may be positive.
    """
    columns = [[case.model(unit_model(name)) for case in cases] for name in weights]
    design = np.array(columns).T / np.array(seconds)[:, None]
    best, least = np.zeros(len(weights)), math.inf
    for chosen in itertools.product([False, True], repeat=len(weights)):
        if not any(chosen):
            continue
        kept = np.array(chosen)
        solution = np.zeros(len(weights))
        solution[kept] = np.linalg.lstsq(design[:, kept], np.ones(len(cases)))[0]
        error = float(np.sum((design @ solution - 1) ** 2))
        if (solution >= 0).all() and error < least:
            best, least = solution, error
    return dict(zip(weights, map(float, best)))


def unit_model(weight: str) -> CostModel:
    names = CostModel.__dataclass_fields__
    return CostModel(**{name: float(name == weight) for name in names})


def fit_all(cases: Sequence[Case], seconds: Sequence[float]) -> CostModel:
    """Each kind of case decides on its own weights."""
    owners = {
        "elementwise": ["per_element"],
        "products": ["per_factor_element", "per_flop"],
        "roots": ["root_cubic", "root_quadratic", "root_constant"],
    }
    weights: dict[str, float] = {}
    for kind, names in owners.items():
        chosen = [i for i, case in enumerate(cases) if case.kind == kind]
        weights |= fit([cases[i] for i in chosen], [seconds[i] for i in chosen], names)
    return CostModel(**{name: float(f"{value:.3g}") for name, value in weights.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (one thread) or cuda; default: cpu")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs a case; default: 5")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)

    cases = [product_case(block, device) for block in PRODUCTS]
    cases += [root_case(d, device) for d in ROOTS]
    cases += [elementwise_case(size, device) for size in ELEMENTWISE]
    for refresh, (shape, size) in itertools.product([False, True], STEPS):
        cases.append(step_case(shape, size, refresh, device))
    seconds = measure(cases, options.repeats, device)
    cost = fit_all(cases, seconds)

    print(f"{'':18} {'blocks':>18} {'measured µs':>12} {'modelled µs':>12} {'ratio':>6}")
    for case, measured in zip(cases, seconds):
        modelled = case.model(cost)
        print(
            f"{case.kind:18} {case.name:>18} {1e6 * measured:12.4g} {1e6 * modelled:12.4g} "
            f"{modelled / measured:6.2f}"
        )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread"
    print(f"\n{where}, torch {torch.__version__}:\n{cost}")


if __name__ == "__main__":
    main()
