"""What a plain step would launch and move on a GPU, counted on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo.plan.planner import meta_parameters
from tests.traffic import Traffic

LAYERS = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]  # of GPT-2, of which there are 12 each


def counted(tx: fs.GradientTransformation, params: dict[str, Tensor]) -> Traffic:
    """A plain step in place."""
    grads = {name: torch.empty_like(p) for name, p in params.items()}
    state = fs.update_in_place(tx, grads, tx.init(params), params)
    with Traffic() as seen:
        fs.update_in_place(tx, grads, state, params)
    return seen


def matrices(layers: int) -> dict[str, Tensor]:
    shapes = [shape for _ in range(layers) for shape in LAYERS]
    return {f"w{i}": torch.empty(shape, device="meta") for i, shape in enumerate(shapes)}


@pytest.mark.parametrize(("dtype", "shares"), [(torch.bfloat16, 27.51), (None, 27.17)])
def test_muon_moves_few_bytes_beside_its_products(dtype: torch.dtype | None, shares: float) -> None:
    params = matrices(2)
    seen = counted(fs.muon(0.02, dtype=dtype), params)
    assert seen.beside_products() <= shares * sum([p.nbytes for p in params.values()]), seen.moved
    assert seen.launches["_foreach_mul"] == 1, "of the rate: decay is a factor of a sum"


def test_muon_launches_as_much_for_more_layers() -> None:
    few, many = (counted(fs.muon(0.02, dtype=torch.bfloat16), matrices(n)) for n in (2, 12))
    assert few.launches == many.launches
    assert many.operators <= 130


def test_small_leaves_cost_no_launches_of_their_own() -> None:
    """Of AdamW by leaf: neither zeros, nor corrections of the bias, nor counters."""

    def leaves(vectors: int) -> dict[str, Tensor]:
        small = {f"b{i}": torch.empty(64 + i % 3, device="meta") for i in range(vectors)}
        return {"embedding": torch.empty(500, 64, device="meta"), **small}

    tx = fs.guarded(fs.adamw(1e-3), by_leaf=True)
    few, many = counted(tx, leaves(20)), counted(tx, leaves(100))
    assert few.launches == many.launches
    assert many.operators <= 48


def test_one_verdict_for_all_leaves_is_made_once() -> None:
    few, many = (
        counted(
            fs.guarded(fs.adamw(1e-3)),
            {f"b{i}": torch.empty(64, device="meta") for i in range(n)},
        )
        for n in (20, 100)
    )
    assert few.launches == many.launches


def test_a_whole_model_under_muon() -> None:
    """Embeddings, head and vectors go to AdamW by leaf. docs/gpu.md has these figures."""
    params = meta_parameters("gpt2", torch.float32)
    names = [name for name, p in params.items() if p.ndim > 1 and p.shape[0] not in (1024, 50257)]
    assert len(names) == 48
    mask = {name: name in names for name in params}
    seen = counted(fs.muon(0.02, dtype=torch.bfloat16, matrices=mask), params)
    assert seen.operators <= 181
    others = {name: p for name, p in params.items() if name not in names}
    assert counted(fs.guarded(fs.adamw(1e-3), by_leaf=True), others).operators <= 51
    assert counted(fs.adamw(1e-3), params).operators <= 71


def test_normuon_keeps_its_state_without_a_copy() -> None:
    """Whose rows' second moments leave out what is not alive, so that nothing is put back."""
    params = matrices(1)
    seen = counted(fs.normuon(0.02, dtype=torch.bfloat16), params)
    assert seen.beside_products() <= 35.52 * sum([p.nbytes for p in params.values()]), seen.moved
