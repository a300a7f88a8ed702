"""Block space: layouts, stacks and back, and the gradients that are missing."""

from __future__ import annotations

import copy
import itertools
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funshampoo as fs
from funshampoo.blocks.blocking import _Blocked
from funshampoo.blocks.layout import layout_of, leaf_keys, merged_shape
from funshampoo.blocks.stacks import stack_blocks, unstack_blocks
from funshampoo.core.context import EMPTY
from tests.trees import gradients, problem, tensors, train


def test_a_copy_steps_by_layouts_that_are_alive() -> None:
    """What is remembered by identity must not be found for what has it after a copy."""
    blocks = _Blocked(fs.scale_by_adam(), lambda keys: layout_of(keys, 2, "none", 0), False, None)
    old = blocks.layout(leaf_keys([torch.ones(4)]))
    blocks._executor(old)
    copied = copy.deepcopy(blocks)
    assert copied._executor(old).layout is old


shapes = st.lists(st.integers(0, 7), min_size=0, max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    trees=st.lists(shapes, min_size=1, max_size=4),
    max_size=st.one_of(st.none(), st.integers(1, 9)),
    merge=st.sampled_from(["none", "small", "matrix"]),
    keep=st.integers(1, 3),
)
def test_blocks_cover_every_parameter_once(
    trees: list[list[int]], max_size: int | None, merge: Any, keep: int
) -> None:
    start, leaves = 0, []
    for shape in trees:
        size = math.prod(shape)
        leaves.append(torch.arange(start, start + size, dtype=torch.float64).reshape(shape))
        start += size
    layout = layout_of(leaf_keys(leaves), max_size, merge, keep)
    stacks = stack_blocks(list(leaves), layout)
    everything = torch.cat([torch.empty(0), *(s.flatten() for s in stacks.values())])
    assert sorted(everything.tolist()) == list(range(start))
    for name, stack in stacks.items():
        assert tuple(stack.shape) == (layout.stacks[name].rows, *layout.stacks[name].block)
        assert max_size is None or all(d <= max_size for d in stack.shape[1:])
    for leaf, back in zip(leaves, unstack_blocks(stacks, layout.parameters, leaves)):
        assert back is not None
        assert torch.equal(leaf, back)


@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=4), max_size=st.integers(1, 5))
def test_rows_are_the_blocks_in_row_major_order_of_the_grid(
    shape: list[int], max_size: int
) -> None:
    """Every block is the slice that a plain loop cuts; full blocks come before ragged ones."""
    x = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    layout = layout_of(leaf_keys([x]), max_size, "none", 1)
    stacks = stack_blocks([x], layout)
    rows: dict[str, list[torch.Tensor]] = {}
    for cut in itertools.product(*[range(0, d, max_size) for d in shape]):
        block = x[tuple(slice(i, i + max_size) for i in cut)]
        rows.setdefault("x".join(map(str, block.shape)), []).append(block)
    assert {name: len(stack) for name, stack in stacks.items()} == {
        n: len(r) for n, r in rows.items()
    }
    for name, blocks in rows.items():
        assert sorted(map(str, blocks)) == sorted(map(str, stacks[name]))


@pytest.mark.parametrize(
    ("shape", "merged"),
    [
        ((6, 4), (24,)),
        ((32, 32), (1024,)),
        ((33, 32), (33, 32)),
        ((64, 3, 7, 7), (64, 147)),
        ((128, 128, 3, 3), (128, 128, 9)),
        ((50257, 768), (50257, 768)),
        ((1, 7), (7,)),
        ((), (1,)),
        ((1, 1), (1,)),
        ((6, 1, 3, 1), (18,)),
    ],
)
def test_merging_examples(shape: tuple[int, ...], merged: tuple[int, ...]) -> None:
    assert merged_shape(shape, 1024, keep=1) == merged


def test_merging_targets_and_kinds() -> None:
    assert merged_shape((1, 2, 5, 1), 10, keep=1) == (10,)
    assert merged_shape((1, 2, 5, 1), 1, keep=1) == (2, 5)
    assert merged_shape((32, 3, 64, 64), 8192, keep=1) == (96, 4096)
    assert merged_shape((32, 3, 64, 64), 10**6, keep=2) == (32, 12288)
    assert merged_shape((2, 3, 4, 5), None, keep=1) == (120,)
    assert merged_shape((2, 3, 4, 5), 20, keep=3) == (2, 3, 20)
    assert merged_shape((6, 1, 3, 1), 1024, "none") == (6, 1, 3, 1)
    assert merged_shape((128, 128, 3, 3), 1024, "matrix") == (128, 1152)
    assert merged_shape((5,), 1024, "matrix") == (5,)


