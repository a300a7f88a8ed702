"""`spike_factor`: a finite gradient far above the block's average changes nothing but a counter."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import funshampoo as fs
from funshampoo.combinators.spikes import DECAY, PATIENCE, WARM_UP
from funshampoo.operators.joined import Joined
from funshampoo.state import GuardedState, SpikeState, find_state, health
from tests.traffic import Traffic
from tests.trees import assert_close, assert_equal, tensors

FACTOR = 4.0
PARAMS = {
    "w": torch.zeros(6, 5, dtype=torch.float64),
    "b": torch.zeros(3, dtype=torch.float64),
    "s": torch.zeros((), dtype=torch.float64),
}


def noise(seed: int, steps: int = 120) -> list[dict[str, Tensor | None]]:
    """Gradients of all sorts: heavy tails, changes of scale, zeros, NaN, inf, None."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    grads: list[dict[str, Tensor | None]] = []
    for t in range(steps):
        g = {name: randn(*p.shape) * torch.exp(0.5 * randn()) for name, p in PARAMS.items()}
        tall = torch.rand(6, 5, generator=generator, dtype=torch.float64) < 0.01
        g["w"] = torch.where(tall, 1e3 * g["w"], g["w"])
        if 40 <= t < 90:
            g["w"][:4] *= 1e3  # for long, so it is no spike
        if 60 <= t < 64:
            g["b"] *= 1e6
        if t % 7 == 3:
            g["b"] *= 0
        if t in (5, 30, 45, 61):
            g["w"][5, 4] = (math.nan, math.inf, 1e200, math.nan)[t % 4]
        if t in (2, 33, 47, 62):
            g["w" if t % 2 else "b"] = None
        grads.append(g)
    return grads


class Plain:
    """One block, in numbers of Python."""

    def __init__(self) -> None:
        self.average = 0.0
        self.accepted = self.pending = self.spikes = 0

    def is_spike(self, n: float) -> bool:
        return self.is_above(n) and self.pending < PATIENCE

    def is_above(self, n: float) -> bool:
        return math.isfinite(n * n) and self.accepted >= WARM_UP and n > FACTOR * self.average

    def step(self, n: float, spike: bool, held: bool) -> None:
        if spike:
            self.spikes += 1
            self.pending += 1
        elif not held and n > 0:
            if self.is_above(n):
                self.average, self.accepted = n, 1
            else:
                share = max(1 / (self.accepted + 1), 1 - DECAY)
                self.average += (n - self.average) * share
                self.accepted += 1
            self.pending = 0


def is_finite(n: float) -> bool:
    return n * n <= torch.finfo(torch.float64).max * 2.0**-20


BLOCKS = {
    "4x4": [("w", (slice(0, 4), slice(0, 4)))],
    "4x1": [("w", (slice(0, 4), slice(4, 5)))],
    "2x4": [("w", (slice(4, 6), slice(0, 4)))],
    "2x1": [("w", (slice(4, 6), slice(4, 5)))],
    "3": [("b", ())],
    "1": [("s", ())],
}


def run(
    tx: fs.GradientTransformation, grads: list[Any], **context: Any
) -> Iterator[tuple[Any, Any]]:
    state = tx.init(PARAMS)
    for g in grads:
        updates, state = tx.update(g, state, PARAMS, **context)
        yield updates, state


