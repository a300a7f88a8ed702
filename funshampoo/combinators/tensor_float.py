"""Products on a GPU's tensor cores: a chain that rounds the products of every step to TF32."""

from __future__ import annotations

from funshampoo.core.applying import applied, apply_of
from funshampoo.core.context import Context
from funshampoo.core.contract import GradientTransformation, State, Tree, as_transformation
from funshampoo.core.modes import asking_for_tf32
from funshampoo.core.traits import IN_TF32, with_traits


def in_tf32(inner: GradientTransformation) -> GradientTransformation:
    """The same transformation, with the products of every step rounded to TF32 on a GPU.

    float32 operands keep 10 bits of their fractions; sums stay float32. This rounds the products
    behind statistics, and those of gradients with roots, bases and orthogonalizing polynomials.
    What is recomputed periodically (roots, eigenvectors) stays in float32, whatever the process has
    asked for; float64 and other devices are not affected. Times are in docs/gpu.md. With rounding
    emulated in float64, blocks of 64 to 1,024 a side times two roots of power -1/4 erred by 0.04 to
    0.05 % for a white gradient, and for one drawn from the statistics by 0.05 % at a condition of
    1e2 and 0.3 % at 1e6 (bfloat16: 0.4 and 2 %).

    Without it products are float32 even if torch.set_float32_matmul_precision("high") was called
    for the model.

    Args:
        inner: a chain or stage. With `compiled`, `in_tf32(compiled(tx))`: a graph can't change the
            setting by which its kernels are chosen. Graphs of steps with a refresh are entirely
            float32; with stagger=True or every=1 that is all of them.

    The setting is process-wide: while a step runs, float32 products of other threads on a GPU are
    rounded as well.

    State: of `inner`.

    >>> import torch
    >>> from funshampoo import soap
    >>> tx = in_tf32(soap(0.1))
    >>> params = {"w": torch.ones(2, 2)}
    >>> updates, state = tx.update({"w": torch.eye(2)}, tx.init(params), params)
    """
    inner = as_transformation(inner)

    def update(
        updates: Tree, state: State, params: Tree, context: Context, *, in_place: bool = False
    ) -> tuple[Tree, State]:
        step = updates, state, params, context
        with asking_for_tf32():
            return (None, applied(inner, *step)) if in_place else inner.run(*step)

    stage = GradientTransformation(
        inner.init,
        update,
        inner.name,
        apply=apply_of(update),
        parts={"inner": inner},
        state_of=lambda state, name: state,
        passes=inner.passes,
        casts=inner.casts,
    )
    return with_traits(stage, IN_TF32)
