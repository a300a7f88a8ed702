"""Never poisoned: what is not finite changes nothing but a counter."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any, NamedTuple

import pytest
import torch
from torch.func import vmap

import funshampoo as fs
from funshampoo import linalg
from funshampoo.combinators.guard import guarded
from funshampoo.state import health
from funshampoo.state.places import Place, map_tensors
from tests.sooner import these
from tests.trees import (
    assert_close,
    assert_equal,
    clone,
    gradients,
    meaning,
    problem,
    tensors,
    train,
)

# One value, put in one place of one block of "w", whose blocks at 4 are rows of several stacks.
POISONS = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "huge": 1e200}
PLAINER = {"momentum": 0.9, "weight_decay": 0.1, "max_size": 4}
CHAINS = {
    "adam": {},
    "rms": {"grafting": "rms", "nesterov": True},
    "adagrad": {"grafting": "adagrad", "beta2": 1.0},
    "none": {"grafting": None, "decay_through_momentum": True},
    "coupled": {"weight_decay_kind": "coupled"},
    "staggered": {"stagger": True},
}
EVERY = 3
STEPS = 8


def optimizer(**options: Any) -> fs.GradientTransformation:
    return fs.shampoo(0.1, **(PLAINER | {"every": EVERY} | options))


@pytest.mark.parametrize("spike_factor", [None, 1e3])
def test_leaves_outside_of_blocks_by_themselves(spike_factor: float | None) -> None:
    """What is held is as if the step had not been; the others do not know of it."""
    params, grads = problem(), gradients(12)
    bad = 11
    if spike_factor is None:
        grads[bad]["w"] = torch.full_like(grads[bad]["w"], float("nan"))
    else:
        grads[bad]["w"] = 1e6 * grads[bad]["w"]
    tx = guarded(fs.adamw(0.1), by_leaf=True, spike_factor=spike_factor)
    plain = fs.adamw(0.1)
    mine, alone = tx.init(params), plain.init(params)
    for g in grads[:bad]:
        _, mine = tx.update(g, mine, params)
        _, alone = plain.update(g, alone, params)
    updates, mine = tx.update(grads[bad], mine, params)
    expected, _ = plain.update(grads[bad], alone, params)
    assert float(updates["w"].abs().max()) == 0
    assert_equal(updates["layers"], expected["layers"])
    assert [int(n) for n in tensors(mine.held)] == [0, 0, 0, 0, 0, 1]
    together = guarded(fs.adamw(0.1), spike_factor=spike_factor)
    updates, _ = together.update(grads[bad], mine, params)
    assert all(float(u.abs().max()) == 0 for u in tensors(updates))


def test_by_leaf_needs_stages_that_know_what_is_alive() -> None:
    def forgetful() -> fs.GradientTransformation:
        def update(updates: Any, state: Any) -> Any:
            return updates, state

        return fs.GradientTransformation(lambda params: (), update)

    with pytest.raises(ValueError, match="by_leaf needs stages that know of `alive`"):
        guarded(forgetful(), by_leaf=True)
    with pytest.raises(TypeError, match="by_leaf is 1"):
        guarded(fs.adamw(0.1), by_leaf=1)  # type: ignore[arg-type]


def poisoned(g: Any, value: float) -> Any:
    """w[0, 0], in block_0_0, is no usable number."""
    g = clone(g)
    g["w"][0, 0] = value
    return g


def rows_of_block(state: Any) -> dict[str, torch.Tensor]:
    """What the state says of block (0, 0) of w, by name; not the guard's own counters."""
    saved = {
        name: x
        for name, x in fs.state.state_dict(state).items()
        if name.startswith("w/block_0_0/") and "guarded" not in name
    }
    assert saved
    return meaning(saved)


@functools.cache
def trained(name: str) -> Any:
    """The parameters at the end, without a fault."""
    return train(optimizer(**CHAINS[name]), problem(), gradients(STEPS), fs.apply_updates)[0]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("bad", [2, 3], ids=["between_refreshes", "at_a_refresh"])