@pytest.mark.parametrize("seed", range(3))
def test_blocks_against_a_plain_loop(seed: int) -> None:
    tx = fs.blocked(fs.guarded(fs.trace(0.5), max_failures=None, spike_factor=FACTOR), 4)
    grads = noise(seed)
    plain = {stack: Plain() for stack in BLOCKS}
    momentum = {stack: torch.zeros(()) for stack in BLOCKS}
    held_in_all = dict.fromkeys(BLOCKS, 0)
    for g, (updates, state) in zip(grads, run(tx, grads), strict=True):
        spikes = state.inner.spikes
        for stack, ((name, where),) in BLOCKS.items():
            if g[name] is None:
                assert updates[name] is None
                continue
            block, block_of = g[name][where], plain[stack]
            n = float(torch.linalg.vector_norm(block))
            spike = block_of.is_spike(n)
            held = spike or not is_finite(n)
            block_of.step(n, spike, held)
            held_in_all[stack] += held
            if held:
                assert not updates[name][where].any()
            else:
                momentum[stack] = 0.5 * momentum[stack] + block
                assert_close(updates[name][where], momentum[stack], 1e-12)
            assert float(spikes.average[stack][0]) == pytest.approx(block_of.average, rel=1e-12)
            assert int(spikes.accepted[stack]) == block_of.accepted
            assert int(spikes.pending[stack]) == block_of.pending
            assert int(spikes.held[stack]) == block_of.spikes
            assert int(state.inner.held[stack]) == held_in_all[stack]
    assert plain["4x4"].spikes >= PATIENCE
    assert plain["3"].spikes >= 3
    assert all(x.accepted < 80 for stack, x in plain.items() if stack in ("4x4", "4x1"))
    found = health(state, file=io.StringIO())
    assert found.spikes == sum(x.spikes for x in plain.values())
    assert found.held == sum(held_in_all.values()) > found.spikes
    assert f"held ({found.spikes} spikes)" in str(found)


def test_leaves_against_a_plain_loop() -> None:
    """Outside of blocks each has its average, and all are held where one is a spike."""
    tx = fs.guarded(fs.trace(0.5), max_failures=None, spike_factor=FACTOR)
    grads = noise(0)
    plain = {name: Plain() for name in PARAMS}
    seen = 0
    for g, (updates, state) in zip(grads, run(tx, grads), strict=True):
        norms = {n: float(torch.linalg.vector_norm(x)) for n, x in g.items() if x is not None}
        finite = all(map(is_finite, norms.values()))
        spikes = {name: finite and plain[name].is_spike(n) for name, n in norms.items()}
        held = not finite or any(spikes.values())
        for name, n in norms.items():
            plain[name].step(n, spikes[name], held)
            assert bool(updates[name].any()) != held
            seen += held
            assert float(state.spikes.average[name]) == pytest.approx(plain[name].average)
            assert int(state.spikes.pending[name]) == plain[name].pending
    assert seen > 30
    assert any(x.accepted > 20 for x in plain.values())  # and it does not lock up


def shampoo(**options: Any) -> fs.GradientTransformation:
    own = {"every": 2, "max_size": 4, "max_failures": None, "spike_factor": FACTOR}
    return fs.shampoo(0.1, **{**own, **options})


@pytest.mark.parametrize("make", [shampoo, lambda: fs.guarded(fs.adamw(0.1), spike_factor=FACTOR)])
def test_donated_is_pure(make: Callable[[], fs.GradientTransformation]) -> None:
    grads = noise(1)
    for (pure, state), (donated, other) in zip(
        run(make(), grads), run(make(), grads, donate=True), strict=True
    ):
        assert_equal(pure, donated)
        assert_equal(state, other)


def test_in_tiles() -> None:
    grads = noise(2)
    whole, tiled = run(shampoo(), grads), run(shampoo(tile=8), grads, donate=True)
    for (a, state), (b, other) in zip(whole, tiled, strict=True):
        assert_equal(a, b)
        assert_equal(state, other)


def test_without_a_spike_it_changes_no_bit_and_off_it_keeps_nothing() -> None:
    grads = [without_none(g) for g in noise(3, 30)]
    on, off = (
        list(run(shampoo(spike_factor=1e200), grads)),
        list(run(shampoo(spike_factor=None), grads)),
    )
    for (a, _), (b, _) in zip(on, off, strict=True):
        assert_equal(a, b)
    guard = find_state(off[-1][1], GuardedState)
    assert guard is not None
    assert guard.spikes == ()
    assert len(tensors(on[-1][1])) == len(tensors(off[-1][1])) + 4 * len(BLOCKS)


def test_what_can_not_be_read_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = noise(0)
    readable = list(run(shampoo(), grads))
    monkeypatch.setattr("funshampoo.combinators.verdicts.any_held", lambda spikes: True)
    for (a, state), (b, other) in zip(run(shampoo(), grads), readable, strict=True):
        assert_close(a, b, 1e-9)
        assert_equal(counters(state), counters(other))


