"""Bad input to every transformation: a clear error, and nothing has been changed.

Of the whole table, since a mistake that one stage tells of clearly may be an AttributeError of its
neighbour, or noticed after that one has written to its state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo.core.applying import Entering
from funshampoo.core.context import Context
from funshampoo.core.live import Live
from funshampoo.core.traits import ROUNDS
from tests.table import Case, every_case
from tests.trees import snapshot, tensors

Change = Callable[[Any], Any]


def tree(seed: int) -> Any:
    """Few leaves, by the names that some cases know."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (4, 3), "bias": (3,), "scale": ()}
    leaves = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {"w": leaves.pop("w"), "layers": [leaves]}


def with_w(function: Callable[[Tensor], Any]) -> Change:
    return lambda found: {**found, "w": function(found["w"])}


def with_scale(x: Any) -> Change:
    """Of the last leaf: whoever goes leaf by leaf has written to the others by then."""
    return lambda found: {**found, "layers": [{**found["layers"][0], "scale": x}]}


def with_new(found: Any) -> Any:
    return {**found, "layers": [{"new": torch.ones(3)}]}


def every_tensor(function: Callable[[Tensor], Tensor], found: Any) -> Any:
    return optree.tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, found)


def in_place(tx: Any, grads: Any, state: Any, params: Any) -> Any:
    return fs.update_in_place(tx, grads, state, params)


def pure(tx: Any, grads: Any, state: Any, params: Any) -> Any:
    return tx.update(grads, state, params)


def donated(tx: Any, grads: Any, state: Any, params: Any) -> Any:
    return tx.update(grads, state, params, donate=True)


def check_refused(step: Any, match: str, tx: Any, grads: Any, state: Any, params: Any) -> None:
    """It raises, and no tensor of anything has been written to."""
    known = [x for found in (grads, state, params) for x in tensors(found) if not x.is_sparse]
    before = snapshot([x for x in known if not x.is_meta])
    with pytest.raises((ValueError, TypeError), match=match):
        step(tx, grads, state, params)
    now = [x for x in known if not x.is_meta]
    for (value, version), x in zip(before, now):
        assert x._version == version, "a tensor was written to"
        assert torch.equal(x, value) or not x.isfinite().all()


def look(state: Any) -> Any:
    """All that can be wrong with it."""
    leaves, spec = optree.tree_flatten(state, none_is_leaf=True)
    kinds = [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else type(x) for x in leaves]
    return spec, kinds


STATES: dict[str, Callable[[Any, Any], Any]] = {
    "None": lambda tx, params: None,
    "a number": lambda tx, params: 3,
    "a stage's": lambda tx, params: fs.trace(0.9, dampening=0.1).init(params),
    "a chain's": lambda tx, params: fs.chain(fs.trace(0.9), fs.scale(1.0)).init(params),
    "a dict": lambda tx, params: {"w": torch.ones(4, 3)},
    "of other shapes": lambda tx, params: tx.init(with_w(lambda w: w.T.contiguous())(params)),
    "of other names": lambda tx, params: tx.init(with_new(params)),
    "of float64": lambda tx, params: tx.init(every_tensor(Tensor.double, params)),
    "on the meta device": lambda tx, params: every_tensor(lambda x: x.to("meta"), tx.init(params)),
}


STATE = "(?i)^(sharded: )?the state (is not|holds other blocks) .*call init"


@every_case
def test_a_state_that_is_not_its_own(case: Case) -> None:
    tx, params, grads = case.make(), tree(0), tree(1)
    own = look(tx.init(params))
    for name, make in STATES.items():
        state = make(tx, params)
        if look(state) == own:  # a stage without a state takes that of another one
            continue
        step = pure if name in ("None", "of float64") else in_place
        check_refused(step, STATE, tx, grads, state, params)


