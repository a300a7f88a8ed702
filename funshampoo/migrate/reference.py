"""The Distributed Shampoo reference implementation as a chain, from its arguments."""

from __future__ import annotations

import inspect
from typing import Any

from funshampoo.core.checks import (
    check_count,
    check_entries,
    check_flags,
    check_range,
    chosen,
    hint,
)
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.core.live import is_exactly
from funshampoo.migrate.reference_averages import averaged_as_published
from funshampoo.migrate.reference_config import (
    DECAY_KINDS,
    WITHOUT_EFFECT,
    Config,
    Fields,
    blocking,
    first_step,
    grafting,
    merging_target,
    peak_of,
)
from funshampoo.migrate.reference_methods import Setting, stages_of
from funshampoo.migrate.wording import in_their_words
from funshampoo.recipes.in_blocks import in_blocks
from funshampoo.transforms import primal_average, schedule_free
from funshampoo.transforms.weight_decay import DecayKind

_CLASSIC = "ClassicMomentumConfig"
_PRIMAL = "GeneralizedPrimalAveragingConfig"
_SCHEDULE_FREE = "ScheduleFreeConfig"


@in_their_words
def from_reference(
    *,
    lr: Hyper | Schedule = 1e-2,
    betas: tuple[Hyper, Hyper] = (0.9, 1.0),
    beta3: float = -1.0,
    epsilon: Hyper = 1e-12,
    weight_decay: Hyper = 0.0,
    weight_decay_type: str = "DECOUPLED",
    max_preconditioner_dim: int | float | str = 1024,
    precondition_frequency: int = 1,
    start_preconditioning_step: int | float | str = -1,
    use_bias_correction: bool = True,
    target_parameter_dimensionality: int | float | str = 1,
    grafting_config: Config | None = None,
    iterate_averaging_config: Config | None = None,
    preconditioner_config: Config | None = None,
    peak_lr: Hyper | None = None,
    group_steps: bool = True,
    floor: bool = True,
    as_published: bool = True,
    **without_effect: Any,
) -> GradientTransformation:
    """The chain that computes the same as `DistributedShampoo(params, ...)`.

    Arguments have the reference's names, defaults and meanings; a config object is written as
    {"type": class name, field: value}, where omitted fields have its defaults. peak_lr,
    group_steps, floor and as_published are ours.

    Args:
        lr: number, or schedule of the old step count instead of a scheduler.
        betas: (for the gradient filter, for the statistics).
        beta3: -1 means betas[0].
        weight_decay_type: "L2", "DECOUPLED", "CORRECTED" or "INDEPENDENT". Decoupled kinds pass
            through the momentum.
        max_preconditioner_dim, target_parameter_dimensionality: an int or "inf".
        start_preconditioning_step: -1 means precondition_frequency; "inf" or math.inf means never.
        grafting_config: SGD-, Adam-, RMSprop-, AdaGradPreconditionerConfig, or None.
        iterate_averaging_config: ClassicMomentum-, GeneralizedPrimalAveraging-,
            ScheduleFreeConfig, or None. With an average, evaluate the model with
            `funshampoo.evaluation_parameters(state, params)`.
        preconditioner_config: RootInvShampoo-, EigendecomposedShampoo-, RootInvKLShampoo- or
            EigendecomposedKLShampooPreconditionerConfig, with amortized_computation_config
            EigenConfig, EighEigendecompositionConfig, CoupledNewtonConfig or
            CoupledHigherOrderConfig, and for the eigendecomposed ones a tolerance, or
            QREigendecompositionConfig; EigenvalueCorrectedShampoo- with one of these two
            decompositions (QREigen: the reference's SOAP); SpectralDescent-, whose
            orthogonalization_config is NewtonSchulz- or SVDOrthogonalizationConfig; SignDescent-,
            and those for grafting. A scaling function is called as in the reference:
            scale_by_dims_fn(d_in, d_out), scale_fn(block), the latter under torch.func.vmap.
        peak_lr: the divisor of "CORRECTED" and "INDEPENDENT" decay, which is the constructor's lr
            there. Only needed with a schedule whose largest value in its first 10,000 steps differs
            from it.
        group_steps: True corrects biases, and weighs Schedule-Free's averages, by all steps, as the
            reference does. False counts each parameter's own gradients, which is right for one
            whose gradient is None at times.
        **without_effect: distributed_config (except its target_parameter_dimensionality),
            shampoo_runtime_config, concurrency_config, shampoo_pt2_compile_config and
            use_pin_memory are accepted and have no effect here.
        floor: eigenvalues below 0 become 0 before epsilon is added. False shifts the whole spectrum
            by the smallest, as the reference does if that is below epsilon.
        as_published: False: weight averages as in their papers, where these differ: decoupled decay
            is part of the step from y, and moves no average outwards; Schedule-Free's coefficients
            are not rounded to float32.

    Intentional differences: an unconverged iteration is not used; a root of zero statistics is the
    identity, and a gradient of zeros has no polar factor; Adam and RMSprop grafting with beta2 = 1,
    whose second moment stays 0 in the reference, are an error; a call in which no parameter has a
    gradient counts as a step.

    Raises:
        ValueError: an argument out of the reference's range, or a config that has no meaning there.
        NotImplementedError: a config of an unsupported type; the error names it.
        TypeError: an unknown argument or field.

    >>> tx = from_reference(lr=1e-3, betas=(0.9, 0.99), precondition_frequency=10,
    ...                     grafting_config={"type": "AdamPreconditionerConfig", "beta2": 0.99})
    """
    check_flags(use_bias_correction=use_bias_correction, group_steps=group_steps)
    check_flags(floor=floor, as_published=as_published)
    for name in sorted(without_effect.keys() - set(WITHOUT_EFFECT)):
        near = hint(name, [*inspect.signature(from_reference).parameters, *WITHOUT_EFFECT])
        raise TypeError(f"from_reference() got an unexpected argument {name!r}{near}")
    check_entries("betas", betas, 2)
    beta1, beta2 = betas
    check_count("precondition_frequency", precondition_frequency)
    check_range("epsilon", epsilon, 0.0)
    check_range("lr", lr, 0.0, schedule=True)
    if peak_lr is not None:
        check_range("peak_lr", peak_lr, 0.0)
    target = merging_target(
        target_parameter_dimensionality, without_effect.get("distributed_config")
    )
    start = first_step(start_preconditioning_step, precondition_frequency)
    if start < precondition_frequency:
        raise ValueError(
            f"start_preconditioning_step is {start}; the reference demands at least "
            f"precondition_frequency, {precondition_frequency}."
        )
    named = getattr(weight_decay_type, "name", weight_decay_type)  # an enum's, or the name itself
    kind: DecayKind = chosen("weight_decay_type", named, DECAY_KINDS)
    if kind in ("corrected", "independent") and peak_lr is None:
        peak_lr = peak_of(lr)
    setting = Setting(
        beta1=beta1,
        beta2=beta2,
        beta3=None if beta3 == -1.0 or is_exactly(beta1, 0) else beta3,
        epsilon=epsilon,
        every=precondition_frequency,
        start=start,
        bias_correction=use_bias_correction,
        own_steps=not group_steps,
        onto=grafting(grafting_config, own_steps=not group_steps),
        floor=floor,
    )
    max_size, merge, keep = blocking(max_preconditioner_dim, target)
    return in_blocks(
        stages_of(preconditioner_config, setting),
        learning_rate=lr,
        every=precondition_frequency,
        max_size=max_size,
        merge=merge,
        keep=keep,
        decay_through_momentum=True,
        **_last_stages(
            iterate_averaging_config,
            as_published,
            lr,
            own_steps=not group_steps,
            weight_decay=weight_decay,
            weight_decay_kind=kind,
            peak_learning_rate=peak_lr,
        ),
    )


