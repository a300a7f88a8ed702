"""chain, masked, partition."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.recipes import RECIPES
from tests.trees import assert_equal, gradients, problem, tensors, train


def recorder(seen: list[dict[str, Any]]) -> fs.GradientTransformation:
    def init(params: Any, **context: Any) -> Any:
        seen.append({"init": True, **context})
        return fs.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **context: Any) -> Any:
        seen.append({"updates": updates, "params": params, **context})
        return updates, state

    return fs.GradientTransformation(init, update, name="recorder")


def test_stages_see_the_context() -> None:
    seen: list[dict[str, Any]] = []
    tx = fs.chain(fs.scale(2.0), fs.blocked(fs.chain(fs.ema(0.9), recorder(seen)), 2))
    params = {"w": torch.ones(4)}
    state = tx.init(params)
    tx.update({"w": torch.full((4,), 3.0)}, state, params, value=7, donate=False)
    made, called = seen
    assert made["block_ndim"] == called["block_ndim"] == 1
    assert called["value"] == 7
    assert called["gradient"]["2"].tolist() == [[6.0, 6.0], [6.0, 6.0]]  # what entered the scope
    assert fs.state.find_state(called["upstream"], fs.state.EmaState).average["2"].shape == (2, 2)  # type: ignore[union-attr]
    assert called["params"] is None
    assert fs.EmptyState() in made["upstream"]


def test_outside_a_scope_there_is_no_gradient_and_stages_use_their_updates() -> None:
    seen: list[dict[str, Any]] = []
    tx = fs.chain(fs.clip(1.0), recorder(seen), fs.scale_by_adagrad(0.0))
    params = {"w": torch.zeros(1)}
    _, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
    assert "gradient" not in seen[1]
    assert state["scale_by_adagrad"].second["w"].item() == 1.0  # of the clipped gradient


def test_clipping_before_a_scope_reaches_the_statistics() -> None:
    tx = fs.chain(fs.clip(1.0), fs.blocked(fs.kronecker_statistics(1.0)))
    params = {"w": torch.zeros(1)}
    _, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
    assert state["blocked"].inner.factors["1"][0].item() == 1.0


def test_inside_a_scope_statistics_are_of_the_gradient_not_of_the_updates() -> None:
    tx = fs.blocked(fs.chain(fs.scale(100.0), fs.kronecker_statistics(1.0)))
    params = {"w": torch.zeros(1)}
    _, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
    assert state.inner["kronecker_statistics"].factors["1"][0].item() == 25.0


def test_states_are_found_by_name_so_an_inserted_stage_moves_none() -> None:
    before = fs.chain(fs.ema(0.9), ("momentum", fs.trace(0.5)))
    after = fs.chain(fs.ema(0.9), fs.clip(10.0), fs.trace(0.1), ("momentum", fs.trace(0.5)))
    params, (g, h) = problem(), gradients(2)
    _, state = before.update(g, before.init(params), params)
    grown = after.init(params) | state
    _, new = after.update(h, grown, params)
    assert list(new) == ["ema", "clip", "trace", "momentum"]
    assert_equal(new["ema"], before.update(h, state, params)[1]["ema"])


@pytest.mark.parametrize("recipe", ["adamw", "shampoo", "soap", "muon", "kl_shampoo"])
@pytest.mark.parametrize(
    "other", [lambda: fs.sgd(0.1), lambda: fs.blocked(fs.trace(0.9)), lambda: fs.trace(0.9)]
)
def test_a_state_of_another_transformation_is_refused(recipe: str, other: Any) -> None:
    """Also where a look at failures comes first; and nothing is changed by a donated step."""
    tx, params = RECIPES[recipe](0.1), {"w": torch.ones(2, 3)}
    state = other().init(params)
    before = [x.clone() for x in tensors((state, params))]
    for step in (lambda: tx.update(params, state, params), lambda: in_place(tx, state, params)):
        with pytest.raises(ValueError, match="the state is (not|another)"):
            step()
    assert_equal(tensors((state, params)), before)


def in_place(tx: fs.GradientTransformation, state: Any, params: Any) -> None:
    fs.update_in_place(tx, {"w": torch.ones(2, 3)}, state, params)


def test_a_second_stage_of_a_name_is_numbered_and_given_names_are_kept() -> None:
    tx = fs.chain(fs.trace(0.1), ("trace_2", fs.trace(0.2)), fs.trace(0.3))
    assert list(tx.init(problem())) == ["trace", "trace_2", "trace_3"]
    with pytest.raises(ValueError, match="two stages of the chain are named 'a'"):
        fs.chain(("a", fs.trace(0.1)), ("a", fs.trace(0.2)))


def test_a_state_of_another_chain() -> None:
    state = fs.chain(fs.ema(0.9)).init(problem())
    with pytest.raises(ValueError, match=r"lacks \['trace'\] and has \['ema'\]"):
        fs.chain(fs.trace(0.9)).update(problem(), state)


@pytest.mark.parametrize(
    "mask",
    [
        {"w": True, "layers": False},
        {"w": True, "layers": [False, {"weight": False, "bias": False, "scale": False}]},
        lambda params: {"w": True, "layers": False},
    ],
    ids=["prefix", "deeper", "function"],
)
def test_masked_hides_the_other_leaves(mask: Any) -> None:
    tx = fs.masked(fs.chain(fs.kronecker_statistics(0.9), fs.scale(2.0)), mask)
    params, g = problem(), gradients(1)[0]
    state = tx.init(params)
    hidden = state.inner["kronecker_statistics"].factors["layers"]
    assert hidden[0]["weight"] == fs.MaskedNode()
    updates, _ = tx.update(g, state, params)
    assert torch.equal(updates["w"], 2 * g["w"])
    assert updates["layers"][0]["weight"] is g["layers"][0]["weight"]


@pytest.mark.parametrize("whole", [OrderedDict, dict])
@pytest.mark.parametrize("part", [OrderedDict, dict, lambda mask: lambda tree: dict(mask)])
def test_a_mask_goes_by_names_whatever_the_order(whole: Any, part: Any) -> None:
    params = {"x": whole(b=torch.ones(2), a=torch.ones(2)), "c": torch.ones(2)}
    names = {"x": part({"a": True, "b": False}), "c": False}
    mask = names if not callable(names["x"]) else lambda tree: {"c": False, "x": names["x"](tree)}
    for tx in (
        fs.masked(fs.scale(0.0), mask),
        fs.partition({True: fs.scale(0.0), False: fs.identity()}, mask),
    ):
        found, _ = tx.update(params, tx.init(params), params)
        assert {n: float(x.sum()) for n, x in found["x"].items()} == {"a": 0.0, "b": 2.0}
    decayed = fs.add_decayed_weights(1.0, mask)
    found, _ = decayed.update(params, decayed.init(params), params)
    assert {n: float(x.sum()) for n, x in found["x"].items()} == {"a": 4.0, "b": 2.0}


def test_masked_around_integers() -> None:
    """What can't be optimized can be hidden."""
    params = {"w": torch.ones(2), "steps": torch.tensor([3])}
    tx = fs.masked(fs.shampoo(0.1), {"w": True, "steps": False})
    updates, _ = tx.update(params, tx.init(params), params)
    assert torch.equal(updates["steps"], params["steps"])


