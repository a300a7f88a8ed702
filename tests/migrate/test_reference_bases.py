"""from_reference where it goes on in an old basis, or by SVD, against plain models in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo.linalg.adaptive import qr_algorithm
from funshampoo.migrate.reference_methods import signs_scaled_by
from funshampoo.state import find_state
from funshampoo.state.eigenbases import EigenbasisState
from funshampoo.testing import check_stage
from tests.migrate import plain_reference

STEPS = 9
# Full rank from the second step on, where the first refresh is.
SHAPES = [(7, 8), (6, 6), (3, 4, 5)]
QR: dict[str, Any] = {"type": "QREigendecompositionConfig"}
EIGH: dict[str, Any] = {"type": "EighEigendecompositionConfig"}
AFTER = {
    "rank_deficient_stability_config": {
        "type": "PerturbationConfig",
        "perturb_before_computation": False,
    }
}
CORRECTED = plain_reference.EIGENVALUE_CORRECTED
STORED = "EigendecomposedShampooPreconditionerConfig"
CONFIGS = [
    QR,  # DefaultSOAPConfig is this one, in eigenvalue-corrected Shampoo
    {**QR, "max_iterations": 4, "tolerance": 0.35},
    {**QR, "max_iterations": 0},
    {**QR, **AFTER},
    {**EIGH, "tolerance": 0.35},
    {**EIGH, "tolerance": 0.6, **AFTER},
]


def arguments(method: str, config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "lr": 0.1,
        "betas": (0.8, 0.9),
        "epsilon": 0.3,
        "precondition_frequency": 2,
        "target_parameter_dimensionality": "inf",
        "preconditioner_config": {"type": method, "amortized_computation_config": config},
        **changes,
    }


def gradients(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    return list(base + torch.randn(STEPS, *shape, generator=generator, dtype=torch.float64))


def final(tx: fs.GradientTransformation) -> list[Tensor]:
    params = [torch.ones(s).double() for s in SHAPES]
    grads = [gradients(s) for s in SHAPES]
    state = tx.init(params)
    for t in range(STEPS):
        updates, state = tx.update([g[t] for g in grads], state, params)
        params = fs.apply_updates(params, updates)
    return params


def wanted(args: dict[str, Any], goods: list[bool]) -> list[Tensor]:
    ones = [torch.ones(s).double() for s in SHAPES]
    return [plain_reference.shampoo(w, gradients(tuple(w.shape)), args, goods)[-1] for w in ones]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b))


@pytest.mark.parametrize("method", [CORRECTED, STORED])
@pytest.mark.parametrize("config", CONFIGS)
def test_agrees_with_the_plain_model(method: str, config: dict[str, Any]) -> None:
    goods: list[bool] = []
    args = arguments(method, config)
    assert difference(final(fs.from_reference(**args)), wanted(args, goods)) < 1e-9
    if config.get("tolerance", 0.0) > 0:
        assert 0 < sum(goods) < len(goods)  # some were good enough, some were not


@pytest.mark.parametrize("method", [CORRECTED, STORED])
@pytest.mark.parametrize(
    ("config", "other"),
    [
        (QR, {**QR, "max_iterations": 2}),
        (QR, {**QR, "tolerance": 0.35}),
        (QR, {**QR, **AFTER}),
        (QR, EIGH),
        (EIGH, {**EIGH, "tolerance": 0.35}),
    ],
)
def test_every_field_reaches_the_chain(
    method: str, config: dict[str, Any], other: dict[str, Any]
) -> None:
    """The agreement can fail."""
    a, b = [final(fs.from_reference(**arguments(method, c))) for c in (config, other)]
    assert difference(a, b) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "epsilon", "other", "exact"),
    [
        (CORRECTED, 1e-3, CORRECTED, EIGH),
        (STORED, 1e-3, STORED, EIGH),
        (
            "EigendecomposedKLShampooPreconditionerConfig",
            1e-2,
            "RootInvKLShampooPreconditionerConfig",
            {"type": "EigenConfig"},
        ),
    ],
)
def test_many_iterations_are_a_decomposition(
    method: str, epsilon: float, other: str, exact: dict[str, Any]
) -> None:
    """Up to a tolerance, at which they end: a thousand more would take a hundred times as long."""
    many = {**QR, "max_iterations": 3000, "tolerance": 1e-9}
    pair = arguments(method, many, epsilon=epsilon), arguments(other, exact, epsilon=epsilon)
    assert difference(*[final(fs.from_reference(**args)) for args in pair]) < 1e-7


@pytest.mark.parametrize("config", [QR, {**EIGH, "tolerance": 0.3}])
def test_a_coordinate_that_comes_late_is_taken_into_the_basis(config: dict[str, Any]) -> None:
    """Untouched, it is in no vector of the old basis, which looks good enough without it."""
    tx = fs.from_reference(**arguments(CORRECTED, config))
    params = {"w": torch.zeros(4, 3).double()}
    state = tx.init(params)
    generator = torch.Generator().manual_seed(0)
    for t in range(12):
        g = torch.randn(4, 3, generator=generator, dtype=torch.float64) + 1
        g[3] *= t >= 6
        updates, state = tx.update({"w": g}, state, params)
        assert bool(updates["w"][3].any()) == (t >= 7)  # the first refresh that sees it
    Q = find_state((state,), EigenbasisState).bases.kept["4x3"][0].value[0][0]
    torch.testing.assert_close(Q.mT @ Q, torch.eye(4).double())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "config"), [(CORRECTED, QR), (STORED, {**EIGH, "tolerance": 0.3})]
)
def test_these_are_stages_like_others(method: str, config: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(4, 4, generator=generator, dtype=torch.float64)}
    check_stage(lambda: fs.from_reference(**arguments(method, config)), params=params)


def test_epsilon_is_live_where_a_basis_depends_on_it() -> None:
    """It shifts what the QR algorithm works on."""
    tx = fs.inject_hyperparams(fs.from_reference)(**arguments(CORRECTED, QR))
    params = [torch.ones(s).double() for s in SHAPES]
    state = tx.init(params)
    state.hyperparams["epsilon"].fill_(0.01)
    for t in range(STEPS):
        updates, state = tx.update([gradients(s)[t] for s in SHAPES], state, params)
        params = fs.apply_updates(params, updates)
    plain = final(fs.from_reference(**arguments(CORRECTED, QR, epsilon=0.01)))
    assert difference(params, plain) < 1e-6
    assert difference(plain, final(fs.from_reference(**arguments(CORRECTED, QR)))) > 1e-3


def test_each_matrix_ends_for_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64)
    A = X @ X.mT
    A[1] = torch.arange(5.0, 0.0, -1).double().diag()  # needs no step, but an order
    A[2, 0, 0] = torch.nan
    Q = torch.eye(5).double().expand(3, 5, 5)
    values, vectors, found, _ = qr_algorithm(A, Q, 0.1, 50)
    assert found.tolist() == [True, True, False]
    assert torch.equal(vectors[1], torch.eye(5).double().flip(1))
    assert torch.equal(values[1], torch.arange(1.0, 6.0).double())
    B = vectors[0].mT @ A[0] @ vectors[0]
    off = float((B - B.diagonal().diag()).norm() / B.norm())
    assert 0.01 < off <= 0.1  # no further than asked for
    torch.testing.assert_close(values[0], B.diagonal())
    alone = qr_algorithm(A[:1], Q[:1], 0.1, 50)
    assert torch.equal(alone.vectors[0], vectors[0])


def test_a_basis_that_lacks_an_untouched_coordinate_goes_on() -> None:
    """It is no failure to keep it; a QR that is not orthogonal is one."""
    A = torch.diag(torch.tensor([3.0, 2.0, 0.0]).double())
    Q = torch.eye(3).double()
    Q[2] = 0
    found = qr_algorithm(A, Q, 0.1, 3)
    assert found.decomposed
    assert torch.equal(found.values, torch.tensor([0.0, 2.0, 3.0]).double())
    assert torch.equal(found.vectors.abs().sum(1), torch.tensor([1.0, 1.0, 0.0]).double())
    assert not qr_algorithm(A + torch.ones(3, 3), torch.full_like(Q, torch.nan), -1.0, 1).decomposed


def svd_arguments(**fields: Any) -> dict[str, Any]:
    config = {"type": "SVDOrthogonalizationConfig", **fields}
    kind = "SpectralDescentPreconditionerConfig"
    method = {"type": kind, "orthogonalization_config": config}
    return {"lr": 1.0, "betas": (0.0, 1.0), "preconditioner_config": method}


@pytest.mark.parametrize("by_nuclear_norm", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_spectral_descent_by_svd(shape: tuple[int, int], by_nuclear_norm: bool) -> None:
    g = gradients(shape)[0]
    args = svd_arguments(
        scale_by_nuclear_norm=by_nuclear_norm,
        scale_by_dims_fn=lambda d_in, d_out: d_in + 10 * d_out,
    )
    tx = fs.from_reference(**args, target_parameter_dimensionality=2)
    updates, _ = tx.update([g], tx.init([g]), [g])
    values, P = torch.linalg.eigh(g @ g.mT)
    keep = values > 1e-9  # the polar factor (G Gᵀ)^(-1/2) G, on the range of G
    roots = values[keep].sqrt()
    factor = (P[:, keep] / roots) @ P[:, keep].mT @ g
    size = (shape[1] + 10 * shape[0]) * (float(roots.sum()) if by_nuclear_norm else 1.0)
    torch.testing.assert_close(-updates[0], size * factor, rtol=1e-10, atol=1e-10)


def test_a_gradient_of_zeros_has_no_polar_factor() -> None:
    params = [torch.ones(4, 6).double()]
    tx = fs.from_reference(**svd_arguments(), target_parameter_dimensionality=2)
    updates, _ = tx.update([torch.zeros(4, 6).double()], tx.init(params), params)
    assert not updates[0].any()


def test_newton_schulz_is_scaled_by_dimensions_too() -> None:
    g = [gradients((4, 6))[0]]
    found = []
    for fields in ({}, {"scale_by_dims_fn": lambda d_in, d_out: d_in / d_out}):
        config = {"type": "NewtonSchulzOrthogonalizationConfig", **fields}
        kind = "SpectralDescentPreconditionerConfig"
        method = {"type": kind, "orthogonalization_config": config}
        tx = fs.from_reference(
            lr=1.0, preconditioner_config=method, target_parameter_dimensionality=2
        )
        found.append(tx.update(g, tx.init(g), g)[0][0])
    torch.testing.assert_close(found[1], 1.5 * found[0])


@pytest.mark.parametrize(
    ("scale_fn", "sizes"),
    [(lambda g: 2.0, (2.0, 2.0)), (lambda g: g.abs().sum(), (6.0, 15.0))],
)
def test_signs_are_scaled_by_a_function_of_each_block(scale_fn: Any, sizes: Any) -> None:
    method = {"type": "SignDescentPreconditionerConfig", "scale_fn": scale_fn}
    tx = fs.from_reference(lr=1.0, betas=(0.0, 1.0), preconditioner_config=method)
    g = [torch.tensor([1.0, -2.0, 3.0]), torch.tensor([4.0, 5.0, -6.0])]
    updates, _ = tx.update(g, tx.init(g), g)
    for u, x, size in zip(updates, g, sizes):
        assert torch.equal(u, -size * x.sign())


def test_scaled_signs_are_a_stage_like_others() -> None:
    check_stage(signs_scaled_by(lambda g: g.abs().sum()), params={"w": torch.ones(3, 2)})
