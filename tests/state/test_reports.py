"""summary and health."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.func import vmap

import funshampoo as fs
from funshampoo.state import health, load_state_dict, state_dict, summary
from tests.table import Case, every_case
from tests.trees import assert_equal, gradients, problem, tensors, train


def size(tree: object) -> int:
    return sum(x.numel() * x.element_size() for x in tensors(tree))


@every_case
def test_every_byte_is_counted_by_stage_and_by_parameter(case: Case) -> None:
    state = case.make().init(problem())
    memory = summary(state, file=io.StringIO())
    assert memory.total == sum(memory.stages.values()) == size(state)
    assert abs(sum(memory.parameters.values()) - memory.total) <= len(memory.parameters)


def test_where_the_memory_of_shampoo_goes(capsys: pytest.CaptureFixture[str]) -> None:
    params = {"w": torch.zeros(8, 4), "b": torch.zeros(4)}
    state = fs.shampoo(0.1, max_size=4, momentum=0.9).init(params)
    memory = summary(state)
    assert str(memory) == capsys.readouterr().out.rstrip("\n")
    guard = state["blocked"].inner
    inner = guard.inner
    assert memory.stages["blocked/kronecker_statistics"] == size(inner["kronecker_statistics"])
    assert memory.stages["blocked/graft/direction"] == size(inner["graft"].direction)
    assert memory.stages["blocked/graft/onto"] == size(inner["graft"].onto)
    assert memory.stages["blocked/trace"] == (32 + 4) * 4
    assert memory.stages["blocked"] == size(guard) - size(inner)
    # w: two blocks of 4×4: two factors, two roots, five entries a root and three weights each
    roots = 2 * (2 * (16 + 16) * 4 + 2 * (4 + 4 + 8 + 8 + 8))
    assert memory.parameters["w"] == roots + 3 * 32 * 4 + 2 * 3 * 4 + 2 * 2 * 8  # and its guards
    assert memory.parameters["(shared)"] == 8  # the counter
    assert set(memory.parameters) == {"w", "b", "(shared)"}


def test_summary_of_an_ensemble() -> None:
    params = {"w": torch.zeros(3, 8, 4)}
    one = summary(fs.shampoo(0.1, max_size=4).init({"w": params["w"][0]}), file=io.StringIO())
    all_of_them = summary(vmap(fs.shampoo(0.1, max_size=4).init)(params), file=io.StringIO())
    assert all_of_them.parameters["w"] == 3 * one.parameters["w"]


def test_health_names_the_parameter_with_the_worst_root(capsys: pytest.CaptureFixture[str]) -> None:
    params = {"good": torch.zeros(4, 4), "bad": torch.zeros(4, 4)}
    tx = fs.shampoo(0.1, every=1, beta1=0.0, relative_epsilon=1e-9)
    g = {"good": torch.eye(4), "bad": torch.diag(torch.tensor([1.0, 1e-2, 1e-4, 1e-6]))}
    _, state = tx.update(g, tx.init(params), params)
    found = health(state)
    assert str(found) == capsys.readouterr().out.rstrip("\n")
    assert found.steps == 1
    assert [f.where for f in found.factors] == ["4x4 side 0", "4x4 side 1"]
    for f in found.factors:
        assert f.matrices == 2
        assert f.worst == "bad"
        assert f.failures == 0
        assert 1e8 < f.condition < 1e10
        assert 0 < f.residual < 1e-3


@pytest.mark.parametrize(
    ("method", "measures"), [(fs.shampoo, True), (fs.kl_shampoo, False), (fs.soap, False)]
)
def test_health_leaves_out_what_nobody_measured(
    method: Callable[..., fs.GradientTransformation], measures: bool
) -> None:
    """Before the first refresh nobody has; eigenbases have neither residual nor condition."""
    params = {"w": torch.zeros(3, 2)}
    tx = method(0.1, every=1)
    fresh = tx.init(params)
    _, state = tx.update({"w": torch.eye(3, 2)}, fresh, params)
    for now, known in ((fresh, False), (state, measures)):
        found = health(now, file=io.StringIO())
        assert [f.where for f in found.factors] == ["3x2 side 0", "3x2 side 1"]
        for f, line in zip(found.factors, str(found).splitlines()[2:]):
            assert (f.residual is not None) == (f.condition is not None) == known
            assert f.worst == ("w" if known else "")
            assert ("-         -" in line) == (not known)


def test_health_counts_failures_and_skipped_micro_batches() -> None:
    params = {"w": torch.zeros(4, 4), "b": torch.zeros(4)}
    tx = fs.multi_steps(fs.shampoo(0.1, every=1), 1)
    nan = {"w": torch.full((4, 4), float("nan")), "b": torch.ones(4)}
    state = tx.init(params)
    for g in (nan, nan, params):
        _, state = tx.update(g, state, params)
    assert health(state, file=io.StringIO()).skipped == 2
    unguarded = fs.blocked(fs.chain(fs.kronecker_statistics(), fs.root_inverse(1)))
    _, state = unguarded.update(nan, unguarded.init(params), params)
    failures = {f.where: f.failures for f in health(state, file=io.StringIO()).factors}
    assert failures == {"4 side 0": 0, "4x4 side 0": 1, "4x4 side 1": 1}
    ours = fs.shampoo(0.1, every=1)
    _, state = ours.update(nan, ours.init(params), params)
    found = health(state, file=io.StringIO())
    assert found.held == 1
    assert {f.failures for f in found.factors} == {0}


def test_health_without_roots_and_outside_blocks() -> None:
    assert health(fs.adamw(0.1).init(problem()), file=io.StringIO()).factors == []
    tx = fs.chain(fs.kronecker_statistics(0.9), fs.root_inverse(1))
    _, _, state = train(tx, problem(), gradients(2), fs.apply_updates)
    found = health(state, file=io.StringIO())
    assert "layers.0.weight side 2" in {f.where for f in found.factors}


def test_a_readers_own_stages_are_stages_whatever_their_states_are() -> None:
    class Watched(NamedTuple):
        seen: torch.Tensor

    own = fs.GradientTransformation(
        lambda params: Watched(torch.zeros(3)), lambda updates, state: (updates, state), "watch"
    )
    bare = fs.GradientTransformation(
        lambda params: torch.zeros(5), lambda updates, state: (updates, state), "bare"
    )
    tx = fs.chain(fs.trace(0.9), own, bare, fs.blocked(fs.chain(fs.kronecker_statistics(), own)))
    memory = summary(tx.init({"w": torch.zeros(2)}), file=io.StringIO())
    assert memory.stages == {
        "trace": 8,
        "watch": 12,
        "bare": 20,
        "blocked/kronecker_statistics": 20,
        "blocked/watch": 12,
    }
    assert memory.parameters == {"w": 28, "(shared)": 44}


def test_parameters_of_unblocked_roots_and_of_hyperparameters() -> None:
    tx = fs.chain(fs.kronecker_statistics(), ("roots", fs.root_inverse(1)))
    memory = summary(tx.init({"w": torch.zeros(3, 2), "l": [torch.zeros(2)]}), file=io.StringIO())
    assert set(memory.parameters) == {"w", "l.0", "(shared)"}
    found = health(tx.init({"w": torch.zeros(3, 2)}), file=io.StringIO())
    assert [f.where for f in found.factors] == ["w side 0", "w side 1"]
    state = fs.inject_hyperparams(fs.adamw)(0.1).init({"w": torch.zeros(2)})
    assert set(summary(state, file=io.StringIO()).parameters) == {"w", "(shared)"}
    assert summary(fs.shampoo(0.1).init({}), file=io.StringIO()).parameters == {"(shared)": 8}


def test_the_state_of_a_wrapper_is_asked_for_by_group() -> None:
    p, q = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    optimizer = fs.Shampoo([{"params": [("p", p)]}, {"params": [("q", q)], "every": 3}])
    p.grad, q.grad = torch.ones(3, 2), torch.full((3, 2), float("nan"))
    optimizer.step()
    found = [health(state, file=io.StringIO()) for state in optimizer.chain_states()]
    assert [(f.steps, f.held) for f in found] == [(1, 0), (1, 1)]
    first, _ = optimizer.chain_states()
    assert set(summary(first, file=io.StringIO()).parameters) == {"p", "(shared)"}
    for report in (health, summary):
        with pytest.raises(TypeError, match=r"optimizer\.chain_states\(\)"):
            report(optimizer.state)


class Inner(NamedTuple):
    inner: torch.Tensor
    scale: torch.Tensor


class Model(NamedTuple):
    w: torch.Tensor
    head: Inner


@pytest.mark.parametrize(
    "tx",
    [
        fs.adamw(0.1),
        fs.scale_by_adam(),
        fs.shampoo(0.1),
        fs.multi_steps(fs.trace(0.9), 2),
        fs.chain(fs.kronecker_statistics(), fs.root_inverse(1)),
    ],
)
def test_parameters_in_named_tuples_have_their_fields_names(tx: fs.GradientTransformation) -> None:
    """Also where a field is called as a combinator's is."""
    params = Model(torch.ones(3, 4), Inner(torch.ones(3), torch.ones(())))
    _, state = tx.update(params, tx.init(params), params)
    owners = set(summary(state, file=io.StringIO()).parameters) - {"(shared)"}
    assert owners == {"w", "head.inner", "head.scale"}
    saved = state_dict(state)
    assert owners <= {name.split("/")[0] for name in saved}
    assert_equal(load_state_dict(tx.init(params), saved).state, state)