def test_partition_equals_two_optimizers_side_by_side() -> None:
    params, grads = problem(), gradients(5)
    parts = {"matrices": fs.shampoo(0.1, every=2, max_size=4), "rest": fs.adamw(0.01)}

    def labels(tree: Any) -> Any:
        return torch.utils._pytree.tree_map(lambda x: "matrices" if x.ndim > 1 else "rest", tree)

    tx = fs.partition(parts, labels)
    together, _, state = train(tx, params, grads, fs.apply_updates)
    assert set(state.inner) == {"matrices", "rest"}
    for label, part in parts.items():
        mask = torch.utils._pytree.tree_map(lambda x, at=label: x == at, labels(params))
        alone, _, _ = train(part, _only(params, mask), [_only(g, mask) for g in grads], _apply)
        assert_equal(_only(together, mask), alone)


def _only(tree: Any, mask: Any) -> Any:
    leaves, names = torch.utils._pytree.tree_leaves(tree), []
    flags = torch.utils._pytree.tree_leaves(mask)
    for i, (leaf, flag) in enumerate(zip(leaves, flags)):
        if flag:
            names.append((f"{i:02d}", leaf))
    return dict(names)


_apply = fs.apply_updates


def test_partition_with_an_unknown_label() -> None:
    tx = fs.partition({"a": fs.sgd(0.1)}, {"w": "a", "layers": "b"})
    with pytest.raises(ValueError, match="labels contain 'b'.*known: a"):
        tx.init(problem())


