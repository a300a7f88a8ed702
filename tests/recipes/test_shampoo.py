"""The recipe against a plain implementation that shares no code with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funshampoo as fs
from funshampoo import linalg
from funshampoo.state.nodes import find_state
from funshampoo.state.stages import KroneckerState, RefreshedState
from tests.plain import PlainShampoo
from tests.trees import gradients, problem, tensors, train

TOLERANCE = 1e-9


def compare(params: list[torch.Tensor], grads: list[list[torch.Tensor]], **options: Any) -> None:
    ours = dict(options)
    ours.setdefault("epsilon", 1e-4)
    ours.setdefault("every", 1)
    ours.setdefault("start", ours["every"])
    ours.setdefault("merge", "none")
    ours.setdefault("grafting_beta2", 0.9)
    vectors = "diagonal"
    if ours["merge"] == "small":
        ours["keep"], vectors = 1, "blocks"  # it makes vectors of matrices
    tx = fs.shampoo(0.1, relative_epsilon=0.0, solver=linalg.eigh(), **ours)
    new, history, _ = train(tx, params, grads, fs.apply_updates)
    largest = max(float(u.abs().max()) for u in tensors(history))
    for i, p in enumerate(params):
        plain = PlainShampoo(p.numpy(), 0.1, **({"vectors": vectors} | options))
        for g in grads:
            expected = plain.step(g[i].numpy())
        assert np.abs(new[i].numpy() - expected).max() <= TOLERANCE * largest


OPTIONS = [
    {},
    {"beta1": 0.0},
    {"beta2": 1.0, "grafting": "adagrad"},
    {"beta3": 0.5},
    {"beta3": "nesterov", "beta1": 0.7},
    {"every": 3},
    {"every": 2, "start": 5},
    {"max_size": 3},
    {"statistics_every": 2, "every": 4},
    {"statistics_every": 3, "every": 2, "start": 5, "vectors": "blocks"},
    {"sides": "smaller"},
    {"sides": "smaller", "max_size": 3, "vectors": "blocks", "merge": "matrix"},
    {"sides": "smaller", "exponents": 1 / 6, "grafting": None},
    {"sides": "smaller", "exponents": "shampoo_squared", "statistics_every": 2, "every": 2},
    {"exponents": "shampoo"},
    {"exponents": "shampoo_squared"},
    {"exponents": 1 / 3, "vectors": "blocks"},
    {"exponents": 1 / 3, "beta2": 1.0, "grafting": None},
    {"vectors": "blocks"},
    {"vectors": "blocks", "max_size": 3, "every": 2, "start": 5},
    {"max_size": 4, "merge": "small"},
    {"max_size": 16, "merge": "small"},
    {"max_size": 4, "merge": "matrix"},
    {"grafting": "rms"},
    {"grafting": "sgd"},
    {"grafting": None},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "dampening": 0.2},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "momentum": 0.9},
    {"weight_decay": 0.1, "weight_decay_kind": "coupled"},
    {"max_size": 3, "every": 2, "beta3": 0.7, "momentum": 0.5, "weight_decay": 0.2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_agrees_with_the_plain_implementation(options: dict[str, Any]) -> None:
    grads = [tensors(g) for g in gradients(8)]
    compare(tensors(problem()), grads, **options)


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 6), min_size=0, max_size=5), min_size=1, max_size=4),
    max_size=st.integers(1, 7),
    merge=st.sampled_from(["none", "small", "matrix"]),
    grafting=st.sampled_from(["adam", None]),
    seed=st.integers(0, 1000),
)
def test_agrees_for_any_shapes(
    shapes: list[list[int]], max_size: int, merge: str, grafting: str | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[torch.Tensor]:
        return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    options = {"max_size": max_size, "merge": merge, "grafting": grafting, "every": 2}
    compare(draw(), [draw() for _ in range(3)], **options)


def test_decay_after_momentum_or_through_it() -> None:
    """W0 = 1, g = 0: after the momentum decay acts once; through it, it builds up."""
    ends = {}
    for through in (False, True):
        tx = fs.shampoo(
            0.1, momentum=0.5, weight_decay=1.0, decay_through_momentum=through, grafting="sgd"
        )
        params = {"w": torch.ones(1, dtype=torch.float64)}
        zero = {"w": torch.zeros(1, dtype=torch.float64)}
        new, _, _ = train(tx, params, [zero] * 2, fs.apply_updates)
        ends[through] = new["w"].item()
    assert ends[False] == pytest.approx(0.9 * 0.9)
    assert ends[True] == pytest.approx(0.9 - 0.1 * (0.5 * 1 + 0.9))


@pytest.mark.parametrize(
    ("kind", "shrink"),
    [
        ("decoupled", lambda rate: 1 - rate * 0.5),
        ("corrected", lambda rate: 1 - rate**2 * 0.5 / 0.4),
        ("independent", lambda rate: 1 - rate / 0.4 * 0.5),
    ],
)
def test_kinds_of_decay(kind: Any, shrink: Any) -> None:
    """Without a gradient the parameter shrinks by the factor that the docstring states."""
    schedule = fs.schedules.linear(0.4, 0.1, 3)
    tx = fs.shampoo(schedule, weight_decay=0.5, weight_decay_kind=kind, peak_learning_rate=0.4)
    params = {"w": torch.ones(2, dtype=torch.float64)}
    zero = {"w": torch.zeros(2, dtype=torch.float64)}
    new, _, _ = train(tx, params, [zero] * 3, fs.apply_updates)
    expected = np.prod([shrink(rate) for rate in (0.4, 0.3, 0.2)])
    assert new["w"][0].item() == pytest.approx(expected, rel=1e-6)


def test_the_default_step_is_the_documented_chain() -> None:
    by_hand = fs.chain(
        fs.blocked(
            fs.chain(
                fs.kronecker_statistics(0.99, exponents={1: 0.0}),
                fs.ema(0.9),
                fs.graft(
                    fs.root_inverse(solver=linalg.eigh(relative_epsilon=1e-6), exponents={1: 0.0}),
                    onto=fs.scale_by_adam(0.0, 0.99),
                    least_order=2,
                ),
            ),
        ),
        fs.scale_by_learning_rate(0.1),
    )
    params, grads = problem(), gradients(12)
    a, _, _ = train(fs.shampoo(0.1), params, grads, fs.apply_updates)
    b, _, _ = train(by_hand, params, grads, fs.apply_updates)
    assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
        ({"epsilon": -1e-8}, "epsilon is -1e-08"),
        ({"relative_epsilon": -1.0}, "relative_epsilon"),
        ({"every": 0}, "every is 0"),
        ({"start": 0}, "start is 0"),
        ({"max_size": 0}, "max_size is 0"),
        ({"merge": "all"}, "merge is 'all'"),
        ({"grafting": "lion"}, "grafting is 'lion'"),
        ({"vectors": "none"}, "vectors is 'none'"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"weight_decay": 0.1, "weight_decay_kind": "corrected"}, "needs peak_learning_rate"),
        ({"trace_scaling": 2.0}, "trace_scaling is 2.0"),
        ({"exponents": {2: {2: 0.5}}}, "names side 2"),
        ({"exponents": {"2": 0.5}}, "exponents has the key '2'"),
        ({"exponents": "-1/4"}, "exponents is '-1/4'; choose one of 'shampoo', 'shampoo_squared'"),
        ({"exponents": -0.25}, "exponents is -0.25"),
        ({"sides": "larger"}, "sides is 'larger'; choose one of 'smaller'"),
        ({"statistics_every": 0}, "statistics_every is 0"),
        ({"momentum": -0.5}, "momentum is -0.5"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fs.shampoo(0.1, **options)


def test_grafting_onto_any_transformation() -> None:
    """An Optax-style pair too; the norm of every block is that of the method's step."""
    pair = (
        lambda params: (),
        lambda updates, state: ({k: 0 * u + 2 for k, u in updates.items()}, state),
    )
    tx = fs.shampoo(1.0, grafting=pair, max_size=4)  # type: ignore[arg-type]
    params = {"w": torch.ones(8, 4)}
    g = {"w": torch.randn(8, 4, generator=torch.Generator().manual_seed(0))}
    updates, _ = tx.update(g, tx.init(params), params)
    assert [b.norm().item() for b in updates["w"].split(4)] == pytest.approx([8.0, 8.0])


