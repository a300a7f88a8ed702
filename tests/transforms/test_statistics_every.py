"""Statistics on every k-th step: which gradients are in them, and what the other steps spare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import funshampoo as fs
from funshampoo.state.nodes import find_state
from funshampoo.state.stages import KroneckerState
from tests.trees import gradients, problem, tensors

D = torch.float64
BETA = 0.75


def g(t: int) -> torch.Tensor:
    return torch.randn(3, 2, generator=torch.Generator().manual_seed(t), dtype=D)


def states(tx: fs.GradientTransformation, grads: list[Any]) -> list[KroneckerState]:
    state = tx.init({"w": torch.zeros(3, 2, dtype=D)})
    found = []
    for grad in grads:
        _, state = tx.update({"w": grad}, state)
        found.append(find_state(state, KroneckerState))
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("own_steps", [True, False])
def test_which_gradients_are_averaged(every: int, own_steps: bool) -> None:
    """Those of steps 1, k, 2k, ..., each decayed once for every later one of them."""
    stage = fs.kronecker_statistics(BETA, every=every, own_steps=own_steps)
    expected, weight = torch.zeros(3, 3, dtype=D), 0.0
    for t, state in enumerate(states(stage, [g(t) for t in range(1, 9)]), start=1):
        if t == 1 or t % every == 0:
            expected = BETA * expected + (1 - BETA) * g(t) @ g(t).T
            weight = BETA * weight + 1 - BETA
        assert torch.allclose(state.factors["w"][0], expected, rtol=0, atol=1e-14)
        own = state.weight["w"] if own_steps else state.weight
        assert float(own) == pytest.approx(weight, rel=1e-6)


def test_a_gradient_that_is_not_there_is_not_made_up_for() -> None:
    """Nothing is accumulated on a later step in its place."""
    grads = [g(1), g(2), g(3), None, g(5), g(6)]
    found = states(fs.kronecker_statistics(BETA, every=4), grads)[-1]
    assert torch.allclose(found.factors["w"][0], (1 - BETA) * g(1) @ g(1).T)


class _Products(TorchDispatchMode):
    """Names the operators that multiply matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in ("mm", "gram", "matmul")):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_other_steps_multiply_nothing(donate: bool, packed: bool) -> None:
    """Neither new tensors nor products; and those with statistics have them, so it would show."""
    stage = fs.blocked(fs.kronecker_statistics(BETA, every=3, packed=packed), 80)
    params = {"w": torch.ones(160, 80)}
    state = stage.init(params)
    for t in range(1, 7):
        before = [x.data_ptr() for x in tensors(find_state(state, KroneckerState))]
        with _Products() as products:
            _, state = stage.update(params, state, donate=donate)
        after = [x.data_ptr() for x in tensors(find_state(state, KroneckerState))]
        assert bool(products.seen) == (t in (1, 3, 6))
        if t not in (1, 3, 6):
            assert before == after


def test_bad_gradients_count_where_statistics_are_taken_alone() -> None:
    """A held block's average and weight decay alike, on the steps that accumulate."""
    tx = fs.blocked(fs.guarded(fs.kronecker_statistics(BETA, every=2)), 4)
    bad = torch.full((3, 2), torch.nan, dtype=D)
    one, _, two, three, four = states(tx, [g(1), bad, bad, g(4), g(5)])
    mean = g(1) @ g(1).T
    for state in (one, two):
        factor, weight = state.factors["3x2"][0][0], state.weight["3x2"][0]
        assert torch.allclose(factor / weight, mean)
    assert torch.equal(three.factors["3x2"][0], four.factors["3x2"][0])


def test_an_ensemble_at_different_steps_needs_to_be_told() -> None:
    """`refresh=` decides for roots, not for statistics."""
    tx = fs.chain(fs.kronecker_statistics(every=2), fs.root_inverse())
    params, grad = problem(), gradients(1)[0]
    early = tx.init(params)
    _, late = tx.update(grad, early, params)
    both = torch.utils._pytree.tree_map(lambda a, b: torch.stack([a, b]), early, late)
    step = torch.func.vmap(lambda state: tx.update(grad, state, params, refresh=False)[0])
    with pytest.raises(RuntimeError, match=r"kronecker_statistics\(every=...\).*pass step="):
        step(both)


def test_a_function_that_chooses_sides_answers_for_each() -> None:
    tx = fs.kronecker_statistics(sides=lambda block: [True])
    with pytest.raises(ValueError, match=r"sides returned 1 value for a block .*\(3, 2, 4\)"):
        tx.init(problem())
