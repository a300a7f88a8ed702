"""A checkpoint with values that no run can have left is refused, by name, whole or in part."""

from __future__ import annotations

import copy
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo.core.tree import map_leaves
from funshampoo.recipes import RECIPES
from funshampoo.state import check, load_state_dict, meaning, state_dict
from funshampoo.state.checkpoint import carried_over
from funshampoo.state.nodes import walk
from funshampoo.state.stages import Kept
from tests.table import Case, every_case
from tests.trees import assert_equal, gradients, problem, train

TX = fs.shampoo(0.1, every=3, max_size=4, momentum=0.9, spike_factor=1e3)


@functools.cache
def _saved(tx: Any, steps: int) -> dict[str, Tensor]:
    _, _, state = train(tx, problem(), gradients(steps), fs.apply_updates)
    return state_dict(state)


def saved(tx: Any = TX, steps: int = 4) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in _saved(tx, steps).items()}


def without_the_last(g: Tensor) -> Tensor:
    """Zeros in the last coordinate of every side, as of a token that no batch has."""
    g = g.clone()
    for side, length in enumerate(g.shape):
        if length > 1:
            g.select(side, -1).zero_()
    return g


@every_case
def test_what_a_run_leaves_is_never_refused(case: Case) -> None:
    """Also after gradients that are None, zero, huge or tiny, and, under a guard, not finite; also
    while some coordinates have not had any."""
    tx, params = case.make(), problem()
    grads = gradients(6)
    grads[:3] = [map_leaves(without_the_last, g) for g in grads[:3]]
    grads[1] = map_leaves(torch.zeros_like, grads[1])
    grads[2] = map_leaves(lambda g: g * 1e-160, grads[2])
    grads[3] = map_leaves(lambda g: g * 1e6, grads[3])
    if case.options.get("none", True):
        grads[4] = {**grads[4], "w": None}
    if "guarded" in case.name or case.name.startswith(("shampoo", "multi_steps:shampoo")):
        grads[5] = {**grads[5], "w": grads[5]["w"] * math.nan}
    state = tx.init(params)
    check(state)
    for g in grads:
        _, state = tx.update(g, state, params)
        check(state)
    loaded = load_state_dict(tx.init(params), state_dict(state)).state
    assert_equal(loaded, state)
    for _, node in walk(state):
        ours = type(node).__module__.startswith("funshampoo.") and node._fields
        assert not ours or type(node) in state_classes().values()


def at_first(value: float) -> Callable[[Tensor], Tensor]:
    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[:1] = value
        return x

    return changed


def one_bit(i: int, bit: int) -> Callable[[Tensor], Tensor]:
    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(torch.int64).view(-1)[i] ^= 1 << bit
        return x

    return changed


