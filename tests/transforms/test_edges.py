"""Values at the ends of a dtype's range, against the same formulas in Python's and float64's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import funshampoo as fs
from funshampoo.linalg import norms
from funshampoo.transforms.agreement import AgreementGate

D = torch.float64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, D)
VALUES = (0.0, 1e-45, 1e-40, 1e-30, 1e-12, 1.0, 1e4, 1e30, 3.4e38)
BAD = (float("inf"), -float("inf"), float("nan"))


def vectors(value: float, dtype: torch.dtype, n: int = 5) -> Tensor:
    """Entries of one order of magnitude, as far as the dtype has them."""
    most = torch.finfo(dtype).max
    x = value * torch.tensor([1.0, -0.5, 0.25, 0.0, 0.75], dtype=D)[:n]
    return x.clamp(-most, most).to(dtype)


def norm64(*tensors: Tensor) -> float:
    return math.hypot(*[v for x in tensors for v in x.double().flatten().tolist()])


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def batched(function: Callable[..., Any]) -> Callable[..., Any]:
    """As one of a batch of two, under vmap: what can't be read on the host."""

    def run(*args: Any) -> Any:
        two = torch.utils._pytree.tree_map(lambda x: torch.stack([x, torch.ones_like(x)]), args)
        return torch.utils._pytree.tree_map(lambda x: x[0], torch.vmap(function)(*two))

    return run


def close(a: Tensor, truth: Tensor) -> None:
    """To 4 roundings, or to two of the smallest numbers."""
    found = torch.finfo(a.dtype)
    denormal = found.tiny * found.eps
    torch.testing.assert_close(
        a.double(), truth, rtol=8 * found.eps, atol=2 * denormal, equal_nan=True
    )


@pytest.mark.parametrize("way", [eager, batched])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", VALUES)
def test_clip_by_global_norm(value: float, dtype: torch.dtype, way: Any) -> None:
    g = {"a": vectors(value, dtype), "b": vectors(value, dtype, 2)}
    norm = norm64(*g.values())
    for limit in (1e-20, 1.0, 1e10, norm * 2 or 1.0):
        limit = torch.tensor(limit, dtype=D if dtype == D else torch.float32).item()
        if limit in (0.0, float("inf")):
            continue
        out = way(lambda g: fs.clip_by_global_norm(limit).update(g, ())[0])(g)  # noqa: B023
        for name, x in g.items():
            if norm <= limit:
                assert torch.equal(out[name].double(), x.double())
            else:
                close(out[name], x.double() / norm * limit)


@pytest.mark.parametrize("way", [eager, batched])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", BAD)
def test_bad_entries_make_everything_nan(bad: float, dtype: torch.dtype, way: Any) -> None:
    g = {"a": torch.tensor([1.0, bad], dtype=dtype), "b": torch.ones(2, dtype=dtype)}
    for limit in (1e-3, 1e3):
        out = way(lambda g: fs.clip_by_global_norm(limit).update(g, ())[0])(g)  # noqa: B023
        assert all(x.isnan().all() for x in out.values())


@pytest.mark.parametrize("way", [eager, batched])
def test_max_norm_may_be_zero_infinite_or_too_large_for_the_dtype(way: Any) -> None:
    zero, one = torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])
    stage = way(lambda g, limit: fs.clip_by_global_norm(limit).update(g, ())[0])
    assert torch.equal(stage(zero, torch.tensor(0.0)), zero)
    assert torch.equal(stage(one, torch.tensor(0.0)), zero)
    for limit in (1e300, float("inf")):
        assert torch.equal(way(lambda g: fs.clip_by_global_norm(limit).update(g, ())[0])(one), one)  # noqa: B023
        assert torch.equal(way(lambda g: fs.clip(limit).update(g, ())[0])(one), one)  # noqa: B023


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [*VALUES, *BAD])
def test_global_norm(value: float, dtype: torch.dtype) -> None:
    g = [vectors(value, dtype, 2), vectors(value, dtype, 3)]
    found = fs.global_norm(g)
    assert found is not None
    truth = torch.tensor(norm64(*g), dtype=D)
    most = torch.finfo(found.dtype).max
    close(found, truth if not truth > most else torch.tensor(float("inf"), dtype=D))


def test_global_norm_of_mixed_dtypes() -> None:
    g = [torch.full((2,), 3e38), torch.full((2,), 1e200, dtype=D), torch.ones(2).bfloat16()]
    assert fs.global_norm(g).item() == pytest.approx(1e200 * 2**0.5, rel=1e-14)  # type: ignore[union-attr]
    assert fs.global_norm(g[::2]).dtype == torch.float32  # type: ignore[union-attr]


def stands_for(x: Tensor) -> fs.GradientTransformation:
    """A stage whose updates are these."""
    return fs.core.contract.stateless(lambda updates: {"w": x}, "stands_for")


