"""Every number that may be live is one: injected, edited in the state, and given in `hyper`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import funshampoo as fs
from funshampoo import linalg
from funshampoo.core.live import Live, is_live_argument, takes_live
from funshampoo.recipes import RECIPES
from funshampoo.state.stages import HyperparamsState
from tests.sooner import these
from tests.trees import assert_close, assert_equal, gradients, problem

Make = Callable[..., fs.GradientTransformation]


class Numbers(NamedTuple):
    """A function, and each of its numbers: {name: (before, after)}; all are exact in float32."""

    name: str
    make: Make
    numbers: Mapping[str, tuple[float, float]]
    options: Mapping[str, Any] = {}
    around: Make = lambda stage: stage

    @property
    def function(self) -> str:
        return self.name.split(":")[0]


def _with_statistics(stage: fs.GradientTransformation) -> fs.GradientTransformation:
    return fs.chain(fs.kronecker_statistics(0.75), stage)


def _used(stage: fs.GradientTransformation) -> fs.GradientTransformation:
    return fs.chain(stage, fs.root_inverse(every=1, epsilon=0.25))


DAMPED = {"epsilon": (0.25, 0.5)}
SPIKES = {"spike_factor": (64.0, 1.0625)}
ADAM = {"learning_rate": (0.5, 0.25), "beta1": (0.75, 0.5), "beta2": (0.75, 0.875)}
SHAMPOO = {**ADAM, "relative_epsilon": (0.25, 0.125)}
TABLE = [
    Numbers("clip", fs.clip, {"max_value": (0.5, 0.25)}),
    Numbers("clip_by_global_norm", fs.clip_by_global_norm, {"max_norm": (0.5, 0.25)}),
    Numbers("scale", fs.scale, {"factor": (0.5, -0.25)}),
    Numbers("scale_by_learning_rate", fs.scale_by_learning_rate, {"learning_rate": (0.5, 0.25)}),
    Numbers("add_decayed_weights", fs.add_decayed_weights, {"weight_decay": (0.5, 0.25)}),
    Numbers(
        "add_decayed_weights:corrected",
        fs.add_decayed_weights,
        {
            "weight_decay": (0.5, 0.25),
            "learning_rate": (0.5, 0.25),
            "peak_learning_rate": (0.5, 2.0),
        },
        {"kind": "corrected"},
    ),
    Numbers(
        "add_decayed_weights:masked",
        fs.add_decayed_weights,
        {"weight_decay": (0.5, 0.25), "peak_learning_rate": (0.5, 2.0)},
        {"kind": "independent", "mask": {"w": True, "layers": False}},
    ),
    Numbers("guarded", fs.guarded, {"spike_factor": (64.0, 1.0625)}, {"inner": fs.trace(0.5)}),
    Numbers("ema", fs.ema, {"beta1": (0.75, 0.5), "beta3": (0.5, 0.25)}),
    Numbers("trace", fs.trace, {"momentum": (0.75, 0.5), "dampening": (0.25, 0.5)}),
    Numbers(
        "scale_by_adam",
        fs.scale_by_adam,
        {"beta1": (0.75, 0.5), "beta2": (0.75, 0.875), "epsilon": (0.25, 0.5)},
    ),
    Numbers("scale_by_rms", fs.scale_by_rms, {"beta2": (0.75, 0.875), **DAMPED}),
    Numbers("scale_by_adagrad", fs.scale_by_adagrad, DAMPED),
    Numbers("kronecker_statistics", fs.kronecker_statistics, {"beta2": (0.75, 0.5)}, {}, _used),
    Numbers(
        "root_inverse",
        fs.root_inverse,
        {**DAMPED, "trace_scaling": (0.5, 0.25), "basis_tolerance": (0.0, 4.0)},
        {"every": 1},
        _with_statistics,
    ),
    Numbers("adamw", fs.adamw, {**ADAM, **DAMPED, "weight_decay": (0.5, 0.25)}),
    Numbers(
        "sgd",
        fs.sgd,
        {
            "learning_rate": (0.5, 0.25),
            "momentum": (0.75, 0.5),
            "dampening": (0.25, 0.5),
            "weight_decay": (0.5, 0.25),
        },
    ),
    Numbers(
        "shampoo",
        fs.shampoo,
        {
            **SHAMPOO,
            "beta3": (0.5, 0.25),
            "grafting_beta2": (0.75, 0.5),
            "grafting_epsilon": (0.25, 0.5),
            "momentum": (0.75, 0.5),
            "dampening": (0.25, 0.5),
            "weight_decay": (0.5, 0.25),
            "peak_learning_rate": (0.5, 2.0),
            "trace_scaling": (0.5, 0.25),
            "basis_tolerance": (0.0, 4.0),
            "spike_factor": (64.0, 1.0625),
            **DAMPED,
        },
        {"every": 2, "max_size": 4, "weight_decay_kind": "corrected"},
    ),
    Numbers(
        "shampoo:nesterov",
        fs.shampoo,
        {**SHAMPOO, "grafting_epsilon": (0.25, 0.5)},
        {"beta3": "nesterov", "every": 2, "max_size": 4},
    ),
    Numbers("adaptive_clip", fs.adaptive_clip, {"max_ratio": (0.5, 0.25), "epsilon": (0.25, 0.5)}),
    Numbers("add_cautious_decay", fs.add_cautious_decay, {"weight_decay": (0.5, 0.25)}),
    Numbers("ema_nesterov", fs.ema_nesterov, {"look_ahead": (0.5, 0.25), "beta": (0.75, 0.5)}),
    Numbers("hyperball", fs.hyperball, {"learning_rate": (0.5, 0.25)}),
    Numbers("lion", fs.lion, {**ADAM, "weight_decay": (0.5, 0.25)}),
    Numbers(
        "muon",
        fs.muon,
        {"learning_rate": (0.5, 0.25), "momentum": (0.75, 0.5), "weight_decay": (0.5, 0.25)},
    ),
    Numbers(
        "normuon",
        fs.normuon,
        {
            "learning_rate": (0.5, 0.25),
            "momentum": (0.75, 0.5),
            "beta2": (0.75, 0.875),
            "weight_decay": (0.5, 0.25),
        },
    ),
    Numbers(
        "eigenvalue_shampoo",
        fs.eigenvalue_shampoo,
        {
            **ADAM,
            "epsilon": (0.25, 0.5),
            "weight_decay": (0.5, 0.25),
            "spike_factor": (64.0, 1.0625),
        },
        {"every": 2, "start": 2, "max_size": 4},
    ),
    Numbers(
        "scale_by_second_moment", fs.scale_by_second_moment, {"beta2": (0.75, 0.875), **DAMPED}
    ),
    Numbers(
        "scale_by_second_moment:floor",
        fs.scale_by_second_moment,
        {"beta2": (0.75, 0.875), **DAMPED},
        {"exponent": 0.25, "damping": "floor"},
    ),
    Numbers(
        "decay_after_step",
        fs.decay_after_step,
        {"weight_decay": (0.5, 0.25), "learning_rate": (0.5, 0.25)},
    ),
    Numbers(
        "splus",
        fs.splus,
        {
            "learning_rate": (0.5, 0.25),
            "beta1": (0.75, 0.5),
            "beta2": (0.75, 0.5),
            "weight_decay": (0.5, 0.25),
        },
        {"every": 1},
    ),
    Numbers(
        "soap_muon",
        fs.soap_muon,
        {
            "learning_rate": (0.5, 0.25),
            "momentum": (0.75, 0.5),
            "beta2": (0.75, 0.5),
            "outward": (0.5, 0.25),
            "inward": (0.5, 0.25),
            "min_ratio": (0.5, 2.0),
        },
    ),
    Numbers("normalize_rows", fs.normalize_rows, {"beta2": (0.75, 0.875), **DAMPED}),
    Numbers(
        "primal_average",
        fs.primal_average,
        {"learning_rate": (0.5, 0.25), "average": (0.75, 0.5), "interpolation": (0.5, 0.25)},
    ),
    Numbers("radial_brake", fs.radial_brake, {"outward": (0.5, 0.25), "inward": (0.5, 0.25)}),
    Numbers("schedule_free", fs.schedule_free, {"learning_rate": (0.5, 0.25), "beta": (0.75, 0.5)}),
    Numbers("sign", fs.sign, {"scale": (0.5, 0.25)}),
    Numbers(
        "sign_descent",
        fs.sign_descent,
        {
            "learning_rate": (0.5, 0.25),
            "beta1": (0.75, 0.5),
            "scale": (0.5, 0.25),
            "weight_decay": (0.5, 0.25),
        },
    ),
    Numbers(
        "kl_statistics",
        fs.kl_statistics,
        {"beta2": (0.75, 0.5), "damping": (0.25, 0.5)},
        {},
        lambda stage: fs.chain(stage, fs.in_eigenbasis(fs.scale_by_eigenvalues(), every=1)),
    ),
    Numbers(
        "scale_by_eigenvalues",
        fs.scale_by_eigenvalues,
        DAMPED,
        {},
        lambda stage: fs.chain(fs.kl_statistics(0.75), fs.in_eigenbasis(stage, every=1)),
    ),
    Numbers(
        "kl_shampoo",
        fs.kl_shampoo,
        {**ADAM, **DAMPED, "damping": (0.25, 0.5), "weight_decay": (0.5, 0.25), **SPIKES},
        {"every": 1, "max_size": 4},
    ),
    Numbers(
        "kl_soap",
        fs.kl_soap,
        {
            **ADAM,
            **DAMPED,
            "statistics_beta": (0.75, 0.5),
            "damping": (0.25, 0.5),
            "weight_decay": (0.5, 0.25),
            **SPIKES,
        },
        {"every": 1, "max_size": 4},
    ),
    Numbers(
        "soap",
        fs.soap,
        {
            **ADAM,
            "epsilon": (0.25, 0.5),
            "statistics_beta": (0.75, 0.5),
            "weight_decay": (0.5, 0.25),
            "spike_factor": (64.0, 1.0625),
        },
        {"every": 1, "max_size": 4},
    ),
    Numbers(
        "spectral_descent",
        fs.spectral_descent,
        {"learning_rate": (0.5, 0.25), "beta1": (0.75, 0.5), "weight_decay": (0.5, 0.25)},
    ),
    Numbers("update_floor", fs.update_floor, {"min_ratio": (0.5, 2.0)}),
    Numbers("shampoo:ungrafted", fs.shampoo, SHAMPOO, {"every": 1, "grafting": None}),
    Numbers(
        "from_reference",
        fs.from_reference,
        {
            "lr": (0.5, 0.25),
            "epsilon": (0.25, 0.5),
            "weight_decay": (0.5, 0.25),
            "peak_lr": (0.5, 2.0),
        },
        {"betas": (0.75, 0.75), "weight_decay_type": "CORRECTED"},
    ),
]
SOLVERS = {
    "by_device": {"relative_epsilon": (0.25, 0.125)},
    "coupled_higher_order": {
        "relative_epsilon": (0.25, 0.125),
        "absolute_epsilon": (0.25, 0.5),
    },
    "coupled_newton": {"relative_epsilon": (0.25, 0.125)},
    "eigh": {"relative_epsilon": (0.25, 0.125)},
    "newton_schulz": {"relative_epsilon": (0.25, 0.125)},
    "pseudo_inverse": {"rtol": (0.0, 0.5)},
}


def _rooted_by(name: str) -> Make:
    def make(**numbers: Any) -> fs.GradientTransformation:
        return fs.root_inverse(every=1, solver=getattr(linalg, name)(**numbers))

    return make


TABLE += [
    Numbers(f"linalg:{name}", _rooted_by(name), numbers, {}, _with_statistics)
    for name, numbers in SOLVERS.items()
]
OTHERS = {
    ("from_reference", "betas"),  # live in the wrapper; a tuple is not injected
    ("splus", "average"),  # as the next one
    ("tail_average", "beta"),  # it moves no parameter, so that no edit would show
}
# Of the recipes, which hand their numbers on to stages, `make test` takes three.
LATER = RECIPES.keys() - {"shampoo", "adamw", "muon"}
every_entry = pytest.mark.parametrize(
    "entry",
    these({e.name: e for e in TABLE}, sooner={e.name for e in TABLE} - LATER),
)


def test_the_table_has_every_number_that_may_be_live() -> None:
    declared = set()
    for name in fs.__all__:
        function = getattr(fs, name)
        if inspect.isfunction(function) and takes_live(function):
            parameters = inspect.signature(function).parameters.values()
            declared |= {(name, p.name) for p in parameters if is_live_argument(function, p)}
    assert declared == OTHERS | {
        (entry.function, n) for entry in TABLE for n in entry.numbers if entry.function != "linalg"
    }


def test_the_table_has_every_number_of_a_solver_that_may_be_a_tensor() -> None:
    declared = set()
    for name in linalg.__all__:
        function = getattr(linalg, name)
        if inspect.isfunction(function):
            parameters = inspect.signature(function).parameters.values()
            declared |= {(name, p.name) for p in parameters if "Tensor" in str(p.annotation)}
    assert declared <= {(name, n) for name, numbers in SOLVERS.items() for n in numbers}


def before(entry: Numbers) -> dict[str, float]:
    return {name: x for name, (x, _) in entry.numbers.items()}


def after(entry: Numbers, name: str) -> dict[str, float]:
    return before(entry) | {name: entry.numbers[name][1]}


def as_tensors(numbers: Mapping[str, float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(x, dtype=torch.float32) for name, x in numbers.items()}


def built(entry: Numbers, numbers: Mapping[str, Any]) -> fs.GradientTransformation:
    return entry.around(entry.make(**numbers, **entry.options))


def run(
    tx: fs.GradientTransformation, state: Any, steps: range, now: Any, **context: Any
) -> tuple[list[Any], Any, Any]:
    """The updates of these steps, the state and the parameters after them."""
    out = []
    for g in gradients(steps.stop)[steps.start :]:
        updates, state = tx.update(g, state, now, **context)
        now = fs.apply_updates(now, updates)
        out.append(updates)
    return out, state, now


def steps_of(entry: Numbers) -> tuple[range, range]:
    """Those before a number changes, and those after it; no gradient is a spike before the 11th."""
    first = 12 if "spike_factor" in entry.numbers else 4
    return range(first), range(first, first + 3)


@every_entry
def test_injected_is_the_same_bit_for_bit_and_edits_reach_it(entry: Numbers) -> None:
    if entry.function == "linalg":
        pytest.skip("a solver is no transformation")
    numbers = as_tensors(before(entry))
    plain, params = built(entry, numbers), problem()
    first, then = steps_of(entry)
    tx = entry.around(fs.inject_hyperparams(entry.make)(**before(entry), **entry.options))
    out, plain_state, now = run(plain, plain.init(params), first, params)
    found, state, _ = run(tx, tx.init(params), first, params)
    assert_equal(found, out)
    assert injected(state).hyperparams.keys() >= numbers.keys()
    unedited, _, _ = run(tx, state, then, now)
    for name in numbers:
        changed = as_tensors(after(entry, name))
        wanted, _, _ = run(built(entry, changed), plain_state, then, now)
        given = edited(state, name, changed[name])
        found, _, _ = run(tx, given, then, now)
        assert_equal(found, wanted)
        assert differ(found, unedited), f"{name} makes no difference, so this shows nothing"
        floats, _, _ = run(tx, edited(state, name, entry.numbers[name][1]), then, now)
        assert_equal(floats, wanted)


@every_entry
def test_what_hyper_says_is_used_bit_for_bit(entry: Numbers) -> None:
    plain, params = built(entry, before(entry)), problem()
    first, then = steps_of(entry)
    tx = built(entry, {name: Live(name, x) for name, x in before(entry).items()})
    out, plain_state, now = run(plain, plain.init(params), first, params)
    found, state, _ = run(tx, tx.init(params), first, params)
    assert_equal(found, out)
    unedited, _, _ = run(tx, state, then, now)
    for name in entry.numbers:
        changed = after(entry, name)
        wanted, _, _ = run(built(entry, changed), plain_state, then, now)
        found, _, _ = run(tx, state, then, now, hyper={name: changed[name]})
        assert_equal(found, wanted)
        assert differ(found, unedited), f"{name} makes no difference, so this shows nothing"
        tensor, _, _ = run(tx, state, then, now, hyper=as_tensors({name: changed[name]}))
        assert_close(tensor, wanted, 1e-6)


class Copies(TorchDispatchMode):
    """From the host to the device of the parameters, for which that device would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            there = kwargs.get("device") or args[0].device
            self.waited += there.type == "meta" and not kwargs.get("non_blocking")
        return function(*args, **kwargs)


