"""recipes.from_reference against trajectories of the reference implementation, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import funshampoo as fs

DATA = torch.load(Path(__file__).parents[1] / "reference" / "reference.pt", weights_only=True)
BUILT = sorted(DATA["configs"])


def _corrected(**fields: Any) -> dict[str, Any]:
    kind = "EigenvalueCorrectedShampooPreconditionerConfig"
    return {"preconditioner_config": {"type": kind, **fields}}


def _orthogonalized(**fields: Any) -> dict[str, Any]:
    config = {"type": "NewtonSchulzOrthogonalizationConfig", **fields}
    kind = "SpectralDescentPreconditionerConfig"
    return {"preconditioner_config": {"type": kind, "orthogonalization_config": config}}


def _averaged(kind: str, **fields: Any) -> dict[str, Any]:
    own: dict[str, Any] = {"train_interp_coeff": 0.75}
    if kind == "GeneralizedPrimalAveraging":
        own["eval_interp_coeff"] = 0.875
    return {"iterate_averaging_config": {"type": f"{kind}Config", **own, **fields}}


def make(config: dict[str, Any], **changes: Any) -> fs.GradientTransformation:
    args = {**config["args"], **changes}
    rates = config["lr_schedule"]
    if rates is not None:
        args["lr"] = lambda count: torch.tensor(rates, dtype=torch.float64)[count]
    return fs.from_reference(**args)


def largest_deviation(
    config: dict[str, Any], tx: fs.GradientTransformation, enough: float = torch.inf
) -> float:
    """From the reference's parameters, relative to the largest update; over all steps, or to where
    it is above `enough`."""
    problem = DATA["problems"][config["problem"]]
    params = list(problem["params0"])
    state = tx.init(params)
    deviation, largest_update = 0.0, 0.0
    for t in range(DATA["meta"]["steps"]):
        grads: list[Any] = [g.double() for g in problem["grads"][t]]
        for absent in config["grad_none"].get(t + 1, []):
            grads[absent] = None
        updates, state = tx.update(grads, state, params)
        params = fs.apply_updates(params, updates)
        for p, u, trajectory in zip(params, updates, config["params"]):
            deviation = max(deviation, float((p - trajectory[t]).abs().max()))
            largest_update = max(largest_update, float(u.abs().max()) if u is not None else 0.0)
        if deviation > enough * largest_update:
            break
    return deviation / largest_update


def test_the_gradients_of_the_golden_problems_are_not_trivial() -> None:
    for problem in DATA["problems"].values():
        for g in (g for step in problem["grads"] for g in step):
            assert g.abs().max() > 1e-3
        first, second = problem["grads"][0], problem["grads"][1]
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(first, second))


@pytest.mark.parametrize("name", BUILT)
def test_agrees_with_the_reference(name: str) -> None:
    config = DATA["configs"][name]
    bound = max(1e-9, 1000 * config["sensitivity"])
    assert largest_deviation(config, make(config)) <= bound


@pytest.mark.parametrize("name", ["block16_merge", "kl_root", "trace_scaling"])
def test_agreement_does_not_depend_on_flooring(name: str) -> None:
    """The reference shifts the spectrum, which full-rank statistics don't show (an option here)."""
    config = DATA["configs"][name]
    bound = max(1e-9, 1000 * config["sensitivity"])
    assert largest_deviation(config, make(config, floor=False)) <= bound


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("adam_b1_09_decoupled", {"weight_decay": 0.13}),
        ("adam_b1_09_decoupled", {"weight_decay_type": "INDEPENDENT"}),
        ("adam_b1_09_decoupled", {"epsilon": 1.1e-4}),
        ("sgd_b1_09", {"betas": (0.9, 0.98)}),
        ("adam_beta3", {"beta3": 0.8}),
        ("momentum_nesterov_damp", {"use_bias_correction": False}),
        ("adagrad_f5", {"precondition_frequency": 4}),
        ("rmsprop_f5_start7", {"start_preconditioning_step": 8}),
        ("block16_merge", {"max_preconditioner_dim": 15}),
        ("merge_dim2", {"target_parameter_dimensionality": 1}),
        ("adam_corrected_wd_sched", {"peak_lr": 0.02}),
        ("kl_root", {"epsilon": 1.1e-4}),
        ("kl_root", {"preconditioner_config": None}),
        ("evc_eigh", {"epsilon": 1e-4}),
        ("evc_eigh", {"betas": (0.9, 0.98)}),
        ("evc_eigh", {"use_bias_correction": False}),
        ("evc_eigh", {"precondition_frequency": 2}),
        ("evc_ignored_dims", {"start_preconditioning_step": 9}),
        ("evc_ignored_dims", _corrected()),
        ("evc_ignored_dims", _corrected(ignored_basis_change_dims={2: [0]})),
        ("evc_ignored_dims", _corrected(inverse_exponent_override={3: 0.4})),
        ("evc_eigh", {"grafting_config": {"type": "SGDPreconditionerConfig"}}),
        ("spectral", _orthogonalized(num_iterations=6)),
        ("spectral", _orthogonalized(coefficients=(2.0, -1.5, 0.5))),
        ("gpa", {"weight_decay_type": "INDEPENDENT"}),
        ("gpa", {"weight_decay_type": "L2"}),
        ("gpa", _averaged("GeneralizedPrimalAveraging", eval_interp_coeff=0.8)),
        ("gpa", _averaged("GeneralizedPrimalAveraging", train_interp_coeff=0.8)),
        ("gpa", {"as_published": False}),
        ("schedule_free", _averaged("ScheduleFree", train_interp_coeff=0.8)),
        ("schedule_free", _averaged("ScheduleFree", eval_coeff_lr_power=1)),
        ("schedule_free", {"weight_decay": 0.12}),
        ("schedule_free", {"as_published": False}),
    ],
)
def test_every_argument_reaches_the_chain(name: str, change: dict[str, Any]) -> None:
    """The agreement above can fail: a changed argument breaks it."""
    config = DATA["configs"][name]
    assert largest_deviation(config, make(config, **change), 1e-6) > 1e-6


