"""Orthogonalization against singular values, and against torch.optim.Muon's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.linalg.polar import polar_factor
from funshampoo.linalg.polynomials import TABLES, polynomials_of

D = torch.float64
SHAPES = [(6, 6), (9, 4), (4, 9), (7, 1), (1, 7), (5, 33)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=D).to(dtype)


def orthogonalized(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    tx = fs.orthogonalize(*arguments, **options)
    found: torch.Tensor = tx.update({"w": x}, tx.init({"w": x}))[0]["w"]
    return found


def by_singular_values(x: torch.Tensor, polynomials: Any, norm: torch.Tensor) -> torch.Tensor:
    U, values, Vt = torch.linalg.svd(x, full_matrices=False)
    values = values / norm
    for a, b, c in polynomials:
        values = a * values + b * values**3 + c * values**5
    return (U * values) @ Vt


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_step_is_a_polynomial_of_the_singular_values(
    shape: tuple[int, ...], name: str, gram: bool
) -> None:
    x = randn(*shape)
    expected = by_singular_values(x, polynomials_of(name, 7), x.norm())
    found = orthogonalized(x, name, 7, scale=None, gram=gram)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "norm"),
    [
        ({"epsilon": 0.5, "norm": "added"}, lambda x: x.norm() + 0.5),
        ({"epsilon": 1e3}, lambda x: torch.tensor(1e3, dtype=D)),
        ({"slack": 1.02, "norm": "added"}, lambda x: 1.02 * x.norm() + 1e-7),
        (
            {"norm": "schatten4", "epsilon": 0.0},
            lambda x: torch.linalg.svdvals(x).pow(4).sum() ** 0.25,
        ),
    ],
)
def test_the_norm_is_the_one_that_was_asked_for(options: Any, norm: Any) -> None:
    x = randn(5, 8)
    found = orthogonalized(x, "converging", 12, scale=None, **options)
    expected = by_singular_values(x, polynomials_of("converging", 12), norm(x))
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_tables_repeat_their_last_entry_or_begin_anew() -> None:
    assert polynomials_of("cans", 7)[4:] == (TABLES["cans"][-1],) * 3
    assert polynomials_of("aol", 6)[4:] == TABLES["aol"][:2]
    assert polynomials_of([(1, 2, 3), (4, 5, 6)], 3)[1:] == ((4.0, 5.0, 6.0),) * 2
    assert len(polynomials_of("newton_schulz")) == 5
    assert len(polynomials_of("polar_express")) == 5


@pytest.mark.parametrize("name", TABLES)
def test_a_table_takes_singular_values_to_about_one(name: str) -> None:
    """A mistyped entry would take some of them far away."""
    values = torch.linspace(0.1, 0.85 if name == "aol" else 1, 1000, dtype=D)
    for a, b, c in polynomials_of(name, 12 if name == "converging" else None):
        values = a * values + b * values**3 + c * values**5
    assert 0.5 < values.min() <= values.max() < 1.3


@pytest.mark.parametrize(
    ("scale", "factor"),
    [
        ("muon", {(8, 2): 2.0, (2, 8): 1.0}),
        ("adam", {(8, 2): 0.2 * 8**0.5, (2, 8): 0.2 * 8**0.5}),
        ("spectral", {(8, 2): 8**0.5, (2, 8): 8**0.5}),
        ("unit_rms", {(8, 2): 2.0, (2, 8): 0.5}),
        (0.3, {(8, 2): 0.3, (2, 8): 0.3}),
        (lambda shape: shape[0] / 10, {(8, 2): 0.8, (2, 8): 0.2}),
    ],
)
def test_the_scale(scale: Any, factor: dict[tuple[int, int], float]) -> None:
    for shape, s in factor.items():
        x = randn(*shape)
        expected = s * orthogonalized(x, scale=None)
        assert torch.allclose(orthogonalized(x, scale=scale), expected, rtol=1e-14)


def test_a_kernel_is_a_matrix_and_experts_are_a_stack() -> None:
    kernel = randn(12, 2, 3, 3)
    flat = orthogonalized(kernel.flatten(1))
    assert torch.equal(orthogonalized(kernel).flatten(1), flat)
    experts = randn(3, 4, 6)
    found = orthogonalized(experts, flatten_sides=False)
    for one, expert in zip(found, experts):
        assert torch.allclose(one, orthogonalized(expert), rtol=1e-13)


def torch_newton_schulz(x: torch.Tensor) -> torch.Tensor:
    module: Any = pytest.importorskip("torch.optim._muon", reason="no Muon in torch 2.8")
    found: torch.Tensor = module._zeropower_via_newtonschulz(x, (3.4445, -4.775, 2.0315), 5, 1e-7)
    return found


@pytest.mark.parametrize("shape", [*SHAPES, (64, 64), (40, 200), (130, 70)], ids=str)
def test_in_bfloat16_it_has_the_bits_of_torch_also_in_a_stack(shape: tuple[int, int]) -> None:
    xs = randn(3, *shape, dtype=torch.float32)
    options: Any = {"scale": None, "dtype": torch.bfloat16}
    stacked = orthogonalized(xs, flatten_sides=False, **options)
    for x, one in zip(xs, stacked):
        expected = torch_newton_schulz(x).float()
        assert torch.equal(orthogonalized(x, **options), expected)
        assert torch.equal(one, expected)


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (8, 8), (70, 66)], ids=str)
def test_a_matrix_has_the_same_bits_wherever_it_lies_in_its_stack(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    xs = randn(5, *shape, dtype=dtype)
    polynomials = polynomials_of("polar_express")
    whole = polar_factor(xs, polynomials)
    for rows in ([0], [1, 2], [4, 3, 0]):
        assert torch.equal(polar_factor(xs[rows], polynomials), whole[rows])


def test_blocks_of_whole_matrices_are_the_leaves_by_themselves() -> None:
    params = {"a": randn(6, 4), "b": randn(6, 4, seed=1), "c": randn(4, 2, 3, 3)}
    inside = fs.blocked(fs.orthogonalize(), None, merge="none")
    blocks, _ = inside.update(params, inside.init(params), params)
    for name, x in params.items():
        assert torch.allclose(blocks[name], orthogonalized(x), rtol=0, atol=1e-13)


def test_zeros_stay_zeros() -> None:
    for norm in ("clamped", "added", "schatten4"):
        assert not orthogonalized(torch.zeros(3, 4), norm=norm).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polynomials": "newton"}, "polynomials is 'newton'; choose one of newton_schulz"),
        ({"polynomials": (3.4, -4.7, 2.0)}, "expected a sequence of"),
        ({"polynomials": []}, "polynomials is empty"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"scale": "big"}, "scale is 'big'; choose one of"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"dtype": torch.int32}, "dtype is torch.int32; give a floating one"),
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"norm": "l2"}, "norm is 'l2'"),
        ({"slack": 0.5}, "slack is 0.5"),
        ({"vectors": "skip"}, "vectors is 'skip'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fs.orthogonalize(**options)


def test_a_vector_is_refused_by_name_or_passes() -> None:
    params = {"w": randn(3, 4), "b": randn(3)}
    with pytest.raises(ValueError, match=r"orthogonalize: 'b' has the shape \(3,\)"):
        fs.orthogonalize().init(params)
    tx = fs.orthogonalize(vectors="pass")
    assert torch.equal(tx.update(params, tx.init(params))[0]["b"], params["b"])


def test_nesterov_is_one_more_step_of_the_average() -> None:
    grads = [randn(3, seed=t) for t in range(4)]
    look, plain = fs.ema(0.9, nesterov=True), fs.ema(0.9)
    ahead = fs.ema(0.9, 0.81)
    states = [tx.init(grads[0]) for tx in (look, plain, ahead)]
    for g in grads:
        found, states[0] = look.update(g, states[0])
        _, states[1] = plain.update(g, states[1])
        squared, states[2] = ahead.update(g, states[2])
        expected, _ = plain.update(g, states[1])  # the same gradient once more
        assert torch.allclose(found, expected, rtol=1e-14)
        assert torch.allclose(found, squared, rtol=1e-12)
    with pytest.raises(ValueError, match="give one of them"):
        fs.ema(0.9, 0.8, nesterov=True)