def counters(state: Any) -> SpikeState:
    return spikes_in(state)._replace(average=())


@pytest.mark.slow
def test_members_of_an_ensemble_are_judged_one_by_one() -> None:
    runs = [[without_none(g) for g in noise(seed)] for seed in (0, 1)]
    tx = shampoo()
    both = {name: torch.stack([p, p]) for name, p in PARAMS.items()}
    state, alone = vmap(tx.init)(both), [run(tx, grads) for grads in runs]
    for pair in zip(*runs, strict=True):
        g = {name: torch.stack([one[name] for one in pair]) for name in PARAMS}
        updates, state = vmap(tx.update)(g, state, both)
        expected = [next(single) for single in alone]
        for i, (wanted, its_state) in enumerate(expected):
            assert_close({n: u[i] for n, u in updates.items()}, wanted, 1e-9)
            mine, theirs = spikes_in(state), spikes_in(its_state)
            assert all(torch.equal(mine.held[s][i], theirs.held[s]) for s in BLOCKS)
    assert all(sum(map(int, spikes_in(its).held.values())) > 10 for _, its in expected)


def without_none(g: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(PARAMS[name]) if x is None else x for name, x in g.items()}


def spikes_in(state: Any) -> SpikeState:
    found = find_state(state, SpikeState)
    assert found is not None
    return found


@pytest.mark.slow
def test_compiled_is_the_same() -> None:
    """Steps with a gradient of None or NaN run as they are, the others in a graph."""
    grads = [without_none(g) for g in noise(0)]
    graph, plain = run(fs.compiled(shampoo(), backend="aot_eager"), grads), run(shampoo(), grads)
    for (a, state), (b, other) in zip(graph, plain, strict=True):
        assert_close(a, b, 1e-9)
        assert_equal(counters(state), counters(other))


def lengths(tx: fs.GradientTransformation, big: float, steps: int) -> list[float]:
    """Of steps on one 2×2 block whose gradient is `big` times too large on step 30."""
    generator = torch.Generator().manual_seed(0)
    g = torch.tensor([[1.0, 0.5], [-0.3, 0.8]])
    params = {"w": torch.zeros(2, 2)}
    state, found = tx.init(params), []
    for t in range(1, steps + 1):
        given = g * (big if t == 30 else 1) * (1 + 0.1 * torch.randn(2, 2, generator=generator))
        before = params["w"].clone()
        state = fs.update_in_place(tx, {"w": given}, state, params)
        found.append(float((params["w"] - before).norm()))
    return found


@pytest.mark.parametrize("big", [1e3, 1e6, 1e15])
def test_after_one_outlier_the_block_goes_on_at_once(big: float) -> None:
    """Without, it makes a hundredth of a step for hundreds of them, and nobody says so."""
    found = lengths(fs.shampoo(0.01, spike_factor=100.0), big, 90)
    assert found[29] == 0
    assert all(x > 0.5 * found[28] for x in found[30:])
    silent = lengths(fs.shampoo(0.01), big, 90)
    assert all(x < 0.5 * silent[28] for x in silent[60:])


def test_a_change_of_scale_is_accepted_in_the_end() -> None:
    tx, params = shampoo(), {"w": torch.zeros(4, 4)}
    state, generator = tx.init(params), torch.Generator().manual_seed(0)
    held = []
    for t in range(80):
        g = torch.randn(4, 4, generator=generator) * (1e6 if t >= 30 else 1)
        updates, state = tx.update({"w": g}, state, params)
        held.append(not updates["w"].any())
    assert [t for t, x in enumerate(held) if x] == list(range(30, 30 + PATIENCE))


def test_too_many_in_a_row_stop_the_training_where_patience_is_longer() -> None:
    tx, params = shampoo(max_failures=3, every=1), {"w": torch.zeros(4, 4)}
    state = tx.init(params)
    for _ in range(30):
        _, state = tx.update({"w": torch.ones(4, 4)}, state, params)
    spike = {"w": torch.full((4, 4), 1e6)}
    for _ in range(3):
        _, state = tx.update(spike, state, params)
    with pytest.raises(fs.FailureLimitError, match="w block_0_0: gradient not finite, or a spike"):
        tx.update(spike, state, params)


