"""from_published against trajectories of the published implementations, in float64."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.core.live import Live
from funshampoo.linalg.polynomials import polynomials_of
from funshampoo.migrate import published_soap_muon
from funshampoo.migrate.published import METHODS
from funshampoo.optim.vocabulary import Vocabulary

DATA = torch.load(Path(__file__).parents[1] / "reference" / "family.pt", weights_only=True)
BUILT = sorted(name for name, config in DATA["configs"].items() if config["method"] in METHODS)


def make(config: dict[str, Any], **changes: Any) -> fs.GradientTransformation:
    args = {**config["args"], **changes}
    rates = config["lr_schedule"]
    if rates is not None:
        args["lr"] = lambda count: torch.tensor(rates, dtype=torch.float64)[count]
    return fs.from_published(config["method"], **args)


def largest_deviation(
    config: dict[str, Any], tx: fs.GradientTransformation, enough: float = torch.inf
) -> float:
    """From the published parameters and those to evaluate with, relative to the largest update;
    over all steps, or to where it is above `enough`.

    Of EMA-Nesterov the parameters are where the next gradient is taken, and the published ones
    those that it is looked ahead from.
    """
    ahead = "lookahead" in config["args"]
    problem = DATA["problems"][config["problem"]]
    params = list(problem["params0"])
    state = tx.init(params)
    deviation = 0.0
    for t in range(len(problem["grads"][0])):
        grads = [g[t].double() for g in problem["grads"]]
        pairs = list(zip(params, config["eval_params"])) if ahead else []
        updates, state = tx.update(grads, state, params)
        params = fs.apply_updates(params, updates)
        if ahead:
            pairs += zip(fs.evaluation_parameters(state, params), config["params"])
        else:
            pairs = list(zip(params, config["params"]))
        if config["eval_params"] is not None and not ahead:
            pairs += zip(fs.evaluation_parameters(state, params), config["eval_params"])
        for p, trajectory in pairs:
            deviation = max(
                deviation, float((p - trajectory[t]).abs().max()) / config["max_update"]
            )
        if deviation > enough:
            break
    return deviation


def test_every_method_that_is_built_has_a_run() -> None:
    assert {DATA["configs"][name]["method"] for name in BUILT} == set(METHODS)


@pytest.mark.parametrize("name", BUILT)
def test_agrees_with_what_was_published(name: str) -> None:
    config = DATA["configs"][name]
    bound = max(1e-9, 1000 * config["sensitivity"])
    assert largest_deviation(config, make(config)) <= bound


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("muon_keller", {"momentum": 0.94}),
        ("muon_keller", {"nesterov": False}),
        ("muon_keller", {"as_published": False}),  # the scale of kernels, a fact of the source
        ("muon_keller_opts", {"ns_steps": 6}),
        ("muon_torch", {"eps": 10.0}),
        ("muon_torch", {"adjust_lr_fn": "match_rms_adamw"}),
        ("muon_torch_rms", {"ns_coefficients": (2.0, -1.5, 0.51)}),
        ("normuon_spectral", {"muon_beta2": 0.94}),
        ("normuon_spectral", {"epsilon": 1e-3}),
        ("normuon_rms_cautious", {"cautious_wd": False}),
        ("normuon_ns5", {"use_polar_express": True}),
        ("nv_muon_coeffs", {"num_ns_steps": 6}),
        ("nv_muon_coeffs", {"extra_scale_factor": 0.3}),
        ("nv_muon_coeffs", {"weight_decay_method": "independent"}),
        ("nv_muon_coeffs", {"weight_decay_method": "l2"}),
        ("nv_muon_cycle", {"scale_mode": "unit_rms_norm"}),
        ("sf_adamw_warmup", {"warmup_steps": 5}),
        ("sf_adamw_warmup", {"weight_decay": 0.06}),
        ("sf_adamw_r0", {"r": 0.1}),
        ("sf_adamw_inner", {"inner_momentum": 0.0}),
        ("sf_adamw_inner", {"weight_lr_power": 2.0}),
        ("sf_sgd", {"momentum": 0.8}),
        ("sf_radam", {"silent_sgd_phase": False}),
        ("sf_radam", {"eps": 1e-3}),
        ("kl_shampoo_freq5", {"init_factor": 0.1}),
        ("kl_shampoo_freq3", {"using_damping": False}),
        ("kl_soap_freq5", {"precondition_frequency": 4}),
        ("klsoaph", {"beta1": 0.8}),
        ("klsoaph", {"shampoo_beta": 0.8}),
        ("klsoaph", {"precondition_frequency": 2}),
        ("nv_rekls", {"eps": 0.02}),
        ("nv_klsoap", {"shampoo_beta": 0.7}),
        ("nv_soap", {"nesterov": False}),
        ("splus_freq3", {"b1": 0.8}),
        ("splus_freq3", {"b2": 0.5}),
        ("splus_freq3", {"ema_rate": 0.8}),
        ("splus_freq3", {"inverse_every": 2}),
        ("splus_freq3", {"weight_decay": 0.02}),
        ("splus_maxdim", {"max_dim": 10}),  # the side of 9 is kept then
        ("splus_maxdim", {"nonstandard_constant": 0.021}),
        ("soap_muon", {"mu_schedule": None}),
        ("soap_muon", {"target_uw": 0.3}),
        ("soap_muon", {"soap_beta2": 0.8}),
        ("soap_muon", {"soap_frequency": 2}),
        ("soap_muon", {"denom_power": 0.4}),
        ("soap_muon", {"radial_outward_scale": 0.6}),
        ("soap_muon", {"radial_inward_scale": 0.9}),
        ("soap_muon", {"trust_floor": 0.5}),
        ("soap_muon", {"trust_cap": 0.5}),
        ("soap_muon_lookahead", {"trust_min_agree": 0.3}),
        ("soap_muon_lookahead", {"trust_min_grad_align": 0.1}),
        ("soap_muon_lookahead", {"trust_power": 2.0}),
        ("soap_muon", {"trust_floor_end_step": 0}),
        ("soap_muon_lookahead", {"roles": "mlp"}),
        ("soap_muon_lookahead", {"initial_lr": 0.03}),
    ],
)
def test_every_argument_reaches_the_chain(name: str, change: dict[str, Any]) -> None:
    """The agreement above can fail: a changed argument breaks it."""
    config = DATA["configs"][name]
    assert largest_deviation(config, make(config, **change), 1e-6) > 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_out_has_a_default(method: str) -> None:
    params = {"w": torch.ones(3, 4)}
    tx = fs.from_published(method)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].isfinite().all()


KNOWN = {method: inspect.signature(METHODS[method]).parameters for method in METHODS}
FIRST_DECAYS = {
    method: next(
        n for n in ("inner_momentum", "mu", "betas", "beta1", "b1", "momentum") if n in known
    )
    for method, known in KNOWN.items()
    if method not in ("SGDScheduleFree", "RAdamScheduleFree")  # which have no first moment
}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("method", FIRST_DECAYS)
def test_no_first_moment_is_the_limit_of_a_short_one(method: str, nesterov: bool) -> None:
    known, decay = KNOWN[method], FIRST_DECAYS[method]
    if nesterov and "nesterov" not in known:
        pytest.skip("it has no such argument")
    args: dict[str, Any] = {"lr": 0.02, **({"nesterov": True} if nesterov else {})}
    if "eps" in known:
        args["eps"] = 0.1  # what is 0 but for rounding would be scaled up, as in NVIDIA's SOAP
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(5, 1, 6, 6, generator=generator, dtype=torch.float64)
    ends = []
    for beta in (0.0, 1e-14):
        tx = fs.from_published(method, **args, **{decay: (beta, 0.9) if decay == "betas" else beta})
        params = [steps[0, 0]]
        state = tx.init(params)
        for g in steps:
            updates, state = tx.update(list(g), state, params)
            params = fs.apply_updates(params, updates)
        ends.append(params[0])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lookahead_stepsize", 0.2),
        ("use_scheduled_lookahead_stepsize", False),
        ("lookahead_ema", 0.8),
        ("prefill_steps", 2),
        ("rest_steps", 11),
    ],
)
def test_every_field_of_the_look_ahead_reaches_the_chain(field: str, value: Any) -> None:
    config = DATA["configs"]["soap_muon_lookahead"]
    changed = {**config["args"]["lookahead"], field: value}
    assert largest_deviation(config, make(config, lookahead=changed), 1e-6) > 1e-6


def test_the_gate_is_held_up_and_then_let_go_of() -> None:
    floor, cap = published_soap_muon.trust(0.5, 0.75, 2, 4)
    steps = torch.arange(6)
    assert [float(floor(t)) for t in steps] == [0.5, 0.5, 0.5, 0.25, 0.0, 0.0]
    assert [float(cap(t)) for t in steps] == [0.75, 0.75, 0.75, 0.75, 1.0, 1.0]


def test_roles_go_with_the_leaves_or_with_a_tree() -> None:
    params = {"b": torch.eye(3) * 2, "a": torch.ones(3, 3)}
    found = []
    for roles in (["plain", "qkv"], {"a": "plain", "b": "qkv"}, {"a": "plain", "b": "mlp"}):
        tx = fs.from_published("SOAP-Muon", roles=roles)
        state = tx.init(params)
        for step in range(3):
            grads = {
                name: p + torch.arange(9.0).view(3, 3).sin() * step for name, p in params.items()
            }
            updates, state = tx.update(grads, state, params)
        found.append(updates)
    for updates in found[1:]:
        assert all(torch.equal(updates[name], found[0][name]) for name in params)
    with pytest.raises(ValueError, match="roles has 1 entry for 2 parameters"):
        fs.from_published("SOAP-Muon", roles=["mlp"]).init(params)
    with pytest.raises(ValueError, match="roles is 'mpl'; choose one of 'mlp'"):
        fs.from_published("SOAP-Muon", roles="mpl").init(params)


def test_independent_decay_does_not_know_the_rate() -> None:
    params = {"w": torch.ones(3, 4, dtype=torch.float64)}
    tx = fs.from_published(
        "Muon (Emerging-Optimizers)", lr=0.0, weight_decay=0.1, weight_decay_method="independent"
    )
    updates, _ = tx.update(params, tx.init(params), params)
    assert torch.allclose(updates["w"], -0.1 * params["w"])


def test_experts_of_three_sides_are_stacks_where_the_sources_stack_them() -> None:
    w = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for method in ("Muon", "NorMuon"):
        tx = fs.from_published(method, lr=0.1)
        stacked, _ = tx.update({"w": w}, tx.init({"w": w}), {"w": w})
        alone = {str(i): x for i, x in enumerate(w)}
        parts, _ = tx.update(alone, tx.init(alone), alone)
        for i, x in enumerate(stacked["w"]):
            assert torch.allclose(x, parts[str(i)], rtol=1e-12)


def test_a_flattened_kernel_is_one_matrix_for_normuon() -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(6, 2, 3, 1, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0, "muon_beta2": 0.0}
    for flat in (True, False):
        tx = fs.from_published("NorMuon", flatten=flat, **options)
        updates, _ = tx.update({"w": kernel}, tx.init({"w": kernel}), {"w": kernel})
        # √(6/6), or for each of 6·2 matrices of 3×1
        assert float(updates["w"].norm()) == pytest.approx(
            0.1 * (6**0.5 if flat else 3**0.5 * 12**0.5), rel=0.1
        )


def _normuon_of_stack(grads: list[torch.Tensor], flat: bool) -> list[torch.Tensor]:
    """The first step of dion's NorMuon for parameters of one shape, without decay, lr 1.

    `flat`: as its `flatten` does it, which is asked for the stack (N, r, c) and so makes N rows of
    whole parameters of it, where it is meant for the sides of a kernel.
    """
    X = torch.stack(grads)
    shape = X.shape
    X = X.flatten(1) if flat else X
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    X = X / (1.02 * X.norm(dim=(-2, -1), keepdim=True) + 1e-8)
    for a, b, c in polynomials_of("polar_express", None):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    found = []
    for polar in (X.mT if tall else X).reshape(shape):
        N = polar / ((0.05 * polar.square().mean(-1, keepdim=True)).sqrt() + 1e-8)
        found.append(-((shape[1] / shape[2]) ** 0.5) * N * polar.norm() / N.norm())
    return found


def test_flatten_does_not_mix_parameters_of_one_shape_as_the_source_does() -> None:
    """A bug of the source, not matched: what it makes depends on who has the same shape.

    Of two 6x9 matrices it orthogonalizes the 2x54 matrix of both, so that a parameter's step is
    about its gradient, with that of the other one taken out, and none of its singular values are
    alike. Here `flatten` does to several matrices what it does to one alone: nothing.
    """
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2)]
    tx = fs.from_published("NorMuon", lr=1.0, weight_decay=0.0, flatten=True)
    ours, _ = tx.update(grads, tx.init(grads), grads)
    for u, right, mixed in zip(
        ours, _normuon_of_stack(grads, flat=False), _normuon_of_stack(grads, flat=True)
    ):
        torch.testing.assert_close(u, right, rtol=1e-10, atol=1e-10)
        values, theirs = [torch.linalg.svdvals(x) for x in (u, mixed)]
        assert values[0] < 1.5 * values[-1]
        assert theirs[0] > 3 * theirs[-1]
    twins = [grads[0], grads[0] + 0.1 * grads[1]]
    with_twin, _ = tx.update(twins, tx.init(twins), twins)
    torch.testing.assert_close(with_twin[0], ours[0], rtol=1e-12, atol=1e-12)
    mixed = [_normuon_of_stack(pair, flat=True)[0].flatten() for pair in (grads, twins)]
    assert torch.cosine_similarity(*mixed, dim=0) < 0.9  # the twin's step is another


@pytest.mark.parametrize(
    ("method", "args", "error", "message"),
    [
        ("Muonn", {}, ValueError, "method is 'Muonn'; known are .* did you mean 'Muon'"),
        ("NorMuon", {"beta": 1}, TypeError, "constructor of NorMuon has no argument 'beta'"),
        ("NorMuon", {"adjust_lr": "rms"}, ValueError, "adjust_lr is 'rms'; choose one of"),
        ("NorMuon", {"newton_schulz_func": abs}, NotImplementedError, "newton_schulz_func"),
        ("Muon (torch.optim)", {"adjust_lr_fn": "x"}, ValueError, "adjust_lr_fn is 'x'"),
        ("Muon (Emerging-Optimizers)", {"scale_mode": "x"}, ValueError, "scale_mode is 'x'"),
        ("Muon (Emerging-Optimizers)", {"coefficient_type": "x"}, ValueError, "coefficient_type"),
        (
            "Muon (Emerging-Optimizers)",
            {"weight_decay_method": "x"},
            ValueError,
            "weight_decay_method is 'x'",
        ),
        ("SOAP-Muon", {"trust_floor_fade_end_step": 3}, ValueError, "fade_end_step is 3"),
        ("SOAP-Muon", {"lookahead": {"rest": 3}}, TypeError, "lookahead has no field 'rest'"),
        ("SPlus", {"b2": 1.5}, ValueError, "b2 is 1.5"),
        ("SGDScheduleFree", {"warmup_steps": -1}, ValueError, "warmup_steps is -1"),
        ("AdamWScheduleFree", {"lr": -1.0}, ValueError, "lr is -1.0"),
        ("RAdamScheduleFree", {"lr": float("nan")}, ValueError, "lr is nan"),
        ("SOAP", {"betas": (0.9,)}, ValueError, "betas is .* must have 2 entries"),
        ("SOAP", {"betas": 0.9}, ValueError, "betas is 0.9; it must have 2 entries"),
        ("SOAP", {"betas": None}, ValueError, "betas is None; it must have 2 entries"),
        ("Muon (torch.optim)", {"ns_coefficients": (1, 2)}, ValueError, "must have 3 entries"),
        ("SOAP", {"max_precond_dim": "a"}, TypeError, "max_precond_dim is 'a'"),
        ("SPlus", {"nonstandard_constant": float("nan")}, ValueError, "nonstandard_constant is"),
        ("KL-SOAP", {"cast_dtype": "bfloat16"}, NotImplementedError, "cast_dtype bfloat16"),
        ("SOAP-Muon", {"trust_floor": -1.0}, ValueError, "trust_floor is -1.0"),
        ("SOAP-Muon", {"lookahead": {}, "initial_lr": 0.0}, ValueError, "initial_lr is 0.0"),
    ],
)
def test_bad_arguments(method: str, args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fs.from_published(method, **args)


@pytest.mark.parametrize("method", METHODS)
def test_the_wrapper_takes_the_arguments_of_every_constructor(method: str) -> None:
    """By their names there, such as eps, which are others' names for those of recipes here."""
    args = {name: known.default for name, known in KNOWN[method].items()}
    args.pop("initial_lr", None)  # in a group that is a note of torch's schedulers
    others = {"silent_sgd_phase": False, "mu_schedule": [0.8, 0.9]}
    args |= {name: value for name, value in others.items() if name in args}
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    tx, params = fs.from_published(method, **args), [steps[0]]
    state = tx.init(params)
    w = torch.nn.Parameter(steps[0].clone())
    optimizer = fs.Optimizer([w], functools.partial(fs.from_published, method), **args)
    for g in steps:
        updates, state = tx.update([g], state, params)
        params = fs.apply_updates(params, updates)
        w.grad = g.clone()
        optimizer.step()
    assert not torch.equal(w, steps[0])
    torch.testing.assert_close(w.detach(), params[0], rtol=0, atol=1e-13)


