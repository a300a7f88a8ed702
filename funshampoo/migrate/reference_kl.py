"""KL-Shampoo of the reference implementation: statistics through the roots."""

from __future__ import annotations

from typing import Any

from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.linalg import Solver
from funshampoo.operators.exponents import Exponents, inverse_exponents
from funshampoo.recipes.in_blocks import in_blocks
from funshampoo.transforms import ema, graft, kl_statistics, root_inverse


def kl_by_roots(
    learning_rate: Hyper | Schedule,
    *,
    beta1: Hyper,
    beta2: Hyper,
    beta3: Hyper | None,
    epsilon: Hyper,
    every: int,
    start: int,
    grafting: GradientTransformation | None,
    vectors: str,
    bias_correction: bool,
    weighted: bool,
    exponents: Exponents | None,
    trace_scaling: Hyper | None,
    solver: Solver,
    initial_eigenvalue: float,
    own_steps: bool,
    **options: Any,
) -> GradientTransformation:
    """`shampoo` with KL-Shampoo's statistics, for what `from_reference` gives to either.

    The reference sees a side through the other sides' roots as they are, by default of exponent
    1/(2k) where KL-Shampoo wants 1/2, and leaves the mean over columns out.
    """

    def sides(block: tuple[int, ...]) -> list[bool]:
        return [e > 0 for e in inverse_exponents(len(block), exponents)]

    roots = root_inverse(
        every,
        start=start,
        epsilon=epsilon,
        solver=solver,
        exponents=exponents,
        trace_scaling=trace_scaling,
        initial_eigenvalue=initial_eigenvalue,
    )
    statistics = kl_statistics(
        beta2,
        through="roots",
        bias_correction=bias_correction,
        weighted=weighted,
        normalized=False,
        own_steps=own_steps,
        sides=sides,
    )
    stages = [
        statistics,
        ema(beta1, beta3, bias_correction=bias_correction, own_steps=own_steps),
        roots if grafting is None else graft(roots, grafting, start=start),
    ]
    return in_blocks(stages, learning_rate=learning_rate, every=every, **options)
