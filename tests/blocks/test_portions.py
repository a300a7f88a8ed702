"""Donated steps by tiles, and in the parameters' memory: the bits of a pure step on everything."""

from __future__ import annotations

import itertools
import math
from typing import Any

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import funshampoo as fs
from funshampoo.blocks.layout import layout_of, leaf_keys
from funshampoo.blocks.portions import tiles_for, tiles_of
from funshampoo.blocks.regions import Parts
from funshampoo.blocks.stacks import stack_blocks
from funshampoo.blocks.state_rows import StateRows
from tests.sooner import these
from tests.trees import assert_equal, assert_unchanged, clone, snapshot, tensors

# Ragged at 8 in one side and in both, odd and even sides, orders 0 to 4, nothing at all.
SHAPES: dict[str, tuple[int, ...]] = {
    "wide": (40, 37),
    "ragged": (64, 33),
    "conv": (7, 9, 3, 3),
    "one": (1,),
    "bias": (13,),
    "long": (5, 100),
    "scalar": (),
    "empty": (0, 3),
}


def tree(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return {name: torch.randn(s, generator=make).to(dtype) for name, s in SHAPES.items()}


def gradient(t: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    found = tree(100 + t, dtype)
    if t == 4:
        found["wide"][0, 0] = math.nan  # one block of many
    return found


def train(tx: fs.GradientTransformation, mode: str, dtype: torch.dtype = torch.float32) -> Any:
    params = tree(0, dtype)
    state = tx.init(params)
    for t in range(1, 8):  # a refresh after the gradient that is not finite, and a step after it
        g = gradient(t, dtype)
        before = [x.clone() for x in tensors(g)]
        if mode == "in place":
            same = params
            state = fs.update_in_place(tx, g, state, params)
            assert params is same
        else:
            updates, state = tx.update(g, state, params, donate=mode == "donated")
            params = fs.apply_updates(params, updates)
        for x, y in zip(tensors(g), before):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    return params, state


OPTIONS: list[dict[str, Any]] = [
    {},
    {"stagger": True, "momentum": 0.9},
    {"grafting": "rms", "own_steps": False, "weight_decay": 0.1},
    {"grafting": None, "momentum": 0.9, "nesterov": True},
    {"grafting": "adagrad", "beta2": 1.0, "merge": "none", "start": 4},
    {"distribute": fs.sharded, "weight_decay": 0.1, "mask": {n: n == "wide" for n in SHAPES}},
    {"weight_decay": 0.1, "weight_decay_kind": "coupled"},
]


# Less than a block, some blocks, and "auto", which takes all of these.
TILED = [(40, "in place"), ("auto", "donated"), (40, "pure"), (40, "donated"), (300, "in place")]


@pytest.mark.parametrize(
    "options",
    these(OPTIONS, sooner=OPTIONS[:4]),
    ids=lambda options: "-".join(options) or "default",
)
def test_tiles_give_the_bits_of_the_whole(options: dict[str, Any]) -> None:
    def make(tile: Any) -> fs.GradientTransformation:
        return fs.shampoo(0.05, max_size=8, every=3, tile=tile, **options)

    expected = train(make(None), "pure")
    assert all(x.isfinite().all() for x in tensors(expected))
    assert not torch.equal(expected[0]["wide"], tree(0)["wide"])
    for tile, mode in TILED[: 2 if options else None]:
        assert_equal(train(make(tile), mode), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tiles_round_to_the_parameters_dtype_once(dtype: torch.dtype) -> None:
    expected = train(fs.shampoo(0.05, max_size=8, tile=None), "pure", dtype)
    tiled = fs.shampoo(0.05, max_size=8, tile=200)
    assert expected[0]["wide"].dtype == dtype
    assert_equal(train(tiled, "in place", dtype), expected)
    assert_equal(train(tiled, "donated", dtype), expected)


def test_parameters_of_any_strides_are_stepped_in_place() -> None:
    def strided() -> dict[str, Tensor]:
        conv = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(1))
        wide = torch.randn(30, 20, generator=torch.Generator().manual_seed(2))
        return {"conv": conv.to(memory_format=torch.channels_last), "wide": wide.t()}

    tx = fs.shampoo(0.1, max_size=8, tile=100)
    params, pure = strided(), {n: x.contiguous() for n, x in strided().items()}
    places = [x.data_ptr() for x in params.values()]
    state, other = tx.init(params), tx.init(pure)
    for _ in range(3):
        state = fs.update_in_place(tx, strided(), state, params)
        updates, other = tx.update({n: x.contiguous() for n, x in strided().items()}, other, pure)
        pure = fs.apply_updates(pure, updates)
    assert_equal({n: x.contiguous() for n, x in params.items()}, pure)
    assert [x.data_ptr() for x in params.values()] == places
    assert not params["wide"].is_contiguous()


def test_missing_gradients_in_place() -> None:
    params, pure = tree(0), tree(0)
    tx = fs.shampoo(0.1, max_size=8, tile=100)
    state, other = tx.init(params), tx.init(pure)
    for t in range(3):
        g: dict[str, Any] = gradient(t) | {"wide": None if t == 1 else gradient(t)["wide"]}
        state = fs.update_in_place(tx, g, state, params)
        updates, other = tx.update(g, other, pure)
        pure = fs.apply_updates(pure, updates)
    assert_equal((params, state), (pure, other))


def test_what_is_remembered_of_spans_does_not_grow() -> None:
    """Other gradients are None on each step: n rows have n² / 2 spans, of n / 3 rows each."""
    count = 24
    leaves = [torch.full((2, 3), float(i)) for i in range(count)]
    parts = Parts(layout_of(leaf_keys(leaves), None, "none", 2))
    for first, last in itertools.combinations(range(count + 1), 2):
        rows = parts.gather("2x3", range(first, last), leaves)
        assert rows[:, 0, 0].tolist() == list(range(first, last))
        assert sum([len(found.parts) for found in parts.values()]) <= 8 * count
    kept = len(parts)
    parts.gather("2x3", range(last - 1, last), leaves)
    assert len(parts) == kept  # and what was there is found again


def test_a_step_of_many_tiles_remembers_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What of a state belongs to a tile is looked up once, however many tiles there are."""
    looked_up = []

    def found(self: StateRows, *given: Any, real: Any = StateRows._found) -> Any:
        looked_up.append(1)
        return real(self, *given)

    monkeypatch.setattr(StateRows, "_found", found)
    tx, params = fs.blocked(fs.trace(0.9), max_size=2, tile=8), {"w": torch.zeros(2, 1200)}
    state = tx.init(params)
    for _ in range(3):
        state = fs.update_in_place(tx, {"w": torch.ones(2, 1200)}, state, params)
    assert len(looked_up) == 300


def donated(tx: fs.GradientTransformation, g: Any, state: Any, params: Any) -> None:
    tx.update(g, state, params, donate=True)


@pytest.mark.parametrize("mode", ["donated", "in place"])
def test_too_many_failures_stop_before_the_first_tile_changes(mode: str) -> None:
    """The failing block is in another tile than the first."""
    tx = fs.shampoo(0.1, max_size=8, every=1, max_failures=2, tile=40)
    params = tree(0)
    state = tx.init(params)
    bad = gradient(1)
    bad["ragged"][-1, -1] = math.inf
    for _ in range(2):
        _, state = tx.update(bad, clone(state), params, donate=True)
    before = snapshot(state, params)
    step = fs.update_in_place if mode == "in place" else donated
    with pytest.raises(fs.FailureLimitError, match="ragged block_7_4"):
        step(tx, bad, state, params)
    assert_unchanged(before, state, params)


class Largest(TorchDispatchMode):
    """The largest tensor that an operator allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tensors((list(args), kwargs or {}))}
        out = function(*args, **(kwargs or {}))
        for x in tensors([out]):
            if not x.is_meta and x.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.itemsize)
        return out


