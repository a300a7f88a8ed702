"""Every transformation and every recipe, for the checks that all of them have to pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch

import funshampoo as fs
from funshampoo import linalg
from funshampoo.core.tree import map_leaves, update_leaves
from funshampoo.recipes import RECIPES


class Case(NamedTuple):
    """A transformation of which every check is to hold.

    `name` is a public name, or one with a variant, as in "ema:beta3"; `options` are those of
    `check_stage`, and say why a check is left out.
    """

    name: str
    make: Callable[[], fs.GradientTransformation]
    changes_updates: bool = True
    options: Mapping[str, Any] = {}

    @property
    def public(self) -> str:
        return self.name.split(":")[0]

    @property
    def further(self) -> bool:
        """Whether `make test` leaves it out: a recipe once more, with other options, whose stages
        have cases of their own; or one of `FURTHER`.
        """
        around = {"every_k", "inject_hyperparams", "multi_steps", "wrapping"}
        made_of_others = {*RECIPES, *around, "from_published", "from_reference"}
        again = ":" in self.name and not self.name.endswith(":everything")
        return (again and self.public in made_of_others) or self.name in FURTHER


# A graph of torch.compile, stages once more with options that other cases have among theirs, and
# recipes and combinators that take seconds, of stages that have cases of their own.
FURTHER = {
    "blend_towards:gate",
    "compiled",
    "cuda_graphed",
    "eigenvalue_shampoo",
    "graft:from_3",
    "graft:matrices",
    "in_eigenbasis:eigh",
    "in_eigenbasis:from_the_identity",
    "in_eigenbasis:momentum",
    "in_eigenbasis:renewed_first",
    "in_tf32",
    "kl_shampoo",
    "kl_soap",
    "kl_statistics:ritz",
    "kl_statistics:roots",
    "normuon",
    "root_inverse:adaptive",
    "root_inverse:adaptive_unblocked",
    "root_inverse:low_precision",
    "root_inverse:newton",
    "root_inverse:packed",
    "root_inverse:pseudo_inverse",
    "root_inverse:staggered",
    "root_inverse:staggered_adaptive",
    "root_inverse:trace_scaled",
    "soap_muon",
    "spectral_descent",
}


def _statistics_and(*stages: fs.GradientTransformation) -> fs.GradientTransformation:
    return fs.chain(fs.kronecker_statistics(0.9), *stages)


def _in_basis_of_matrices(inner: fs.GradientTransformation) -> fs.GradientTransformation:
    """Not of vectors: of one gradient, 4 of 5 directions are any at all, as a CPU rounds."""
    statistics = fs.kronecker_statistics(0.9, sides=lambda block: [len(block) > 1] * len(block))
    return fs.chain(statistics, fs.in_eigenbasis(inner, 2))


def _root(every: int = 2, **options: object) -> fs.GradientTransformation:
    return fs.root_inverse(every, start=1, **options)


def _blocked(*stages: fs.GradientTransformation) -> fs.GradientTransformation:
    return fs.blocked(_statistics_and(*stages), max_size=4)


def _kl(*stages: fs.GradientTransformation, **options: Any) -> fs.GradientTransformation:
    return fs.blocked(fs.chain(fs.kl_statistics(0.9, **options), *stages), max_size=4)


def _schedule() -> fs.core.contract.Schedule:
    return fs.schedules.warmup_cosine(0.1, 2, 6)


def _cautious(inner: fs.GradientTransformation) -> fs.GradientTransformation:
    def update(run: Any, updates: Any, own: Any) -> Any:
        return update_leaves(lambda u, g: (u * (u * g > 0),), run(updates), (), (updates,))[0], own

    return fs.wrapping(inner, update)


def _on_matrices(method: str, **args: Any) -> fs.GradientTransformation:
    def kind(tree: Any) -> Any:
        return map_leaves(lambda p: "a" if p.ndim == 2 else "b", tree)

    return fs.partition({"a": fs.from_published(method, **args), "b": fs.sgd(0.1)}, kind)


# What a transformation can't do by nature
BY_NAME = {"blocks": False}  # it knows parameters by their names
AROUND_BLOCKS = {"blocks": False}  # it refuses to stand inside
ROUNDED = {"vmap": False}  # a stack of matrices in half precision has a kernel of its own
ROUNDED_IN_STACKS = {**ROUNDED, "compile": False}  # and a graph takes it
COUPLED = {"blocks": False, "none": False}  # leaves, or the steps of one, depend on each other

CASES = [
    Case("identity", fs.identity, changes_updates=False),
    Case("chain", lambda: fs.chain(fs.ema(0.9), fs.trace(0.5), fs.scale(2.0))),
    Case("chain:nested", lambda: fs.chain(fs.chain(fs.ema(0.9)), fs.chain(fs.scale(2.0)))),
    Case(
        "masked",
        lambda: fs.masked(fs.trace(0.9, nesterov=True), {"w": True, "layers": False}),
        options=BY_NAME,
    ),
    Case(
        "partition",
        lambda: fs.partition(
            {"a": fs.adamw(0.1), "b": fs.shampoo(0.1, every=2)}, {"w": "a", "layers": "b"}
        ),
    ),
    Case(
        "inject_hyperparams:adaptive",
        lambda: fs.inject_hyperparams(fs.shampoo)(
            _schedule(), every=2, max_size=4, basis_tolerance=0.1
        ),
    ),
    Case("inject_hyperparams", lambda: fs.inject_hyperparams(fs.shampoo)(_schedule(), every=2)),
    Case(
        "in_tf32",
        lambda: fs.in_tf32(fs.chain(fs.ema(0.9), fs.soap(0.1, every=2, max_size=4))),
    ),
    Case(
        "compiled",
        lambda: fs.compiled(fs.chain(fs.ema(0.9), fs.trace(0.5)), backend="eager"),
        options=AROUND_BLOCKS,
    ),
    Case("cuda_graphed", lambda: fs.cuda_graphed(fs.soap(0.1, every=2, max_size=4))),
    Case("multi_steps", lambda: fs.multi_steps(fs.trace(0.9), 2), options=COUPLED),
    Case(
        "multi_steps:shampoo",
        lambda: fs.multi_steps(fs.shampoo(0.1, every=2, start=1), 2),
        options=COUPLED,
    ),
    Case("every_k", lambda: fs.every_k(fs.trace(0.9), 2)),
    Case("every_k:roots", lambda: fs.every_k(_statistics_and(_root()), 2)),
    Case("wrapping", lambda: _cautious(fs.scale_by_adam())),
    Case("wrapping:shampoo", lambda: _cautious(fs.shampoo(0.1, every=2, max_size=4))),
    Case("blocked", lambda: fs.blocked(fs.trace(0.9, nesterov=True), 4)),
    Case("guarded", lambda: fs.guarded(fs.trace(0.9, nesterov=True), every=2)),
    Case("guarded:by_leaf", lambda: fs.guarded(fs.adamw(0.1), every=2, by_leaf=True)),
    Case("guarded:spikes", lambda: fs.blocked(fs.guarded(fs.ema(0.9), spike_factor=2.0), 4)),
    Case("guarded:blocked", lambda: fs.blocked(fs.guarded(fs.ema(0.9), every=2), 4)),
    Case("sharded", lambda: fs.sharded(fs.trace(0.9)), options=AROUND_BLOCKS),  # on one rank
    Case("shampoo:sharded", lambda: fs.shampoo(0.1, every=2, max_size=4, distribute=fs.sharded)),
    Case("kronecker_statistics", lambda: fs.kronecker_statistics(0.9), changes_updates=False),
    Case("kronecker_statistics:sum", lambda: fs.kronecker_statistics(1.0), changes_updates=False),
    Case(
        "kronecker_statistics:every",
        lambda: fs.kronecker_statistics(0.9, every=2),
        changes_updates=False,
    ),
    Case(
        "root_inverse:one_sided",
        lambda: fs.blocked(
            fs.chain(
                fs.kronecker_statistics(0.9, every=2, sides="smaller", exponents=1 / 3),
                _root(sides="smaller", exponents=1 / 3),
            ),
            max_size=4,
        ),
    ),
    Case("root_inverse", lambda: _statistics_and(_root())),
    Case("root_inverse:blocked", lambda: _blocked(_root())),
    Case(
        "root_inverse:pseudo_inverse",
        lambda: _blocked(_root(solver=linalg.pseudo_inverse(rtol=1e-6))),
    ),
    Case("root_inverse:newton", lambda: _blocked(_root(solver=linalg.coupled_newton()))),
    Case("root_inverse:newton_schulz", lambda: _blocked(_root(solver=linalg.newton_schulz()))),
    Case("root_inverse:trace_scaled", lambda: _blocked(_root(trace_scaling=0.5))),
    Case("root_inverse:low_precision", lambda: _blocked(_root(product_dtype=torch.bfloat16))),
    Case(
        "root_inverse:packed",
        lambda: fs.blocked(
            fs.chain(fs.kronecker_statistics(0.9, packed=True), _root(packed=True)), max_size=4
        ),
    ),
    Case("root_inverse:adaptive", lambda: _blocked(_root(basis_tolerance=0.1))),
    Case("root_inverse:adaptive_unblocked", lambda: _statistics_and(_root(basis_tolerance=0.05))),
    Case(
        "root_inverse:staggered_adaptive",
        lambda: _blocked(_root(stagger=True, basis_tolerance=0.1)),
    ),
    Case("root_inverse:staggered", lambda: _blocked(_root(stagger=True))),
    Case("in_eigenbasis", lambda: _in_basis_of_matrices(fs.scale_by_adam())),
    Case("in_eigenbasis:blocked", lambda: _blocked(fs.in_eigenbasis(fs.scale_by_adam(), 2))),
    Case(
        "in_eigenbasis:momentum",
        lambda: _blocked(fs.in_eigenbasis(fs.chain(fs.trace(0.9), fs.scale_by_rms(0.9)), 2)),
    ),
    Case(
        "in_eigenbasis:eigh",
        lambda: _blocked(fs.in_eigenbasis(fs.scale_by_adam(), 2, basis=linalg.eigh())),
    ),
    Case(
        "in_eigenbasis:staggered",
        lambda: _blocked(fs.in_eigenbasis(fs.scale_by_adam(), 2, stagger=True)),
    ),
    Case("soap", lambda: fs.soap(0.1, every=2, max_size=4)),
    Case("kl_statistics", lambda: _kl(fs.in_eigenbasis(fs.scale_by_adam(), 2))),
    Case(
        "kl_statistics:everything",
        lambda: _kl(
            fs.in_eigenbasis(
                fs.scale_by_adam(), 2, stagger=True, basis=linalg.orthogonal_iteration()
            ),
            bias_correction=False,
            starts_whole=True,
            in_turn=True,
            damping=0.1,
            least_eigenvalue=1e-3,
        ),
    ),
    Case("kl_statistics:roots", lambda: _kl(_root(epsilon=1e-4), through="roots")),
    Case(
        "kl_statistics:ritz",
        lambda: _kl(
            fs.in_eigenbasis(fs.scale_by_adam(), 2, first="identity"),
            through="ritz",
            least_eigenvalue=0.1,
        ),
    ),
    Case("scale_by_eigenvalues", lambda: _kl(fs.in_eigenbasis(fs.scale_by_eigenvalues(), every=2))),
    Case("kl_shampoo", lambda: fs.kl_shampoo(0.1, every=2, max_size=4)),
    Case("kl_shampoo:vectors", lambda: fs.kl_shampoo(0.1, every=2, max_size=4, vectors="blocks")),
    Case("kl_soap", lambda: fs.kl_soap(0.1, every=2, max_size=4, damping=0.1)),
    Case(
        "in_eigenbasis:from_the_identity",
        lambda: _blocked(fs.in_eigenbasis(fs.scale_by_adam(), 2, first="identity")),
    ),
    Case(
        "in_eigenbasis:renewed_first",
        lambda: _blocked(
            fs.in_eigenbasis(
                fs.chain(fs.trace(0.9), fs.scale_by_second_moment(0.9)),
                2,
                start=2,
                basis=linalg.by_rank(),
                first="identity",
                renew_before_use=True,
            )
        ),
    ),
    Case(
        "eigenvalue_shampoo",
        lambda: fs.eigenvalue_shampoo(0.1, epsilon=1e-3, every=2, start=2, max_size=4),
    ),
    Case("splus", lambda: fs.splus(0.1, every=2)),
    Case("soap_muon", lambda: fs.soap_muon(0.1, every=2)),
    Case(
        "soap_muon:schedule",
        lambda: fs.soap_muon(_schedule(), gate=fs.AgreementGate(0.1, floor=0.2), exponent=0.4),
    ),
    Case(
        "blend_towards",
        lambda: fs.chain(fs.trace(0.9), fs.blend_towards(fs.scale_by_adam(), 0.5)),
    ),
    Case(
        "blend_towards:gate",
        lambda: _blocked(
            fs.trace(0.9),
            fs.blend_towards(
                fs.in_eigenbasis(fs.scale_by_second_moment(0.9), 2), fs.AgreementGate()
            ),
        ),
    ),
    Case("scale_by_second_moment", fs.scale_by_second_moment),
    Case(
        "scale_by_second_moment:floor",
        lambda: fs.scale_by_second_moment(0.9, 0.01, exponent={2: 0.3}, damping="floor"),
    ),
    Case("scale_by_second_moment:sum", lambda: fs.scale_by_second_moment(1.0)),
    Case("scale_by_shape", lambda: fs.scale_by_shape("unit_rms")),
    Case(
        "decay_after_step",
        lambda: fs.chain(fs.scale(-0.1), fs.decay_after_step(0.1, 0.5, scale="spectral")),
    ),
    Case("decay_after_step:schedule", lambda: fs.decay_after_step(0.1, _schedule())),
    Case("kl_shampoo:nesterov", lambda: fs.kl_shampoo(0.1, every=2, max_size=4, nesterov=True)),
    Case("kl_soap:nesterov", lambda: fs.kl_soap(0.1, every=2, max_size=4, nesterov=True)),
    Case(
        "eigenvalue_shampoo:nesterov",
        lambda: fs.eigenvalue_shampoo(0.1, every=2, max_size=4, nesterov=True),
    ),
    Case("soap:nesterov", lambda: fs.soap(0.1, every=2, max_size=4, nesterov=True)),
    Case("soap:one_sided", lambda: fs.soap(0.1, every=2, max_size=4, sides="smaller")),
    Case("graft", lambda: _blocked(fs.graft(_root(), fs.scale_by_rms(0.9)))),
    Case("graft:from_3", lambda: _blocked(fs.graft(_root(), fs.scale_by_adam(0.0), start=3))),
    Case(
        "graft:matrices",
        lambda: _statistics_and(fs.graft(_root(), fs.scale_by_adam(0.0), start=3, least_order=2)),
    ),
    Case("ema", lambda: fs.ema(0.9)),
    Case("ema:beta3", lambda: fs.ema(0.9, 0.8)),
    Case("ema:nesterov", lambda: fs.ema(0.9, nesterov=True)),
    Case("ema:uncorrected", lambda: fs.ema(0.9, bias_correction=False)),
    Case("orthogonalize", lambda: fs.orthogonalize(vectors="pass")),
    Case(
        "orthogonalize:stacks",
        lambda: fs.orthogonalize(
            "polar_express", scale="adam", norm="schatten4", flatten_sides=False, vectors="pass"
        ),
    ),
    Case(
        "orthogonalize:gram",
        lambda: fs.orthogonalize("cans", scale=None, vectors="pass", gram=True),
    ),
    Case(
        "orthogonalize:bfloat16",
        lambda: fs.orthogonalize(dtype=torch.bfloat16, vectors="pass"),
        options=ROUNDED,
    ),
    Case("trace", lambda: fs.trace(0.9)),
    Case("trace:nesterov", lambda: fs.trace(0.9, nesterov=True)),
    Case("trace:damped", lambda: fs.trace(0.9, dampening=0.5, dampen_first_step=False)),
    Case("scale_by_sgd", fs.scale_by_sgd, changes_updates=False),
    Case("scale_by_adam", fs.scale_by_adam),
    Case("scale_by_adam:nesterov", lambda: fs.scale_by_adam(nesterov=True)),
    Case("scale_by_adam:unfiltered", lambda: fs.scale_by_adam(0.0)),
    Case("scale_by_rms", fs.scale_by_rms),
    Case("scale_by_rms:sum", lambda: fs.scale_by_rms(0.9, weighted=False)),
    Case("scale_by_adagrad", fs.scale_by_adagrad),
    Case("add_decayed_weights", lambda: fs.add_decayed_weights(0.1)),
    Case(
        "add_decayed_weights:masked",
        lambda: fs.add_decayed_weights(0.1, {"w": True, "layers": False}),
        options=BY_NAME,
    ),
    Case(
        "add_decayed_weights:corrected",
        lambda: fs.add_decayed_weights(
            0.1, kind="corrected", learning_rate=_schedule(), peak_learning_rate=0.1
        ),
    ),
    Case("clip", lambda: fs.clip(0.1)),
    Case("clip_by_global_norm", lambda: fs.clip_by_global_norm(0.1), options=COUPLED),
    Case("normalize_rows", fs.normalize_rows),
    Case("normalize_rows:stacks", lambda: fs.normalize_rows(0.5, flatten_sides=False)),
    Case("sign", fs.sign),
    Case("sign:mean", lambda: fs.sign("mean")),
    Case("cautious", lambda: fs.cautious(fs.scale_by_adam())),
    Case("cautious:trace", lambda: fs.cautious(fs.trace(0.9), rescale=False)),
    Case("add_cautious_decay", lambda: fs.add_cautious_decay(0.1)),
    Case("centralize", fs.centralize),
    Case("adaptive_clip", lambda: fs.adaptive_clip(0.3)),
    Case("update_floor", lambda: fs.update_floor(1.5)),
    Case("update_floor:row", lambda: fs.update_floor(1.5, per="row")),
    Case("radial_brake", lambda: fs.radial_brake(0.5, 2.0)),
    Case(
        "stochastic_rounding",
        fs.stochastic_rounding,
        changes_updates=False,
        options={"blocks": False},
    ),
    Case("hyperball", lambda: fs.hyperball(0.1)),
    Case("hyperball:schedule", lambda: fs.hyperball(_schedule(), radius="first_order")),
    Case("hyperball:plain", lambda: fs.hyperball(0.1, relative=False, radius="first_order")),
    Case("schedule_free", lambda: fs.chain(fs.scale_by_adam(0.0), fs.schedule_free(0.1, r=1.0))),
    Case("schedule_free:schedule", lambda: fs.schedule_free(_schedule(), weight_lr_power=1.0)),
    Case(
        "schedule_free:blocked",
        lambda: fs.blocked(
            fs.chain(fs.ema(0.9), fs.schedule_free(0.1)), max_size=4, with_params=True
        ),
    ),
    Case("primal_average", lambda: fs.primal_average(0.1, average=0.9, interpolation=0.7)),
    Case(
        "primal_average:schedule",
        lambda: fs.primal_average(_schedule(), average=0.9, interpolation=0.7),
    ),
    Case("ema_nesterov", lambda: fs.chain(fs.scale(-0.1), fs.ema_nesterov(0.3))),
    Case("ema_nesterov:schedule", lambda: fs.ema_nesterov(_schedule())),
    Case("tail_average", fs.tail_average, changes_updates=False),
    Case("tail_average:schedule", lambda: fs.tail_average(3), changes_updates=False),
    Case("tail_average:beta", lambda: fs.tail_average(beta=0.9), changes_updates=False),
    Case("scale", lambda: fs.scale(2.0)),
    Case("scale_by_learning_rate", lambda: fs.scale_by_learning_rate(0.1)),
    Case("scale_by_learning_rate:schedule", lambda: fs.scale_by_learning_rate(_schedule())),
    Case("shampoo", lambda: fs.shampoo(0.1, every=2, max_size=4)),
    Case("shampoo:vectors", lambda: fs.shampoo(0.1, every=2, max_size=4, vectors="blocks")),
    Case(
        "shampoo:adaptive",
        lambda: fs.shampoo(0.1, every=2, max_size=4, basis_tolerance=0.1),
    ),
    Case(
        "shampoo:everything",
        lambda: fs.shampoo(
            _schedule(),
            beta3=0.8,
            epsilon=1e-8,
            every=2,
            start=2,
            max_size=3,
            merge="matrix",
            momentum=0.9,
            nesterov=True,
            dampening=0.1,
            weight_decay=0.1,
            weight_decay_kind="independent",
            peak_learning_rate=0.1,
            decay_through_momentum=True,
            exponents={2: {0: 0.5, 1: 0.0}},
        ),
    ),
    Case(
        "shampoo:one_sided",
        lambda: fs.shampoo(
            0.1,
            every=2,
            max_size=4,
            statistics_every=2,
            sides="smaller",
            exponents="shampoo_squared",
        ),
    ),
    Case(
        "shampoo:coupled",
        lambda: fs.shampoo(
            0.1, every=2, weight_decay=0.1, weight_decay_kind="coupled", momentum=0.9
        ),
    ),
    Case("shampoo:adagrad", lambda: fs.shampoo(0.1, every=2, beta2=1.0, grafting="adagrad")),
    Case(
        "shampoo:low_precision",
        lambda: fs.shampoo(0.1, every=2, max_size=4, product_dtype=torch.bfloat16),
    ),
    Case("shampoo:packed", lambda: fs.shampoo(0.1, every=2, packed=True, stagger=True)),
    Case("shampoo:ungrafted", lambda: fs.shampoo(0.1, every=2, grafting=None, beta1=0.0)),
    Case("muon", lambda: fs.muon(0.1)),
    Case(
        "muon:everything",
        lambda: fs.muon(
            _schedule(),
            momentum=0.8,
            nesterov=False,
            polynomials="polar_express",
            steps=4,
            scale="adam",
            matrices={"w": True, "layers": False},
            others=fs.lion(0.1),
        ),
        options=BY_NAME,
    ),
    Case("muon:sharded", lambda: fs.muon(0.1, distribute=fs.sharded)),
    Case(
        "muon:bfloat16",
        lambda: fs.muon(0.1, dtype=torch.bfloat16),
        options=ROUNDED_IN_STACKS,
    ),
    Case("inject_hyperparams:muon", lambda: fs.inject_hyperparams(fs.muon)(_schedule())),
    Case("normuon", lambda: fs.normuon(0.1)),
    Case("normuon:cautious", lambda: fs.normuon(0.1, nesterov=True, cautious_decay=True)),
    Case("spectral_descent", lambda: fs.spectral_descent(0.1, weight_decay=0.1)),
    Case("lion", lambda: fs.lion(0.1, weight_decay=0.1)),
    Case("sign_descent", lambda: fs.sign_descent(0.1, scale="mean")),
    Case("adamw", fs.adamw),
    Case("adamw:guard", lambda: fs.adamw(guard=True)),
    Case("sgd", lambda: fs.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
    Case("from_published:kl", lambda: fs.from_published("KL-Shampoo", precondition_frequency=2)),
    Case(
        "from_published:kl_h",
        lambda: _on_matrices("KL-SOAP-H (hyperball)", precondition_frequency=2),
    ),
    Case("from_published:rekls", lambda: _on_matrices("REKLS", weight_decay_method="l2", eps=0.1)),
    Case("from_published", lambda: _on_matrices("Muon", lr=0.1)),
    Case("from_published:NorMuon", lambda: _on_matrices("NorMuon", cautious_wd=True)),
    Case(
        "from_published:nvidia",
        lambda: _on_matrices(
            "Muon (Emerging-Optimizers)", lr=0.1, weight_decay_method="independent"
        ),
    ),
    Case(
        "from_published:schedule",
        lambda: fs.from_published("AdamWScheduleFree", warmup_steps=3, weight_decay=0.1),
    ),
    Case(
        "from_published:schedule_radam",
        lambda: fs.from_published("RAdamScheduleFree", betas=(0.9, 0.9), silent_sgd_phase=False),
    ),
    Case(
        "from_published:soap_muon",
        lambda: fs.partition(
            {
                "a": fs.from_published("SOAP-Muon + EMA-Nesterov", mu_schedule=[0.8, 0.9]),
                "b": fs.sgd(0.1),
            },
            lambda tree: map_leaves(lambda p: "a" if p.ndim == 2 else "b", tree),
        ),
    ),
    Case("from_published:splus", lambda: fs.from_published("SPlus", inverse_every=2)),
    Case(
        "from_reference:eigenvalue_corrected",
        lambda: fs.from_reference(
            lr=0.1,
            betas=(0.9, 0.99),
            epsilon=1e-3,
            precondition_frequency=2,
            preconditioner_config={"type": "EigenvalueCorrectedShampooPreconditionerConfig"},
        ),
    ),
    Case(
        "from_reference:schedule_free",
        lambda: fs.from_reference(
            lr=_schedule(),
            betas=(0.0, 0.99),
            epsilon=1e-4,
            weight_decay=0.1,
            precondition_frequency=2,
            grafting_config={"type": "AdamPreconditionerConfig"},
            iterate_averaging_config={"type": "ScheduleFreeConfig"},
        ),
    ),
    Case(
        "from_reference:primal_average",
        lambda: fs.from_reference(
            lr=0.1,
            betas=(0.9, 0.99),
            weight_decay=0.1,
            weight_decay_type="INDEPENDENT",
            preconditioner_config={"type": "AdamPreconditionerConfig"},
            iterate_averaging_config={"type": "GeneralizedPrimalAveragingConfig"},
        ),
    ),
    Case(
        "from_reference",
        lambda: fs.from_reference(
            lr=0.1,
            betas=(0.9, 0.99),
            epsilon=1e-4,  # undamped roots of rank-deficient statistics amplify rounding
            precondition_frequency=2,
            grafting_config={"type": "AdamPreconditionerConfig"},
            iterate_averaging_config={"type": "ClassicMomentumConfig", "momentum": 0.9},
        ),
    ),
]

every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.further else [])
        for case in CASES
    ],
)

# Public names that are no transformation, so that a test can tell whether the table is complete.
NOT_TRANSFORMATIONS = {
    "blocks",
    "AgreementGate",
    "EmptyState",
    "FailureLimitError",
    "InterruptedStepError",
    "GradientTransformation",
    "MaskedNode",
    "Optimizer",
    "Schedule",
    "Shampoo",
    "stateless",
    "update_in_place",
    "apply_updates",
    "evaluation_parameters",
    "for_model",
    "global_norm",
    "linalg",
    "migrate",
    "models",
    "plan",
    "recipes",
    "refresh_due",
    "roles",
    "routing_table",
    "schedules",
    "state",
}