def test_a_mask_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="mask is not a prefix"):
        fs.masked(fs.sgd(0.1), {"other": True}).init(problem())


def test_masked_inside_a_scope_masks_the_gradient_too() -> None:
    tx = fs.blocked(
        fs.masked(
            fs.chain(fs.scale(9.0), fs.scale_by_adagrad(0.0)),
            lambda stacks: {k: k == "2" for k in stacks},
        )
    )
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["a"].tolist() == [9.0, 9.0]  # 9 g / √g²
    assert updates["b"].tolist() == [1.0, 1.0, 1.0]


SHAPES = {"w": (3, 4), "b": (2,)}


@pytest.mark.parametrize("where", ["leaves", "blocks"])
def test_a_masked_stage_reads_a_state_upstream(where: str) -> None:
    def mask(tree: Any) -> Any:
        return {k: k in ("w", "3x4") for k in tree}

    stages = fs.chain(fs.kronecker_statistics(), fs.masked(fs.root_inverse(1), mask))
    tx = stages if where == "leaves" else fs.blocked(stages)
    generator = torch.Generator().manual_seed(0)
    params = {k: torch.randn(s, generator=generator).double() for k, s in SHAPES.items()}
    updates, _ = tx.update(params, tx.init(params), params)
    whole = fs.chain(fs.kronecker_statistics(), fs.root_inverse(1))
    expected, _ = whole.update(params, whole.init(params), params)
    assert torch.allclose(updates["w"], expected["w"], rtol=1e-5)
    assert torch.equal(updates["b"], params["b"])


def test_factor_matrices_of_another_scope() -> None:
    tx = fs.chain(fs.blocked(fs.kronecker_statistics()), fs.root_inverse(1))
    with pytest.raises(ValueError, match="inside the same blocked"):
        tx.init({"w": torch.ones(3, 4)})


def test_a_partition_in_a_chain_puts_no_tensor_into_words(monkeypatch: Any) -> None:
    """What hides the states of other stages used to read optree's errors, values and all."""
    labels = {"w": "a", "layers": "b"}
    tx = fs.chain(
        fs.ema(0.9),
        fs.partition({"a": fs.trace(0.9), "b": fs.adamw()}, labels),
        fs.ema_nesterov(0.1),
    )
    params = problem()
    state = tx.init(params)

    def shown(*args: Any, **options: Any) -> str:
        raise AssertionError("a tensor was printed")

    monkeypatch.setattr(torch.Tensor, "__repr__", shown)
    tx.update(gradients(1)[0], state, params)


def test_phases_are_those_of_the_steps_that_a_part_has() -> None:
    """On which `compiled` makes another graph: real steps, refreshes among them, and no others."""

    def every_other() -> fs.GradientTransformation:
        return fs.blocked(fs.chain(fs.kronecker_statistics(), fs.root_inverse(2)))

    alone = fs.scale(1.0)
    refresh = every_other().phase(1)
    assert refresh == ("refresh in threads",)
    for tx, expected in (
        (fs.every_k(alone, 2), [(), ("every 2",)] * 4),
        (fs.multi_steps(alone, 4), [(), (), (), ("real step of 4",)] * 2),
        (every_other(), [refresh, refresh, (), refresh, (), refresh, (), refresh]),
        (
            fs.multi_steps(every_other(), 2),
            [y for t in (1, 2, 3, 4) for y in ((), ("real step of 2", *every_other().phase(t)))],
        ),
        (
            fs.every_k(fs.multi_steps(alone, 2), 2),
            [(), ("every 2",), (), ("every 2", "real step of 2")] * 2,
        ),
    ):
        assert [tx.phase(t) for t in range(1, 9)] == expected