def test_a_partner_that_reads_parameters_gets_them() -> None:
    """The steps are as long as those of the decay alone; what a mask hides has none."""
    params = {"w": torch.full((4, 4), 3.0), "v": torch.full((4, 4), 5.0)}
    grads = {"w": torch.eye(4), "v": torch.eye(4)}
    decay = fs.chain(fs.scale(0.0), fs.add_decayed_weights(1.0))
    for mask, expected in ((None, {"w": 12.0, "v": 20.0}), ({"w": True, "v": False}, {"w": 12.0})):
        tx = fs.shampoo(1.0, grafting=decay, mask=mask)
        updates, _ = tx.update(grads, tx.init(params), params)
        for name, u in updates.items():
            assert float(u.norm()) == pytest.approx(expected.get(name, 0.0))


def test_a_negative_learning_rate() -> None:
    with pytest.raises(ValueError, match="learning_rate is -0.1"):
        fs.shampoo(-0.1)


def test_a_schedule_where_a_number_belongs_points_to_inject_hyperparams() -> None:
    with pytest.raises(TypeError, match="inject_hyperparams"):
        fs.shampoo(0.1, beta2=fs.schedules.constant(0.9))  # type: ignore[arg-type]


def test_a_mask_that_hides_all_is_no_decay() -> None:
    params = {"w": torch.ones(2, 2)}
    tx = fs.shampoo(0.1, weight_decay=0.1, mask=False)
    updates, _ = tx.update({"w": torch.zeros(2, 2)}, tx.init(params), params)
    assert float(updates["w"].abs().max()) == 0


