"""Checks that every transformation and every recipe of the table passes."""

from __future__ import annotations

import io
from typing import Any

import optree
import pytest
import torch
from torch.func import vmap

import funshampoo as fs
from tests.table import CASES, NOT_TRANSFORMATIONS, Case
from tests.trees import (
    assert_close,
    assert_equal,
    assert_unchanged,
    clone,
    gradients,
    problem,
    snapshot,
    tensors,
    train,
)

STEPS = 5
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_the_table_is_complete() -> None:
    tested = " ".join(case.name for case in CASES)
    for name in set(fs.__all__) - NOT_TRANSFORMATIONS:
        assert name in tested, f"{name} is public but not in the table"


@every_case
def test_update_changes_no_argument(case: Case) -> None:
    tx, params = case.make(), problem()
    state = tx.init(params)
    for g in gradients(STEPS):
        before = snapshot(params, state, g)
        _, new = tx.update(g, state, params)
        assert_unchanged(before, params, state, g)
        state = new


@every_case
def test_init_changes_no_argument_and_shares_no_memory(case: Case) -> None:
    params = problem()
    before = snapshot(params)
    state = case.make().init(params)
    assert_unchanged(before, params)
    theirs = {x.untyped_storage().data_ptr() for x in tensors(params) if x.numel()}
    ours = {x.untyped_storage().data_ptr() for x in tensors(state) if x.numel()}
    assert not theirs & ours


@every_case
def test_the_same_call_twice_gives_the_same_result(case: Case) -> None:
    tx, params = case.make(), problem()
    state = tx.init(params)
    for g in gradients(STEPS):
        first = tx.update(g, state, params)
        assert_equal(first, tx.update(g, state, params))
        state = first[1]


@every_case
def test_donate_gives_the_same_numbers(case: Case) -> None:
    tx, params, grads = case.make(), problem(), gradients(STEPS)
    pure = train(tx, params, grads, fs.apply_updates)
    donated = train(tx, params, grads, fs.apply_updates, donate=True)
    assert_equal(pure, donated)  # the updates of all steps: none was overwritten by a later step


@every_case
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_autocast_changes_nothing(case: Case, donate: bool) -> None:
    """A step may stand inside the model's autocast: factor matrices and roots stay float32."""
    f32 = torch.float32
    tx, params, grads = case.make(), problem(dtype=f32), gradients(STEPS, f32)
    plain = train(tx, params, grads, fs.apply_updates, donate=donate)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16
        assert_equal(plain, train(tx, params, grads, fs.apply_updates, donate=donate))


@every_case
def test_in_place_gives_the_same_numbers(case: Case) -> None:
    tx, params = case.make(), problem()
    mine = clone(params)
    state, other = tx.init(params), tx.init(mine)
    for g in gradients(STEPS):
        before = snapshot(g)
        updates, state = tx.update(g, state, params)
        params = fs.apply_updates(params, updates)
        other = fs.update_in_place(tx, g, other, mine)
        assert_unchanged(before, g)
        assert_equal((mine, other), (params, state))


@every_case
def test_donate_writes_to_the_state_alone(case: Case) -> None:
    tx, params, grads = case.make(), problem(), gradients(STEPS)
    before = snapshot(params, grads)
    train(tx, params, grads, fs.apply_updates, donate=True)
    assert_unchanged(before, params, grads)


@every_case
def test_updates_share_no_memory_with_the_state(case: Case) -> None:
    """So that neither a later donated step nor a caller who edits them reaches the other."""
    tx, params = case.make(), problem()
    state = tx.init(params)
    for g in gradients(STEPS):
        updates, state = tx.update(g, state, params)
        theirs = {x.untyped_storage().data_ptr() for x in tensors(updates)}
        assert not theirs & {x.untyped_storage().data_ptr() for x in tensors(state)}


