"""SOAP's arguments that no published trajectory shows, against a plain model in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo.migrate.published_eigenbases import channels_second
from funshampoo.testing import check_stage
from tests.migrate import plain_soap

STEPS = 9
SOAP = {
    "lr": 0.03,
    "betas": (0.9, 0.95),
    "weight_decay": 0.1,
    "precondition_frequency": 2,
    "max_precond_dim": 10,
}
LAST: dict[str, Any] = {"merge_dims": True, "data_format": "channels_last"}
# Kernels are (out, height, width, in), and merged with their channels second of sides (4, 9, 3),
# (4, 4, 4), (6, 6) and (8, 9). The fourth has one channel, so that both orders are the same. A side
# is at most one longer than the product of the others: a first gradient leaves no null space.
SHAPES = [(4, 3, 3, 3), (2, 4, 4, 2), (2, 3, 2, 3), (8, 3, 3, 1), (2, 4, 7), (7, 8), (2,)]


def gradients(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(STEPS, *shape, generator=generator, dtype=torch.float64)
    return list(base + noise)


def largest_error(args: dict[str, Any], model: dict[str, Any] | None = None) -> list[float]:
    """Of every parameter, relative to its largest update."""
    args = {**SOAP, **args}
    params = {str(i): torch.ones(s).double() for i, s in enumerate(SHAPES)}
    grads = {str(i): gradients(s) for i, s in enumerate(SHAPES)}
    pairs = [(params[n], grads[n]) for n in params]
    wanted = [plain_soap.soap(w, g, {**args, **(model or {})}) for w, g in pairs]
    tx = fs.from_published("SOAP", **args)
    state = tx.init(params)
    errors, largest = [0.0] * len(SHAPES), [0.0] * len(SHAPES)
    for t in range(STEPS):
        updates, state = tx.update({n: g[t] for n, g in grads.items()}, state, params)
        params = fs.apply_updates(params, updates)
        for i, n in enumerate(params):
            errors[i] = max(errors[i], float((params[n] - wanted[i][t]).abs().max()))
            largest[i] = max(largest[i], float(updates[n].abs().max()))
    return [e / size for e, size in zip(errors, largest)]


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"merge_dims": True},
        LAST,
        {**LAST, "max_precond_dim": 6, "precondition_1d": True},
        {"shampoo_beta": 0.0},
        {**LAST, "normalize_grads": True, "correct_bias": False, "precondition_frequency": 1},
    ],
)
def test_agrees_with_the_plain_model(args: dict[str, Any]) -> None:
    assert max(largest_error(args)) < 1e-9


def test_the_format_matters_to_merged_kernels_alone() -> None:
    """The agreement can fail: the other order of a kernel's sides is another method."""
    errors = largest_error(LAST, {"data_format": "channels_first"})
    different = [error > 1e-3 for error in errors]
    assert different == [True, True, True, False, False, False, False]
    plain = {"data_format": "channels_last"}
    assert max(largest_error(plain, {"data_format": "channels_first"})) < 1e-9


def test_channels_last_is_a_stage_like_others() -> None:
    """Pure, resumed, compiled, under vmap, with gradients of None, donated to the same bits."""
    params = {"kernel": torch.ones(2, 4, 4, 2), "bias": torch.ones(3)}
    check_stage(lambda: channels_second(fs.blocked(fs.trace(0.9), 4)), params=params)


def test_its_state_has_the_names_of_the_merged_kernel() -> None:
    params = {"kernel": torch.ones(2, 4, 4, 2).double()}
    saved = fs.state.state_dict(fs.from_published("SOAP", **{**SOAP, **LAST}).init(params))
    factors = [x for name, x in saved.items() if "factors" in name]
    assert [tuple(x.shape) for x in factors] == [(4, 4)] * 3
    plain = fs.from_published("SOAP", **{**SOAP, "max_precond_dim": 4})
    assert set(saved) == set(fs.state.state_dict(plain.init({"kernel": torch.ones(4, 4, 4)})))


def test_a_held_block_keeps_the_statistics_of_its_last_gradient() -> None:
    """With shampoo_beta=0 nothing else is in them."""
    tx = fs.from_published("SOAP", **{**SOAP, "shampoo_beta": 0.0})
    good, *later = [{"w": g} for g in gradients((7, 8))]
    params = {"w": torch.ones(7, 8).double()}
    _, state = tx.update(good, tx.init(params), params)
    bad = {"w": torch.full((7, 8), torch.nan).double()}
    updates, held = tx.update(bad, state, params)
    assert not updates["w"].any()
    before, after = [fs.state.state_dict(x) for x in (state, held)]
    factors = [name for name in before if "factors" in name]
    assert len(factors) == 2
    for name in factors:
        assert torch.equal(before[name], after[name])
        assert before[name].any()
    for g in later[:3]:
        updates, held = tx.update(g, held, params)
        assert updates["w"].isfinite().all()
        assert updates["w"].any()
