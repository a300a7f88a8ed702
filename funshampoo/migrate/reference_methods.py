"""The Distributed Shampoo reference's directions, by its preconditioner_config."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.checks import check_entries
from funshampoo.core.contract import GradientTransformation, Hyper, Tree
from funshampoo.core.live import initial
from funshampoo.core.tree import update_leaves, wide
from funshampoo.migrate.reference_config import GRAFTED, Config, Fields, diagonal
from funshampoo.migrate.reference_solver import basis_of, initial_eigenvalue, solver_of
from funshampoo.operators.exponents import side_exponents
from funshampoo.operators.leaf_ops import per_block
from funshampoo.operators.leafwise import leafwise
from funshampoo.transforms import (
    ema,
    graft,
    in_eigenbasis,
    kl_statistics,
    kronecker_statistics,
    orthogonalize,
    root_inverse,
    scale_by_second_moment,
    sign,
)

# Accepted by the reference, and useless in a chain: dtypes follow the parameters here, failed
# roots are counted in the state, and symmetric storage does not change numbers.
_WITHOUT_EFFECT = (
    "factor_matrix_dtype",
    "inv_factor_matrix_dtype",
    "factor_matrix_eigenvectors_dtype",
    "factor_matrix_eigenvalues_dtype",
    "corrected_eigenvalues_dtype",
    "num_tolerated_failed_amortized_computations",
    "use_symmetric_packing",
)


@dataclass(frozen=True)
class Setting:
    """The optimizer's own arguments on which a direction depends.

    Attributes:
        onto: the method to graft onto, or None.
        floor: as in `linalg.eigh`.
    """

    beta1: Hyper
    beta2: Hyper
    beta3: Hyper | None
    epsilon: Hyper
    every: int
    start: int
    bias_correction: bool
    own_steps: bool
    onto: GradientTransformation | None
    floor: bool

    def averaged(self, fields: Fields) -> dict[str, Any]:
        """How squares are averaged: arguments for the stages that do it."""
        return {
            "bias_correction": self.bias_correction,
            "weighted": not fields.take("drop_weighting_factor_on_gsquare", False),
            "own_steps": self.own_steps,
        }


Stages = list[GradientTransformation]


def stages_of(config: Config | None, setting: Setting) -> Stages:
    """The stages from the gradient to the direction, in block space.

    Raises:
        NotImplementedError: an unsupported type, or a field value that is not supported.
        TypeError: the config has no such field.
    """
    fields = Fields(config or None, "preconditioner_config", tuple(BUILT))
    fields.drop(*_WITHOUT_EFFECT)
    statistics, direction = BUILT[fields.type](fields, setting)
    fields.finish()
    average = ema(
        setting.beta1,
        setting.beta3,
        bias_correction=setting.bias_correction,
        own_steps=setting.own_steps,
    )
    if setting.onto is not None:
        direction = graft(direction, setting.onto, start=setting.start)
    return [*statistics, average, direction]


Found = tuple[Stages, GradientTransformation]
"""The stages before the average of the gradient, and the direction made of the average."""


def _shampoo(fields: Fields, setting: Setting) -> Found:
    exponents = fields.by_order("inverse_exponent_override")
    amortized = fields.take("amortized_computation_config", None)
    scaled = fields.take("use_trace_scaling", False)
    power = fields.take("trace_scaling_exponent", 0.5)
    epsilon = initial(setting.epsilon)
    stores_spectrum = fields.type.startswith("Eigendecomposed")
    averaged = setting.averaged(fields)
    if "KL" in fields.type:
        # Whitened by the roots as they are, with default exponents 1/(2k), without a mean:
        # KL-Shampoo's paper has exponent 1/2, and the mean over columns.
        def sides(block: tuple[int, ...]) -> list[bool]:
            return [e > 0 for e in side_exponents(block, exponents)]

        statistics = kl_statistics(
            setting.beta2, through="roots", normalized=False, sides=sides, **averaged
        )
    else:
        statistics = kronecker_statistics(setting.beta2, exponents=exponents, **averaged)
    solver, basis_tolerance = solver_of(amortized, epsilon, setting.floor, stores_spectrum)
    roots = root_inverse(
        setting.every,
        start=setting.start,
        epsilon=setting.epsilon,
        solver=solver,
        exponents=exponents,
        trace_scaling=power if scaled else None,
        initial_eigenvalue=initial_eigenvalue(amortized, epsilon) if stores_spectrum else 1.0,
        basis_tolerance=basis_tolerance,
    )
    return [statistics], roots


def _eigenvalue_corrected(fields: Fields, setting: Setting) -> Found:
    basis = basis_of(fields.take("amortized_computation_config", None), setting.epsilon)
    ignored = _checked(fields.by_order("ignored_basis_change_dims") or {})
    averaged = setting.averaged(fields)

    def sides(block: tuple[int, ...]) -> list[bool]:
        left_alone = ignored.get(len(block), ())
        return [side not in left_alone for side in range(len(block))]

    corrected = scale_by_second_moment(
        setting.beta2,
        setting.epsilon,
        exponent=fields.by_order("inverse_exponent_override") or {},
        **averaged,
    )
    direction = in_eigenbasis(
        corrected,
        setting.every,
        start=setting.start,
        basis=basis,
        first="identity",
        renew_before_use=True,
    )
    return [kronecker_statistics(setting.beta2, sides=sides, **averaged)], direction


def _checked(given: Mapping[int, Collection[int]]) -> Mapping[int, Collection[int]]:
    for order, ignored in given.items():
        wrong = [side for side in ignored if not 0 <= side < max(order, 1)]
        if wrong:
            raise ValueError(
                f"ignored_basis_change_dims[{order}] has {wrong[0]}, which a block of {order} "
                "sides does not have; they count from 0."
            )
    return given


def _diagonal(fields: Fields, setting: Setting) -> Found:
    return [], diagonal(fields, setting.own_steps)


_NEWTON_SCHULZ = "NewtonSchulzOrthogonalizationConfig"
_SVD = "SVDOrthogonalizationConfig"


def spectral(fields: Fields) -> GradientTransformation:
    """The direction of a SpectralDescentPreconditionerConfig."""
    nested = fields.nested("orthogonalization_config", _NEWTON_SCHULZ, _SVD)
    nested.drop("rank_deficient_stability_config")  # a field of the base class, unread there too
    by_dimensions = nested.function("scale_by_dims_fn")
    # Theirs is a function of (columns, rows), ours of a leaf's shape.
    scale = by_dimensions and (lambda shape: by_dimensions(math.prod(shape[1:]), shape[0]))
    if nested.type == _SVD:
        return by_svd(scale, nested.take("scale_by_nuclear_norm", False))
    coefficients = nested.take("coefficients", (3.4445, -4.7750, 2.0315))
    check_entries("coefficients", coefficients, 3)
    a, b, c = coefficients
    return orthogonalize([(a, b, c)], nested.take("num_iterations", 5), scale=scale)


def signs(fields: Fields) -> GradientTransformation:
    """The direction of a SignDescentPreconditionerConfig."""
    scale_fn = fields.function("scale_fn")
    return sign() if scale_fn is None else signs_scaled_by(scale_fn)


def by_svd(
    scale: Callable[[tuple[int, ...]], float] | None, by_nuclear_norm: bool
) -> GradientTransformation:
    """U ← s P Qᵀ of U = P Σ Qᵀ, by singular value decomposition; optionally times tr Σ.

    Directions with a singular value of exactly 0 stay 0, where the reference uses whichever ones
    LAPACK returns: for a gradient of zeros, that is an arbitrary step.

    Args:
        scale: s from the leaf's shape; None is 1.
        by_nuclear_norm: whether to multiply by the sum of the singular values.
    """
    like = orthogonalize(scale=scale)  # refuses leaves that are not matrices

    def update(updates: Tree, state: Any, *, block_ndim: int = 0) -> tuple[Tree, Any]:
        def leaf(u: Tensor) -> tuple[Tensor]:
            x = wide(u).flatten(block_ndim + 1)
            P, sizes, Q = torch.linalg.svd(x, full_matrices=False)
            found = (P * (sizes > 0)[..., None, :]) @ Q
            if by_nuclear_norm:
                found = found * sizes.sum(-1)[..., None, None]
            s = 1.0 if scale is None else scale(tuple(u.shape[block_ndim:]))
            return (found.reshape(u.shape) * s,)

        return update_leaves(leaf, updates, ())[0], state

    return GradientTransformation(like.init, update, "by_svd", minds_alive=True)


def signs_scaled_by(scale_fn: Callable[[Tensor], Any]) -> GradientTransformation:
    """U ← s(U) sign(U), where s is a function of each block that returns a number or a tensor ().

    It is called once for all blocks of a shape, under torch.func.vmap: reading values on the host,
    as by .item(), raises torch's error.
    """

    def one(u: Tensor) -> Tensor:
        s = torch.as_tensor(scale_fn(u), dtype=u.dtype, device=u.device)
        if s.shape != ():
            raise ValueError(
                f"scale_fn gives a tensor of shape {tuple(s.shape)}; it has to give a number, or a "
                "tensor of shape ()."
            )
        return s

    def scaled(u: Tensor, block_ndim: int) -> Tensor:
        each: Any = torch.func.vmap(one) if block_ndim else one
        return u.sign() * per_block(each(u), u)

    return leafwise(scaled, name="sign")


BUILT: Mapping[str, Callable[[Fields, Setting], Found]] = {
    "RootInvShampooPreconditionerConfig": _shampoo,
    "EigendecomposedShampooPreconditionerConfig": _shampoo,
    "RootInvKLShampooPreconditionerConfig": _shampoo,
    "EigendecomposedKLShampooPreconditionerConfig": _shampoo,
    "EigenvalueCorrectedShampooPreconditionerConfig": _eigenvalue_corrected,
    "SpectralDescentPreconditionerConfig": lambda fields, _: ([], spectral(fields)),
    "SignDescentPreconditionerConfig": lambda fields, _: ([], signs(fields)),
    **{f"{name}PreconditionerConfig": _diagonal for name in GRAFTED},
}
"""{class of the config: function that makes its direction}; the first one is the default."""