GRADIENTS: dict[str, tuple[Change, str]] = {
    "missing": (lambda g: {"w": g["w"]}, r"'layers.0.bias' is missing from gradients.*as None"),
    "extra": (lambda g: {**g, "x": torch.ones(2)}, "'x' is missing from params. Leave it out"),
    "a list": (lambda g: [g["w"]], "no leaf in common: .*gradients is a list of '0'. Give both as"),
    "None": (lambda g: None, "no leaf in common: .*gradients is None. Give both as"),
    "shape": (
        with_scale(torch.ones(1)),
        r"'layers.0.scale' has shape \(\) in params",
    ),
    "int": (
        with_scale(torch.tensor(3)),
        "gradient of 'layers.0.scale' is of torch.int64, ",
    ),
    "bool": (with_w(lambda w: w > 0), "gradient of 'w' is of torch.bool, .* real floating dtype"),
    "complex": (with_w(lambda w: w + 0j), "'w' is complex in gradients, .*real part"),
    "float8": (with_w(lambda w: w.to(torch.float8_e5m2)), "gradient of 'w' is of torch.float8"),
    "sparse": (with_w(lambda w: w.to_sparse()), "gradient of 'w' is sparse .*sparse=False"),
    "meta": (with_w(lambda w: w.to("meta")), "gradient of 'w' is on meta, .* move it there"),
    "numpy": (with_w(lambda w: w.numpy()), "'w' is no tensor but of type ndarray.*as_tensor"),
    "a number": (with_scale(3.0), "'layers.0.scale' is no tensor but of type float"),
}


@every_case
def test_gradients_that_do_not_fit_the_parameters(case: Case) -> None:
    tx, params, grads = case.make(), tree(0), tree(1)
    state = tx.init(params)
    for change, match in GRADIENTS.values():
        for step in (pure, in_place):
            check_refused(step, match, tx, change(grads), state, params)


@every_case
def test_gradients_without_parameters(case: Case) -> None:
    """Of a dtype that no parameter has, or not those that init saw: also before anything."""
    tx, params, grads = case.make(), tree(0), tree(1)
    state = tx.init(params)
    if tx.needs:
        check_refused(donated, f"{tx.needs} needs the parameters: pass", tx, grads, state, None)
        if ROUNDS in tx.traits:  # which no combinator may stand around
            return
        around = fs.wrapping(tx, lambda run, updates, own: (run(updates, params=None), own))
        match = f"run was given params=None, and {tx.needs} needs the parameters"
        check_refused(donated, match, around, grads, around.init(params), params)
        return
    changes = [with_w(Tensor.int), with_w(lambda w: w + 0j), with_w(Tensor.to_sparse)]
    for change in changes:
        match = "gradient of 'w' is .* only dense tensors of a real floating dtype"
        check_refused(donated, match, tx, change(grads), state, None)
    match = "gradient of 'w' is no tensor but of type ndarray"
    check_refused(donated, match, tx, with_w(lambda w: w.numpy())(grads), state, None)
    if tensors(state) and look(state) != look(tx.init(with_w(lambda w: w.T)(params))):
        match = "^these gradients do not fit the state: .*call init"
        check_refused(donated, match, tx, with_w(lambda w: w.T.contiguous())(grads), state, None)


@every_case
def test_a_gradient_of_another_floating_dtype_is_cast(case: Case) -> None:
    """What is exact in float32 does not show where it came from."""
    if "bfloat16" in case.name:
        pytest.skip("rounds by itself")
    tx, params, grads = case.make(), tree(0), tree(1)
    half = every_tensor(Tensor.bfloat16, grads)
    wanted, _ = tx.update(every_tensor(Tensor.float, half), tx.init(params), params)
    for dtype in (torch.bfloat16, torch.float64):
        cast = every_tensor(lambda x, dtype=dtype: x.to(dtype), half)
        found, _ = tx.update(cast, tx.init(params), params)
        assert look(found) == look(wanted)
        for a, b in zip(tensors(found), tensors(wanted)):
            assert torch.equal(a, b)
        moved = every_tensor(Tensor.clone, params)
        in_place(tx, cast, tx.init(moved), moved)
        for a, b in zip(tensors(moved), tensors(fs.apply_updates(params, wanted))):
            assert torch.equal(a, b)