@pytest.mark.parametrize("way", [eager, batched])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", VALUES[:-1])
@pytest.mark.parametrize("value", VALUES)
def test_graft(value: float, length: float, dtype: torch.dtype, way: Any) -> None:
    p, p_g = vectors(value, dtype), vectors(length, dtype, 3)
    ratio = norm64(p_g) / (norm64(p) + 1e-16)
    if way is batched and not 1e-37 < ratio < 1e38:
        pytest.skip("one factor can't say it, and off the CPU there is no second one")
    truth = p.double() * ratio

    def grafted(p: Tensor, p_g: Tensor) -> Tensor:
        tx = fs.graft(stands_for(p), stands_for(p_g))
        out, _ = tx.update({"w": p}, tx.init({"w": p}))
        return out["w"]

    close(way(grafted)(p, p_g), truth)


def test_blocks_do_not_disturb_each_other() -> None:
    """The same row beside any neighbour, to the last bit; and only a bad row is NaN."""
    torch.manual_seed(0)
    row = torch.randn(1, 7)

    def grafted(p: Tensor, p_g: Tensor) -> Tensor:
        tx = fs.graft(stands_for(p), stands_for(p_g))
        out, _ = tx.update({"w": p}, tx.init({"w": p}, block_ndim=1), block_ndim=1)
        return out["w"]

    usual = grafted(row.repeat(2, 1), row.repeat(2, 1) * 3)[0]
    for value in (*VALUES, *BAD):
        beside = torch.full((1, 7), value)
        for p, p_g in ((beside, row), (row, beside), (beside, beside)):
            out = grafted(torch.cat([row, p]), torch.cat([row * 3, p_g]))
            assert torch.equal(out[0], usual)
            assert out[1].isnan().all() == (not math.isfinite(value))


def test_the_usual_numbers_are_those_of_the_plain_formula() -> None:
    torch.manual_seed(0)
    p, p_g = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    ratio = p_g.reshape(4, -1).norm(dim=-1) / (p.reshape(4, -1).norm(dim=-1) + 1e-16)
    tx = fs.graft(stands_for(p), stands_for(p_g))
    state = tx.init({"w": p}, block_ndim=1)
    out, _ = tx.update({"w": p}, state, block_ndim=1)
    assert torch.equal(out["w"], p * ratio[:, None, None])


@pytest.mark.parametrize("make", [lambda: fs.clip_by_global_norm(1.0), lambda: _grafted()])
def test_finite_derivatives_at_zero(make: Any) -> None:
    tx = make()

    def total(g: Tensor) -> Tensor:
        return tx.update({"w": g}, tx.init({"w": g}))[0]["w"].sum()

    for g in (torch.zeros(3), torch.full((3,), 1e-30), torch.full((3,), 1e25)):
        assert torch.func.grad(total)(g).isfinite().all()


def _grafted() -> fs.GradientTransformation:
    return fs.graft(fs.scale(1e-3), fs.scale_by_sgd())


def test_compiled_in_one_graph() -> None:
    tx = fs.chain(fs.clip_by_global_norm(1.0), fs.graft(fs.scale(3.0), fs.scale_by_sgd()))
    state = tx.init({"w": torch.zeros(3)})
    step = torch.compile(
        lambda g: tx.update({"w": g}, state)[0]["w"], backend="eager", fullgraph=True
    )
    for value in (0.0, 1e-30, 1.0, 1e30):
        g = vectors(value, torch.float32)
        clipped = g.double() * min(1.0, 1.0 / (norm64(g) or 1.0))
        close(step(g), 3 * clipped * norm64(clipped) / (3 * norm64(clipped) + 1e-16))


@pytest.mark.parametrize("epsilon", [0.0, 1e-10])
@pytest.mark.parametrize("value", [1e-18, 1e-17, 1e-12, 1.0, 1e18])
def test_adagrad_of_small_gradients(value: float, epsilon: float) -> None:
    g = vectors(value, torch.float32)
    truth = g.double() / (g.double().abs() + epsilon)
    truth = torch.where(g == 0, 0.0, truth)
    for epsilon_ in (epsilon, torch.tensor(epsilon)):
        tx = fs.scale_by_adagrad(epsilon_)
        out = tx.update({"w": g}, tx.init({"w": g}))[0]["w"]
        torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=0)


_VIEWS = ("view.default", "detach.default", "alias.default", "unbind.int", "promote_types.default")


