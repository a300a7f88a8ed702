"""Trees and comparisons that many tests use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import Tensor


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A tree of parameters of orders 0 to 4, in nested containers, with ragged blocks at 4."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "w": randn(6, 5),
        "layers": [
            {"weight": randn(3, 2, 4), "bias": randn(5)},
            {"weight": randn(4, 2, 3, 1), "bias": randn(1), "scale": randn()},
        ],
    }


def gradients(steps: int, dtype: torch.dtype = torch.float64, seed: int = 100) -> list[Any]:
    """One tree of gradients a step, of order 1 and never zero."""
    return [problem(seed + t, dtype) for t in range(steps)]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As in code that builds its model in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in optree's order."""
    return [x for x in optree.tree_leaves(tree) if isinstance(x, Tensor)]


def snapshot(*trees: Any) -> list[tuple[Tensor, int]]:
    """Copies of all tensors, with their version counters."""
    return [(x.clone(), x._version) for tree in trees for x in tensors(tree)]


def assert_unchanged(before: list[tuple[Tensor, int]], *trees: Any) -> None:
    now = [x for tree in trees for x in tensors(tree)]
    assert len(now) == len(before)
    for (value, version), x in zip(before, now):
        assert x._version == version, "a tensor was written to"
        assert torch.equal(x, value)


def assert_equal(tree: Any, other: Any) -> None:
    """The same structure, dtypes and bits."""
    assert optree.tree_structure(tree) == optree.tree_structure(other)
    for a, b in zip(tensors(tree), tensors(other)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def assert_close(tree: Any, other: Any, tolerance: float) -> None:
    """The largest difference is at most `tolerance` times the largest entry of a leaf."""
    assert optree.tree_structure(tree) == optree.tree_structure(other)
    for a, b in zip(tensors(tree), tensors(other)):
        assert a.shape == b.shape
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        assert (a - b).abs().max().item() <= tolerance * scale if b.numel() else True


def train(tx: Any, params: Any, grads: list[Any], apply: Callable[..., Any], **context: Any) -> Any:
    """Run the steps; returns the last parameters, all updates, and the last state."""
    state = tx.init(params)
    history = []
    for g in grads:
        updates, state = tx.update(g, state, params, **context)
        params = apply(params, updates)
        history.append(updates)
    return params, history, state


def clone(tree: Any) -> Any:
    return optree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def meaning(saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A saved state, its averages divided by their weights: what a held step leaves as it was."""
    found = {}
    for name, x in saved.items():
        if name.startswith("funshampoo/"):
            continue
        stage, _, field = name.rpartition("/")
        stage = stage.removesuffix("/factors")
        field = "" if stage.endswith("kronecker_statistics") else field.replace("average", "")
        weight = saved.get(f"{stage}/{field}_weight".replace("/_weight", "/weight"))
        if weight is not None and not name.endswith("weight"):
            found[name] = x / torch.where(weight > 0, weight, torch.ones_like(weight))
        elif weight is None and not name.endswith("weight"):
            found[name] = x.clone()
    return found
