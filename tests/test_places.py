"""Stages out of their place, which would do nothing, or something else than they say: refused.

By their `traits`, when a chain or combinator is built. Each case was silent before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import funshampoo as fs
from tests.trees import problem

Made = Callable[[], fs.GradientTransformation]


def every_leaf(label: str) -> dict[str, str]:
    return {"w": label, "layers": label}


def statistics_and(*stages: fs.GradientTransformation) -> fs.GradientTransformation:
    return fs.chain(fs.kronecker_statistics(0.9), *stages)


def user_stage() -> fs.GradientTransformation:
    return fs.stateless(lambda updates: updates, "mine")  # says nothing of what it does


def monitor() -> fs.GradientTransformation:
    """A stage of one's own that reads lengths, in averages, and changes nothing."""

    def update(updates: Any, state: Any, params: Any) -> Any:
        return updates, {"length": torch.lerp(state["length"], fs.global_norm(updates), 0.1)}

    return fs.GradientTransformation(
        lambda params: {"length": torch.zeros(()).double()}, update, "monitor", passes=True
    )


LAST = {
    "stochastic_rounding": fs.stochastic_rounding,
    "tail_average": fs.tail_average,
    "ema_nesterov": lambda: fs.ema_nesterov(0.5),
    "schedule_free": lambda: fs.schedule_free(0.1),
    "primal_average": lambda: fs.primal_average(0.1, average=0.5, interpolation=0.5),
}
WITHIN: dict[str, Callable[[fs.GradientTransformation], fs.GradientTransformation]] = {
    "graft": lambda tx: fs.graft(tx, onto=fs.scale_by_sgd()),
    "graft, onto": lambda tx: fs.graft(fs.sign(), onto=tx),
    "in_eigenbasis": lambda tx: statistics_and(fs.in_eigenbasis(tx)),
    "cautious": fs.cautious,
    "blend_towards": fs.blend_towards,
    "chain": lambda tx: fs.chain(tx, fs.scale(0.5)),
    "chain, nested": lambda tx: fs.chain(fs.chain(tx), fs.guarded(fs.clip(1.0))),
    "chain, a stage of one's own": lambda tx: fs.chain(tx, user_stage()),
}
HANDED_ON: dict[str, Callable[[fs.GradientTransformation], fs.GradientTransformation]] = {
    "as it is": lambda tx: tx,
    "guarded": fs.guarded,
    "masked": lambda tx: fs.masked(tx, {"w": True, "layers": False}),
    "partition": lambda tx: fs.partition({"a": tx}, every_leaf("a")),
    "sharded": fs.sharded,
    "multi_steps": lambda tx: fs.multi_steps(tx, 2),
    "inject_hyperparams": lambda tx: fs.inject_hyperparams(lambda: tx)(),
}


@pytest.mark.parametrize("handed_on", HANDED_ON)
@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("name", LAST)
def test_what_has_to_come_last(name: str, within: str, handed_on: str) -> None:
    """Rounding was rounded again, to nearest; averages were those of weights that never were."""
    stage = HANDED_ON[handed_on](LAST[name]())
    stage.init(problem())
    with pytest.raises(ValueError, match=rf"{name}.*(put|Put)"):
        WITHIN[within](stage)