def test_nothing_larger_than_a_tile_is_allocated_in_place() -> None:
    params = {"w": torch.randn(64, 48), "v": torch.randn(40, 40)}
    tx = fs.shampoo(0.1, max_size=8, tile=8 * 64, every=2)
    state = tx.init(params)
    g = {n: torch.ones_like(p) for n, p in params.items()}
    for _ in range(3):
        with Largest() as seen:
            state = fs.update_in_place(tx, g, state, params)
        assert seen.numel <= 2 * 9 * 64  # both sides' matrices, where a single row was left


def test_a_chain_that_goes_on_after_the_blocks_is_applied_as_a_whole() -> None:
    tx = fs.chain(fs.blocked(fs.trace(0.9), 4, tile=20), fs.scale(-0.5))
    assert tx.apply is None
    ends = fs.chain(fs.scale(-0.5), fs.blocked(fs.trace(0.9), 4, tile=20))
    for chain in (tx, ends):
        assert_equal(train(chain, "in place")[0].keys(), train(chain, "pure")[0].keys())


def test_a_state_that_cant_be_cut_is_stepped_as_a_whole() -> None:
    """Two guards, each of which has to see all blocks."""
    inner = fs.guarded(fs.chain(fs.ema(0.9), fs.guarded(fs.trace(0.9))))
    expected = train(fs.blocked(inner, 8), "pure")
    assert_equal(train(fs.blocked(inner, 8, tile=40), "donated"), expected)