def test_known_layouts() -> None:
    layout = layout_of((((50257, 768), torch.float32, torch.device("cpu")),), 1024, "small", 1)
    assert {name: s.rows for name, s in layout.stacks.items()} == {"1024x768": 49, "81x768": 1}


def test_equal_blocks_of_all_parameters_share_a_stack() -> None:
    params = {"a": torch.zeros(8, 4), "b": torch.zeros(4, 4, dtype=torch.bfloat16)}
    state = fs.blocked(fs.trace(0.9), 4, merge="none").init(params)
    assert {k: tuple(v.shape) for k, v in state.inner.buffer.items()} == {"4x4": (3, 4, 4)}
    assert state.layout == {
        "a": {"4x4": {"0:2 2x1+0,0": ()}},
        "b": {"4x4": {"2:3 1x1+0,0": ()}},
    }


def test_blocks_of_different_dtypes_do_not() -> None:
    params = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)}
    state = fs.blocked(fs.trace(0.9)).init(params)
    assert {k: v.dtype for k, v in state.inner.buffer.items()} == {
        "2:float32": torch.float32,
        "2:float64": torch.float64,
    }


@pytest.mark.parametrize(
    "tx", [fs.shampoo(0.1), fs.blocked(fs.trace(0.9))], ids=["shampoo", "trace"]
)
def test_empty_and_one_element_parameters(tx: fs.GradientTransformation) -> None:
    params = {"none": torch.zeros(0, 3), "one": torch.ones(1, 1), "scalar": torch.ones(())}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["none"].shape == (0, 3)
    assert updates["one"].shape == (1, 1)
    assert updates["scalar"].shape == ()
    only_empty = {"none": torch.zeros(0)}
    updates, _ = tx.update(only_empty, tx.init(only_empty), only_empty)
    assert updates["none"].shape == (0,)


def test_a_tree_without_parameters() -> None:
    tx = fs.shampoo(0.1)
    assert tx.update({}, tx.init({}), {})[0] == {}


def test_with_params_hands_the_parameters_to_the_inner_stages() -> None:
    inner = fs.add_decayed_weights(0.5)
    params, g = problem(), gradients(1)[0]
    tx = fs.blocked(inner, 4, with_params=True)
    a, _ = tx.update(g, tx.init(params), params)
    b, _ = inner.update(g, inner.init(params), params)
    assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b)))


@pytest.mark.parametrize("own_steps", [True, False])
def test_a_late_parameter_in_a_shared_stack(own_steps: bool) -> None:
    """Two parameters share a stack; one's gradients begin at step 4."""
    tx = fs.shampoo(0.1, every=1, own_steps=own_steps)
    params = {"early": torch.zeros(3, 2), "late": torch.zeros(3, 2)}
    grads = [{"early": g["w"][:3, :2], "late": g["w"][3:, :2]} for g in gradients(6, torch.float32)]
    with_none = [g if t >= 3 else {**g, "late": None} for t, g in enumerate(grads)]
    got, _, _ = train(tx, params, with_none, fs.apply_updates)
    alone = {"late": params["late"]}
    own, _, _ = train(tx, alone, [{"late": g["late"]} for g in grads[3:]], fs.apply_updates)
    close = torch.allclose(got["late"], own["late"], rtol=1e-4, atol=1e-6)
    assert close == own_steps


def test_with_params_needs_them() -> None:
    params = {"w": torch.ones(2)}
    tx = fs.blocked(fs.add_decayed_weights(0.5), with_params=True)
    with pytest.raises(ValueError, match="add_decayed_weights needs.*pass params"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="blocked needs.*pass params"):  # as combinators call it
        tx.run(params, tx.init(params), None, EMPTY)
    tx = fs.blocked(fs.add_decayed_weights(0.5))
    with pytest.raises(ValueError, match="with_params=True"):
        tx.update(params, tx.init(params), params)


def test_names_that_only_look_alike() -> None:
    params = {"a": {"b": torch.ones(2)}, "a.b": torch.ones(2)}
    state = fs.blocked(fs.trace(0.9)).init(params)
    assert list(state.layout) == ["a.b", "'a.b'"]


def test_a_states_layout_is_its_own() -> None:
    tx, params = fs.blocked(fs.trace(0.9)), {"w": torch.ones(2)}
    tx.init(params).layout["w"]["2"]["0:7"] = ()
    assert tx.init(params).layout == {"w": {"2": {"0:1 1+0": ()}}}


def test_none_needs_the_parameters_shape() -> None:
    tx = fs.blocked(fs.trace(0.9))
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(ValueError, match="gradient of 'b' is None.*pass params"):
        tx.update({"a": torch.ones(2), "b": None}, tx.init(params))