ROOTS = fs.root_inverse(1)
STEP = fs.scale_by_learning_rate(0.1)
OTHER: dict[str, tuple[Made, str]] = {
    "a decay behind the rate": (
        lambda: fs.chain(STEP, fs.add_decayed_weights(0.1)),
        r"add_decayed_weights stands behind scale_by_learning_rate.*before it, or scale\(-1.0\)",
    ),
    "a masked decay behind a recipe": (
        lambda: fs.chain(fs.soap(0.1), fs.add_decayed_weights(0.1, {"w": True, "layers": False})),
        "add_decayed_weights stands behind scale_by_learning_rate",
    ),
    "a decay behind the rate of some": (
        lambda: fs.chain(fs.masked(STEP, {"w": True, "layers": False}), fs.radial_brake()),
        "radial_brake stands behind scale_by_learning_rate",
    ),
    "a cautious decay": (
        lambda: fs.chain(STEP, fs.clip(1.0), fs.add_cautious_decay(0.1)),
        "add_cautious_decay stands behind scale_by_learning_rate",
    ),
    "a brake": (lambda: fs.chain(STEP, fs.radial_brake()), "radial_brake stands behind"),
    "two rates": (
        lambda: fs.chain(fs.adamw(0.1), fs.scale_by_learning_rate(1.0)),
        "scale_by_learning_rate stands behind scale_by_learning_rate",
    ),
    "two recipes": (lambda: fs.chain(fs.soap(0.1), fs.muon(0.1)), "stands behind"),
    "a rate of every label": (
        lambda: fs.chain(fs.partition({"a": fs.sgd(0.1)}, every_leaf("a")), fs.hyperball(0.1)),
        "hyperball stands behind",
    ),
    "a recipe in every_k": (lambda: fs.every_k(fs.adamw(0.1), 2), "uphill. multi_steps"),
    "rounding in every_k": (lambda: fs.every_k(fs.stochastic_rounding(), 2), "behind every_k"),
    "rounding in a combinator of one's own": (
        lambda: fs.wrapping(fs.stochastic_rounding(), lambda run, u, own: (run(u), own), name="m"),
        r"m\(...\) with stochastic_rounding\(...\) in it: .*put it behind m\(...\)",
    ),
    "a recipe as a direction": (
        lambda: fs.blend_towards(fs.adamw(0.1), 0.5),
        r"turns them round: .*chain\(blend_towards\(scale_by_adam\(\)\), scale_by_learning_rate",
    ),
    "a cautious part": (
        lambda: fs.cautious(fs.masked(fs.adamw(0.1), {"w": True, "layers": False})),
        "turns them round",
    ),
    "one step and one direction": (
        lambda: fs.graft(ROOTS, onto=fs.adamw(0.1), start=5),
        "one of direction and onto scales by the learning rate",
    ),
    "statistics in eigenbases": (
        lambda: statistics_and(fs.in_eigenbasis(statistics_and(fs.scale_by_adam()))),
        r"in_eigenbasis\(...\) with kronecker_statistics\(...\) in it: .*outside",
    ),
    "statistics on some steps there": (
        lambda: statistics_and(fs.in_eigenbasis(fs.kronecker_statistics(0.9, every=2))),
        r"in_eigenbasis\(...\) with kronecker_statistics",
    ),
    "roots in eigenbases": (
        lambda: statistics_and(fs.in_eigenbasis(fs.masked(ROOTS, True))),
        r"in_eigenbasis\(...\) with root_inverse",
    ),
    "eigenbases in eigenbases": (
        lambda: statistics_and(fs.in_eigenbasis(fs.in_eigenbasis(fs.sign()))),
        r"in_eigenbasis\(...\) with in_eigenbasis",
    ),
    "blocks in eigenbases": (
        lambda: statistics_and(fs.in_eigenbasis(fs.blocked(fs.trace(0.9)))),
        r"in_eigenbasis\(...\) with blocked",
    ),
    "parameters in eigenbases": (
        lambda: statistics_and(fs.in_eigenbasis(fs.chain(fs.sign(), fs.add_decayed_weights(0.1)))),
        r"in_eigenbasis\(...\) with add_decayed_weights\(...\) in it: .*put it behind",
    ),
    "a norm of all leaves on ranks": (
        lambda: fs.sharded(fs.chain(fs.clip_by_global_norm(1.0), fs.scale_by_adam())),
        r"sharded\(...\) with clip_by_global_norm\(...\) in it: .*before or behind",
    ),
    "gradients of all leaves on ranks": (
        lambda: fs.sharded(fs.multi_steps(fs.scale_by_adam(), 2)),
        r"sharded\(...\) with multi_steps\(...\) in it: ",
    ),
    "a guard of all leaves on ranks": (
        lambda: fs.sharded(fs.chain(fs.guarded(fs.scale_by_adam()), STEP)),
        r"sharded\(...\) with guarded\(...\) in it: .*by_leaf=True",
    ),
    "moments behind a mean of gradients": (
        lambda: fs.chain(fs.multi_steps(fs.clip(1.0), 4), fs.adamw(0.1)),
        r"'chain' stands behind multi_steps, .*put it into multi_steps\(chain",
    ),
    "a decay behind a mean of gradients": (
        lambda: fs.chain(fs.masked(fs.multi_steps(fs.sign(), 4), True), fs.add_decayed_weights(1)),
        "'add_decayed_weights' stands behind multi_steps",
    ),
    "a norm of all blocks in tiles": (
        lambda: fs.blocked(fs.clip_by_global_norm(1.0), tile="auto"),
        r"blocked\(...\) with clip_by_global_norm\(...\) in it: .*before or behind",
    ),
    "an average of hidden weights": (
        lambda: fs.blocked(fs.tail_average(), with_params={"w": True, "layers": False}),
        r"blocked\(...\) with tail_average\(...\) in it: .*zeros",
    ),
    "eigenvalues without bases": (
        lambda: fs.chain(
            fs.kl_statistics(), fs.guarded(fs.scale_by_eigenvalues()), fs.in_eigenbasis(fs.sign())
        ),
        r"scale_by_eigenvalues is for coordinates in eigenbases: put it into in_eigenbasis",
    ),
    "statistics in both branches": (
        lambda: fs.chain(fs.graft(statistics_and(ROOTS), statistics_and(ROOTS)), ROOTS),
        "root_inverse found factor matrices in both branches of the graft",
    ),
    "statistics in both, for bases": (
        lambda: statistics_and(
            fs.guarded(fs.graft(statistics_and(ROOTS), statistics_and(ROOTS))),
            fs.in_eigenbasis(fs.sign()),
        ),
        "in_eigenbasis found factor matrices in both branches of the graft",
    ),
    "the length of hidden weights": (
        lambda: fs.blocked(fs.adaptive_clip(), with_params=lambda p: p),
        r"blocked\(...\) with adaptive_clip\(...\) in it: .*zeros",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_belongs_elsewhere(name: str) -> None:
    make, message = OTHER[name]
    with pytest.raises(ValueError, match=message):
        make().init(problem())


IN_PLACE: dict[str, Made] = {
    "turned back": lambda: fs.chain(
        fs.soap(0.1), fs.scale(-1.0), fs.primal_average(1.0, average=0.0, interpolation=0.0)
    ),
    "turned back inside": lambda: fs.chain(
        fs.soap(0.1), fs.chain(fs.scale(-1.0), fs.schedule_free(1.0))
    ),
    "by a tensor": lambda: fs.chain(STEP, fs.scale(torch.tensor(-1.0)), STEP),
    "a second factor": lambda: fs.chain(STEP, fs.scale_by_learning_rate(0.5, flip_sign=False)),
    "a rate for some and one for others": lambda: fs.chain(
        fs.masked(fs.adamw(0.1), {"w": True, "layers": False}),
        fs.masked(fs.sgd(0.1), {"w": False, "layers": True}),
    ),
    "each half by a method that ends": lambda: fs.chain(
        fs.masked(fs.chain(STEP, fs.tail_average()), {"w": True, "layers": False}),
        fs.masked(fs.chain(STEP, fs.stochastic_rounding()), {"w": False, "layers": True}),
    ),
    "averages and rounding": lambda: fs.chain(
        fs.schedule_free(0.1), fs.tail_average(), fs.identity(), fs.stochastic_rounding()
    ),
    "an average behind rounding": lambda: fs.chain(fs.stochastic_rounding(), fs.tail_average()),
    "a decay behind an average": lambda: fs.chain(
        STEP, fs.tail_average(), fs.ema_nesterov(0.1), fs.decay_after_step(0.1, 0.1)
    ),
    "an average on some steps": lambda: fs.chain(STEP, fs.every_k(fs.tail_average(), 2)),
    "two steps": lambda: fs.graft(fs.sgd(0.1), onto=fs.adamw(0.1), start=3),
    "a step grafted onto a direction": lambda: fs.graft(fs.sgd(0.1), onto=fs.scale_by_adam()),
    "a direction grafted onto a step": lambda: fs.chain(
        fs.graft(fs.sign(), onto=fs.sgd(0.1)), fs.scale_by_learning_rate(1.0)
    ),
    "statistics behind both branches": lambda: fs.chain(
        fs.graft(statistics_and(ROOTS), statistics_and(ROOTS)), statistics_and(ROOTS)
    ),
    "statistics in one branch": lambda: statistics_and(
        fs.graft(statistics_and(ROOTS), fs.scale_by_sgd()), ROOTS
    ),
    "a mean of gradients": lambda: fs.chain(
        fs.trace(0.9),
        fs.multi_steps(fs.adamw(0.1), 2),
        fs.scale_by_learning_rate(0.5, flip_sign=False),
        fs.tail_average(),
        fs.stochastic_rounding(),
    ),
    "a method with an average for some, and one without for others": lambda: fs.chain(
        fs.partition(
            {"a": fs.chain(fs.adamw(0.1), fs.tail_average()), "b": fs.sgd(0.1)},
            {"w": "a", "layers": "b"},
        ),
        fs.masked(fs.scale(0.5), {"w": False, "layers": True}),
    ),
    "what passes behind an average, in combinators": lambda: fs.chain(
        STEP,
        fs.tail_average(),
        fs.every_k(fs.masked(fs.in_tf32(monitor()), {"w": True, "layers": False}), 2),
        fs.partition({"a": fs.inject_hyperparams(monitor)()}, every_leaf("a")),
    ),
    "an average, and an injected rate, behind a mean of gradients": lambda: fs.chain(
        fs.multi_steps(fs.scale_by_adam(), 2),
        fs.masked(fs.inject_hyperparams(fs.scale_by_learning_rate)(0.1), True),
        monitor(),
        fs.partition({"a": fs.tail_average()}, every_leaf("a")),
    ),
    "a mean of some gradients, and averages of the others": lambda: fs.chain(
        fs.masked(fs.multi_steps(fs.sign(), 2), {"w": True, "layers": False}),
        fs.masked(fs.adamw(0.1), {"w": False, "layers": True}),
    ),
    "a mean of one gradient": lambda: fs.chain(fs.multi_steps(fs.sign(), 1), fs.adamw(0.1)),
    "a direction turned by a number, grafted onto a step": lambda: fs.graft(
        fs.chain(fs.sign(), fs.scale(-0.1)), onto=fs.sgd(0.1), start=3
    ),
    "guards of blocks, and of leaves one by one": lambda: fs.sharded(
        fs.chain(fs.guarded(fs.scale_by_adam(), by_leaf=True), fs.blocked(fs.guarded(fs.sign())))
    ),
    "a norm of all blocks at once": lambda: fs.blocked(fs.clip_by_global_norm(1.0)),
    "around a method with an average": lambda: fs.wrapping(
        fs.schedule_free(0.1), lambda run, updates, own: (run(updates), own)
    ),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_in_its_place(name: str) -> None:
    tx, params = IN_PLACE[name](), problem()
    updates, _ = tx.update(params, tx.init(params), params)
    assert set(updates) == set(params)


def test_behind_the_rate_a_decay_has_to_be_turned_back() -> None:
    """By the numbers: behind the rate, with the wrong sign, a decay makes weights grow."""
    params = {"w": torch.full((3,), 2.0)}
    zeros = {"w": torch.zeros(3)}
    rate = fs.scale_by_learning_rate(0.1)
    right = fs.chain(fs.add_decayed_weights(0.5), rate)
    behind = fs.chain(rate, fs.scale(-1.0), fs.add_decayed_weights(0.05), fs.scale(-1.0))
    for tx in (right, behind):
        updates, _ = tx.update(zeros, tx.init(params), params)
        torch.testing.assert_close(updates["w"], torch.full((3,), -0.1))


def test_gradients_that_are_added_up_turn_with_the_bases() -> None:
    """Their mean, turned back, is that of the gradients, although bases are renewed in between."""
    tx = statistics_and(fs.in_eigenbasis(fs.multi_steps(fs.scale(1.0), 3), 1, first="identity"))
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(6)]
    state = tx.init({"w": grads[0]})
    for g in grads:
        updates, state = tx.update({"w": g}, state)
    torch.testing.assert_close(updates["w"], torch.stack(grads[3:]).mean(0))


def test_moments_in_bases_are_those_of_the_mean() -> None:
    """They were those of the last gradient of each mean, and None stopped a step."""
    mean = fs.multi_steps(fs.scale_by_adam(0.0), 2)
    inside = statistics_and(fs.in_eigenbasis(mean, 10, start=10, first="identity"))
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.zeros(4, 3).double(), "v": torch.zeros(2, 2).double()}
    states = [tx.init(params) for tx in (mean, inside)]
    for i in range(6):
        grads = {n: torch.randn(p.shape, generator=generator).double() for n, p in params.items()}
        given = grads | {"v": None} if i % 4 == 3 else grads
        (wanted, states[0]), (found, states[1]) = [
            tx.update(given, state) for tx, state in zip((mean, inside), states)
        ]
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "turned",
    [
        fs.stateless(lambda updates: {name: -u for name, u in updates.items()}),
        fs.wrapping(fs.identity(), lambda run, updates, own: ({"w": -run(updates)["w"]}, own)),
    ],
    ids=["stateless", "wrapping"],
)
def test_a_users_stage_may_turn_the_sign(turned: fs.GradientTransformation) -> None:
    rate = fs.scale_by_learning_rate
    tx = fs.chain(rate(1.0), turned, rate(0.5), turned, fs.add_decayed_weights(0.0))
    params = {"w": torch.ones(2)}
    assert tx.update(params, tx.init(params), params)[0]["w"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "last",
    [
        [fs.scale_by_learning_rate(0.1, flip_sign=False)],
        [fs.scale_by_learning_rate(0.1), fs.scale(-1.0)],
    ],
)
def test_the_wrapper_does_not_scale_twice(last: list[fs.GradientTransformation]) -> None:
    w = torch.nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    with pytest.raises(TypeError, match="scales by a learning rate already"):
        fs.Optimizer([w], fs.chain(fs.scale_by_adam(), *last), lr=0.1).step()