BLOCK = "w/block_0_0/blocked/"
FAULTS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "nan_average": (f"{BLOCK}ema/average", at_first(math.nan), "not finite"),
    "inf_momentum": (f"{BLOCK}trace/buffer", at_first(math.inf), "not finite"),
    "inf_factor": (f"{BLOCK}kronecker_statistics/factors/0", lambda x: x * math.inf, "not finite"),
    "nan_root": (f"{BLOCK}graft/direction/kept/1/value/0", at_first(-math.inf), "not finite"),
    "nan_weight": (f"{BLOCK}ema/weight", at_first(math.nan), "not finite"),
    "negative_weight": (f"{BLOCK}kronecker_statistics/weight", lambda x: -x, "negative"),
    "large_weight": (f"{BLOCK}graft/onto/second_weight", at_first(1.5), "above 1"),
    "negative_square": (f"{BLOCK}graft/onto/second", lambda x: -x, "negative"),
    "negative_diagonal": (f"{BLOCK}kronecker_statistics/factors/1", lambda x: -x, "diagonal"),
    "exponent_of_an_entry": (
        f"{BLOCK}kronecker_statistics/factors/1",
        one_bit(1, 62),
        "above √",
    ),
    "negative_clock": ("clock/steps", lambda x: x * 0 - 7, "negative"),
    "clock_behind": ("clock/steps", lambda x: x * 0 + 1, "above the clock, which is at 1"),
    "negative_held": (f"{BLOCK}guarded/held", lambda x: x - 1, "negative"),
    "held_ahead": (f"{BLOCK}guarded/held", lambda x: x + 9, "above the clock, which is at 4"),
    "held_streak": (f"{BLOCK}guarded/streak", lambda x: x + 1, "above its 'held'"),
    "spikes_pending": (f"{BLOCK}guarded/spikes/pending", lambda x: x + 1, "above its 'held'"),
    "spike_average": (f"{BLOCK}guarded/spikes/average", lambda x: -x, "negative"),
    "weight_of_nothing": (
        f"{BLOCK}ema/weight",
        lambda x: x * 0,
        "is 0, while its 'average' is not",
    ),
    "factors_of_nothing": (
        f"{BLOCK}kronecker_statistics/weight",
        lambda x: x * 0,
        "is 0, while its 'factors' is not",
    ),
    "squares_of_nothing": (
        f"{BLOCK}graft/onto/second_weight",
        lambda x: x * 0,
        "is 0, while its 'second' is not",
    ),
    "root_streak": (f"{BLOCK}graft/direction/kept/0/streak", lambda x: x + 1, "its 'failures'"),
    "rounds_ahead": (f"{BLOCK}graft/direction/kept/0/rounds", lambda x: x + 99, "the clock"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_impossible_values_are_refused_by_name(fault: Any) -> None:
    name, change, reason = fault
    strict = fault != FAULTS["held_ahead"]
    found = saved()
    found[name] = change(found[name])
    state = TX.init(problem())
    before = copy.deepcopy(state)
    with pytest.raises(ValueError, match="nothing was changed") as error:
        load_state_dict(state, found, strict=strict)
    assert_equal(state, before)
    named = "kept/0/rounds" if fault == FAULTS["clock_behind"] else name
    assert named in str(error.value)
    assert reason in str(error.value)
    assert "load an earlier one" in str(error.value)


def test_several_are_listed_and_only_they() -> None:
    found = saved()
    wrong = [name for name in found if name.endswith("trace/buffer")][1:4]
    found |= {name: found[name] * math.nan for name in wrong}
    with pytest.raises(ValueError, match="no run can have left") as error:
        load_state_dict(TX.init(problem()), found)
    assert str(error.value).count("is not finite") == 3
    assert all(f"'{name}'" in str(error.value) for name in wrong)


def test_many_entries_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("funshampoo.state.values._AT_A_TIME", 20)
    found = saved()
    name = [name for name in found if name.endswith("ema/average")][-1]
    found[name] = found[name] * math.nan
    with pytest.raises(ValueError, match=f"'{name}' is not finite"):
        load_state_dict(TX.init(problem()), found)


def test_a_cast_that_overflows_is_refused() -> None:
    found = saved()
    name = f"{BLOCK}trace/buffer"
    found[name] = at_first(1e300)(found[name])
    load_state_dict(TX.init(problem()), found)
    with pytest.raises(ValueError, match=f"'{name}' is not finite"):
        load_state_dict(TX.init(problem(dtype=torch.float32)), found, cast=True)


def test_what_is_not_loaded_is_not_looked_at() -> None:
    found = saved() | {"w/block_0_0/blocked/gone/buffer": torch.tensor(math.nan)}
    assert load_state_dict(TX.init(problem()), found, strict=False).unknown


def test_a_lag_behind_a_new_clock_is_no_fault() -> None:
    """The checkpoint has no clock, so what the fresh state's says is no measure."""
    found = saved()
    del found["clock/steps"]
    loaded = load_state_dict(TX.init(problem()), found, strict=False)
    assert loaded.missing == ["clock/steps"]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ({"funshampoo/format": torch.tensor(7)}, "has format 7; this release"),
        ({"funshampoo/format": torch.tensor([2, 2])}, "no int64"),
        ({"funshampoo/format": torch.tensor(2.0)}, "no int64"),
        ({"funshampoo/part": torch.tensor([3, 2, 0])}, "is no .rank, ranks, bits."),
        ({"funshampoo/part": torch.tensor(1)}, "is no .rank, ranks, bits."),
        ({"clock/steps": 4}, "'clock/steps' is no tensor"),
        ({f"{BLOCK}kronecker_statistics/factors/0": [1.0]}, "is no tensor"),
    ],
)
def test_entries_that_are_none(damage: Any, match: str) -> None:
    for strict in (True, False):
        with pytest.raises(ValueError, match=match):
            load_state_dict(TX.init(problem()), saved() | damage, strict=strict)