VECTORS = {"bias": (5,), "row": (1, 6), "long": (9,), "scalar": ()}


def kept_units(tx: fs.GradientTransformation, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """{stack: number of sides with a factor matrix, and of those with a root}; they are alike."""
    state = tx.init({name: torch.zeros(shape) for name, shape in shapes.items()})
    factors = find_state(state, KroneckerState).factors  # type: ignore[union-attr]
    roots = find_state(state, RefreshedState).kept  # type: ignore[union-attr]
    found = {name: sum(isinstance(x, torch.Tensor) for x in own) for name, own in factors.items()}
    assert found == {name: sum(unit != () for unit in own) for name, own in roots.items()}
    return found


def test_vectors_have_no_matrices_by_default() -> None:
    shapes = VECTORS | {"matrix": (3, 2), "conv": (3, 2, 4)}
    without = {"5": 0, "6": 0, "7": 0, "2": 0, "1": 0}
    assert kept_units(fs.shampoo(0.1, max_size=7), shapes) == without | {"3x2": 2, "6x4": 2}
    spared = fs.shampoo(0.1, max_size=7, exponents={2: {0: 0.0}})
    assert kept_units(spared, shapes) == without | {"3x2": 1, "6x4": 1}


@pytest.mark.parametrize(
    "options",
    [{"vectors": "blocks"}, {"grafting": None}, {"keep": 1}, {"exponents": {1: 0.25}}],
    ids=str,
)
def test_where_vectors_are_preconditioned(options: dict[str, Any]) -> None:
    """And whatever makes them be, it is as if `vectors` had said so."""
    tx, blocks = fs.shampoo(0.1, **options), fs.shampoo(0.1, **(options | {"vectors": "blocks"}))
    assert set(kept_units(tx, VECTORS).values()) == {1}
    params, grads = problem(), gradients(5)
    (a, _, _), (b, _, _) = (train(tx, params, grads, fs.apply_updates) for tx in (tx, blocks))
    assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b)))


def test_a_vector_steps_as_the_grafted_method_does() -> None:
    """AdamW's step, bit for bit, beside matrices that are preconditioned."""
    params, grads = problem(), gradients(8)
    options = {"beta2": 0.95, "weight_decay": 0.1}
    ours, _, _ = train(fs.shampoo(0.1, **options), params, grads, fs.apply_updates)
    adamw, _, _ = train(fs.adamw(0.1, **options), params, grads, fs.apply_updates)
    preconditioned, _, _ = train(
        fs.shampoo(0.1, vectors="blocks", **options), params, grads, fs.apply_updates
    )
    for a, b, c in zip(tensors(ours), tensors(adamw), tensors(preconditioned)):
        vector = sum(side > 1 for side in a.shape) < 2
        assert torch.equal(a, b) == vector
        assert torch.equal(a, c) != vector or a.numel() == 1


def test_without_a_gradient_a_vector_stays() -> None:
    """A None among vectors and among matrices, and nothing but vectors."""
    params = {"b": torch.ones(3), "c": torch.ones(3), "v": torch.ones(4, 2), "w": torch.ones(4, 2)}
    grads = {name: None if name in "bv" else torch.ones_like(p) for name, p in params.items()}
    for names in ("bcvw", "bc"):
        tx, own = fs.shampoo(0.1), {name: params[name] for name in names}
        updates, _ = tx.update({name: grads[name] for name in names}, tx.init(own), own)
        moved = {name for name, u in updates.items() if u is not None and bool(u.any())}
        assert moved == set(names) & set("cw")


def test_the_wrapper_takes_it() -> None:
    parameter = torch.nn.Parameter(torch.ones(5))
    for vectors, count in (("diagonal", 0), ("blocks", 1)):
        optimizer = fs.Shampoo([parameter], vectors=vectors)
        (state,) = optimizer.chain_states()
        kept = find_state(state, RefreshedState)
        assert kept is not None
        assert [sum(unit != () for unit in own) for own in kept.kept.values()] == [count]
        assert optimizer.param_groups[0]["vectors"] == vectors
    with pytest.raises(ValueError, match="vectors is 'none'"):
        fs.Shampoo([parameter], vectors="none")