@every_case
def test_structure_and_dtype_of_updates_and_state_are_stable(case: Case) -> None:
    tx, params = case.make(), problem()
    state = tx.init(params)
    for g in gradients(STEPS):
        updates, new = tx.update(g, state, params)
        assert optree.tree_structure(updates) == optree.tree_structure(params)
        assert optree.tree_structure(new) == optree.tree_structure(state)
        for a, b in zip(tensors(new), tensors(state)):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        for u, p in zip(tensors(updates), tensors(params)):
            assert (u.shape, u.dtype) == (p.shape, p.dtype)
        state = new


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_half_precision_computes_in_float32(case: Case, dtype: torch.dtype) -> None:
    tx, params, grads = case.make(), problem(dtype=dtype), gradients(STEPS, dtype)
    state = tx.init(params)
    for x in tensors(state):
        assert not x.is_floating_point() or x.dtype == torch.float32
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
def test_dtypes_mix_in_one_tree(case: Case) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]

    def mix(tree: Any) -> Any:
        leaves, spec = optree.tree_flatten(tree)
        return spec.unflatten([x.to(dtypes[i % 5]) for i, x in enumerate(leaves)])

    params = mix(problem())
    tx = case.make()
    new, history, _ = train(tx, params, [mix(g) for g in gradients(3)], fs.apply_updates)
    for a, b in zip(tensors(new), tensors(params)):
        assert a.dtype == b.dtype
    assert all(torch.isfinite(u).all() for u in tensors(history))


@every_case
def test_a_saved_state_resumes_exactly(case: Case) -> None:
    tx, params, grads = case.make(), problem(), gradients(6)
    _, history, _ = train(tx, params, grads, fs.apply_updates)
    state, now = tx.init(params), params
    for g in grads[:3]:
        updates, state = tx.update(g, state, now)
        now = fs.apply_updates(now, updates)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=False)
    for g, expected in zip(grads[3:], history[3:]):
        updates, state = case.make().update(g, state, now)
        now = fs.apply_updates(now, updates)
        assert_equal(updates, expected)


@every_case
def test_vmap_equals_a_loop(case: Case) -> None:
    """Over an ensemble, init and update alike; the counters of its members are read as one."""
    tx, members = case.make(), 3
    ensemble = [problem(seed) for seed in range(members)]
    grads = [[gradients(STEPS, seed=100 + 10 * m)[t] for m in range(members)] for t in range(STEPS)]

    def stack(trees: list[Any]) -> Any:
        return optree.tree_map(lambda *xs: torch.stack(xs), *trees)

    params = stack(ensemble)
    state = vmap(tx.init)(params)
    for g in grads:
        updates, state = vmap(tx.update)(stack(g), state, params)
        params = fs.apply_updates(params, updates)
    for m in range(members):
        expected, _, _ = train(tx, ensemble[m], [g[m] for g in grads], fs.apply_updates)
        # Roots of rank-deficient statistics amplify rounding by the root of 1e6 a side.
        assert_close(optree.tree_map(lambda x, m=m: x[m], params), expected, 1e-9)


@every_case
def test_a_gradient_of_none_leaves_its_parameter_alone(case: Case) -> None:
    """None twice in the middle: as if those steps had not been, for that parameter."""
    if "multi_steps" in case.name or "global_norm" in case.name:
        pytest.skip("couples the parameters or the steps: tested apart")
    if "from_reference" in case.name:
        pytest.skip("corrects biases by everyone's steps: tested apart")
    if any(word in case.name for word in ("schedule", "everything", "corrected", "inject")):
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
def test_compiles_in_one_graph_without_recompilation(case: Case) -> None:
    """fullgraph, on steps that do not refresh: one graph serves them all."""
    from torch._dynamo.testing import CompileCounterWithBackend

    tx, params = case.make(), problem(dtype=torch.float32)
    grads = gradients(6, torch.float32)
    context: dict[str, Any] = {"refresh": False}
    if "multi_steps" in case.name:
        context["step"] = 2  # a real step; the others differ in a constant
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda g, s, p: tx.update(g, s, p, **context), fullgraph=True, backend=counter
    )
    state = tx.init(params)
    for g in grads:
        expected = tx.update(g, state, params, **context)
        got = compiled(g, state, params)
        assert_close(got, expected, 1e-6)
        state = expected[1]
    assert counter.frame_count <= 1