@pytest.mark.parametrize("name", ["gpa", "schedule_free"])
def test_the_weights_to_evaluate_with(name: str) -> None:
    """The reference finds them from y and z with coefficients in float32, so 1e-6 and no less."""
    config = DATA["configs"][name]
    problem = DATA["problems"][config["problem"]]
    tx, params = make(config), list(problem["params0"])
    state, seen = tx.init(params), 0
    for t in range(DATA["meta"]["steps"]):
        updates, state = tx.update([g.double() for g in problem["grads"][t]], state, params)
        params = fs.apply_updates(params, updates)
        for found, wanted in zip(
            fs.evaluation_parameters(state, params), config["eval_params"].get(t + 1, ())
        ):
            seen += 1
            assert torch.allclose(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    assert seen == 2 * len(params)


@pytest.mark.parametrize(("name", "bound"), [("gpa", 1e-11), ("schedule_free", 1e-6)])
def test_without_decay_the_averages_are_the_papers(name: str, bound: float) -> None:
    """Up to the rounding of Schedule-Free's coefficients; with it, as above, they are not."""
    config = DATA["configs"][name]
    problem = DATA["problems"][config["problem"]]
    ends = []
    for as_published in (True, False):
        tx = make(config, weight_decay=0.0, as_published=as_published)
        params = list(problem["params0"])
        state = tx.init(params)
        for grads in problem["grads"]:
            updates, state = tx.update([g.double() for g in grads], state, params)
            params = fs.apply_updates(params, updates)
        ends.append([*params, *fs.evaluation_parameters(state, params)])
    for a, b in zip(*ends):
        assert (a - b).abs().max() <= bound


def test_a_rate_of_zero_on_the_first_step_moves_nothing() -> None:
    config = DATA["configs"]["schedule_free"]
    args = {**config["args"], "lr": lambda count: 0.1 * (count > 0)}
    tx = fs.from_reference(**args)
    params = [torch.ones(2, 3, dtype=torch.float64)]
    updates, state = tx.update(params, tx.init(params), params)
    assert not updates[0].any()
    assert torch.equal(fs.evaluation_parameters(state, params)[0], params[0])


def test_what_may_be_grafted_onto_may_be_the_whole_method() -> None:
    config = {"type": "AdamPreconditionerConfig", "beta2": 0.97, "epsilon": 1e-6}
    tx = fs.from_reference(lr=0.1, betas=(0.8, 1.0), preconditioner_config=config)
    w = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.1, betas=(0.8, 0.97), eps=1e-6)
    params, generator = {"w": w.detach().clone()}, torch.Generator().manual_seed(0)
    state = tx.init(params)
    for _ in range(4):
        w.grad = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        updates, state = tx.update({"w": w.grad.clone()}, state, params)
        params = fs.apply_updates(params, updates)
        adam.step()
    assert torch.allclose(params["w"], w.detach(), rtol=1e-12)


