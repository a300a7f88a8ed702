"""Every scheduler of torch.optim.lr_scheduler: what it writes is what the next step uses.

The rates are those that the same scheduler gives to a plain torch.optim.SGD or AdamW; the
functional loop builds a new transformation with them for every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import funshampoo as fs
from tests.optim.runs import (
    ADAMW,
    BARE,
    EVERYTHING,
    REFERENCE,
    SGD,
    SHAMPOO,
    Method,
    assert_same,
    functional,
    grads_of,
    name_of,
    parameters,
)

STEPS = 9


def _sequential(o: Any) -> Any:
    first = lr_scheduler.LinearLR(o, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(o, [first, lr_scheduler.ExponentialLR(o, 0.8)], [3])


def _chained(o: Any) -> Any:
    parts = [lr_scheduler.LinearLR(o, 0.5, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer=o)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    # 0 and 1 are values at which a recipe might leave a part out
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: [0, 1, 1.0 / 0.05, 0.3][min(t, 3)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS, 2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "CyclicLR_rate_only": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "OneCycleLR_rate_only": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=STEPS + 1, cycle_momentum=False
    ),
    "ChainedScheduler": _chained,
    "SequentialLR": _sequential,
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=5),
}
CYCLES_MOMENTUM = {"CyclicLR", "OneCycleLR"}
LOSSES = [1.0, 0.9, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0, 1.1]


def _advance(scheduler: Any, step: int) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(LOSSES[step])
    else:
        scheduler.step()


def _rates(method: Method, scheduler_name: str) -> list[dict[str, Any]]:
    """The hyperparameters of every step, from an optimizer of torch under the same scheduler."""
    dummy = torch.nn.Parameter(torch.zeros(1))
    lr = method.options["lr"]
    names = ["lr"]
    if method is SGD:
        twin: Any = torch.optim.SGD([dummy], lr=lr, momentum=method.options["momentum"])
        names += ["momentum"]
    else:
        twin = torch.optim.AdamW([dummy], lr=lr, betas=method.options.get("betas", (0.9, 0.99)))
        names += ["betas"] if scheduler_name in CYCLES_MOMENTUM else []
    scheduler = SCHEDULERS[scheduler_name](twin)
    found = []
    for step in range(STEPS):
        found.append({name: twin.param_groups[0][name] for name in names})
        twin.step()
        _advance(scheduler, step)
    return found


def _cases() -> list[Any]:
    methods = {name: [SGD] for name in SCHEDULERS}
    methods |= {name: [SHAMPOO, SGD, BARE] for name in ("LambdaLR", "CosineAnnealingLR", "SWALR")}
    methods |= {name: [SHAMPOO, EVERYTHING, SGD, ADAMW, REFERENCE] for name in CYCLES_MOMENTUM}
    return [
        pytest.param(name, method, id=f"{name}-{name_of(method)}")
        for name in SCHEDULERS
        for method in methods[name]
    ]


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # 2.8's SequentialLR passes it itself
@pytest.mark.parametrize(("scheduler_name", "method"), _cases())
def test_takes_effect_at_the_next_step(scheduler_name: str, method: Method) -> None:
    params, grads = parameters(), grads_of(STEPS)
    rates = _rates(method, scheduler_name)
    assert len({str(r) for r in rates}) > 1  # something is scheduled
    expected, _ = functional(
        [(method.transformation(**r), g) for r, g in zip(rates, grads)], params
    )
    optimizer = method.optimizer(params.items())
    scheduler = SCHEDULERS[scheduler_name](optimizer)
    for step, g in enumerate(grads):
        for name, p in params.items():
            p.grad = g[name].clone()
        optimizer.step()
        _advance(scheduler, step)
    assert_same(params, expected)


def test_a_tensor_that_the_scheduler_writes_to_takes_effect() -> None:
    """torch's schedulers fill a tensor rate in place; the chain may have negated the old value."""
    params, grads = parameters(), grads_of(STEPS)
    optimizer = SHAMPOO.optimizer(params.items(), lr=torch.tensor(0.05, dtype=torch.float64))
    scheduler = lr_scheduler.StepLR(optimizer, 2, 0.5)
    rate = optimizer.param_groups[0]["lr"]
    for g in grads:
        for name, p in params.items():
            p.grad = g[name].clone()
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    steps = [(SHAMPOO.transformation(lr=0.05 * 0.5 ** (t // 2)), g) for t, g in enumerate(grads)]
    assert_same(params, _from_start(steps), 1e-14)


def _from_start(steps: Any) -> dict[str, torch.Tensor]:
    return functional(steps, parameters())[0]


@pytest.mark.parametrize("kind", ["INDEPENDENT", "CORRECTED"])
def test_decay_of_the_reference_divides_by_the_first_rate(kind: str) -> None:
    """peak_lr=None means the constructor's lr, whatever a scheduler makes of lr later.

    Resumed in the middle, by an optimizer that was made with another lr.
    """
    params, grads = parameters(), grads_of(6)
    options = {"weight_decay": 0.1, "weight_decay_type": kind}
    saved: list[dict[str, Any]] = []
    for t, g in enumerate(grads):
        if t in (0, 3):
            optimizer = REFERENCE.optimizer(params.items(), **options, lr=0.05 - 0.01 * t)
            scheduler = lr_scheduler.ExponentialLR(optimizer, 0.7)
            for resumed, before in zip((optimizer, scheduler), saved):
                resumed.load_state_dict(before)
        for name, p in params.items():
            p.grad = g[name].clone()
        optimizer.step()
        scheduler.step()
        saved = [optimizer.state_dict(), scheduler.state_dict()]
    changes = [
        (REFERENCE.transformation(lr=0.05 * 0.7**t, peak_lr=0.05, **options), g)
        for t, g in enumerate(grads)
    ]
    assert_same(params, _from_start(changes), 1e-14)


@pytest.mark.parametrize("given", [{}, {"initial_lr": 0.06}, {"lr": 0.06, "initial_lr": 0.03}])
def test_a_look_ahead_follows_the_rate_from_the_first_one_on(given: dict[str, float]) -> None:
    """initial_lr, too, is the constructor's lr: a scheduler leaves what is there as it is."""
    options = {"lr": 0.03, **given}
    first = options.get("initial_lr", options["lr"])
    grads = list(torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(0)).double())
    w, ends = torch.nn.Parameter(grads[0].clone()), [grads[0]]
    method = functools.partial(fs.from_published, "SOAP-Muon + EMA-Nesterov")
    optimizer = fs.Optimizer([w], method, **options)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.7)
    tx = method(lr=lambda count: options["lr"] * 0.7 ** count.double(), initial_lr=first)
    state = tx.init(ends)
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
        scheduler.step()
        updates, state = tx.update([g], state, ends)
        ends = fs.apply_updates(ends, updates)
    torch.testing.assert_close(w.detach(), ends[0], rtol=0, atol=1e-12)


def test_a_schedule_as_lr_is_an_error_that_names_schedulers() -> None:
    with pytest.raises(TypeError, match=r"lr is a function.*lr_scheduler"):
        fs.Optimizer(parameters().values(), fs.shampoo, lr=lambda t: 0.1)
