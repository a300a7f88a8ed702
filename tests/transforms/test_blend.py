"""SOAP-Muon's parts: whitening, the blend and its gate; scale by shape and the late decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.core.tree import update_leaves

D = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def turned(u: torch.Tensor) -> torch.Tensor:
    """Some other direction, by entries."""
    return u.flip(-1) + 0.6 * u + 0.3 * u.abs()


def other() -> fs.GradientTransformation:
    return fs.stateless(lambda tree: update_leaves(lambda u: (turned(u),), tree, ())[0], "other")


def schatten4(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(x.reshape(x.shape[0], -1)).pow(4).sum() ** 0.25


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()))


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (3, 2, 5), (6,)])
@pytest.mark.parametrize("gate", [1.0, 0.3])
def test_a_blend_has_the_size_of_the_updates(shape: tuple[int, ...], gate: float) -> None:
    u = randn(*shape)
    found = fs.blend_towards(other(), gate).update(
        {"w": u}, fs.blend_towards(other()).init({"w": u})
    )
    W = turned(u)
    W = W * schatten4(u) / schatten4(W)
    V = u + gate * (W - u)
    assert torch.allclose(found[0]["w"], V * schatten4(u) / schatten4(V), rtol=1e-12)


def test_where_there_is_no_other_direction_the_updates_stay() -> None:
    u = {"w": randn(3, 3), "b": torch.zeros(2, dtype=D)}
    for gate in (1.0, 0.5, fs.AgreementGate()):
        tx = fs.blend_towards(fs.scale(0.0), gate)
        found, _ = tx.update(u, tx.init(u))
        assert torch.allclose(found["w"], u["w"], rtol=1e-12)
        assert not found["b"].any()


@pytest.mark.parametrize("least", [(0.1, 0.05), (-0.5, 0.05), (0.1, -0.5), (-1.5, -1.5)])
@pytest.mark.parametrize("floor_and_cap", [(0.0, 1.0), (0.9, 1.0), (0.0, 0.05)])
def test_the_gate_opens_with_the_agreement(
    floor_and_cap: tuple[float, float], least: tuple[float, float]
) -> None:
    (floor, cap), (agreement, alignment) = floor_and_cap, least
    shares = []
    for seed in range(6):
        u, g = randn(4, 5, seed=seed), randn(4, 5, seed=seed) + 0.8 * randn(4, 5, seed=seed + 50)
        gate = fs.AgreementGate(agreement, alignment, 1.5, floor, cap)
        W = turned(u)
        W = W * schatten4(u) / schatten4(W)
        a = (cosine(W, u) - agreement) / (1 - agreement)
        b = (cosine(W, g) - alignment) / max(cosine(u, g) - alignment, 1e-8)
        share = (min(max(a, 0), 1) * min(max(b, 0), 1)) ** 1.5
        shares.append(share)
        share = min(max(share, floor), cap)
        V = u + share * (W - u)
        tx = fs.blocked(fs.chain(replaced(u), fs.blend_towards(other(), gate)))
        found, _ = tx.update({"w": g}, tx.init({"w": g}))
        assert torch.allclose(found["w"], V * schatten4(u) / schatten4(V), rtol=1e-10)
    if least == (0.1, 0.05):
        assert min(shares) < 0.05 < max(shares)  # or the bounds would show nothing
    else:
        assert len({round(share, 3) for share in shares}) > 2


def replaced(u: torch.Tensor) -> fs.GradientTransformation:
    """Other updates than the gradient, in blocks."""
    return fs.stateless(lambda tree: dict.fromkeys(tree, u[None]), "replaced")


def test_a_schedule_of_the_gate_reads_the_old_step_count() -> None:
    counts = []

    def floor(count: torch.Tensor) -> torch.Tensor:
        counts.append(int(count))
        return torch.tensor(0.5)

    tx = fs.blend_towards(other(), fs.AgreementGate(floor=floor))
    u = {"w": randn(3, 3)}
    state = tx.init(u)
    for _ in range(3):
        _, state = tx.update(u, state)
    assert counts == [0, 1, 2]


def test_inside_a_blend_second_moments_are_of_the_updates() -> None:
    u, g = randn(4, 5), randn(4, 5, seed=1)
    second = fs.scale_by_second_moment(0.75, exponent=0.25, bias_correction=False)
    tx = fs.blocked(fs.chain(replaced(u), fs.blend_towards(second)))
    found, _ = tx.update({"w": g}, tx.init({"w": g}))
    W = u / ((0.25 * u.square()) ** 0.25 + 1e-8)
    assert torch.allclose(found["w"], W * schatten4(u) / schatten4(W), rtol=1e-12)


@pytest.mark.parametrize("damping", ["added", "floor"])
@pytest.mark.parametrize("kind", ["corrected", "plain", "sum", "unweighted"])
@pytest.mark.parametrize("exponent", [0.5, 0.3])
def test_powers_of_the_second_moment(damping: Any, kind: str, exponent: float) -> None:
    beta, epsilon = (1.0 if kind == "sum" else 0.75), 0.3
    tx = fs.scale_by_second_moment(
        beta,
        epsilon,
        exponent=exponent,
        damping=damping,
        bias_correction=kind == "corrected",
        weighted=kind != "unweighted",
    )
    state, V = tx.init({"w": torch.zeros(6, dtype=D)}), torch.zeros(6, dtype=D)
    for t in range(1, 5):
        g = randn(6, seed=t)
        V = beta * V + (1.0 if kind in ("sum", "unweighted") else 1 - beta) * g**2
        total = V / (1 - beta**t) if kind == "corrected" else V
        if damping == "added":
            expected = g / (total**exponent + epsilon)
        else:
            expected = g / total.clamp(min=epsilon) ** exponent
        found, state = tx.update({"w": g}, state)
        assert torch.allclose(found["w"], expected, rtol=1e-12)


def test_exponents_by_the_number_of_sides() -> None:
    params = {"w": randn(2, 3), "b": randn(3), "s": randn()}
    tx = fs.blocked(fs.scale_by_second_moment(0.0, 0.0, exponent={1: 0.25, 2: 1.0}), merge="none")
    found, _ = tx.update(params, tx.init(params))
    for name, exponent in {"w": 1.0, "b": 0.25, "s": 0.5}.items():
        g = params[name]
        assert torch.allclose(found[name], g / (g**2) ** exponent, rtol=1e-12)


def test_with_adams_exponent_it_is_adam_without_a_first_moment() -> None:
    adam, own = fs.scale_by_adam(0.0, 0.9), fs.scale_by_second_moment(0.9)
    params = {"w": randn(5)}
    states = [adam.init(params), own.init(params)]
    for t in range(3):
        g = {"w": randn(5, seed=t)}
        a, states[0] = adam.update(g, states[0])
        b, states[1] = own.update(g, states[1])
        assert torch.allclose(a["w"], b["w"], rtol=1e-12)


def test_steps_by_shape() -> None:
    params = {
        "w": torch.ones(2, 6),
        "k": torch.ones(2, 3, 4),
        "b": torch.ones(9),
        "s": torch.ones(()),
    }
    found, _ = fs.scale_by_shape("spectral").update(params, ())
    expected = {"w": 6**0.5, "k": 12**0.5, "b": 3.0, "s": 1.0}
    assert {k: float(x.flatten()[0]) for k, x in found.items()} == pytest.approx(expected)
    blocks = fs.blocked(fs.scale_by_shape(lambda shape: sum(shape)), max_size=4)
    found, _ = blocks.update(params, blocks.init(params))
    assert found["w"][0].tolist() == [6.0] * 4 + [4.0] * 2


def test_a_decay_after_the_step_needs_the_weights() -> None:
    tx, u = fs.decay_after_step(0.1, 0.1), {"w": torch.ones(1)}
    with pytest.raises(ValueError, match="decay_after_step needs the parameters: pass params"):
        tx.update(u, tx.init(u))


def test_a_decay_after_the_step_shrinks_what_it_made() -> None:
    w, u = {"w": randn(2, 3)}, {"w": randn(2, 3, seed=1)}
    rates = [0.5, 0.25]
    tx = fs.decay_after_step(
        0.3, lambda count: torch.tensor(rates, dtype=D)[count], scale=lambda shape: 2.0
    )
    state = tx.init(w)
    for rate in rates:
        found, state = tx.update(u, state, w)
        expected = (w["w"] + u["w"]) * (1 - 0.3 * rate * 2)
        assert torch.allclose(w["w"] + found["w"], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.blend_towards(fs.sign(), 1.5), "gate is 1.5"),
        (lambda: fs.AgreementGate(agreement=1.0), "agreement is 1.0"),
        (lambda: fs.AgreementGate(agreement=float("-inf")), "agreement is -inf"),
        (lambda: fs.AgreementGate(alignment=1.0), "alignment is 1.0"),
        (lambda: fs.AgreementGate(power=0.0), "power is 0.0"),
        (lambda: fs.AgreementGate(floor=-0.1), "floor is -0.1"),
        (lambda: fs.AgreementGate(cap=1.1), "cap is 1.1"),
        (lambda: fs.AgreementGate(floor=0.6, cap=0.5), "floor is 0.6, above cap, 0.5"),
        (lambda: fs.scale_by_second_moment(1.5), "beta2 is 1.5"),
        (lambda: fs.scale_by_second_moment(epsilon=-1.0), "epsilon is -1.0"),
        (lambda: fs.scale_by_second_moment(exponent=0.0), "exponent is 0.0"),
        (lambda: fs.scale_by_second_moment(exponent={2: -1.0}), "exponent is -1.0"),
        (lambda: fs.scale_by_second_moment(exponent={"2": 0.5}), "an order in exponent is '2'"),  # type: ignore[dict-item]
        (lambda: fs.scale_by_second_moment(exponent=torch.tensor(0.25)), "exponent is a tensor"),  # type: ignore[arg-type]
        (lambda: fs.scale_by_second_moment(damping="x"), "damping is 'x'"),  # type: ignore[arg-type]
        (lambda: fs.scale_by_shape("x"), "scale is 'x'"),  # type: ignore[arg-type]
        (lambda: fs.decay_after_step(-1.0, 0.1), "weight_decay is -1.0"),
        (lambda: fs.decay_after_step(1.0, -0.1), "learning_rate is -0.1"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_gate_is_no_schedule() -> None:
    """It can be called, and stands where a number may."""
    w = {"w": torch.eye(2, dtype=D)}
    plain = fs.soap_muon(0.1, gate=fs.AgreementGate())
    injected = fs.inject_hyperparams(fs.soap_muon)(
        torch.tensor(0.1, dtype=D), gate=fs.AgreementGate()
    )
    found = [tx.update(w, tx.init(w), w)[0]["w"] for tx in (plain, injected)]
    assert torch.allclose(*found, rtol=1e-6)
