"""Applying updates to parameters: W + U as a new tree, or in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.core.context import Context, changed, context_of
from funshampoo.core.contract import GradientTransformation, State, Tree, TreeT
from funshampoo.core.elementwise import local_step
from funshampoo.core.fit import Entered
from funshampoo.core.interrupted import Watched, tensors_of
from funshampoo.core.live import check_values
from funshampoo.core.modes import are_apart, for_keeps, is_plain
from funshampoo.core.of_parts import checked_pair
from funshampoo.core.parameters import as_entering
from funshampoo.core.placed import all_placed_like, any_in_parts, local_parts, placed_as
from funshampoo.core.tree import check_same_structure, wide
from funshampoo.core.writable import check_writable


def apply_updates(params: TreeT, updates: Tree) -> TreeT:
    """W + U for every leaf, rounded once to the parameter's dtype.

    Args:
        params: tree of parameters.
        updates: tree of the same structure, as a chain returns it (the step already carries its
            sign). For a leaf that is None the parameter is returned unchanged.

    Returns:
        New parameters with the dtypes of the old. Half-precision parameters are added in float32
        and rounded to nearest once: a step below 2^-9 of a weight in bfloat16, 2^-12 in float16,
        leaves it unchanged, however often; the remedy is `stochastic_rounding`. Autograd records
        the sum: detach parameters that require gradients first, unless you want gradients through
        training.

    Raises:
        ValueError: the trees differ; the message names the leaf.

    >>> import torch
    >>> apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([0.5, -1.0])})
    {'w': tensor([1.5000, 0.0000])}
    """
    (leaves, spec), (steps, _) = check_same_structure(params, updates, "updates")

    def add(p: Tensor, u: Tensor | None) -> Tensor:
        if u is None:
            return p
        return torch.add(wide(p), u).to(p.dtype)

    found: TreeT = spec.unflatten([add(p, u) for p, u in zip(leaves, steps)])
    return found


def add_in_place(params: Tree, updates: Tree) -> None:
    """W ← W + U in place in the parameters, with the roundings of `apply_updates`.

    Raises:
        ValueError: the trees differ; the message names the leaf. Nothing is changed.

    >>> import torch
    >>> params = {"w": torch.ones(2)}
    >>> add_in_place(params, {"w": torch.tensor([0.5, -1.0])})
    >>> params
    {'w': tensor([1.5000, 0.0000])}
    """
    (leaves, _), (steps, _) = check_same_structure(params, updates, "updates")
    pairs = [(p, u) for p, u in zip(leaves, steps) if u is not None]
    if any_in_parts(leaves):
        own, found = [p for p, _ in pairs], [u for _, u in pairs]
        pairs = list(zip(local_parts(own), local_parts(all_placed_like(found, own))))
    if torch.compiler.is_dynamo_compiling():
        # torch 2.13: a graph loses what it writes to a 0-dimensional float64 input on a CPU.
        pairs = [(p, u) if p.ndim else (p.view(1), u.reshape(1)) for p, u in pairs]
    alike = [(p, u) for p, u in pairs if p.dtype == u.dtype]
    targets = [p for p, _ in alike]
    if alike and is_plain(*zip(*alike)) and are_apart(targets):
        torch._foreach_add_(targets, [u for _, u in alike])
    else:
        for p, u in alike:
            p.add_(u)
    for p, u in pairs:
        if p.dtype != u.dtype:
            p.copy_(torch.add(wide(p), u))


def update_in_place(
    transformation: GradientTransformation,
    updates: Tree,
    state: State,
    params: Tree,
    **context: Any,
) -> State:
    """A donated, in-place step: `update`, consuming the state, then `add_in_place`.

    If the transformation has an `apply`, its updates are never held all at once.

    Args:
        transformation: any. Its state is donated, including tensors that earlier states share with
            it (a pure step without a refresh passes on the old roots).
        updates: the gradients. They are not written to.
        params: detached from autograd.

    Returns:
        The new state.

    Raises:
        ValueError, TypeError: as `GradientTransformation.update`. A parameter can't be written to:
            it, its gradient or the state requires gradients, outside torch.no_grad(); or several of
            its entries share memory. Nothing is changed.
        InterruptedStepError: an earlier step of this state did not finish. Any exception, including
            KeyboardInterrupt, that ends a step after its first write marks the state.

    >>> import torch
    >>> from funshampoo import sgd
    >>> tx = sgd(0.1)
    >>> params = {"w": torch.ones(2)}
    >>> state = update_in_place(tx, {"w": torch.ones(2)}, tx.init(params), params)
    >>> params
    {'w': tensor([0.9000, 0.9000])}
    """
    tx = transformation
    given = context_of(context | {"donate": True}, tx.accepts, tx.live, tx.wants)
    if given.hyper:
        check_values(given.hyper, transformation.lives)
    if torch.compiler.is_dynamo_compiling():
        return applied(transformation, placed_as(updates, params), state, params, given)
    watched = Watched(state, params)
    with watched:
        step = Entering(transformation, updates, state, params, given).checked(watched.state)
        return step.applied()


class Entering(NamedTuple):
    """An in-place step that has not started.

    Attributes:
        ascends: whether to maximize: the gradients are negated.
        entered: the result of `checked`.
    """

    transformation: GradientTransformation
    updates: Tree
    state: State
    params: Tree
    context: Context
    ascends: bool = False
    entered: Entered | None = None

    def checked(self, tensors: Sequence[Tensor]) -> Entering:
        """The same step, once the checks have shown that it is possible.

        Several steps may be waiting, one per group of the wrapper, so nothing is copied yet.

        Args:
            tensors: those of the state.

        Raises:
            ValueError, TypeError: as `update_in_place`; and any that a step raises before a write.
        """
        tx, updates, state, params, context, *_ = self
        if params is None:
            raise ValueError(
                "params is None, and update_in_place changes parameters: pass them, or call "
                "update, which returns the updates."
            )
        updates, entered = tx.checked(updates, state, params, context)
        check_writable(params, entered.known, entered.gradients, tensors)
        return changed(self, updates=updates, entered=entered)

    def applied(self) -> State:
        """The state after the step: one that was made outside of inference mode stays so."""
        if torch.is_inference_mode_enabled() and not self._is_of_inference():
            with for_keeps():  # which ends that mode
                return self.applied()
        tx, updates, state, params, context, ascends, entered = self
        assert entered is not None, "nobody has checked it"
        casts = entered.looks.unlike and not tx.casts
        if casts or ascends:
            updates = as_entering(updates, params, casts, ascends)
        new = applied(tx, updates, state, params, changed(context, entered=entered))
        tx._fits.made((None, new), entered.looks)
        return new

    def _is_of_inference(self) -> bool:
        """Whether only inference mode may write to some of it."""
        tensors = (*tensors_of(self.state), *tensors_of(self.params))
        return any([x.is_inference() for x in tensors])


def applied(
    transformation: GradientTransformation,
    updates: Tree,
    state: State,
    params: Tree,
    context: Context,
) -> State:
    """`update_in_place` for a part, in a donated context."""
    if transformation.apply is not None:
        return transformation.apply(updates, state, params, context)
    local = local_step(updates, params, context) if transformation.elementwise else None
    if local is not None and local.fits(state):
        found, state = local.run(transformation, state)
        add_in_place(local.params, found)
        return state
    found, state = checked_pair(
        transformation.run(updates, state, params, context), transformation.name
    )
    add_in_place(params, found)
    return state


def apply_of(update: Callable[..., tuple[Any, State]]) -> Callable[..., State]:
    """The `apply` of a combinator whose `update` also takes `in_place=True`.

    The updates that it then returns are unused: the parameters include them.
    """

    def apply(updates: Tree, state: State, params: Tree, context: Context) -> State:
        return update(updates, state, params, context, in_place=True)[1]

    return apply
