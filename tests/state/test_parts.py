"""Parts of a checkpoint say what they are a part of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.state import load_state_dict, merged, state_dict
from funshampoo.state.parts import Part, bits_of
from tests.trees import gradients, problem, train

CHAINS = {
    "adamw": lambda: fs.adamw(0.1),
    "sgd": lambda: fs.sgd(0.1, momentum=0.9),
    "ema": lambda: fs.ema(0.9, bias_correction=False),
    "shampoo": lambda: fs.shampoo(0.1, max_size=4),
    "zero": lambda: fs.sharded(fs.scale_by_adam(), max_failures=None),
}
every_chain = pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)


def saved(make: Any, steps: int, seed: int = 100) -> dict[str, torch.Tensor]:
    params = {"a": torch.zeros(4, 4), "b": torch.zeros(4, 4)}
    grads = [
        {"a": g["w"][:4, :4].float(), "b": g["w"][1:5, 1:].float()}
        for g in gradients(steps, seed=seed)
    ]
    return state_dict(train(make(), params, grads, fs.apply_updates)[2])


def without(content: dict[str, torch.Tensor], owner: str) -> dict[str, torch.Tensor]:
    return {name: x for name, x in content.items() if not name.startswith(f"{owner}/")}


@every_chain
def test_pieces_of_one_save_merge(make: Any) -> None:
    whole = saved(make, 2)
    together = merged([without(whole, "a"), without(saved(make, 2), "b")])
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], x) for name, x in whole.items())


@every_chain
@pytest.mark.parametrize("other", [(3, 100), (2, 200)], ids=["another_step", "another_run"])
def test_pieces_of_other_steps_or_runs_do_not(make: Any, other: tuple[int, int]) -> None:
    pieces = [without(saved(make, 2), "a"), without(saved(make, *other), "b")]
    with pytest.raises(ValueError, match="not saved at the same step of the same training"):
        merged(pieces)


def test_contradictions_are_named() -> None:
    whole = saved(CHAINS["shampoo"], 2)
    name = "a/block_0_0/blocked/ema/average"
    with pytest.raises(ValueError, match=f"'{name}' differs between the parts"):
        merged([whole, whole | {name: whole[name] + 1}])


def as_part(content: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    return content | {"funshampoo/part": Part(rank, size, rank).entry()}


def test_the_part_of_every_rank_is_needed_once_at_least() -> None:
    whole = saved(CHAINS["adamw"], 2)
    first, second = as_part(without(whole, "a"), 0, 3), as_part(without(whole, "b"), 1, 3)
    third = as_part(without(without(whole, "a"), "b"), 2, 3)
    for parts in ([first, second, third], [third, third, second, first, first]):
        together = merged(iter(parts))
        assert all(torch.equal(together[name], x) for name, x in whole.items())
        assert together["funshampoo/part"].tolist()[:2] == [0, 1]  # it is a whole now
    with pytest.raises(ValueError, match=r"of the parts of 3 ranks, that of rank 0, 2 is missing"):
        merged([second])
    with pytest.raises(ValueError, match=r"different numbers of ranks \(2, 3\)"):
        merged([first, as_part(without(whole, "b"), 1, 2)])
    with pytest.raises(ValueError, match=r"different numbers of ranks \(unknown, 3\)"):
        merged([first, {name: x for name, x in second.items() if name != "funshampoo/part"}])


def test_parts_inside_other_mappings() -> None:
    """As of {"optimizer": state_dict(state), ...}, or of the wrapper, which takes no sum."""
    inner = [{"shared/funshampoo/part": torch.tensor([r, 2]), f"x{r}": r} for r in range(2)]
    together = merged([{"state": {0: part}, "epoch": 3} for part in inner])
    assert together == {"state": {0: {"x0": 0, "x1": 1}}, "epoch": 3}
    with pytest.raises(ValueError, match="that of rank 0 is missing"):
        merged([{"state": {0: inner[1]}}])


def test_checkpoints_that_do_not_say_what_they_are_merge_as_they_did() -> None:
    whole = saved(CHAINS["shampoo"], 2)
    del whole["funshampoo/part"]
    together = merged([without(whole, "a"), without(whole, "b")])
    assert together.keys() == whole.keys()
    load_state_dict(CHAINS["shampoo"]().init({k: torch.zeros(4, 4) for k in "ab"}), together)
    assert merged([]) == {}


def test_a_part_that_lacks_something_says_whose_it_is() -> None:
    tx = CHAINS["adamw"]()
    state = tx.init({k: torch.zeros(4, 4) for k in "ab"})
    part = as_part(without(saved(CHAINS["adamw"], 2), "b"), 1, 2)
    with pytest.raises(ValueError, match="the part of rank 1 of 2: save every rank's") as error:
        load_state_dict(state, part)
    assert "missing from the checkpoint: b/" in str(error.value)
    assert load_state_dict(state, part, strict=False).missing


def test_the_sum_of_bits_does_not_depend_on_order_or_layout() -> None:
    params = problem()
    values = list(params["layers"][0].values())
    assert bits_of(values) == bits_of(values[::-1]) == sum(bits_of([x]) for x in values)
    assert bits_of([params["w"]]) == bits_of([params["w"].T]) == bits_of(params["w"].unbind(1))
    for dtype in (torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.complex64):
        x = torch.ones(3).to(dtype)
        assert bits_of([x]) != bits_of([x, x[:1]])
    assert bits_of([torch.empty(3, device="meta")]) == 0
    assert bits_of([torch.tensor([2**62] * 3)]) == -(2**62)