def test_a_checkpoint_resumes_exactly() -> None:
    tx, grads = shampoo(), noise(1)
    history = list(run(tx, grads))
    saved = fs.state.state_dict(history[40][1])
    assert any("spikes" in name for name in saved)
    state = fs.state.load_state_dict(tx.init(PARAMS), saved).state
    for g, (expected, _) in zip(grads[41:], history[41:], strict=True):
        updates, state = tx.update(g, state, PARAMS)
        assert_equal(updates, expected)


def test_in_the_wrapper_its_number_is_live() -> None:
    p = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = fs.Shampoo([p], lr=0.1, spike_factor=1e9)
    for t in range(30):
        p.grad = torch.ones(4, 4) * (1 if t < 20 else 100)
        if t == 25:
            optimizer.param_groups[0]["spike_factor"] = 10.0
        before = p.detach().clone()
        optimizer.step()
        assert not torch.equal(before, p.detach()), t
    p.grad = torch.full((4, 4), 1e5)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(before, p.detach())
    (state,) = optimizer.chain_states()
    assert health(state, file=io.StringIO()).spikes == 1


@pytest.mark.parametrize("value", [1.0, 0.5, -3.0])
def test_a_factor_out_of_range_is_named(value: float) -> None:
    for make in (
        lambda: fs.guarded(fs.trace(0.9), spike_factor=value),
        lambda: shampoo(spike_factor=value),
    ):
        with pytest.raises(ValueError, match=f"spike_factor is {value}"):
            make()


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("by_leaf", [False, True])
def test_leaves_that_are_joined_on_a_device_are_judged_as_they_are(
    by_leaf: bool, donate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of the leaves one by one, with the choice that a CPU does not make."""
    grads = [{**g, "f": torch.ones(2, dtype=torch.float32)} for g in noise(3)]
    params = {**PARAMS, "f": torch.zeros(2, dtype=torch.float32)}  # of another kind

    def trained() -> Any:
        tx = fs.guarded(fs.adamw(0.1), spike_factor=FACTOR, by_leaf=by_leaf, max_failures=None)
        state, found = tx.init(params), []
        for g in grads:
            updates, state = tx.update(g, state, params, donate=donate)
            found.append(updates)
        return found, state

    expected = trained()
    monkeypatch.setattr(Joined, "worth_it", lambda self: True)
    assert_equal(trained(), expected)
    assert any([n.item() for n in tensors(expected[1].spikes.held)])


def test_many_leaves_with_a_spike_factor_cost_no_more_launches() -> None:
    tx = fs.guarded(fs.adamw(1e-3), spike_factor=10.0, by_leaf=True)

    def launches(leaves: int) -> int:
        params = {f"b{i}": torch.empty(64, device="meta") for i in range(leaves)}
        grads = {name: torch.empty_like(p) for name, p in params.items()}
        state = fs.update_in_place(tx, grads, tx.init(params), params)
        with Traffic() as seen:
            fs.update_in_place(tx, grads, state, params)
        return seen.operators

    assert launches(8) == launches(50) <= 94


@pytest.mark.parametrize("by_leaf", [False, True])
def test_a_step_without_any_gradient(by_leaf: bool) -> None:
    """Nothing is judged; the step counts, and the next one is as if there had been none."""
    tx = fs.guarded(fs.scale_by_adam(), spike_factor=3.0, by_leaf=by_leaf)
    params = {"w": torch.zeros(3), "b": torch.zeros(2)}
    gradients = {"w": torch.tensor([1.0, -2.0, 0.5]), "b": torch.ones(2)}
    state = tx.init(params)
    expected, _ = tx.update(gradients, state, params)
    updates, state = tx.update(dict.fromkeys(params), state, params)
    assert updates == dict.fromkeys(params)
    found, _ = tx.update(gradients, state, params)
    assert all(torch.equal(found[n], expected[n]) for n in params)