@every_entry
def test_a_number_on_the_host_is_sent_without_waiting(entry: Numbers) -> None:
    """The meta device stands for a GPU; refreshes are left out, which may wait."""
    if entry.name in BY_ITERATION:
        pytest.skip("it asks the device whether it is done, and meta tensors have no answer")
    tx = built(entry, {name: Live(name, x) for name, x in before(entry).items()})
    params, *grads = [to_meta(tree) for tree in (problem(), *gradients(3))]
    hyper, state = as_tensors(before(entry)), tx.init(params)
    for g, context in zip(grads, ({}, {"refresh": False}, {"refresh": False})):
        with Copies() as copies:
            _, state = tx.update(g, state, params, hyper=hyper, **context)
    assert copies.waited == 0


BY_ITERATION = ("linalg:coupled_newton", "linalg:coupled_higher_order")


def to_meta(tree: Any) -> Any:
    return optree.tree_map(lambda x: x.to("meta"), tree)


@every_entry
def test_a_name_in_hyper_that_nobody_reads_is_an_error(entry: Numbers) -> None:
    tx = built(entry, {name: Live(name, x) for name, x in before(entry).items()})
    params, g = problem(), gradients(1)[0]
    state = tx.init(params)
    for name in entry.numbers:
        others = before(entry)
        value = others.pop(name)
        with pytest.raises(ValueError, match=f"a live number '{name}s'; did you mean '{name}'"):
            tx.update(g, state, params, hyper=others | {f"{name}s": value})
    with pytest.raises(ValueError, match="a live number 'zzz'. Live are "):
        tx.update(g, state, params, hyper={"zzz": 1.0})
    numbers_alone = built(entry, before(entry))
    with pytest.raises(ValueError, match="None is live"):
        numbers_alone.update(g, state, params, hyper={name: value})
    with pytest.raises(ValueError, match="None is live"):
        fs.update_in_place(numbers_alone, g, state, params, hyper={name: value})