PARAMETERS: dict[str, tuple[Change, str]] = {
    "None": (lambda p: None, "^params is None, .*pass them"),
    "missing": (lambda p: {"w": p["w"]}, "'layers.0.bias' is missing from params"),
    "shape": (with_w(lambda w: w.T.contiguous()), r"'w' has shape \(3, 4\) in params"),
    "int": (with_w(Tensor.int), "parameter 'w' is an integer or bool tensor"),
    "meta": (with_w(lambda w: w.to("meta")), "gradient of 'w' is on cpu, the parameter on meta"),
    "leaf None": (with_w(lambda w: None), "parameter 'w' is None; only dense"),
    "leaf number": (with_scale(3.0), "parameter 'layers.0.scale' is of type float, not a"),
    "recorded": (with_w(lambda w: w.clone().requires_grad_()), "'w' requires gradients.*no_grad"),
}


@every_case
def test_what_no_state_can_be_made_of(case: Case) -> None:
    tx, params = case.make(), tree(0)
    w = params["w"]
    for odd in (None, 3.0, "w", w.int(), w > 0, w + 0j, w.to_sparse(), w.numpy()):
        with pytest.raises(TypeError, match="parameter 'w' is .*; only dense.*Leave it out"):
            tx.init({**params, "w": odd})


def test_what_masked_hides_may_be_anything() -> None:
    """Also in a process that has not made the state."""
    params = {"w": torch.ones(2, 3), "count": torch.tensor(3)}
    grads = {"w": torch.ones(2, 3), "count": None}

    def make() -> fs.GradientTransformation:
        return fs.masked(fs.adamw(0.1), {"w": True, "count": False})

    state = make().init(params)
    updates, _ = make().update(grads, state, params)
    assert updates["count"] is None
    fs.update_in_place(make(), grads, state, params)
    assert params["count"] == 3
    assert (params["w"] < 1).all()


@every_case
def test_parameters_that_no_step_can_change(case: Case) -> None:
    tx, params, grads = case.make(), tree(0), tree(1)
    state = tx.init(params)
    for change, match in PARAMETERS.values():
        check_refused(in_place, match, tx, grads, state, change(params))
    wide = with_w(lambda w: torch.ones(4, 1).expand(4, 3))(params)
    check_refused(
        in_place, r"'w' has several entries in one place.*clone\(\)", tx, grads, state, wide
    )
    recorded = with_w(lambda g: g.clone().requires_grad_())(grads)
    check_refused(
        in_place, "gradient of 'w' requires gradients.*detach", tx, recorded, state, params
    )
    strided = with_w(lambda w: w.T.contiguous().T)(params)  # a transposed one can be written to
    in_place(tx, grads, tx.init(params), strided)


