"""Bad input: one clear error each, naming the leaf or the stage, and before anything changes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.core.parameters import detached
from tests.trees import assert_unchanged, problem, snapshot

RECIPES = {
    "shampoo": fs.shampoo(0.1),
    "adamw": fs.adamw(0.1),
    "sgd": fs.sgd(0.1, momentum=0.9),
    "adam": fs.scale_by_adam(),
    "blocked": fs.blocked(fs.trace(0.9)),
    "multi_steps": fs.multi_steps(fs.sgd(0.1), 2),
}


@pytest.mark.parametrize(
    ("leaf", "problem"),
    [
        (torch.ones(2, dtype=torch.int64), "an integer or bool tensor"),
        (torch.ones(2, dtype=torch.bool), "an integer or bool tensor"),
        (torch.ones(2, dtype=torch.complex64), "is complex"),
        (torch.eye(2).to_sparse(), "is sparse"),
        (torch.ones(2).to(torch.float8_e5m2), "not of a dtype that can be optimized"),
        (3.0, "is of type float, not a tensor"),
        (None, "is None"),
    ],
    ids=["integer", "bool", "complex", "sparse", "float8", "float", "none"],
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_that_can_not_be_optimized(recipe: str, leaf: Any, problem: str) -> None:
    params = {"fine": torch.ones(2), "layers": [{"odd": leaf}]}
    with pytest.raises(
        TypeError, match=rf"'layers\.0\.odd' {problem}|'layers\.0\.odd' is {problem}"
    ):
        RECIPES[recipe].init(params)


@pytest.mark.parametrize("recipe", ["shampoo", "adamw", "sgd"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {k: v for k, v in g.items() if k != "w"}, "leaf 'w' is missing from gradients"),
        (lambda g: {**g, "new": torch.ones(1)}, "leaf 'new' is missing from params"),
        (lambda g: {**g, "w": g["w"].T}, r"leaf 'w' has shape \(6, 5\) in params and \(5, 6\)"),
        (lambda g: {**g, "layers": tuple(g["layers"])}, "containers of different types"),
    ],
    ids=["missing", "unknown", "shape", "container"],
)
def test_gradients_that_do_not_fit_the_parameters(recipe: str, change: Any, message: str) -> None:
    tx, params = RECIPES[recipe], problem()
    state = tx.init(params)
    before = snapshot(params, state)
    with pytest.raises(ValueError, match=message):
        tx.update(change(problem(1)), state, params, donate=True)
    assert_unchanged(before, params, state)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    "stage", [fs.scale_by_adam(), fs.trace(0.9), fs.ema(0.9), fs.sgd(0.1, momentum=0.9)]
)
@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (
            {"a": torch.ones(4), "b": torch.ones(1)},
            r"gradients do not fit the state: at '\S*b' it has shape",
        ),
        ({"a": torch.ones(4)}, r"gradients do not fit the state: at '\S+' it has \['b'\] besides"),
    ],
    ids=["broadcast", "missing"],
)
def test_gradients_that_do_not_fit_the_state(
    stage: fs.GradientTransformation, gradient: Any, message: str, donate: bool
) -> None:
    """Without params to compare with: nothing is broadcast, nothing half written."""
    state = stage.init({"a": torch.zeros(4), "b": torch.zeros(4)})
    before = snapshot(state)
    with pytest.raises(ValueError, match=message):
        stage.update(gradient, state, donate=donate)
    assert_unchanged(before, state)


def test_complex_gradients() -> None:
    params = {"w": torch.ones(2)}
    tx = fs.adamw()
    with pytest.raises(TypeError, match="'w' is complex in gradients"):
        tx.update({"w": torch.ones(2, dtype=torch.complex64)}, tx.init(params), params)


def test_gradients_of_another_dtype_are_cast_to_the_parameters() -> None:
    params = {"w": torch.ones(3, 2), "b": torch.ones(2, dtype=torch.bfloat16)}
    tx = fs.shampoo(0.1, every=1)
    state = tx.init(params)
    wide = {k: p.double() for k, p in params.items()}
    a, _ = tx.update(wide, state, params)
    b, _ = tx.update({k: p.float() for k, p in params.items()}, state, params)
    for name, u in a.items():
        assert u.dtype == torch.float32
        assert torch.equal(u, b[name])


def test_apply_updates_checks_too() -> None:
    with pytest.raises(ValueError, match="leaf 'w' is missing from updates"):
        fs.apply_updates({"w": torch.ones(1)}, {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.kronecker_statistics(1.5), "beta2 is 1.5; it must lie in"),
        (lambda: fs.root_inverse(epsilon=-1.0), "epsilon is -1.0"),
        (lambda: fs.root_inverse(every=2.5), "every is 2.5; expected an int"),
        (lambda: fs.ema(1.0), r"beta1 is 1.0; it must lie in \[0.0, 1.0\)"),
        (lambda: fs.trace(-0.1), "momentum is -0.1"),
        (lambda: fs.trace(0.9, dampening=1.0), "dampening is 1.0"),
        (lambda: fs.scale_by_adam(epsilon=-1e-8), "epsilon is -1e-08"),
        (lambda: fs.scale_by_rms(float("nan")), "beta2 is nan"),
        (lambda: fs.scale_by_adagrad("small"), "epsilon is 'small'; expected a number"),
        (lambda: fs.clip(0.0), "max_value is 0.0"),
        (lambda: fs.clip_by_global_norm(-1.0), "max_norm is -1.0"),
        (lambda: fs.add_decayed_weights(-0.1), "weight_decay is -0.1"),
        (lambda: fs.add_decayed_weights(0.1, kind="cuopled"), "kind is 'cuopled'; choose one of"),
        (lambda: fs.scale_by_learning_rate(-1.0), "learning_rate is -1.0"),
        (lambda: fs.scale(True), "factor is True"),
        (lambda: fs.blocked(fs.trace(0.9), max_size=0), "max_size is 0"),
        (lambda: fs.sgd(0.1, nesterov=True), "nesterov needs momentum"),
        (lambda: fs.shampoo(0.1, nesterov=True), "nesterov needs momentum"),
        (lambda: fs.shampoo(0.1, weight_decay_kind="l3"), "kind is 'l3'"),
        (lambda: fs.shampoo(0.1, weight_decay_kind="corrected"), "needs peak_learning_rate"),
        (lambda: fs.root_inverse(solver=fs.linalg.eigh), "call it, as in linalg.eigh"),
        (lambda: fs.shampoo(0.1, solver="eigh"), "solver is 'eigh'; give one of"),
        (lambda: fs.kronecker_statistics(0.0), r"beta2 is 0.0; it must lie in \(0.0, 1.0\]"),
        (lambda: fs.orthogonalize(0.5), "polynomials is 0.5; give a name"),
        (lambda: fs.orthogonalize(dtype="half"), "dtype is half; give a floating one"),
        (lambda: fs.soap(0.1, statistics_beta=0.0), "statistics_beta is 0.0"),
        (lambda: fs.kl_soap(0.1, statistics_beta=1.0), "statistics_beta is 1.0"),
        (lambda: fs.splus(0.1, average=1.0), "average is 1.0"),
        (lambda: fs.splus(0.1, basis=0), "basis is 0; give"),
        (lambda: fs.eigenvalue_shampoo(0.1, basis=0), "basis is 0; give"),
        (lambda: fs.soap_muon(0.1, momentum=1.0), "momentum is 1.0"),
        (lambda: fs.muon(0.1, momentum=1.0), "momentum is 1.0"),
        (lambda: fs.from_published("SOAP", shampoo_beta=1.5), "shampoo_beta is 1.5"),
    ],
    ids=lambda value: "",
)
def test_arguments_out_of_range(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("value", [-1.0, 5.0])
def test_tensors_are_never_validated_by_value(value: float) -> None:
    """They may be traced or batched; nothing reads them."""
    t = torch.tensor(value)
    fs.shampoo(t, beta1=t, beta2=t, epsilon=t, weight_decay=t, momentum=t, grafting_epsilon=t)


class _DTensor(torch.Tensor):
    """What FSDP2 makes of a parameter, as far as one can see."""

    device_mesh, placements = None, ()


@pytest.mark.parametrize("tx", [fs.kronecker_statistics(), fs.blocked(fs.trace(0.9))])
def test_parameters_that_lie_on_several_ranks_are_refused_where_nobody_shares(
    tx: fs.GradientTransformation,
) -> None:
    params = {"w": torch.ones(2, 2).as_subclass(_DTensor)}
    with pytest.raises(TypeError, match=r"'w' is a DTensor.*blocked\(sharded.*to_local"):
        tx.init(params)
    fs.adamw(0.1).init(params)  # elementwise, and fine


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened"])
@pytest.mark.parametrize(
    "tx", [fs.shampoo(0.1), fs.blocked(fs.trace(0.9)), fs.sharded(fs.scale_by_adam())]
)
def test_flat_parameters_of_fsdp1_are_refused_by_name(
    tx: fs.GradientTransformation, mark: str
) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    setattr(p, mark, True)
    for given in (p, detached(p)):
        with pytest.raises(TypeError, match=r"'w' is one of .*FSDP1.*distribute=sharded"):
            tx.init({"w": given})
        fs.adamw(0.1).init({"w": given})
    assert not detached(p).requires_grad


@pytest.mark.parametrize("tx", [fs.shampoo(0.1), fs.sgd(0.1), fs.sharded(fs.scale_by_adam())])
def test_parameters_without_a_shape_are_refused_by_name(tx: fs.GradientTransformation) -> None:
    layer = torch.nn.LazyLinear(3)
    for read in (lambda p: p, detached):
        with pytest.raises(TypeError, match=r"'bias' has no shape yet.*Run the model once"):
            tx.init({name: read(p) for name, p in layer.named_parameters()})
    layer(torch.ones(1, 2))
    tx.init({name: detached(p) for name, p in layer.named_parameters()})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"packed": 1}, "packed is 1; expected True or False"),
        ({"stagger": "yes"}, "stagger is 'yes'"),
        ({"distribute": True}, r"distribute is True; give funshampoo\.sharded"),
    ],
)
def test_options_that_are_no_switches(option: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fs.shampoo(0.1, **option)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (torch.ones(3).to_sparse(), "gradient of 'b' is sparse.*sparse=False"),
        (torch.ones(3, device="meta"), "gradient of 'b' is on meta, the parameter on cpu"),
        (3.0, "gradient of 'b' is no tensor"),
    ],
    ids=["sparse", "device", "number"],
)
@pytest.mark.parametrize("way", ["pure", "donated", "in place"])
def test_a_gradient_that_no_tile_could_take(way: str, gradient: Any, message: str) -> None:
    """Found before the first tile is stepped."""
    tx = fs.shampoo(0.05, max_size=4, tile=16)
    params = {"a": torch.ones(8, 4), "b": torch.ones(3)}
    state = tx.init(params)
    before = snapshot(params, state)
    step: Any = {
        "pure": tx.update,
        "donated": functools.partial(tx.update, donate=True),
        "in place": functools.partial(fs.update_in_place, tx),
    }[way]
    with pytest.raises(TypeError, match=message):
        step({"a": torch.ones(8, 4), "b": gradient}, state, params)
    assert_unchanged(before, params, state)


@pytest.mark.parametrize("tx", [fs.adamw(0.1), fs.shampoo(0.1)])
def test_a_parameter_that_autograd_guards_is_not_written_to(tx: fs.GradientTransformation) -> None:
    params = {"a": torch.ones(2), "b": torch.ones(2, requires_grad=True)}
    gradients = {"a": torch.ones(2), "b": torch.ones(2)}
    state = tx.init(params)
    before = snapshot(params, state)
    with pytest.raises(ValueError, match=r"'b' requires gradients.*no_grad"):
        fs.update_in_place(tx, gradients, state, params)
    assert_unchanged(before, params, state)
    with torch.no_grad():
        fs.update_in_place(tx, gradients, state, params)
    assert (params["b"] < 1).all()


@pytest.mark.parametrize("mask", ["all", 3, {"w": 1.0}, lambda params: {"w": "yes"}])
def test_a_mask_of_other_things_than_bools(mask: Any) -> None:
    """All of them are true to Python, so everything would decay, or be a matrix."""
    params = {"w": torch.ones(2, 2)}
    for tx in (
        fs.shampoo(0.1, weight_decay=0.1, mask=mask),
        fs.adamw(0.1, weight_decay=0.1, mask=mask),
        fs.masked(fs.trace(0.9), mask),
        fs.muon(0.1, matrices=mask),
        fs.blocked(fs.scale_by_adam(), with_params=mask),
    ):
        with pytest.raises(
            TypeError, match="(mask|matrices|with_params) is .*; expected True or False"
        ):
            tx.update(params, tx.init(params), params)


def test_a_mask_that_takes_a_hidden_leaf_for_a_tensor() -> None:
    params = {"w": torch.ones(2, 2), "b": torch.ones(2), "other": torch.ones(2)}
    shown = {"w": True, "b": True, "other": False}

    def only_tensors(tree: Any) -> Any:
        return {n: isinstance(p, torch.Tensor) and p.ndim > 1 for n, p in tree.items()}

    for own in (
        lambda mask: fs.shampoo(0.1, weight_decay=0.1, mask=mask),
        lambda mask: fs.masked(fs.trace(0.9), mask),
        lambda mask: fs.add_decayed_weights(0.1, mask),
    ):
        naive = fs.masked(own(lambda tree: {n: p.ndim > 1 for n, p in tree.items()}), shown)
        with pytest.raises(TypeError, match=r"MaskedNode\(\).*isinstance\(p, torch\.Tensor\)"):
            naive.update(params, naive.init(params), params)
        careful = fs.masked(own(only_tensors), shown)
        careful.update(params, careful.init(params), params)