def test_what_the_state_says_is_not_the_callers_to_give() -> None:
    tx, params = fs.inject_hyperparams(fs.sgd)(0.5), problem()
    with pytest.raises(ValueError, match="reads a live number 'learning_rate'"):
        tx.update(params, tx.init(params), params, hyper={"learning_rate": 0.1})


def test_a_number_whose_part_is_off_may_stand_beside_one_that_is_read() -> None:
    """As in the wrapper, which gives all that a group has."""
    tx = fs.sgd(Live("lr", 0.5), momentum=Live("mu", 0.0))
    params, g = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    updates, _ = tx.update(g, tx.init(params), params, hyper={"lr": 0.25, "mu": 0.0})
    assert updates["w"].tolist() == [-0.25, -0.25]


def test_a_stage_that_declares_hyper_may_read_any_name() -> None:
    def scaled(updates: Any, *, hyper: Mapping[str, Any] = {}) -> Any:
        return {name: u * hyper.get("mine", 1.0) for name, u in updates.items()}

    tx = fs.chain(fs.stateless(scaled), fs.scale(Live("other", 1.0)))
    g = {"w": torch.ones(2)}
    assert tx.update(g, tx.init(g), hyper={"mine": 3.0})[0]["w"].tolist() == [3.0, 3.0]


def test_so_may_a_combinator_that_does() -> None:
    def halved(run: Any, updates: Any, own: Any, *, hyper: Mapping[str, Any]) -> Any:
        return {name: u * hyper["mine"] for name, u in run(updates).items()}, own

    tx = fs.wrapping(fs.scale(Live("other", 1.0)), halved)
    g = {"w": torch.ones(2)}
    assert tx.update(g, tx.init(g), hyper={"mine": 0.5})[0]["w"].tolist() == [0.5, 0.5]


def injected(state: Any) -> HyperparamsState:
    found = fs.state.find_state(state, HyperparamsState)
    assert found is not None
    return found


def edited(state: Any, name: str, value: Any) -> Any:
    if isinstance(state, HyperparamsState):
        return state._replace(hyperparams=state.hyperparams | {name: value})
    if type(state) is dict:
        return {key: edited(part, name, value) for key, part in state.items()}
    if hasattr(state, "inner"):
        return state._replace(inner=edited(state.inner, name, value))
    return state


def differ(found: Any, other: Any) -> bool:
    try:
        assert_equal(found, other)
    except AssertionError:
        return True
    return False
