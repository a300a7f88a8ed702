"""Products in TF32: those of every step, and nothing that is computed now and then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import funshampoo as fs
from funshampoo.core.modes import asking_for_tf32, full_precision, product_precision
from tests.core.test_precision import as_before

__all__ = ["as_before"]  # the process' setting is put back after each test

SHAPES = {"w": (40, 24), "b": (24,)}


def is_rounded() -> bool:
    """As a GPU's products see it: it raises where torch's two interfaces contradict."""
    found: bool = torch.backends.cuda.matmul.allow_tf32
    return found


class Products(TorchDispatchMode):
    """Whether TF32 is on at each matrix product, by the name of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: list[bool] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "mm" in str(function):
            self.rounded.append(is_rounded())
        return function(*args, **(kwargs or {}))


def tree(seed: int) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=make) for name, shape in SHAPES.items()}


CHAINS = {
    "shampoo": lambda: fs.shampoo(0.1, every=2, max_size=32, solver=fs.linalg.newton_schulz()),
    "soap": lambda: fs.soap(0.1, every=2, max_size=32),
    "kl_shampoo": lambda: fs.kl_shampoo(0.1, every=2, max_size=32),
    "muon": lambda: fs.muon(0.1),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("asked", ["highest", "high"])
def test_products_of_plain_steps_alone(name: str, asked: str) -> None:
    """Whatever the process asks for, and as it was afterwards."""
    torch.set_float32_matmul_precision(asked)
    try:
        for tx, plain in ((CHAINS[name](), {False}), (fs.in_tf32(CHAINS[name]()), {True})):
            state = tx.init(tree(0))
            for t, kinds in ((1, None), (2, plain)):
                with Products() as seen:
                    _, state = tx.update(tree(t), state, tree(0), refresh=t == 1)
                assert seen.rounded
                if kinds is not None:
                    assert set(seen.rounded) == kinds
                elif name == "shampoo":  # roots are made by products, in float32
                    assert False in seen.rounded
        assert torch.get_float32_matmul_precision() == asked
        assert is_rounded() == (asked == "high")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_contexts_inside_of_each_other() -> None:
    with asking_for_tf32():
        assert not is_rounded()
        with full_precision(), product_precision():
            assert is_rounded()
            with full_precision():
                assert not is_rounded()
            assert is_rounded()
    with product_precision():
        assert not is_rounded()


def test_inside_of_compiled_it_is_an_error() -> None:
    inside = fs.chain(fs.in_tf32(fs.scale_by_adam()), fs.scale(-0.1))
    with pytest.raises(ValueError, match="put it outside"):
        fs.compiled(inside)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHAINS)
def test_on_a_gpu_it_is_near(name: str) -> None:
    """Near, and not the same: else nothing was rounded. Of a square, whose bases are unique."""

    def drawn(seed: int) -> Tensor:
        return torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)).cuda()

    found = []
    for tx in (CHAINS[name](), fs.in_tf32(CHAINS[name]())):
        params = {"w": drawn(0)}
        state = tx.init(params)
        for t in range(1, 6):
            state = fs.update_in_place(tx, {"w": drawn(t)}, state, params)
        found.append(params["w"])
    way, error = (found[0] - drawn(0)).norm(), (found[1] - found[0]).norm()
    assert 0 < error < 0.05 * way
