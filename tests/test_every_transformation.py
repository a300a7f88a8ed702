"""Checks that every transformation and every recipe of the table passes."""

from __future__ import annotations

import sys

import optree
import pytest
import torch

import funshampoo as fs
from funshampoo.testing import check_stage
from tests.releases import wrong_before
from tests.table import CASES, NOT_TRANSFORMATIONS, Case, every_case
from tests.trees import (
    assert_close,
    assert_equal,
    default_dtype,
    gradients,
    problem,
    tensors,
    train,
)

STEPS = 5


def test_the_table_is_complete() -> None:
    assert {case.public for case in CASES} == set(fs.__all__) - NOT_TRANSFORMATIONS


@every_case
def test_a_case_builds_what_it_is_named_after(case: Case) -> None:
    called = set()
    sys.setprofile(lambda frame, event, _: called.add(frame.f_code) if event == "call" else None)
    try:
        case.make()
    finally:
        sys.setprofile(None)
    assert getattr(fs, case.public).__code__ in called


@every_case
def test_it_passes_the_checks_of_every_stage(case: Case) -> None:
    check_stage(case.make, params=problem(), steps=5, **{**case.options, "compile": False})


@pytest.mark.slow
@every_case
def test_it_compiles_as_every_stage_does(case: Case) -> None:
    shared = "sharded" in case.name or case.name == "multi_steps:shampoo"
    wrong_before("2.10", "a graph can't look for ranks in a state", shared)
    check_stage(case.make, params=problem(), **{"compile": "aot_eager", **case.options})


@every_case
# Donated products are written where they go, which autocast never casts: pure ones matter most.
@pytest.mark.parametrize(
    "donate", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["pure", "donated"]
)
def test_autocast_and_a_default_dtype_change_nothing(case: Case, donate: bool) -> None:
    """A step may stand inside the model's autocast: factor matrices and roots stay float32.

    So does what is made of integers and Python numbers, which torch gives the default dtype.
    """
    f32 = torch.float32
    tx, params, grads = case.make(), problem(dtype=f32), gradients(3, f32)
    plain = train(tx, params, grads, fs.apply_updates, donate=donate)
    with torch.autocast("cpu", dtype=torch.bfloat16), default_dtype(torch.float16):
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16
        assert_equal(plain, train(case.make(), params, grads, fs.apply_updates, donate=donate))


@every_case
def test_it_does_something(case: Case) -> None:
    tx, params = case.make(), problem()
    _, history, _ = train(tx, params, gradients(STEPS), fs.apply_updates)
    changed = any(
        not torch.equal(u, g)
        for updates, gradient in zip(history, gradients(STEPS))
        for u, g in zip(tensors(updates), tensors(gradient))
    )
    assert changed == case.changes_updates
    assert all(torch.isfinite(u).all() for u in tensors(history))


@every_case
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        # The same casts; check_stage trains in float16 too, and looks at the state's dtypes.
        pytest.param(torch.float16, marks=pytest.mark.slow),
        pytest.param(torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_half_precision_computes_in_float32(case: Case, dtype: torch.dtype) -> None:
    if case.public == "stochastic_rounding":
        pytest.skip("rounds to the parameters' dtype: tested apart")
    tx, params, grads = case.make(), problem(dtype=dtype), gradients(STEPS, dtype)
    state = tx.init(params)
    for x in tensors(state):  # a weight that all blocks share is a float64 number
        assert not x.is_floating_point() or x.dtype == torch.float32 or not x.ndim
    wide = optree.tree_map(lambda x: x.float(), grads)
    expected, got = state, state
    for g, w in zip(grads, wide):
        # the same parameters on both sides: only the gradients' storage differs
        u, got = tx.update(g, got, params)
        v, expected = tx.update(w, expected, optree.tree_map(lambda x: x.float(), params))
        assert_equal(optree.tree_map(lambda x: x.float(), u), v)
    new = fs.apply_updates(params, u)
    assert all(x.dtype == dtype for x in tensors(new))


@every_case
def test_a_gradient_of_none_leaves_its_parameter_alone(case: Case) -> None:
    """None twice in the middle: as if those steps had not been, for that parameter.

    `check_stage` asks for less, so that a stage may count everybody's steps.
    """
    if case.options.get("none") is False or case.public == "every_k":
        pytest.skip("couples the parameters or the steps: tested apart")
    if "from_reference" in case.name:
        pytest.skip("corrects biases by everyone's steps: tested apart")
    name = case.name.replace("schedule_free", "")
    if any(word in name for word in ("schedule", "everything", "corrected", "inject")):
        pytest.skip("the learning rate goes on")
    tx, params, grads = case.make(), problem(), gradients(6)
    absent = (2, 3)  # steps counted from 0; refreshes fall on the same steps for the rest
    with_none = [dict(g, w=None) if t in absent else g for t, g in enumerate(grads)]
    state, now = tx.init(params), params
    for t, g in enumerate(with_none):
        updates, state = tx.update(g, state, now)
        assert (updates["w"] is None) == (t in absent)
        new = fs.apply_updates(now, updates)
        if t in absent:
            assert new["w"] is now["w"]
        now = new
    for_w, _, _ = train(
        tx, params, [g for t, g in enumerate(grads) if t not in absent], fs.apply_updates
    )
    for_others, _, _ = train(tx, params, grads, fs.apply_updates)
    assert_equal(now["layers"], for_others["layers"])
    assert_close(now["w"], for_w["w"], 1e-12)


@every_case
def test_parameters_without_entries_beside_others(case: Case) -> None:
    """Means and quotients of nothing have no value: they are in no update, and in no state."""
    ones = torch.ones
    params = {"w": ones(3, 0), "layers": {"none": ones(2, 0, 3), "nil": ones(0), "one": ones(3, 2)}}
    tx = case.make()
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
    assert [u.shape for u in tensors(updates)] == [p.shape for p in tensors(params)]
    assert all(u.isfinite().all() for u in tensors(updates))
    fs.state.check(state)