def _both(changes: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of two argument lists on the same gradients."""
    problem = DATA["problems"]["matrix"]
    final = []
    for args in (changes, other):
        tx = fs.from_reference(**{"lr": 0.1, "betas": (0.9, 0.99), "epsilon": 1e-4, **args})
        params = list(problem["params0"])
        state = tx.init(params)
        for grads in problem["grads"]:
            updates, state = tx.update([g.double() for g in grads], state, params)
            params = fs.apply_updates(params, updates)
        final.append(params)
    return max(float((a - b).abs().max()) for a, b in zip(*final))


def _root(amortized: dict[str, Any], **more: Any) -> dict[str, Any]:
    config = {
        "type": "RootInvShampooPreconditionerConfig",
        "amortized_computation_config": amortized,
        **more,
    }
    return {"preconditioner_config": config}


def _perturbation(**fields: Any) -> dict[str, Any]:
    return {
        "type": "EigenConfig",
        "rank_deficient_stability_config": {"type": "PerturbationConfig", **fields},
    }


@pytest.mark.parametrize(
    ("args", "same"),
    [
        ({"preconditioner_config": {"type": "EigendecomposedShampooPreconditionerConfig"}}, {}),
        (
            {"preconditioner_config": {"type": "EigendecomposedKLShampooPreconditionerConfig"}},
            {"preconditioner_config": {"type": "RootInvKLShampooPreconditionerConfig"}},
        ),
        (_root(_perturbation(perturb_before_computation=False)), {}),
        (_root({"type": "CoupledNewtonConfig", "max_iterations": 500, "tolerance": 1e-12}), {}),
        (
            _root(
                {
                    "type": "CoupledHigherOrderConfig",
                    "rel_epsilon": 0.0,
                    "abs_epsilon": 1e-4,
                    "tolerance": 1e-12,
                }
            ),
            {"epsilon": 1e-4},
        ),
        ({"max_preconditioner_dim": "inf"}, {"max_preconditioner_dim": 1 << 20}),
        (
            {"target_parameter_dimensionality": float("inf")},
            {"target_parameter_dimensionality": "inf"},
        ),
        ({"start_preconditioning_step": -1}, {"start_preconditioning_step": 1}),
        ({"beta3": -1.0}, {"beta3": 0.9}),
    ],
    ids=lambda value: "",
)
def test_arguments_that_mean_the_same(args: dict[str, Any], same: dict[str, Any]) -> None:
    assert _both(args, same) < 1e-9


def test_higher_order_ignores_the_optimizers_epsilon() -> None:
    config = {"type": "CoupledHigherOrderConfig", "rel_epsilon": 1e-3, "abs_epsilon": 0.0}
    assert _both(_root(config), {**_root(config), "epsilon": 1.0}) == 0.0
    assert _both(_root(config), {"epsilon": 1e-3}) > 1e-6


def test_dropping_the_weighting_factor_is_a_plain_decayed_sum() -> None:
    """V ← beta2 V + G², no correction: RMSprop's direction scaled by √(1 - beta2) before it."""
    dropped = {
        "type": "AdamPreconditionerConfig",
        "beta2": 0.75,
        "epsilon": 1e-30,
        "drop_weighting_factor_on_gsquare": True,
    }
    plain = {"type": "RMSpropPreconditionerConfig", "beta2": 0.75, "epsilon": 1e-30}
    ratio = (1 - 0.75) ** 0.5
    assert (
        _both({"grafting_config": dropped}, {"grafting_config": plain, "lr": 0.1 * ratio}) < 1e-12
    )


def test_dropping_the_weighting_factor_of_the_statistics() -> None:
    """L ← beta2 L + G Gᵀ is 1/(1 - beta2) times the average: a root -1/4 a side scales by √."""
    config = {
        "type": "RootInvShampooPreconditionerConfig",
        "drop_weighting_factor_on_gsquare": True,
    }
    dropped = {"betas": (0.9, 0.75), "epsilon": 4e-4, "preconditioner_config": config}
    dropped |= {"target_parameter_dimensionality": 2}
    average = {"betas": (0.9, 0.75), "epsilon": 1e-4, "target_parameter_dimensionality": 2}
    steps_in = 90  # after which 1 - beta2^t is 1 - 6e-12
    problem = DATA["problems"]["matrix"]
    ends = []
    for args in ({"lr": 0.1, **dropped}, {"lr": 0.05, **average}):
        tx = fs.from_reference(**args)
        params = list(problem["params0"])
        state = tx.init(params)
        for t in range(steps_in):
            grads = [g.double() for g in problem["grads"][t % 20]]
            updates, state = tx.update(grads, state, params)
        ends.append(updates)
    for a, b in zip(*ends):
        assert torch.allclose(a, b, rtol=1e-9, atol=0)


def test_bias_correction_by_everyones_steps_or_ones_own() -> None:
    """Where we differ on purpose: group_steps=False counts each parameter's own gradients."""
    args = {"lr": 0.1, "betas": (0.9, 0.99), "epsilon": 1e-4, "target_parameter_dimensionality": 2}
    params = {"early": torch.zeros(2, 2), "late": torch.zeros(2, 2)}
    g = torch.tensor([[1.0, 0.5], [0.0, 2.0]])
    first_steps = {}
    for group_steps in (True, False):
        tx = fs.from_reference(**args, group_steps=group_steps)
        state = tx.init(params)
        for _ in range(9):
            _, state = tx.update({"early": g, "late": None}, state, params)
        updates, _ = tx.update({"early": g, "late": g}, state, params)
        first_steps[group_steps] = updates
    early = first_steps[True]["early"]
    assert torch.allclose(first_steps[False]["late"], early, rtol=1e-4)  # as if from its start
    assert not torch.allclose(first_steps[True]["late"], early, rtol=0.1)
    # by hand: the average of the first gradient, divided by what ten steps would have given
    m = 0.1 / (1 - 0.9**10)
    a = torch.linalg.eigh(0.01 / (1 - 0.99**10) * g @ g.T + 1e-4 * torch.eye(2))
    b = torch.linalg.eigh(0.01 / (1 - 0.99**10) * g.T @ g + 1e-4 * torch.eye(2))
    left, right = ((q * lam**-0.25) @ q.T for lam, q in (a, b))
    expected = -0.1 * left @ (m * g) @ right
    assert torch.allclose(first_steps[True]["late"], expected, rtol=1e-4)


EIGENDECOMPOSED = "EigendecomposedShampooPreconditionerConfig"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"preconditioner_config": {"type": EIGENDECOMPOSED}}, [3.0, 4.0]),
        # λ = 1 is stored, and stabilized at every step: (1 + ε)^(-1/2) before the first refresh
        (
            {
                "preconditioner_config": {
                    "type": EIGENDECOMPOSED,
                    "amortized_computation_config": {
                        **_perturbation(perturb_before_computation=False),
                        "type": "EighEigendecompositionConfig",
                    },
                }
            },
            [3 / 1.1**0.5, 4 / 1.1**0.5],
        ),
        ({"start_preconditioning_step": "inf"}, [3.0, 4.0]),
        # a pseudo-inverse that drops every eigenvalue (25 ≤ 30) is zero
        (
            {
                "epsilon": 0.0,
                "precondition_frequency": 1,
                **_root(
                    {
                        "type": "EigenConfig",
                        "rank_deficient_stability_config": {
                            "type": "PseudoInverseConfig",
                            "rank_atol": 30.0,
                        },
                    }
                ),
            },
            [0.0, 0.0],
        ),
    ],
    ids=["eigendecomposed", "perturbed_after", "never", "nothing_left"],
)
def test_a_first_step_by_hand(args: dict[str, Any], expected: list[float]) -> None:
    base = {"lr": 1.0, "betas": (0.0, 1.0), "epsilon": 0.1, "precondition_frequency": 2}
    tx = fs.from_reference(**{**base, **args})
    params = [torch.zeros(2, dtype=torch.float64)]
    g = [torch.tensor([3.0, 4.0], dtype=torch.float64)]
    updates, _ = tx.update(g, tx.init(params), params)
    assert (-updates[0]).tolist() == pytest.approx(expected, abs=1e-12)