def test_transforms_are_let_through() -> None:
    """Under vmap nothing is written to, donated or not."""
    tx = fs.shampoo(0.1, max_size=4, tile=8)
    params = {"w": torch.randn(3, 10, 6)}
    state = torch.func.vmap(tx.init)(params)

    def step(g: Any, s: Any, p: Any) -> Any:
        return tx.update(g, s, p, donate=True, refresh=True)

    before = snapshot(params)
    updates, state = torch.func.vmap(step)(params, state, params)
    assert_unchanged(before, params)
    for i in range(3):
        own = {"w": params["w"][i]}
        expected, _ = tx.update(own, tx.init(own), own, refresh=True)
        torch.testing.assert_close(updates["w"][i], expected["w"])


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=6),
    st.integers(1, 100),
)
def test_tiles_hold_every_row_once(stacks: list[tuple[int, int]], most: int) -> None:
    rows = {f"s{i}": count for i, (count, _) in enumerate(stacks)}
    numel = {f"s{i}": n for i, (_, n) in enumerate(stacks)}
    tiles = tiles_of(rows, numel, most)
    seen = [(stack, row) for tile in tiles for stack, span in tile.items() for row in span]
    assert sorted(seen) == [(stack, row) for stack, count in rows.items() for row in range(count)]
    for tile in tiles:
        for stack, span in tile.items():
            assert len(span) >= min(2, rows[stack])
        numbers = sum(len(span) * numel[stack] for stack, span in tile.items())
        row = max(numel[stack] for stack in tile)
        assert numbers <= max(most + 3 * row, 3 * row)
        whole = all(len(span) == rows[stack] for stack, span in tile.items())
        last = any(span.stop == rows[stack] for stack, span in tile.items())
        assert whole or last or all(len(span) in {2, *range(4, 99, 4)} for span in tile.values())


def test_tiles_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as keep a step's memory low and its fixed cost too; elsewhere fewer."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    resnet = {"256x256": ((256, 256), 300), "64x64": ((64, 64), 100), "64": ((64,), 10)}
    assert len(tiles_for(resnet, "auto", gpu)) == len(tiles_for(resnet, None, cpu)) == 1
    assert 10 < len(tiles_for(resnet, "auto", cpu)) < 40
    assert all(len(tile.get("256x256", ())) <= 16 for tile in tiles_for(resnet, "auto", cpu))
    assert len(tiles_for({"40x40": ((40, 40), 1000)}, "auto", cpu)) == 1
    large = {"1024x1024": ((1024, 1024), 100)}
    assert [len(tile["1024x1024"]) for tile in tiles_for(large, "auto", gpu)] == [64, 36]
    small = {"256x256": ((256, 256), 48)}  # a quarter, of four tensors each: the parameters once
    assert [len(tile["256x256"]) for tile in tiles_for(small, "auto", cpu)] == [12] * 4
    assert all(len(tile["1024x1024"]) == 2 for tile in tiles_for(large, "auto", cpu))
    # Threads share the roots of a tile, and wait for one another at its end.
    assert len(tiles_for(small, "auto", cpu, refresh=True)) == 1
    refreshed = tiles_for(resnet, "auto", cpu, refresh=True)
    assert 1 < len(refreshed) < len(tiles_for(resnet, "auto", cpu))
    assert tiles_for(resnet, 10**6, cpu, refresh=True) == tiles_for(resnet, 10**6, cpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 32)  # each needs something to do
    assert len(tiles_for(resnet, "auto", cpu)) == 5
    assert [len(tile["1024x1024"]) for tile in tiles_for(large, "auto", cpu)] == [32, 32, 32, 4]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 7), max_size=4), min_size=1, max_size=4),
    st.integers(1, 4),
    st.data(),
)
def test_any_rows_are_gathered_and_put_back(
    shapes: list[list[int]], max_size: int, data: st.DataObject
) -> None:
    leaves = [torch.randn(shape) for shape in shapes]
    layout = layout_of(leaf_keys(leaves), max_size, "none", 2)
    stacks, parts = stack_blocks(list(leaves), layout), Parts(layout)
    back, sums = [torch.full_like(x, math.nan) for x in leaves], [x.clone() for x in leaves]
    for name, stack in stacks.items():
        cut = data.draw(st.integers(0, len(stack)))
        for rows in (range(cut), range(cut, len(stack))):
            if rows:
                values = parts.gather(name, rows, leaves)
                assert torch.equal(values, stack[rows.start : rows.stop])
                parts.scatter(name, rows, values, back)
                parts.scatter_add(name, rows, values, sums)
    assert_equal(back, leaves)
    assert_equal(sums, [2 * x for x in leaves])


def test_every_case_is_alike_in_place() -> None:
    """`update_in_place` is `update` and `apply_updates`, whether there is an `apply` or not."""
    for tx in (fs.adamw(0.1), fs.sgd(0.1, momentum=0.9), fs.multi_steps(fs.shampoo(0.1), 2)):
        got, want = train(tx, "in place"), train(tx, "pure")
        structure = optree.tree_structure(want)
        assert optree.tree_structure(got) == structure
        for a, b in zip(tensors(got), tensors(want)):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_tied_parameters_with_decay_are_alike_in_place() -> None:
    """A tile would read what the one before it has written to the other name."""
    tx = fs.shampoo(0.05, weight_decay=0.1, max_size=4, tile=32)
    draw = torch.Generator().manual_seed(0)
    grads = {n: torch.randn(16, 8, generator=draw) for n in ("a", "b")}
    found = []
    for in_place in (False, True):
        w = torch.ones(16, 8)
        params = {"a": w, "b": w}
        state = tx.init(params)
        for _ in range(3):
            if in_place:
                state = fs.update_in_place(tx, grads, state, params)
            else:
                updates, state = tx.update(grads, state, params)
                fs.core.applying.add_in_place(params, updates)
        found.append(w)
    assert torch.equal(*found)