def test_flags_are_bools() -> None:
    """What is no bool would be taken for yes, "no" too."""
    flags = [(m, n) for m in METHODS for n in KNOWN[m] if "bool" in str(KNOWN[m][n].annotation)]
    assert {method for method, _ in flags} >= {"SOAP", "KL-SOAP", "NorMuon", "Muon"}
    for method, name in flags:
        with pytest.raises(TypeError, match=f"{name} is 'no'; expected True or False"):
            fs.from_published(method, **{name: "no"})


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("SOAP", "shampoo_beta"),
        ("SOAP (Emerging-Optimizers)", "shampoo_beta"),
        ("KL-Shampoo", "shampoo_beta"),
        ("SOAP-Muon", "soap_beta2"),
        ("SPlus", "b2"),
    ],
)
def test_statistics_that_never_take_in_a_gradient_are_refused(method: str, name: str) -> None:
    """With a decay of 1 they stay at 0 in the sources; the stages here would sum gradients up."""
    with pytest.raises(ValueError, match=rf"^{name} is 1.0; it must lie in"):
        fs.from_published(method, **{name: 1.0})


@pytest.mark.parametrize("method", METHODS)
def test_a_group_of_the_wrapper_has_the_constructors_arguments(method: str) -> None:
    """As theirs has: an edit of one that had its default was ignored."""
    w = torch.nn.Parameter(torch.eye(6, dtype=torch.float64))
    optimizer = fs.Optimizer([w], functools.partial(fs.from_published, method), lr=0.1)
    (group,) = optimizer.param_groups
    assert KNOWN[method].keys() - {"initial_lr"} <= group.keys()  # that is a scheduler's note
    w.grad = torch.ones(6, 6, dtype=torch.float64)
    optimizer.step()
    name = FIRST_DECAYS.get(method, "betas" if "betas" in group else "momentum")
    group[name] = (2.0, 0.9) if name == "betas" else -2.0
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        optimizer.step()


