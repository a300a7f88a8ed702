"""The diagonal methods against torch.optim, in float64, to 1e-12 of the largest update."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch

import funshampoo as fs
from tests.trees import gradients, problem, tensors, train

STEPS = 40


def with_torch(make: Any) -> list[torch.Tensor]:
    params = [torch.nn.Parameter(p.clone()) for p in tensors(problem())]
    optimizer = make(params)
    for grads in gradients(STEPS):
        for p, g in zip(params, tensors(grads)):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


def rmsprop(lr: float, beta2: float, epsilon: float) -> fs.GradientTransformation:
    return fs.chain(fs.scale_by_rms(beta2, epsilon), fs.scale_by_learning_rate(lr))


def adagrad(lr: float, epsilon: float, start: float) -> fs.GradientTransformation:
    scaling = fs.scale_by_adagrad(epsilon, initial_accumulator=start)
    return fs.chain(scaling, fs.scale_by_learning_rate(lr))


optim = torch.optim
PAIRS = [
    ("adamw", fs.adamw(1e-2), lambda p: optim.AdamW(p, lr=1e-2)),
    (
        "adamw_options",
        fs.adamw(1e-2, beta1=0.8, beta2=0.95, epsilon=1e-3, weight_decay=0.3),
        lambda p: optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3),
    ),
    (
        "adam",
        fs.chain(fs.scale_by_adam(), fs.scale_by_learning_rate(1e-2)),
        lambda p: optim.Adam(p, lr=1e-2),
    ),
    ("sgd", fs.sgd(0.1), lambda p: optim.SGD(p, lr=0.1)),
    ("momentum", fs.sgd(0.1, momentum=0.9), lambda p: optim.SGD(p, lr=0.1, momentum=0.9)),
    (
        "nesterov",
        fs.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    (
        "dampening",
        fs.sgd(0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    ),
    (
        "rmsprop",
        rmsprop(1e-2, 0.97, 1e-5),
        lambda p: optim.RMSprop(p, lr=1e-2, alpha=0.97, eps=1e-5),
    ),
    ("adagrad", adagrad(1e-2, 1e-10, 0.0), lambda p: optim.Adagrad(p, lr=1e-2)),
    (
        "adagrad_start",
        adagrad(1e-2, 1e-6, 0.5),
        lambda p: optim.Adagrad(p, lr=1e-2, eps=1e-6, initial_accumulator_value=0.5),
    ),
]


@pytest.mark.parametrize(("name", "tx", "make"), PAIRS, ids=[name for name, _, _ in PAIRS])
@pytest.mark.parametrize("in_blocks", [False, True], ids=["leaves", "blocks"])
def test_agrees_with_torch_optim(
    name: str, tx: fs.GradientTransformation, make: Any, in_blocks: bool
) -> None:
    if in_blocks:
        tx = fs.blocked(tx, 4, with_params=True)
    ours, history, _ = train(tx, problem(), gradients(STEPS), fs.apply_updates)
    largest = max(float(u.abs().max()) for u in tensors(history))
    for a, b in zip(tensors(ours), with_torch(make)):
        assert float((a - b).abs().max()) <= 1e-12 * largest


@pytest.mark.parametrize("name", ["cosine", "step"])
def test_a_schedule_is_a_scheduler_of_torch(name: str) -> None:
    params = [torch.nn.Parameter(p.clone()) for p in tensors(problem())]
    optimizer = torch.optim.SGD(params, lr=0.1)
    schedulers = torch.optim.lr_scheduler
    if name == "cosine":
        scheduler: Any = schedulers.CosineAnnealingLR(optimizer, T_max=STEPS, eta_min=0.01)
        schedule: Any = fs.schedules.cosine(0.1, STEPS, end=0.01)
    else:
        scheduler = schedulers.StepLR(optimizer, step_size=7, gamma=0.5)
        schedule = lambda count: 0.1 * 0.5 ** (count // 7)  # noqa: E731
    for grads in gradients(STEPS):
        for p, g in zip(params, tensors(grads)):
            p.grad = g.clone()
        optimizer.step()
        scheduler.step()
    ours, history, _ = train(fs.sgd(schedule), problem(), gradients(STEPS), fs.apply_updates)
    largest = max(float(u.abs().max()) for u in tensors(history))
    for a, b in zip(tensors(ours), [p.detach() for p in params]):
        assert float((a - b).abs().max()) <= 1e-6 * largest  # the rate is float32


def test_the_fixture_is_not_trivial() -> None:
    assert len(optree.tree_leaves(problem())) == 6
    assert all(float(g.abs().min()) > 0 for g in tensors(gradients(STEPS)))