def test_packed_factors_are_looked_at() -> None:
    tx = fs.kronecker_statistics(0.9, packed=True)
    params = {"w": torch.zeros(64, 3)}
    _, state = tx.update({"w": torch.randn(64, 3)}, tx.init(params), params)
    found = {name: x.clone() for name, x in state_dict(state).items()}
    load_state_dict(tx.init(params), found)
    name = "w/factors/0"
    assert found[name].shape == (32, 65)
    found[name][0, 0] = -1.0
    for packed in (True, False):
        fresh = fs.kronecker_statistics(0.9, packed=packed).init(params)
        with pytest.raises(ValueError, match=f"'{name}' is negative on the diagonal"):
            load_state_dict(fresh, found)


@meaning(worst="any", hits="count")
class Watch(NamedTuple):
    average: Any
    worst: Any
    hits: Any


def watch() -> fs.GradientTransformation:
    def init(params: Any) -> Watch:
        lowest = map_leaves(lambda x: torch.full_like(x, -math.inf), params)
        hits = map_leaves(lambda x: torch.zeros_like(x, dtype=torch.int64), params)
        return Watch(map_leaves(torch.zeros_like, params), lowest, hits)

    return fs.GradientTransformation(init, lambda updates, state: (updates, state), "watch")


def test_a_stage_of_ones_own_is_checked_and_opts_out() -> None:
    tx, params = fs.chain(watch(), fs.trace(0.9)), {"w": torch.zeros(2)}
    found = state_dict(tx.init(params))
    load_state_dict(tx.init(params), found)
    for field, value in (("average", math.nan), ("hits", -1)):
        wrong = found | {f"w/watch/{field}": found[f"w/watch/{field}"] * 0 + value}
        with pytest.raises(ValueError, match=f"'w/watch/{field}' is"):
            load_state_dict(tx.init(params), wrong)


def test_declarations_that_are_none() -> None:
    with pytest.raises(ValueError, match="Watch has no field 'gone'"):
        meaning(gone="any")(Watch)
    with pytest.raises(ValueError, match="Watch has no field 'gone'"):
        meaning(hits="count <= gone")(Watch)
    for kind in ("finit", "weight <= hits"):
        with pytest.raises(ValueError, match="known kinds: finite, linear"):
            meaning(hits=kind)(Watch)


def test_a_combinator_of_ones_own_may_tick_faster() -> None:
    """What runs its part twice a step holds a block twice a step."""

    def twice(inner: fs.GradientTransformation) -> fs.GradientTransformation:
        def update(run: Any, updates: Any, own: Any) -> Any:
            return run(run(updates)), own

        return fs.wrapping(inner, update)

    tx, params = twice(fs.guarded(fs.trace(0.9))), {"w": torch.zeros(2)}
    _, state = tx.update({"w": torch.full((2,), math.nan)}, tx.init(params), params)
    found = state_dict(state)
    assert int(found["w/guarded/held"]) >= int(found["wrapped/steps"])
    load_state_dict(tx.init(params), found)


def test_carried_over_takes_what_is_there_and_cuts_counts_to_the_clock() -> None:
    """Entries of a state of this process, whose clock may be ahead, and which may be poisoned."""
    found = saved(steps=6)
    name = f"{BLOCK}trace/buffer"
    found[name] = found[name] * math.nan
    found["clock/steps"] = torch.tensor(1)
    new = state_dict(carried_over(TX.init(problem()), found))
    assert bool(new[name].isnan().all())
    assert int(new[f"{BLOCK}graft/direction/kept/0/rounds"]) == 1
    check(carried_over(TX.init(problem()), found | {name: torch.zeros_like(found[name])}))