@pytest.mark.parametrize("value", these(POISONS, sooner={"nan", "inf"}))
@pytest.mark.parametrize("name", CHAINS)
def test_one_block_is_held_and_the_others_go_on(
    name: str, value: float, bad: int, donate: bool
) -> None:
    tx, params, grads = optimizer(**CHAINS[name]), problem(), gradients(STEPS)
    state, now = tx.init(params), params
    for t, g in enumerate(grads, start=1):
        given = poisoned(g, value) if t == bad else g
        if t == bad:
            before, block = rows_of_block(state), now["w"][:4, :4].clone()
        updates, state = tx.update(given, state, now, donate=donate)
        now = fs.apply_updates(now, updates)
        if t == bad:
            assert torch.equal(now["w"][:4, :4], block)
            assert rows_of_block(state).keys() == before.keys()
            for field, x in rows_of_block(state).items():
                assert_close(x, before[field], 1e-12)
        assert all(torch.isfinite(x).all() for x in tensors((now, state)))
    clean = trained(name)
    assert_equal(now["layers"], clean["layers"])  # bitwise as without the fault
    assert torch.equal(now["w"][4:], clean["w"][4:])
    assert torch.equal(now["w"][:, 4:], clean["w"][:, 4:])
    assert not torch.equal(now["w"][:4, :4], clean["w"][:4, :4])  # it missed a step
    assert health(state, file=io.StringIO()).held == 1


def test_a_held_gradient_is_missing_in_the_means() -> None:
    """Its time passes all the same: the gradients before it weigh less against those after it."""
    beta1, beta2, bad = 0.9, 0.7, 2
    tx, params, grads = optimizer(every=1, beta1=beta1, beta2=beta2), problem(), gradients(6)
    state, now = tx.init(params), params
    for t, g in enumerate(grads):
        given = poisoned(g, float("nan")) if t == bad else g
        updates, state = tx.update(given, state, now, donate=True)
        now = fs.apply_updates(now, updates)

    def mean(beta: float, values: list[torch.Tensor]) -> torch.Tensor:
        weights = [beta ** (5 - t) for t in range(6) if t != bad]
        return sum(w * x for w, x in zip(weights, values)) / sum(weights)  # type: ignore[return-value]

    G = [g["w"][:4, :4] for t, g in enumerate(grads) if t != bad]
    found = rows_of_block(state)
    for place, expected in (
        ("ema/average", mean(beta1, G)),
        ("graft/onto/second", mean(beta2, [g * g for g in G])),
        ("kronecker_statistics/factors/0", mean(beta2, [g @ g.T for g in G])),
        ("kronecker_statistics/factors/1", mean(beta2, [g.T @ g for g in G])),
    ):
        assert_close(found[f"w/block_0_0/blocked/{place}"], expected, 1e-12)


def test_tiny_zero_and_rank_one_gradients_are_no_failures() -> None:
    params = problem(dtype=torch.float32)
    for make in (
        lambda g: g * 1e-30,
        torch.zeros_like,
        lambda g: torch.ones_like(g),
    ):
        for grafting in ("adam", "rms", "adagrad", "sgd", None):
            tx = optimizer(grafting=grafting)
            state, now = tx.init(params), params
            for t, g in enumerate(gradients(STEPS, torch.float32)):
                strange = {"w": make(g["w"]), "layers": g["layers"]} if t % 2 else g
                updates, state = tx.update(strange, state, now)
                now = fs.apply_updates(now, updates)
                assert all(torch.isfinite(x).all() for x in tensors((now, state))), grafting
            assert health(state, file=io.StringIO()).held == 0


def test_every_step_tiny_then_a_normal_one_does_not_jump() -> None:
    tx = fs.shampoo(1.0, every=2)
    params = {"w": torch.zeros(8, 8)}
    g = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    state = tx.init(params)
    for _ in range(5):
        updates, state = tx.update({"w": 1e-30 * g}, state, params)
        assert torch.isfinite(updates["w"]).all()
    updates, state = tx.update({"w": g}, state, params)
    assert updates["w"].norm() < 100