class Count(TorchDispatchMode):
    """How many operators that do something to numbers, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in _VIEWS:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda: fs.scale_by_rms(), 8),
        (lambda: fs.scale_by_adagrad(), 8),
        (lambda: fs.clip(1.0), 4),
        (lambda: fs.clip_by_global_norm(1.0), 40),
        (lambda: fs.graft(fs.scale_by_sgd(), fs.scale_by_rms()), 70),
    ],
)
def test_a_column_takes_few_operators_off_the_cpu(make: Any, most: int) -> None:
    """On the meta device, which no host reads: 100 leaves, not 100 operators."""
    g = {str(i): torch.zeros(4, 3, device="meta") for i in range(100)}
    tx = make()
    state = tx.init(g)
    with Count() as count:
        tx.update(g, state)
    assert len(count.names) <= most, count.names


def test_limits_of_the_range() -> None:
    """Between them the plain norm is right; beyond them the scaled one is."""
    for dtype in (torch.float32, D):
        least, most = norms.range_limits(dtype)
        for value in (least, most / 2, least / 1e6, most * 1e6):
            x = torch.full((3,), value, dtype=dtype)
            scale = norms.range_scale(norms.block_norm(x, 0))
            found = norms.block_norm(x * scale, 0) / scale
            assert found.item() == pytest.approx(value * 3**0.5, rel=1e-6)


_FLOORED = fs.update_floor(0.5), fs.update_floor(0.5, per="row")
_SHORT = fs.chain(fs.sign(), fs.scale(2.0**-130))
_GATED = fs.blend_towards(fs.sign(), gate=AgreementGate())
_SMALL = 2.0**-110, 2.0**-60, 2.0**-40
_SMALLEST = (2.0**-140, *_SMALL)  # denormal, and exact
_LARGE = 2.0**40, 2.0**60, 2.0**90
HOMOGENEOUS: dict[str, tuple[fs.GradientTransformation, int, tuple[float, ...]]] = {
    "clamped": (fs.orthogonalize(epsilon=0.0), 0, _SMALLEST + _LARGE),
    "added": (fs.orthogonalize(epsilon=0.0, norm="added", slack=1.5), 0, _SMALLEST + _LARGE),
    "schatten4": (fs.orthogonalize(epsilon=0.0, norm="schatten4"), 0, _SMALLEST + _LARGE),
    "gram": (fs.orthogonalize(epsilon=0.0, gram=True), 0, _SMALLEST + _LARGE),
    "bfloat16": (fs.orthogonalize(epsilon=0.0, dtype=torch.bfloat16), 0, _SMALLEST + _LARGE),
    "float16": (fs.orthogonalize(epsilon=0.0, dtype=torch.float16), 0, _SMALLEST + _LARGE),
    "hyperball": (fs.hyperball(0.5), 0, _SMALL + _LARGE),
    "blend": (fs.blend_towards(fs.sign(), gate=0.5), 1, _SMALL + _LARGE),
    "blend of short": (fs.blend_towards(_SHORT, gate=0.5), 1, _SMALL + _LARGE),
    "gate": (_GATED, 1, _SMALL + _LARGE),
    "cautious": (fs.cautious(fs.ema(0.5)), 1, _SMALLEST + _LARGE),
    "floor": (_FLOORED[0], 0, _SMALL),
    "floor of rows": (_FLOORED[1], 0, _SMALL),
    "adaptive_clip": (fs.adaptive_clip(0.5), 0, _LARGE),
}
"""{what it is: a stage, of which degree in the updates, for which scales of them}."""


@pytest.mark.parametrize("way", [eager, batched])
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_powers_of_two_change_no_bit(name: str, way: Any) -> None:
    """stage(c U) = c^degree stage(U): no square, or fourth power, has left the range."""
    tx, degree, scales = HOMOGENEOUS[name]
    u = torch.tensor([[1.0, -2.0, 0.0], [3.0, 0.5, 1.0], [0.0, 2.0, -1.0], [1.0, 1.0, -3.0]])
    w = {"w": torch.full_like(u, 16.0 if name.startswith("floor") else 0.25)}

    def step(u: Tensor) -> Tensor:
        found: Tensor = tx.update({"w": u}, tx.init(w), w)[0]["w"]
        return found

    expected = way(step)(u)
    assert expected.any()
    for c in scales:
        assert torch.equal(way(step)(c * u), c**degree * expected), c
    for c in (0.0, 2.0**-140):
        assert way(step)(c * u).isfinite().all()


def test_cautious_decay_looks_at_signs() -> None:
    w = {"w": torch.tensor([1e-20, -1e-20, 1e-20])}
    u = {"w": torch.tensor([-1e-30, 1e-30, 1e-30])}
    found = fs.add_cautious_decay(0.5).update(u, (), w)[0]["w"]
    assert torch.equal(found, u["w"] + torch.tensor([0.0, 0.0, 5e-21]))


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e-6, 1e6, 1e12, 1e15])
def test_soap_muon_at_any_scale(scale: float) -> None:
    """Of what `guarded` lets in nothing is NaN, and nothing stands still."""
    tx, params = fs.soap_muon(0.1), {"w": torch.eye(4, 3)}
    state = tx.init(params)
    for seed in range(12):
        g = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        updates, state = tx.update({"w": scale * g}, state, params)
        params = fs.apply_updates(params, updates)
        assert updates["w"].isfinite().all()
        assert updates["w"].norm() > 0.01