def _with_lives(method: str) -> tuple[fs.Optimizer, torch.nn.Parameter, dict[str, Live]]:
    """An optimizer in which every number that may be switched off is on, and its live numbers."""
    words = Vocabulary(functools.partial(fs.from_published, method))
    known = [(n, p.default) for n, p in KNOWN[method].items() if "Hyper" in str(p.annotation)]
    given = {name: 0.05 if value == 0 else 0.9 for name, value in known if value in (0, 1)}
    w = torch.nn.Parameter(torch.eye(6, dtype=torch.float64) + 0.1)
    optimizer = fs.Optimizer([w], words.method, **{**given, "lr": 0.1})
    return optimizer, w, words.live(words.arguments(optimizer.param_groups[0]))


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_of_a_number_rebuilds_nothing(method: str) -> None:
    """And the step is that of a chain that was built with it: a scheduler edits lr on every one."""
    optimizer, w, lives = _with_lives(method)
    (group,), (chain,) = optimizer.param_groups, optimizer._chains()
    typed = {n for n, p in KNOWN[method].items() if "Hyper" in str(p.annotation)}
    assert {n.partition("[")[0] for n in lives} == typed >= {"lr"}
    generator = torch.Generator().manual_seed(0)
    params = [w.detach().clone()]
    state = chain.init(params)
    for name in [*[None] * 6, *lives]:  # RAdam moves nothing at first
        if name is not None:
            name, _, index = name.removesuffix("]").partition("[")
            old = group[name]
            changed = [0.6 * x if index == str(i) else x for i, x in enumerate(old)] if index else 0
            group[name] = tuple(changed) if index else 0.6 * old
        args = {n: group[n] for n in KNOWN[method] if n in group}
        w.grad = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        before = w.detach().clone()
        optimizer.step()
        updates, state = fs.from_published(method, **args).update([w.grad], state, params)
        params = fs.apply_updates(params, updates)
        torch.testing.assert_close(w.detach(), params[0], rtol=0, atol=1e-13)
        assert name is None or not torch.equal(w, before)
        assert optimizer._chains()[0] is chain, name


