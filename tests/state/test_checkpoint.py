"""Checkpoints: flat names, nothing lost, checked before anything changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.state import KroneckerState, find_state, load_state_dict, state_dict
from funshampoo.state.nodes import walk
from funshampoo.state.stages import ShardedState
from tests.table import Case, every_case
from tests.trees import assert_equal, gradients, problem, tensors, train


@every_case
def test_every_tensor_is_saved_once(case: Case) -> None:
    """Two stages of a kind, sides, blocks: as many numbers in the file as in the state."""
    state = case.make().init(problem())
    saved = state_dict(state)
    numbers = sum(x.numel() for name, x in saved.items() if "funshampoo/" not in name)
    shared = [x for x in tensors(state) if x.ndim == 0]
    # A report, which is derived anew, and the number of the run, which the part's entry has.
    others = 5 * sum(isinstance(node, ShardedState) for _, node in walk(state))
    assert numbers + others >= sum(x.numel() for x in tensors(state))
    if len({id(x) for x in shared}) == len(shared) and case.name != "from_reference":
        assert numbers + others == sum(x.numel() for x in tensors(state))


def test_names_say_what_a_tensor_is() -> None:
    tx = fs.chain(
        fs.trace(0.9),
        ("slow", fs.trace(0.99)),
        fs.blocked(fs.chain(fs.kronecker_statistics(), fs.root_inverse()), max_size=4),
    )
    saved = state_dict(tx.init({"conv": {"weight": torch.zeros(6, 3)}}))
    assert set(saved) == {
        "funshampoo/format",
        "funshampoo/part",
        "conv.weight/trace/buffer",
        "conv.weight/slow/buffer",
        "clock/steps",
        *(
            f"conv.weight/block_{i}_0/blocked/{rest}"
            for i in range(2)
            for rest in (
                "kronecker_statistics/weight",
                *(f"kronecker_statistics/factors/{side}" for side in range(2)),
                *(
                    f"root_inverse/kept/{side}/{field}"
                    for side in range(2)
                    for field in (
                        "value/0",
                        "residual",
                        "condition",
                        "failures",
                        "streak",
                        "rounds",
                    )
                ),
            )
        ),
    }
    assert saved["conv.weight/block_1_0/blocked/kronecker_statistics/factors/0"].shape == (2, 2)


def test_names_do_not_depend_on_stacks_or_on_a_stages_place() -> None:
    """Another parameter shares the stack; another stage goes before: the names stay."""
    small = fs.chain(fs.blocked(fs.ema(0.9), 4), fs.trace(0.9))
    large = fs.chain(fs.clip(1.0), fs.scale(2.0), fs.blocked(fs.ema(0.9), 4), fs.trace(0.9))
    params = {"a": torch.zeros(8, 4), "b": torch.zeros(4, 4), "c": torch.zeros(4)}
    one = state_dict(small.init({"b": params["b"]}))
    assert set(one) - set(state_dict(large.init(params))) == set()
    _, state = small.update({"b": torch.ones(4, 4)}, small.init({"b": params["b"]}))
    loaded = load_state_dict(large.init(params), state_dict(state), strict=False)
    assert torch.equal(loaded.state["blocked"].inner.average["4x4"][2], 0.1 * torch.ones(4, 4))
    assert {name.split("/")[0] for name in loaded.missing} == {"a", "c"}


def test_a_state_dict_is_views_and_loading_copies() -> None:
    tx, params = fs.shampoo(0.1, max_size=4), problem()
    state = tx.init(params)
    saved = state_dict(state)
    name = "w/block_0_0/blocked/ema/average"
    saved[name].fill_(7.0)
    saved["w/block_0_0/blocked/ema/weight"].fill_(1.0)
    assert float(state["blocked"].inner.inner["ema"].average["4x4"].max()) == 7.0
    loaded = load_state_dict(tx.init(params), saved).state
    saved[name].fill_(8.0)
    assert float(loaded["blocked"].inner.inner["ema"].average["4x4"].max()) == 7.0


class TestWhatDoesNotFit:
    tx = fs.shampoo(0.1, max_size=4, momentum=0.9)

    def saved(self, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        _, _, state = train(self.tx, problem(dtype=dtype), gradients(3, dtype), fs.apply_updates)
        return state_dict(state)

    def refuse(self, saved: Any, match: str, tx: Any = None, **options: Any) -> None:
        state = (tx or self.tx).init(problem())
        before = copy.deepcopy(state)
        with pytest.raises(ValueError, match=match):
            load_state_dict(state, saved, **options)
        assert_equal(state, before)

    def test_missing(self) -> None:
        saved = self.saved()
        del saved["w/block_0_0/blocked/trace/buffer"]
        self.refuse(saved, "missing from the checkpoint: w/block_0_0/blocked/trace/buffer\n")
        loaded = load_state_dict(self.tx.init(problem()), saved, strict=False)
        assert loaded.missing == ["w/block_0_0/blocked/trace/buffer"]
        assert float(loaded.state["blocked"].inner.inner["trace"].buffer["4x4"].abs().max()) == 0

    def test_unknown(self) -> None:
        saved = {**self.saved(), "w/block_9_9/blocked/trace/buffer": torch.zeros(4, 4)}
        self.refuse(saved, "unknown to the state: w/block_9_9")
        loaded = load_state_dict(self.tx.init(problem()), saved, strict=False)
        assert loaded.unknown == ["w/block_9_9/blocked/trace/buffer"]

    def test_another_chain(self) -> None:
        """A stage less: its memory would be lost, so it is an error that lists it."""
        self.refuse(self.saved(), "unknown.*trace/buffer", tx=fs.shampoo(0.1, max_size=4))

    @pytest.mark.parametrize("now", [True, False])
    def test_another_guard(self, now: bool) -> None:
        """The option that makes the difference is told, and what strict=False does then."""
        now_and_then = [fs.adamw(0.1, guard=guard).init(problem()) for guard in (now, not now)]
        state, saved = now_and_then[0], state_dict(now_and_then[1])
        with pytest.raises(ValueError, match=f"to go on as it was, give guard={not now}"):
            load_state_dict(state, saved)
        loaded = load_state_dict(state, saved, strict=False)
        assert {name.split("/")[-2] for name in loaded.missing + loaded.unknown} == {"guarded"}

    def test_another_block_size(self) -> None:
        other = fs.shampoo(0.1, max_size=3, momentum=0.9)
        self.refuse(self.saved(), "(?s)does not fit.*another max_size, merge or keep", tx=other)

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"max_size": 3}, True),
            ({"max_size": 2}, True),
            ({"max_size": None}, True),
            ({"merge": "none"}, True),
            ({"momentum": 0.0}, False),
            ({"grafting": "sgd"}, False),
            ({"grafting": None}, False),
            ({"vectors": "blocks"}, False),
            ({"sides": "smaller"}, False),
        ],
    )
    def test_the_block_size_is_told_of_other_blocks_alone(
        self, options: dict[str, Any], told: bool
    ) -> None:
        """Not of a stage, a parameter, an entry or a dtype that differs inside of the same ones."""
        other = fs.shampoo(0.1, **{"max_size": 4, "momentum": 0.9, **options})
        with pytest.raises(ValueError, match="does not fit the state") as refusal:
            load_state_dict(other.init(problem()), self.saved())
        assert ("another max_size" in str(refusal.value)) is told
        gone = {name: x for name, x in self.saved().items() if not name.startswith("w/")}
        for saved in (
            gone,
            self.saved(torch.float32),
            {**self.saved(), "w/block_0_0/more": torch.ones(1)},
        ):
            with pytest.raises(ValueError, match="does not fit the state") as refusal:
                load_state_dict(self.tx.init(problem()), saved)
            assert "another max_size" not in str(refusal.value)

    def test_another_precision(self) -> None:
        saved = self.saved(torch.float32)
        self.refuse(saved, "is torch.float32 there and torch.float64 here; cast=True converts")
        loaded = load_state_dict(self.tx.init(problem()), saved, cast=True).state
        for x, y in zip(tensors(loaded), tensors(self.tx.init(problem()))):
            assert x.dtype == y.dtype
        assert float(loaded["blocked"].inner.inner["trace"].buffer["4x4"].abs().max()) > 0

    def test_an_integer_is_never_cast(self) -> None:
        saved = self.saved()
        saved["clock/steps"] = saved["clock/steps"].float()
        self.refuse(saved, "'clock/steps' is torch.float32 there", cast=True)

    def test_no_checkpoint_and_another_format(self) -> None:
        saved = self.saved()
        self.refuse({"w": torch.zeros(1)}, "no checkpoint of funshampoo")
        self.refuse({**saved, "funshampoo/format": torch.tensor(1)}, "has format 1.*reads 2")

    def test_ensembles(self) -> None:
        state = torch.func.vmap(self.tx.init)({"w": torch.zeros(3, 8, 4)})
        with pytest.raises(ValueError, match="ensemble"):
            state_dict(state)


def test_two_states_of_one_name_are_an_error_and_not_a_loss() -> None:
    tx = fs.guarded(fs.guarded(fs.trace(0.9)))
    with pytest.raises(ValueError, match="saved as 'w/guarded/held'"):
        state_dict(tx.init(problem()))


def test_another_solver_takes_over_at_the_next_refresh() -> None:
    """The documented conversion: roots stay in use until then."""
    params, grads = problem(), gradients(4)
    first = fs.shampoo(0.1, every=3)
    _, _, state = train(first, params, grads[:1], fs.apply_updates)
    other = fs.shampoo(0.1, every=3, solver=fs.linalg.coupled_newton())
    state = load_state_dict(other.init(params), state_dict(state)).state
    old = state["blocked"].inner.inner["graft"].direction.kept["6x5"][0].value[0]
    for step, g in enumerate(grads[1:3], start=2):
        _, state = other.update(g, state, params)
        root = state["blocked"].inner.inner["graft"].direction.kept["6x5"][0].value[0]
        assert torch.equal(root, old) == (step < 3)


def test_a_number_of_all_blocks_is_kept_where_a_parameter_is_new() -> None:
    """Whichever comes first; correction counts everyone's steps."""
    tx = fs.shampoo(0.1, own_steps=False, grafting="rms")
    w, g = {"w": torch.ones(4)}, {"w": torch.ones(4)}
    state = tx.init(w)
    for _ in range(3):
        _, state = tx.update(g, state, w)
    saved = state_dict(state)
    for both in ({"a": torch.ones(4), **w}, {**w, "z": torch.ones(4)}):
        loaded = load_state_dict(tx.init(both), saved, strict=False).state
        weight = find_state(loaded, KroneckerState).weight
        assert torch.equal(weight, find_state(state, KroneckerState).weight)
        assert 0 < float(weight) < 1