def test_gradients_of_another_model() -> None:
    tx = fs.blocked(fs.trace(0.9))
    state = tx.init({"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(ValueError, match="do not fit the state: it has other blocks for 'b'"):
        tx.update({"a": torch.ones(2), "b": torch.ones(4)}, state)
    with pytest.raises(ValueError, match=r"do not fit the state: it has \['b'\] besides"):
        tx.update({"a": torch.ones(2)}, state)
    with pytest.raises(ValueError, match=r"do not fit the state: it has \['a', 'b'\] besides"):
        tx.update({}, state)
    with pytest.raises(ValueError, match=r"lacks \['c'\]"):
        tx.update({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, state)


def test_gradients_that_differ_from_the_parameters() -> None:
    tx, params = fs.blocked(fs.trace(0.9)), {"a": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"leaf 'a' has shape \(2, 3\) in params and \(3, 2\)"):
        tx.update({"a": torch.ones(3, 2)}, tx.init(params), params)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_gradients_of_a_dtype_that_init_has_not_seen(dtype: torch.dtype) -> None:
    """Without parameters, whose dtype would rule. Half precision is stacked as float32 is."""
    tx, params = fs.blocked(fs.trace(0.9)), {"a": torch.ones(2, 3), "b": torch.ones(4)}
    state = tx.init(params)
    for half in (torch.bfloat16, torch.float16):
        tx.update(params | {"a": torch.ones(2, 3, dtype=half)}, state)
    problem = "other blocks for 'a', of another shape, dtype|gradient of 'a' is .* only dense"
    with pytest.raises((ValueError, TypeError), match=problem):
        tx.update(params | {"a": torch.ones(2, 3).to(dtype)}, state)


def test_a_state_whose_keys_were_sorted_still_fits() -> None:
    tx = fs.blocked(fs.trace(0.9))
    params = {"b": torch.ones(2), "a": torch.ones(3)}
    state = tx.init(params)
    shuffled = state._replace(layout=dict(reversed(list(state.layout.items()))))
    tx.update(params, shuffled)


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.ones(2, 2), "w": torch.ones(2, 2)},  # sorted: w takes the rows of x
        OrderedDict(w=torch.ones(2, 2), x=torch.ones(2, 2)),
        OrderedDict(x=torch.ones(2, 2), z=torch.ones(2, 2)),
        [torch.ones(2, 2), torch.ones(2, 2)],
    ],
    ids=["sorted", "reordered", "renamed", "a list"],
)
def test_a_state_of_other_names_or_another_order_is_refused(other: Any) -> None:
    tx = fs.blocked(fs.scale_by_adam())
    params = OrderedDict(x=torch.ones(2, 2), w=torch.ones(2, 2))
    _, state = tx.update(params, tx.init(params))
    for _ in range(2):  # what is remembered of a tree doesn't let it pass
        with pytest.raises(ValueError, match="do not fit the state"):
            tx.update(other, state)
        tx.update(params, state)


def test_blocks_of_blocks() -> None:
    with pytest.raises(ValueError, match="blocked inside blocked"):
        fs.blocked(fs.chain(fs.blocked(fs.trace(0.9)))).init({"a": torch.ones(2)})


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (torch.Tensor.to_sparse, "sparse"),
        (lambda x: x.to("meta"), "meta"),
        (lambda x: 1.0, "no tensor"),
    ],
    ids=["sparse", "meta", "number"],
)
def test_what_an_earlier_stage_returns_is_looked_at(made: Any, said: str) -> None:
    bad = fs.stateless(lambda updates: {name: made(x) for name, x in updates.items()}, "bad")
    params = {"w": torch.ones(3, 2)}
    tx = fs.chain(bad, fs.blocked(fs.trace(0.9)))
    with pytest.raises(TypeError, match=f"gradient of 'w'.*{said}"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_replaced_in_their_own_dict_are_seen(in_place: bool) -> None:
    """A stage should not do so; but `blocked` may not step those that entered in their stead."""

    def doubled(updates: Any) -> Any:
        for name in updates:
            updates[name] = 2 * updates[name]
        return updates

    tx = fs.chain(fs.stateless(doubled), fs.blocked(fs.scale(-1.0)))
    params = {"w": torch.zeros(3, 3)}
    state = tx.init(params)
    for t in range(1, 4):
        grads = {"w": torch.ones(3, 3)}
        if in_place:
            state = fs.update_in_place(tx, grads, state, params)
        else:
            updates, state = tx.update(grads, state, params)
            params = fs.apply_updates(params, updates)
        assert torch.equal(params["w"], torch.full((3, 3), -2.0 * t))