@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_a_constructor_are_injected(method: str) -> None:
    """The names that a partial leaves were among **keywords, so that nothing was, silently."""
    recipe = functools.partial(fs.from_published, method)
    tx = fs.inject_hyperparams(recipe)(lr=0.125)
    params = [torch.eye(6, dtype=torch.float64) + 0.1]
    grads = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    state = tx.init(params)
    assert "lr" in state.hyperparams
    now, plain = params, recipe(lr=0.125).init(params)
    first = {"initial_lr": 0.125} if "initial_lr" in KNOWN[method] else {}
    for rate, g in zip((0.125, 0.0625), grads):
        state = state._replace(hyperparams={**state.hyperparams, "lr": torch.tensor(rate)})
        updates, state = tx.update([g], state, params)
        params = fs.apply_updates(params, updates)
        updates, plain = recipe(lr=rate, **first).update([g], plain, now)
        now = fs.apply_updates(now, updates)
    torch.testing.assert_close(params[0], now[0], rtol=0, atol=1e-8)  # others are in float32


@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_a_constructor_may_be_tensors(method: str) -> None:
    """A comparison with a tensor decided a switch, which has to be a bool."""
    recipe = functools.partial(fs.from_published, method)
    params = [torch.eye(6, dtype=torch.float64) + 0.1]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(3)]

    def trained(**args: Any) -> Any:
        tx, now = recipe(**{"lr": 0.1, **args}), params
        state = tx.init(params)
        for g in grads:
            updates, state = tx.update([g], state, now)
            now = fs.apply_updates(now, updates)
        return now[0]

    for name, p in KNOWN[method].items():
        fixed = name == "denom_power"  # refused by name
        if isinstance(p.default, float) and p.default > 0 and not fixed:
            number = torch.tensor(p.default, dtype=torch.float64)
            found = trained(**{name: number})
            torch.testing.assert_close(found, trained(**{name: p.default}), rtol=0, atol=1e-12)


def test_a_number_among_many_keywords_is_injected_or_refused() -> None:
    def of_keywords(**options: Any) -> fs.GradientTransformation:
        return fs.adamw(**options)

    params = [torch.eye(3)]
    state = fs.inject_hyperparams(of_keywords)(learning_rate=0.1, beta1=0.5).init(params)
    assert state.hyperparams.keys() == {"learning_rate", "beta1"}
    with pytest.raises(TypeError, match="lr is one of many keywords of from_published"):
        fs.inject_hyperparams(fs.from_published)("SOAP", lr=0.1)