@pytest.mark.parametrize("earlier", [True, False])
def test_a_state_of_an_earlier_process_is_known(
    earlier: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `init` on the meta device; one of a like transformation's is known without."""
    params, grads = tree(0), tree(1)
    state = fs.shampoo(0.1).init(params)
    if earlier:
        monkeypatch.setattr("funshampoo.core.fit._ELSEWHERE", {})
    asked = []
    tx = fs.shampoo(0.1)
    inner = tx._fits._init
    tx._fits._init = lambda *given: asked.append(given) or inner(*given)
    for _ in range(3):
        _, state = tx.update(grads, optree.tree_map(torch.clone, state), params)
    assert len(asked) == earlier


def test_many_kinds_by_turns_are_all_remembered() -> None:
    tx = fs.adamw(0.1)
    kinds = [{"w": torch.ones(n)} for n in range(1, 30)]
    states = [tx.init(params) for params in kinds]
    tx._fits._init = lambda *given: pytest.fail("init was asked again")
    read_elsewhere = tx._fits._known  # by another thread
    before = list(read_elsewhere)
    for _ in range(2):
        for i, params in enumerate(kinds):
            _, states[i] = tx.update(params, states[i], params)
    assert all(a is b for a, b in zip(read_elsewhere, before, strict=True))


def test_a_stage_that_is_replaced_in_a_state_is_looked_at() -> None:
    """Before the stages ahead of it have written to theirs, in the dict that the last step made."""
    tx, params = fs.chain(fs.trace(0.9), fs.scale_by_adam(), fs.scale(-1.0)), tree(0)
    state = fs.update_in_place(tx, tree(1), tx.init(params), params)
    state["scale_by_adam"] = fs.scale_by_adam().init({"w": torch.ones(2)})
    check_refused(in_place, "scale_by_adam", tx, tree(1), state, params)


def test_steps_of_one_transformation_that_enter_together_are_known_apart() -> None:
    """As of two groups of the wrapper, or of two threads: a state of the one is not the other's."""

    def update(updates: Any, state: Any) -> Any:  # another state than init's, as it should not be
        return updates, {name: (x,) for name, x in updates.items()}

    tx = fs.GradientTransformation(lambda params: dict(params), update)
    kinds: list[Any] = [{"w": torch.ones(n)} for n in (2, 3)]
    entering = [Entering(tx, p, tx.init(p), p, Context(donate=True)).checked([]) for p in kinds]
    states = [step.applied() for step in entering]
    for i, wrong in enumerate(reversed(states)):
        check_refused(pure, "^the state is not one of this", tx, kinds[i], wrong, kinds[i])


def test_a_state_that_is_asked_for_draws_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(params: Any) -> Any:
        return {name: torch.randn(p.shape) for name, p in params.items()}

    def make() -> fs.GradientTransformation:
        return fs.GradientTransformation(init, lambda updates, state: (updates, state))

    params = {"w": torch.ones(3)}
    state = make().init(params)
    monkeypatch.setattr("funshampoo.core.fit._ELSEWHERE", {})
    before = torch.random.get_rng_state()
    make().update(params, state)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_state_whose_init_reads_values_is_left_to_its_stages() -> None:
    def stage() -> fs.GradientTransformation:
        def init(params: Any) -> Any:
            return {name: x * float(x.norm()) for name, x in params.items()}

        return fs.GradientTransformation(init, lambda updates, state: (updates, state))

    params = {"w": torch.ones(2)}
    stage().update(params, stage().init(params))
    tx = fs.GradientTransformation(lambda params: params, lambda updates, state: (updates, state))
    with pytest.raises(ValueError, match="'w' it has shape"):
        tx.update(params, {"w": torch.ones(3)})


def test_a_combinator_by_hand_that_hands_on_its_context() -> None:
    """What `init` was told of (blocks, a clock) it is told of in `update` as well."""

    def around(inner: fs.GradientTransformation) -> fs.GradientTransformation:
        def update(updates: Any, state: Any, params: Any = None, **context: Any) -> Any:
            return inner.update(updates, state, params, **context)

        return fs.GradientTransformation(inner.init, update, counts=inner.counts)

    params, grads = tree(0), tree(1)
    tx = fs.blocked(fs.chain(around(fs.chain(fs.kronecker_statistics(), fs.root_inverse(2)))), 2)
    same = fs.blocked(fs.chain(fs.chain(fs.kronecker_statistics(), fs.root_inverse(2))), 2)
    found, wanted = tx.init(params), same.init(params)
    for _ in range(3):
        a, found = tx.update(grads, found, params)
        b, wanted = same.update(grads, wanted, params)
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b)))


CONTEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "hyper, no dict": ({"hyper": 0.1}, "hyper is 0.1; give a dict"),
    "hyper, another name": ({"hyper": {"learning_rat": 0.1}}, "did you mean 'learning_rate'"),
    "negative": (
        {"hyper": {"learning_rate": -0.1}},
        r"learning_rate is -0.1; it must lie",
    ),
    "nan": ({"hyper": {"learning_rate": float("nan")}}, "learning_rate is nan"),
    "no number": ({"hyper": {"learning_rate": "0.1"}}, "learning_rate is '0.1'; expected"),
    "decay": ({"hyper": {"weight_decay": -1.0}}, "weight_decay is -1.0"),
    "no value": (
        {"hyper": {"learning_rate": torch.tensor(0.1, device="meta")}},
        "learning_rate is a tensor on the meta device",
    ),
    "step, a word": ({"step": "3"}, "step is a str; pass a Python int"),
    "step, a tensor": ({"step": torch.tensor(3)}, "step is a Tensor; pass a Python int"),
    "step, a float": ({"step": 3.0}, "step is a float; pass a Python int"),
    "step, zero": ({"step": 0}, "step is 0; it counts from 1"),
    "refresh": ({"refresh": 1}, "refresh is 1; expected True or False"),
    "another name": ({"refesh": True}, "did you mean 'refresh'"),
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("recipe", [fs.sgd, fs.adamw, fs.shampoo], ids=lambda f: f.__name__)
def test_what_is_said_of_a_step(recipe: Any, name: str) -> None:
    given, match = CONTEXTS[name]
    tx = recipe(Live("learning_rate", 0.1), weight_decay=Live("weight_decay", 0.1))
    params, grads = tree(0), tree(1)
    state = tx.init(params)

    def step_in_place(tx: Any, grads: Any, state: Any, params: Any) -> Any:
        return fs.update_in_place(tx, grads, state, params, **given)

    def step(tx: Any, grads: Any, state: Any, params: Any) -> Any:
        return tx.update(grads, state, params, donate=True, **given)

    for way in (step, step_in_place):
        check_refused(way, match, tx, grads, state, params)


@pytest.mark.parametrize("parts", [(slice(0, 4), slice(2, 6)), (slice(0, 6), slice(2, 4))])
def test_parameters_that_share_entries_move_by_the_sum(parts: tuple[slice, slice]) -> None:
    """Updates are of the parameters as they were, whatever part of them another step writes to."""
    rows = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    grads = {name: torch.ones_like(rows[part]) for name, part in zip("ab", parts)}
    for tx in (
        fs.partition({"a": fs.adamw(0.1), "b": fs.shampoo(0.1)}, {"a": "a", "b": "b"}),
        fs.shampoo(0.1, weight_decay=0.5, max_size=2, tile=4),
    ):
        memory = rows.clone()
        params = {name: memory[part] for name, part in zip("ab", parts)}
        apart = {name: x.clone() for name, x in params.items()}
        updates, _ = tx.update(grads, tx.init(apart), apart)
        expected = rows.clone()
        for name, part in zip("ab", parts):
            expected[part] += updates[name]
        fs.update_in_place(tx, grads, tx.init(params), params)
        assert torch.allclose(memory, expected, rtol=0, atol=1e-6)


class Unlucky(NamedTuple):
    """Of a stage of somebody's, whose fields have names that mean something elsewhere."""

    layout: Tensor
    owned: Tensor
    ranks: Tensor
    pace: Tensor


def test_a_field_may_have_any_name() -> None:
    def init(params: Any) -> Unlucky:
        return Unlucky(*[torch.zeros(i + 2) for i in range(4)])

    def update(updates: Any, state: Unlucky) -> Any:
        return updates, Unlucky(*[x + 1 for x in state])

    tx = fs.chain(("own", fs.GradientTransformation(init, update)), fs.scale(-1.0))
    params, grads = tree(0), tree(1)
    _, state = tx.update(grads, tx.init(params), params)
    twin = fs.chain(("own", fs.GradientTransformation(init, update)), fs.scale(-1.0))
    twin.update(grads, copy.deepcopy(state), params, hyper=None)
    wrong = {**state, "own": state["own"]._replace(pace=torch.zeros(9))}
    with pytest.raises(ValueError, match="'own/pace' it has shape"):
        twin.update(grads, wrong, params)