def through_a_file(content: Any, folder: Path, damage: Callable[[bytearray], None]) -> Any:
    file = folder / "state.pt"
    torch.save(content, file)
    data = bytearray(file.read_bytes())
    damage(data)
    file.write_bytes(data)
    return torch.load(file, weights_only=True)


class TestFiles:
    """What torch.save wrote, damaged."""

    name = f"{BLOCK}trace/buffer"

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
    def test_a_truncated_file_is_an_error(self, tmp_path: Path, share: float) -> None:
        def cut(data: bytearray) -> None:
            del data[int(share * len(data)) :]

        with pytest.raises((RuntimeError, OSError)):  # which one is up to the C library
            through_a_file(saved(), tmp_path, cut)

    def flipped(self, content: dict[str, Tensor], folder: Path, bit: int) -> Any:
        """The file with another bit in the first number of `name`."""
        number = content[self.name].reshape(-1)[:2].contiguous().numpy().tobytes()

        def flip(data: bytearray) -> None:
            at = data.index(number)
            data[at + bit // 8] ^= 1 << bit % 8

        return through_a_file(content, folder, flip)

    def test_a_flipped_bit_that_makes_a_number_impossible(self, tmp_path: Path) -> None:
        content = saved()
        content[self.name].view(-1)[0] = 1.5  # its exponent lacks one bit of infinity's
        found = self.flipped(content, tmp_path, 62)
        assert not bool(found[self.name].isfinite().all())
        with pytest.raises(ValueError, match=f"'{self.name}' is not finite"):
            load_state_dict(TX.init(problem()), found)

    def test_a_flipped_bit_that_leaves_it_plausible_can_not_be_told(self, tmp_path: Path) -> None:
        """As docs/checkpoints.md says: that is for a checksum of the file."""
        content = saved()
        found = self.flipped(content, tmp_path, 40)
        assert not torch.equal(found[self.name], content[self.name])
        load_state_dict(TX.init(problem()), found)


STATES = {"inner", "direction", "onto", "own", "statistics", "rate", "spikes", "kept"}
NO_NUMBERS = {"layout", "owned", "ranks", "ranges", "pace", "steps"}  # what is where; the clock


@functools.cache
def state_classes() -> dict[str, type]:
    """Every named tuple of the package that is a state, by name."""
    found: dict[str, type] = {"Kept": Kept}
    for module in pkgutil.walk_packages(fs.__path__, "funshampoo."):
        if not module.name.endswith("__main__"):
            for name, x in vars(importlib.import_module(module.name)).items():
                if name.endswith("State") and name[0] != "_" and hasattr(x, "_fields"):
                    found[name] = x
    return found


@pytest.mark.parametrize("state", state_classes().values(), ids=state_classes())
def test_every_field_of_every_state_says_what_it_means(state: Any) -> None:
    """So that none is left to "finite" because nobody thought of it."""
    declared = getattr(state, "_meaning", {})
    assert set(state._fields) - STATES - NO_NUMBERS == set(declared), state.__name__


def _averages(recipe: Any) -> tuple[Any, dict[str, Tensor]]:
    tx = fs.chain(fs.scale_by_adam(), recipe)
    return tx, saved(tx)


NEGATIVE = {
    "schedule_free/total": lambda: fs.schedule_free(0.1),
    "schedule_free/largest": lambda: fs.schedule_free(0.1),
    "schedule_free/seen": lambda: fs.schedule_free(0.1),
    "tail_average/weight": lambda: fs.tail_average(beta=0.9),
    "normalize_rows/second": lambda: fs.normalize_rows(0.9),
}


@pytest.mark.parametrize("field", NEGATIVE)
def test_a_negative_sum_is_refused(field: str) -> None:
    tx, found = _averages(NEGATIVE[field]())
    load_state_dict(tx.init(problem()), found)
    name = next(name for name in found if name.endswith(field))
    found[name] = -found[name] - 1
    with pytest.raises(ValueError, match=f"'{name}' is negative"):
        load_state_dict(tx.init(problem()), found)


INJECTED: dict[str, tuple[Any, list[float], list[float]]] = {
    "learning_rate": (fs.adamw, [-1e-3, math.inf, math.nan], [0.0, 10.0]),
    "beta1": (fs.adamw, [9e5, 1.1, -0.1], [0.0, 0.5]),
    "epsilon": (fs.adamw, [-1e-8], [0.0, 1e-3]),
    "weight_decay": (fs.shampoo, [-1.0], [0.0, 1.0]),
    "beta2": (fs.shampoo, [1.5, -0.5], [0.5, 1.0]),
    "momentum": (fs.sgd, [-0.9], [0.5]),
    "max_norm": (fs.clip_by_global_norm, [-1.0], [1.0, math.inf]),  # where infinite is no limit
}


@pytest.mark.parametrize("name", INJECTED)
def test_hyperparameters_in_a_state_are_held_to_the_ranges_of_their_arguments(name: str) -> None:
    recipe, refused, taken = INJECTED[name]
    arguments = {} if recipe is fs.clip_by_global_norm else {"learning_rate": 0.1}
    tx = fs.inject_hyperparams(recipe)(**{**arguments, name: 0.5})
    found = saved(tx)
    entry = next(n for n in found if n.endswith(f"hyperparams/{name}"))
    for value in taken:
        recipe(**{**arguments, name: value})
        load_state_dict(tx.init(problem()), found | {entry: torch.tensor(value)})
    for value in refused:
        with pytest.raises(ValueError, match=name):
            recipe(**{**arguments, name: value})
        with pytest.raises(ValueError, match=f"'{entry}' is") as error:
            load_state_dict(tx.init(problem()), found | {entry: torch.tensor(value)})
        assert "no run can have left" in str(error.value)


def test_every_number_of_a_recipe_has_its_range_in_the_state() -> None:
    """But one that is looked at through a function of it."""
    for recipe in (fs.shampoo, fs.soap, fs.muon, fs.adamw, fs.sgd, fs.lion, fs.splus):
        state = fs.inject_hyperparams(recipe)(0.1).init(problem())
        assert {name for name in state.hyperparams if not state.ranges[name]} == set(), recipe


WITH_BASES = [fs.soap, fs.splus, fs.kl_shampoo, fs.eigenvalue_shampoo, fs.soap_muon, fs.kl_soap]


@pytest.mark.parametrize("recipe", WITH_BASES, ids=lambda recipe: recipe.__name__)
@pytest.mark.parametrize("change", [lambda Q: 3 * Q, lambda Q: 0 * Q, lambda Q: Q[:, :1] + 0 * Q])
def test_a_basis_is_orthonormal(recipe: Any, change: Callable[[Tensor], Tensor]) -> None:
    tx = recipe(0.1)
    found = saved(tx)
    name = next(n for n in found if "bases/kept" in n and n.endswith("value/0"))
    assert found[name].shape[-1] > 1
    with pytest.raises(ValueError, match=f"'{name}' has rows that are not orthonormal"):
        load_state_dict(tx.init(problem()), found | {name: change(found[name])})


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_counts_are_held_to_the_clock_in_every_recipe(recipe: Any) -> None:
    """Also where parts of the parameters have methods of their own."""
    tx = recipe(0.1)
    found = saved(tx)
    fields = ("held", "seen", "rounds", "failures")
    counts = [name for name in found if name.endswith(tuple(f"/{f}" for f in fields))]
    assert counts or recipe in (fs.adamw, fs.sgd, fs.lion, fs.sign_descent)
    for name in counts:
        with pytest.raises(ValueError, match=f"'{name}' is above the clock, which is at 4"):
            load_state_dict(tx.init(problem()), found | {name: found[name] * 0 + 10**6})