def test_what_can_not_be_read_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device, in vmap and in compiled code nobody looks: the same numbers but for rounding."""
    tx, params, grads = optimizer(), problem(), gradients(STEPS)

    def run() -> Any:
        state, now = tx.init(params), params
        for t, g in enumerate(grads):
            given = poisoned(g, float("nan")) if t in (2, 3) else g
            updates, state = tx.update(given, state, now, donate=True)
            now = fs.apply_updates(now, updates)
        return now, state

    readable = run()
    monkeypatch.setattr("funshampoo.combinators.verdicts.surely_usable", lambda gradients: None)
    assert_equal(run(), readable)  # a look at each block
    monkeypatch.setattr("funshampoo.combinators.verdicts._all_usable", lambda norms: False)
    assert_close(run(), readable, 1e-12)  # no look


def test_members_of_an_ensemble_are_held_one_by_one() -> None:
    tx, params = optimizer(every=1), {"w": problem()["w"]}
    grads = [{"w": torch.stack([g["w"], g["w"]])} for g in gradients(4)]
    grads[2]["w"][1, 0, 0] = float("nan")
    both = {"w": torch.stack([params["w"]] * 2)}
    state = vmap(tx.init)(both)
    for g in grads:
        updates, state = vmap(tx.update)(g, state, both)
        both = fs.apply_updates(both, updates)
    for i in range(2):
        now, alone = params, tx.init(params)
        for g in grads:
            updates, alone = tx.update({"w": g["w"][i]}, alone, now)
            now = fs.apply_updates(now, updates)
        assert_close(both["w"][i], now["w"], 1e-12)
    assert health(state, file=io.StringIO()).held == 1


def test_outside_blocks_all_leaves_are_held_together() -> None:
    tx, params = guarded(fs.adamw(0.1)), problem()
    state = tx.init(params)
    _, state = tx.update(gradients(1)[0], state, params)
    updates, new = tx.update(poisoned(gradients(1)[0], float("nan")), state, params)
    assert all(float(u.abs().max()) == 0 for u in tensors(updates))
    before, after = (meaning(fs.state.state_dict(s.inner)) for s in (state, new))
    assert before.keys() == after.keys()
    assert_close(after, before, 1e-12)
    assert all(int(n) == 1 for n in tensors(new.held))


def test_what_a_stage_counts_is_held_too() -> None:
    class Seen(NamedTuple):
        seen: Any
        steps: torch.Tensor

    def update(updates: Any, state: Seen) -> tuple[Any, Seen]:
        return updates, Seen(
            {k: torch.ones_like(x) for k, x in state.seen.items()}, state.steps + 1
        )

    def init(params: Any) -> Seen:
        return Seen({k: torch.zeros(2, dtype=torch.bool) for k in params}, torch.tensor(0))

    tx = guarded(fs.GradientTransformation(init, update, "mine"))
    _, state = tx.update({"w": torch.tensor([float("nan")])}, tx.init({"w": torch.zeros(1)}))
    assert not state.inner.seen["w"].any()
    assert int(state.inner.steps) == 1


def test_what_a_stage_counts_by_block_is_held_by_block() -> None:
    """Whatever it is called: only a clock, which all blocks share, goes on."""

    def init(params: Any, *, block_ndim: int = 0) -> Any:
        return {k: {"steps": torch.zeros(x.shape[:block_ndim])} for k, x in params.items()}

    def update(updates: Any, state: Any) -> Any:
        return updates, {k: {"steps": x["steps"] + 1} for k, x in state.items()}

    tx = fs.blocked(guarded(fs.GradientTransformation(init, update, "mine")), 2)
    g = {"w": torch.ones(4, 4)}
    state = tx.init(g)
    g["w"][0, 0] = float("nan")
    _, state = tx.update(g, state)
    assert state.inner.inner["2x2"]["steps"].tolist() == [0, 1, 1, 1]


def test_labels_that_are_named_like_stacks_are_labels() -> None:
    parts = {"4": fs.scale_by_adam(), "2x3": fs.trace(0.9)}
    tx = fs.blocked(guarded(fs.partition(parts, {"2x3": "4", "4": "2x3"})))
    params = {"w": torch.zeros(2, 3), "b": torch.zeros(4)}
    g = {"w": torch.full((2, 3), float("nan")), "b": torch.ones(4)}
    _, state = tx.update(g, tx.init(params), params)
    inner = state.inner.inner.inner
    assert float(inner["4"].first_weight["2x3"].sum()) == 0
    assert torch.equal(inner["2x3"].buffer["4"], torch.ones(1, 4))


def test_staggered_roots_of_some_stacks_alone() -> None:
    roots = fs.chain(fs.kronecker_statistics(), fs.root_inverse(every=2, stagger=True))
    tx = fs.blocked(guarded(fs.masked(roots, {"2x3": True, "4": False}), max_failures=1, every=1))
    params = {"w": torch.zeros(2, 3), "b": torch.zeros(4)}
    state = tx.init(params)
    for seed in range(4):
        g = {
            k: torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
            for k, x in params.items()
        }
        updates, state = tx.update(g, state, params)
        assert torch.equal(updates["b"], g["b"])
    _, state = tx.update({k: x + float("nan") for k, x in g.items()}, state, params)
    with pytest.raises(fs.FailureLimitError, match="w block_0_0"):
        tx.update(g, state, params)


def test_it_stops_after_max_failures_in_a_row_and_names_the_block() -> None:
    tx, params = optimizer(max_failures=4, every=2), problem()
    state = tx.init(params)
    g, nan = gradients(1)[0], poisoned(gradients(1)[0], float("nan"))
    for given in (nan, nan, nan, g, nan, nan, nan, nan):  # four in a row at last
        _, state = tx.update(given, state, params)
    _, state = tx.update(nan, state, params)  # nobody looks
    before = copy.deepcopy(state)
    with pytest.raises(
        fs.FailureLimitError, match=r"4 times in a row.*: w block_0_0: gradient not finite\. "
    ):
        tx.update(nan, state, params, donate=True)
    assert_equal(state, before)  # whole, to be saved
    never = optimizer(max_failures=None, every=2)
    state = never.init(params)
    for _ in range(30):
        _, state = never.update(nan, state, params)


def test_an_ensemble_at_different_steps_goes_on_by_refresh_and_stops_at_the_limit() -> None:
    """Where nobody can say which step this is, every step is one before which somebody looks."""
    tx, params = fs.shampoo(0.1, every=100, max_failures=2), {"w": torch.ones(2, 3, 4)}
    state = vmap(tx.init)(params)
    state["clock"] = state["clock"]._replace(steps=torch.tensor([0, 3]))
    step = vmap(functools.partial(tx.update, refresh=False))
    good, bad = {"w": torch.ones(2, 3, 4)}, {"w": torch.ones(2, 3, 4)}
    bad["w"][1, 0, 0] = float("nan")
    for g in (good, bad, good, bad, bad):
        updates, state = step(g, state, params)
        assert updates["w"].isfinite().all()
    assert state["clock"].steps.tolist() == [5, 8]
    with pytest.raises(fs.FailureLimitError, match="w block_0_0: gradient not finite"):
        step(good, state, params)


def test_it_stops_where_roots_fail_in_a_row() -> None:
    def failing(A: torch.Tensor, p: float, epsilon: Any = 0.0) -> linalg.InverseRoot:
        found = linalg.eigh(relative_epsilon=1e-6)(A, p, epsilon)
        return found._replace(converged=found.converged & (A.shape[-1] != 5))

    tx = fs.shampoo(0.1, every=1, solver=failing, max_failures=3, max_size=5)
    params, grads = problem(), gradients(20)
    state = tx.init(params)
    for g in grads[:3]:
        updates, state = tx.update(g, state, params)
        assert all(torch.isfinite(u).all() for u in tensors(updates))
    failures = {f.failures for f in health(state, file=io.StringIO()).factors}
    assert failures == {0, 3}
    with pytest.raises(fs.FailureLimitError, match="refresh of its statistics failed"):
        tx.update(grads[3], state, params)


def test_no_step_looks_at_the_counters_but_every_nth(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(
        "funshampoo.combinators.guard.limit_reached", lambda *a: looks.append(1) and False
    )
    tx, params = optimizer(every=5), problem()
    state = tx.init(params)
    for t, g in enumerate(gradients(11), start=1):
        _, state = tx.update(g, state, params)
        assert len(looks) == t // 5  # with the refreshes, which wait for the device too


def test_arguments_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="max_failures is 0"):
        guarded(fs.trace(0.9), max_failures=0)
    with pytest.raises(ValueError, match="every is 0"):
        guarded(fs.trace(0.9), every=0)


def test_a_report_of_places_names_every_tensor() -> None:
    """`map_tensors` finds for each per-block tensor as many rows as it has."""
    tx, params = optimizer(), problem()
    seen = []

    def look(place: Place, x: torch.Tensor) -> torch.Tensor:
        if place.stack is not None and x.ndim:
            assert place.rows is not None
            assert len(place.rows) == x.shape[0]
            seen.append(place.path)
        return x

    state = tx.init(params)
    assert_equal(map_tensors(look, state), state)
    assert ("blocked", "graft", "direction", "kept", "0", "value", "0") in seen
