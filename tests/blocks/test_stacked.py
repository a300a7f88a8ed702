"""A stack of matrices, or several in one, steps as the matrices would by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo.blocks import Stacked, to_parameters
from funshampoo.state import load_state_dict, state_dict
from funshampoo.state.nodes import walk
from funshampoo.state.stages import BlockedState, KroneckerState
from tests.sooner import these

D = torch.float64

RECIPES: dict[str, Callable[..., Any]] = {
    "shampoo": lambda **o: fs.shampoo(0.1, every=2, weight_decay=0.1, momentum=0.9, **o),
    "shampoo in blocks": lambda **o: fs.shampoo(0.1, every=2, max_size=4, **o),
    "shampoo alone": lambda **o: fs.shampoo(0.1, every=2, grafting=None, epsilon=1e-3, **o),
    "soap": lambda **o: fs.soap(0.1, every=2, **o),
    "soap in blocks": lambda **o: fs.soap(0.1, every=2, max_size=4, **o),
    "muon": lambda **o: fs.muon(0.1, **o),
    "normuon": lambda **o: fs.normuon(0.1, **o),
    "spectral_descent": lambda **o: fs.spectral_descent(0.1, **o),
}
# (shape, merge, how the matrices are taken out of a tensor of that shape)
KINDS: dict[str, tuple[tuple[int, ...], Stacked, Callable[[Tensor], list[Tensor]]]] = {
    "experts": ((3, 7, 5), Stacked(), lambda x: list(x.unbind(0))),
    "one expert": ((1, 7, 5), Stacked(), lambda x: [x[0]]),
    "query, key, value": ((21, 5), Stacked(parts=3), lambda x: list(x.split(7))),
    "and transposed": ((5, 21), Stacked(axis=1, parts=3), lambda x: list(x.split(7, 1))),
    "heads of rank two": ((8, 5), Stacked(parts=4), lambda x: list(x.split(2))),
    "experts last": ((7, 5, 3), Stacked(axis=2), lambda x: list(x.unbind(2))),
}


def randn(*shape: int, seed: int, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


def run(tx: Any, params: dict[str, Tensor], grads: list[dict[str, Tensor]], how: str) -> Any:
    params = {name: p.clone() for name, p in params.items()}
    state = tx.init(params)
    for g in grads:
        if how == "in place":
            state = fs.update_in_place(tx, g, state, params)
        else:
            updates, state = tx.update(g, state, params, donate=how == "donated")
            params = fs.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("how", these(["pure", "donated", "in place"], sooner={"pure", "in place"}))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_steps_as_its_matrices_would_alone(recipe: str, kind: str, how: str) -> None:
    shape, merge, taken = KINDS[kind]
    together = {"w": randn(*shape, seed=0)}
    grads = [{"w": randn(*shape, seed=t)} for t in range(1, 6)]
    apart = {f"{i}": x for i, x in enumerate(taken(together["w"]))}
    alone = [{f"{i}": x.clone() for i, x in enumerate(taken(g["w"]))} for g in grads]
    found, _ = run(RECIPES[recipe](merge=merge), together, grads, how)
    expected, _ = run(RECIPES[recipe](), apart, alone, how)
    for own, x in zip(taken(found["w"]), expected.values()):
        assert (own - x).abs().max() < 1e-9 * x.abs().max()
    if kind != "one expert":  # and without it they do not
        other, _ = run(RECIPES[recipe](), together, grads, how)
        assert (other["w"] - found["w"]).abs().max() > 1e-4


def test_a_block_is_called_by_its_matrix_and_its_place_in_it() -> None:
    tx = fs.shampoo(0.1, merge=Stacked(), max_size=4)
    params = {"w": torch.zeros(2, 7, 3)}
    blocks = {name.split("/")[1] for name in state_dict(tx.init(params)) if name.startswith("w/")}
    assert blocks == {"block_0_0_0", "block_0_1_0", "block_1_0_0", "block_1_1_0"}
    (state,) = [n for _, n in walk(tx.init(params)) if isinstance(n, BlockedState)]
    assert {"4x3", "3x3"} == set(state.layout["w"])


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_go_back_to_the_parameters_shape(kind: str) -> None:
    shape, merge, _ = KINDS[kind]
    params, g = {"w": torch.zeros(shape, dtype=D)}, {"w": randn(*shape, seed=1)}
    tx = fs.blocked(fs.trace(0.9), 4, merge=merge)
    _, state = tx.update(g, tx.init(params), params)
    assert torch.equal(to_parameters(state.inner.buffer, state, params)["w"], g["w"])


@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_adamw_are_taken_over(kind: str) -> None:
    """Each block gets the part of the moments that lies where it lies."""
    shape, merge, _ = KINDS[kind]
    p = torch.nn.Parameter(randn(*shape, seed=0))
    adamw = torch.optim.AdamW([p])
    p.grad = randn(*shape, seed=1)
    adamw.step()
    tx = fs.shampoo(0.1, merge=merge, max_size=4)
    params = {"w": p.detach()}
    state = fs.state.seed_from_adamw(tx.init(params), adamw.state_dict(), ["w"])
    (blocks,) = [n for _, n in walk(state) if isinstance(n, BlockedState)]
    (average,) = [n.average for _, n in walk(state) if hasattr(n, "average")]
    found = to_parameters(average, blocks, params)["w"]
    assert torch.allclose(found, adamw.state_dict()["state"][0]["exp_avg"])


def test_a_state_is_saved_and_loaded() -> None:
    shape, merge, _ = KINDS["experts"]
    tx = fs.soap(0.1, merge=merge, every=2)
    params = {"w": randn(*shape, seed=0)}
    grads = [{"w": randn(*shape, seed=t)} for t in range(1, 6)]
    half, state = run(tx, params, grads[:3], "pure")
    state = load_state_dict(tx.init(params), state_dict(state)).state
    for g in grads[3:]:
        updates, state = tx.update(g, state, half)
        half = fs.apply_updates(half, updates)
    assert torch.equal(half["w"], run(tx, params, grads, "pure")[0]["w"])


def test_it_is_batched_by_vmap() -> None:
    shape, merge, _ = KINDS["and transposed"]
    tx = fs.shampoo(0.1, merge=merge, every=1)
    g = randn(2, *shape, seed=1)
    state = torch.func.vmap(tx.init)({"w": g})
    updates, _ = torch.func.vmap(tx.update)({"w": g}, state)
    alone, _ = tx.update({"w": g[1]}, tx.init({"w": g[1]}))
    assert torch.allclose(updates["w"][1], alone["w"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["experts", "and transposed"])
def test_it_is_compiled(kind: str) -> None:
    shape, merge, _ = KINDS[kind]
    params = {"w": randn(*shape, seed=0)}
    grads = [{"w": randn(*shape, seed=t)} for t in range(1, 5)]
    tx = fs.shampoo(0.1, every=3, merge=merge)
    plain, _ = run(tx, params, grads, "pure")
    graphs, _ = run(fs.compiled(tx, backend="aot_eager"), params, grads, "pure")
    assert torch.allclose(plain["w"], graphs["w"], rtol=0, atol=1e-10)


def test_no_factor_matrix_reaches_over_matrices() -> None:
    state = fs.shampoo(0.1, merge=Stacked()).init({"w": torch.zeros(3, 7, 5)})
    (statistics,) = [n for _, n in walk(state) if isinstance(n, KroneckerState)]
    assert [tuple(L.shape) for L in statistics.factors["7x5"]] == [(3, 7, 7), (3, 5, 5)]


@pytest.mark.parametrize(
    ("merge", "shape", "message"),
    [
        (Stacked(), (4, 4), "no stack of matrices"),
        (Stacked(parts=3), (4, 4), "does not divide side 0"),
        (Stacked(axis=2), (4, 4), "has no such axis"),
        (Stacked(parts=2), (4, 4, 4), "no stack of matrices"),
    ],
)
def test_what_is_no_stack_is_refused(merge: Stacked, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fs.blocked(fs.trace(0.9), merge=merge).init({"w": torch.zeros(shape)})


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="axis is -1"):
        Stacked(-1)
    with pytest.raises(ValueError, match="parts is 0"):
        Stacked(parts=0)
    with pytest.raises(TypeError, match="axis is 1.0"):
        Stacked(1.0)  # type: ignore[arg-type]