def test_arguments_about_where_and_how_it_runs_are_accepted() -> None:
    distributed = {"type": "DDPDistributedConfig", "target_parameter_dimensionality": 2}
    args = {"distributed_config": distributed, "use_pin_memory": False}
    assert _both(args, {"target_parameter_dimensionality": 2}) == 0
    assert _both(args, {"target_parameter_dimensionality": 1}) > 1e-3


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"start_preconditioning_step": 0}, ValueError, "start_preconditioning_step is 0"),
        ({"weight_decay_type": "L1"}, ValueError, "weight_decay_type is 'L1'"),
        ({"grafting_config": {"type": "Lion"}}, NotImplementedError, "Lion is not built"),
        (
            {"grafting_config": {"type": "AdamPreconditionerConfig", "beta": 1}},
            TypeError,
            "AdamPreconditionerConfig has no field 'beta'",
        ),
        (
            {"grafting_config": {"type": "RMSpropPreconditionerConfig", "beta2": 1.0}},
            ValueError,
            "AdaGradPreconditionerConfig is the plain sum",
        ),
        ({"start_preconditioning_step": 2.5}, ValueError, "step is 2.5; it must be an int"),
        ({"max_preconditioner_dim": "x"}, ValueError, "dim is 'x'; it must be an int"),
        ({"grafting_config": "Adam"}, TypeError, "grafting_config is a str; write it as"),
        (
            {"preconditioner_config": {"type": EIGENDECOMPOSED, "inverse_exponent_override": 0.5}},
            TypeError,
            "inverse_exponent_override is 0.5; write it as",
        ),
        (_corrected(ignored_basis_change_dims={"2": [0]}), TypeError, "dims is .* write it as"),
        (_root(_perturbation(perturb_before_computation="no")), TypeError, "computation is 'no'"),
        (
            {"iterate_averaging_config": {"type": "ClassicMomentumConfig", "use_nesterov": "no"}},
            TypeError,
            "use_nesterov is 'no'; expected True or False",
        ),
        # What the reference has no meaning for
        (
            _root({"type": "QREigendecompositionConfig"}),
            ValueError,
            "QREigen.* which a root that is kept does not have.* give Eigendecomposed",
        ),
        (
            _root({"type": "EighEigendecompositionConfig", "tolerance": 0.1}),
            ValueError,
            "EighEigen.* which a root that is kept does not have",
        ),
        (
            _root({"type": "EigenConfig", "tolerance": 0.1}),
            ValueError,
            "tolerance is 0.1; EigenConfig wants 0",
        ),
        (
            _corrected(
                amortized_computation_config={
                    "type": "QREigendecompositionConfig",
                    "tolerance": 1.5,
                }
            ),
            ValueError,
            "tolerance is 1.5",
        ),
        (
            _corrected(
                amortized_computation_config={
                    "type": "EighEigendecompositionConfig",
                    "rank_deficient_stability_config": {"type": "PseudoInverseConfig"},
                }
            ),
            ValueError,
            "PseudoInverseConfig is none for eigenvalue-corrected",
        ),
        (
            _root(
                {
                    "type": "EigenConfig",
                    "rank_deficient_stability_config": {"type": "PseudoInverseConfig"},
                }
            ),
            ValueError,
            "epsilon is 1e-12; PseudoInverseConfig wants 0",
        ),
        ({"betas": (1.0, 0.9)}, ValueError, "beta1 is 1.0"),
        ({"epsilon": 0.0}, ValueError, "epsilon is 0.0; without PseudoInverseConfig"),
        ({"max_preconditioner_dim": 2.5}, ValueError, "max_preconditioner_dim is 2.5"),
        ({"target_parameter_dimensionality": 0}, ValueError, "dimensionality is 0"),
        (
            {"iterate_averaging_config": {"type": "ClassicMomentumConfig", "momentum": 1.5}},
            ValueError,
            "momentum is 1.5",
        ),
        (_root({"type": "CoupledHigherOrderConfig"}), TypeError, "needs rel_epsilon"),
        (
            _corrected(amortized_computation_config={"type": "CoupledNewtonConfig"}),
            NotImplementedError,
            "CoupledNewtonConfig is not built here",
        ),
        (
            _corrected(ignored_basis_change_dims={2: [2]}),
            ValueError,
            r"ignored_basis_change_dims\[2\] has 2, which a block of 2 sides does not have",
        ),
        (_corrected(inverse_exponent_override={2: 0.0}), ValueError, "exponent is 0.0"),
        (_corrected(ignored=1), TypeError, "has no field 'ignored'"),
        (_averaged("ScheduleFree", train_interp_coeff=0.0), ValueError, "interp_coeff is 0.0"),
        (_averaged("ScheduleFree", eval_interp_coeff=0.5), TypeError, "no field 'eval_interp"),
        (
            _averaged("GeneralizedPrimalAveraging", eval_interp_coeff=1.0),
            ValueError,
            "eval_interp_coeff is 1.0",
        ),
        ({"learning_rate": 0.1}, TypeError, "unexpected argument 'learning_rate'"),
        ({"epsilon": -1.0}, ValueError, "epsilon is -1.0"),
        ({"betas": 0.9}, ValueError, "betas is 0.9; it must have 2 entries"),
    ],
    ids=lambda value: "",
)
def test_bad_arguments(args: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fs.from_reference(**args)


def _grafted(**config: Any) -> dict[str, Any]:
    return {"grafting_config": config}


_EIGH = {"type": "EighEigendecompositionConfig"}


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (lambda: fs.from_reference(weight_decy=0.1), "weight_decay"),
        (lambda: fs.from_reference(use_pinned_memory=True), "use_pin_memory"),
        (
            lambda: fs.from_reference(distributed_config={"target_parameter_dimensionalty": 2}),
            "target_parameter_dimensionality",
        ),
        (
            lambda: fs.from_reference(**_grafted(type="AdamPrecondtionerConfig")),
            "AdamPreconditionerConfig",
        ),
        (
            lambda: fs.from_reference(**_grafted(type="AdamPreconditionerConfig", beta=0.9)),
            "beta2",
        ),
        (lambda: fs.from_reference(**_corrected(use_symmetric_packng=1)), "use_symmetric_packing"),
        (
            lambda: fs.from_reference(
                **_root({**_EIGH, "rank_deficient_stability_config": {"type": "PerturbConfig"}})
            ),
            "PerturbationConfig",
        ),
        (lambda: fs.from_reference(**_averaged("ScheduleFree", train_coeff=0.5)), "train_interp"),
        (lambda: fs.from_published("SOAPP"), "SOAP"),
        (lambda: fs.from_published("SOAP", precond_frequency=1), "precondition_frequency"),
        (lambda: fs.from_published("SOAP-Muon", lookahead={"rest_step": 3}), "rest_steps"),
    ],
)
def test_a_misspelt_name_is_an_error_with_the_nearest_one(
    call: Callable[[], Any], meant: str
) -> None:
    with pytest.raises(Exception, match=f"; did you mean '{meant}.*'\\?$"):
        call()


def test_a_config_is_a_mapping() -> None:
    """Their own classes are not, on any level."""
    for args in (
        {"distributed_config": object()},
        {"grafting_config": object()},
        {"iterate_averaging_config": object()},
        {"preconditioner_config": object()},
        _root(object()),  # type: ignore[arg-type]
        _corrected(amortized_computation_config={**_EIGH, "rank_deficient_stability_config": 1}),
    ):
        with pytest.raises(TypeError, match=r"_config is a (object|int); write it as \{\"type\""):
            fs.from_reference(**args)
