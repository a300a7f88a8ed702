"""All checks, in order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from funshampoo.core.contract import Tree
from funshampoo.state.nodes import find_state
from funshampoo.state.stages import BlockedState
from funshampoo.testing import blocks, contract, numbers, transformed
from funshampoo.testing.trial import StageError, Trial


class _Check(NamedTuple):
    """One check: what it tests, and the remedy if the stage raises an error meanwhile.

    option: the argument of check_stage that switches it off; "" if there is none.
    """

    run: Callable[[Trial], None]
    tries: str
    remedy: str
    option: str = ""

    def applies(self, trial: Trial) -> bool:
        """Whether it is enabled and, if it is about blocks, the stage makes none itself."""
        if self.option != "blocks" or not trial.options["blocks"]:
            return not self.option or bool(trial.options[self.option])
        return find_state(trial.tx.init(trial.params), BlockedState) is None


_PLAIN = "A stage has to take any tree of dense floating-point tensors."
_CLOCKLESS = (
    " It declares `step` or `clock`, which are None outside a chain: "
    "check_stage(lambda: chain(mine()))."
)
_INSIDE = (
    "Declare block_ndim, and take the axes from it on for the block's own; for a stage that stands "
    "outside of blocked, pass blocks=False."
)
_ON_HOST = (
    "Take branches on Python values and read no tensor on the host (.item(), float(x), if x:), but "
    "choose by torch.where."
)

_CHECKS = (
    _Check(contract.returns_pairs, "a step", _PLAIN),
    _Check(contract.state_is_of_tensors, "a step", _PLAIN),
    _Check(contract.arguments_are_untouched, "some steps", _PLAIN),
    _Check(contract.shapes_are_stable, "some steps", _PLAIN),
    _Check(contract.twice_is_the_same, "steps that are repeated", _PLAIN),
    _Check(contract.steps_of_a_phase_are_alike, "step=", _PLAIN),
    _Check(contract.memory_is_apart, "steps with apply_updates", _PLAIN),
    _Check(contract.donation_changes_no_number, "donate=True", "Handle donate, or ignore it."),
    _Check(contract.in_place_is_the_same, "update_in_place", "Look at the stage's `apply`."),
    _Check(
        numbers.none_leaves_alone,
        "a gradient of None",
        "Go over the leaves by update_leaves of funshampoo.authoring, which leaves such a one "
        "alone; for a stage that needs all gradients by nature, pass none=False.",
        "none",
    ),
    _Check(
        numbers.resumes_from_a_pickle,
        "torch.save",
        "Keep tensors alone in the state, in named tuples that stand at the top of a module.",
    ),
    _Check(
        numbers.resumes_from_a_checkpoint,
        "state_dict and load_state_dict",
        "Let the state be a named tuple whose fields are trees like the parameters, or tensors.",
    ),
    _Check(
        numbers.half_precision_is_kept_in_float32,
        "parameters in half precision",
        "Compute in compute_dtype(u) of funshampoo.authoring, and cast the updates to it.",
    ),
    _Check(
        numbers.dtypes_may_mix,
        "a tree of several dtypes",
        "Take dtypes from the leaf that is worked on.",
    ),
    _Check(numbers.parts_are_parts_of_the_whole, "parts of the leaves", _PLAIN),
    _Check(blocks.rows_lead, "block space", _INSIDE, "blocks"),
    _Check(blocks.rows_in_another_order, "block space", _INSIDE, "blocks"),
    _Check(blocks.rows_in_two_parts, "block space", _INSIDE, "blocks"),
    _Check(blocks.rows_are_rounded_alike, "block space", _INSIDE, "blocks"),
    _Check(blocks.faulty_blocks_are_held, "guarded around it", _INSIDE, "blocks"),
    _Check(transformed.ensembles_are_loops, "torch.func.vmap", _ON_HOST, "vmap"),
    _Check(transformed.compiles_to_one_graph, "torch.compile", _ON_HOST, "compile"),
    _Check(
        transformed.gradients_flow,
        "torch.func.grad",
        "Do with torch operators whatever depends on the gradient, and detach nothing; for a stage "
        "without a derivative, pass differentiable=False.",
        "differentiable",
    ),
    _Check(
        transformed.derivatives_are_right,
        "a derivative through some steps",
        "A torch.autograd.Function needs both a backward and a jvp; for a stage without a "
        "derivative, pass differentiable=False.",
        "differentiable",
    ),
)


def check_stage(
    stage: Any,
    *,
    params: Tree = None,
    steps: int = 6,
    context: Mapping[str, Any] | None = None,
    none: bool = True,
    blocks: bool = True,
    bitwise: bool = True,
    vmap: bool = True,
    compile: bool | str = True,
    differentiable: bool = True,
) -> None:
    """Check that a stage meets the contract, on a few steps with random gradients.

    A stage that passes can be used in any chain, and works with ranks, checkpoints, ensembles,
    donation, compilation, guards and reports as funshampoo's own stages do. Checked in this order,
    up to the first failure: it returns (updates, state), its state consists of tensors, arguments
    are not written to, the same call gives the same result, `phase` tells steps apart, shapes and
    dtypes stay, memory is not shared, donated and in-place steps give the same bits; a gradient of
    None leaves its parameter alone; a saved state resumes bitwise; half precision is computed in
    float32, and dtypes may mix; a stage declared elementwise gives the same on parts of the leaves;
    inside `blocked` a block's numbers depend on no other block, bit by bit, and a block whose
    gradient is NaN is held by `guarded`; vmap equals a loop; torch.compile makes one graph;
    derivatives with respect to the gradient are finite, and those through some steps, backward and
    forward, agree with finite differences.

    Where results may differ by rounding (ensembles, graphs, leaves beside a gradient of None), the
    tolerance is the root of the dtype's epsilon, relative to the largest entry of a tensor: 1.5e-8
    in float64.

    Args:
        stage: a transformation, or a function without arguments that makes one; then states are
            resumed by another instance, which detects memory outside the state. Include the earlier
            stages that it reads from: chain(kronecker_statistics(), mine()).
        params: a tree of parameters; by default a matrix, a tensor of order 3, a vector and a
            scalar, in float64. Blocks have the shapes of its leaves.
        steps: enough for everything that the stage does, such as the second refresh; 4 or more. A
            stage that rotates its input by an eigenbasis should start when the matrices have full
            rank, or rounding decides the rest of the basis.
        context: arguments that a step needs, such as {"value": 1.0}.
        none: False if a leaf's update depends on the other leaves, as in `clip_by_global_norm`, or
            on several steps, as in `multi_steps`.
        blocks: False if a stage can't be used inside `blocked`, or looks across blocks there. Not
            needed for a stage that contains a `blocked`.
        bitwise: False if a block may be rounded by its place in a stack: on a CPU, several ranks
            are then not bitwise one process. What torch rounds alike depends on shapes, of which
            only those of `params` are tried.
        vmap: False if a stage reads a value on the host.
        compile: False if a stage can't be traced, or to save time; or the name of a backend instead
            of "eager". It empties the caches of torch.compile.
        differentiable: False if a stage has no derivative, or not a finite one; or rounds to half
            precision, which finite differences see and autograd does not.

    Raises:
        StageError: with the stage, what was seen, and the remedy.
        TypeError: `stage` is a function that needs arguments.

    >>> from funshampoo import ema
    >>> check_stage(lambda: ema(0.9), compile=False)
    """
    options = {"none": none, "blocks": blocks, "vmap": vmap, "differentiable": differentiable}
    options["bitwise"] = bitwise
    trial = Trial(stage, params, steps, dict(context or {}), compile=compile, **options)
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):  # torch's, not the stage's fault
            warnings.filterwarnings("ignore", category=kind, module=r"torch\b")
        for check in _CHECKS:
            try:
                if check.applies(trial):
                    check.run(trial)
            except StageError:
                raise
            except Exception as error:
                seen = f"{check.tries} raised {type(error).__name__}: {str(error).rstrip('. ')}"
                lacks = _CLOCKLESS if trial.tx.counts and trial.tx.name != "chain" else ""
                raise StageError(f"{trial.tx!r}: {seen}. {check.remedy}{lacks}") from error