def _last_stages(
    config: Config | None,
    as_published: bool,
    lr: Hyper | Schedule,
    *,
    own_steps: bool,
    **decay: Any,
) -> dict[str, Any]:
    """Arguments of `in_blocks`: momentum, decay, and what replaces the learning rate."""
    if config is None:
        return decay
    fields = Fields(config, "iterate_averaging_config", (_CLASSIC, _PRIMAL, _SCHEDULE_FREE))
    if fields.type == _CLASSIC:
        check_range(
            "momentum", fields.left.get("momentum", 0.5), 0, 1, low_open=True, high_open=True
        )
        momentum = {
            "momentum": fields.take("momentum", 0.5),
            "dampening": fields.take("dampening", 0.0),
            "nesterov": fields.take("use_nesterov", False),
        }
        fields.finish()
        return {**momentum, **decay}
    is_primal = fields.type == _PRIMAL
    average = fields.take("eval_interp_coeff", 0.9) if is_primal else None
    interpolation = fields.take("train_interp_coeff", 0.8)
    power = 2 if is_primal else fields.take("eval_coeff_lr_power", 2)
    fields.finish()
    check_range("eval_coeff_lr_power", power, float("-inf"))
    if not as_published:
        if average is None:
            last = schedule_free(lr, interpolation, weight_lr_power=power, own_steps=own_steps)
        else:
            last = primal_average(lr, average=average, interpolation=interpolation)
        return {"last": last, **decay}
    coupled = decay["weight_decay_kind"] == "coupled"  # it goes before the blocks
    last = averaged_as_published(
        lr,
        average=average,
        interpolation=interpolation,
        lr_power=power,
        own_steps=own_steps,
        weight_decay=0.0 if coupled else decay["weight_decay"],
        kind="decoupled" if coupled else decay["weight_decay_kind"],
        peak=decay["peak_learning_rate"],
    )
    return {"last": last, **(decay if coupled else {})}
