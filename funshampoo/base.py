"""The contract: a gradient transformation is a pair of pure functions over pytrees.

    init(params) -> state
    update(updates, state, params=None, **context) -> (updates, state)

It is Optax's contract (https://optax.readthedocs.io, `GradientTransformation`) with one addition:
`update` may take keyword arguments, the *context*. A chain hands down

    gradient    what entered the innermost scope (see `funshampoo.blocked`); absent outside a scope
    upstream    the new states of the stages before this one, outermost first
    donate      True: the state passed in is consumed and its memory may be reused
    block_ndim  how many leading axes of every leaf count blocks: 1 inside `blocked`, else 0
    step        the number of this step, counted from 1, when the caller knows it on the host
    refresh     True or False: whether this step recomputes the roots, decided by the caller

and whatever else the caller passes. `init` receives `upstream` and `block_ndim` likewise. A
function that does not declare one of these names never sees it, so that a two- or three-argument
`update` written for Optax works unchanged.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funshampoo.tree import check_same_structure, compute_dtype, flatten

Tree: TypeAlias = Any  # a pytree of tensors; mypy has no recursive type that optree and torch share
State: TypeAlias = Any
Hyper: TypeAlias = float | Tensor
Schedule: TypeAlias = Callable[[Tensor], Hyper]


class EmptyState(NamedTuple):
    """The state of a transformation that remembers nothing."""


@dataclass(frozen=True)
class GradientTransformation:
    """A pair of pure functions, `init` and `update`, and the name of the stage in a chain.

    Args:
        init: `init(params) -> state`; may also declare `upstream` and `block_ndim`.
        update: `update(updates, state, params=None, **context) -> (updates, state)`; it may leave
            out `params` and any name of the context.
        name: the key of this stage's state in a chain. By default the name of the function that
            `update` was defined in: a stage written as `def sign(): ... def update(...)` is `sign`.

    Unpacks as Optax's does: `init, update = transformation`.

    >>> import torch
    >>> def sign():
    ...     def update(updates, state):
    ...         return {name: u.sign() for name, u in updates.items()}, state
    ...     return GradientTransformation(lambda params: EmptyState(), update)
    >>> stage = sign()
    >>> stage.name
    'sign'
    >>> state = stage.init({"w": torch.zeros(2)})
    >>> stage.update({"w": torch.tensor([3.0, -2.0])}, state)[0]
    {'w': tensor([ 1., -1.])}
    """

    init: Callable[..., State]
    update: Callable[..., tuple[Tree, State]]
    name: str = ""

    def __post_init__(self) -> None:
        set_field = functools.partial(object.__setattr__, self)  # frozen: the only way in
        set_field("name", self.name or _name_of(self.update))
        set_field("init", _ignoring_unknown_context(self.init, required=1))
        set_field("update", _ignoring_unknown_context(self.update, required=2))

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        yield self.init
        yield self.update


def as_transformation(stage: Any) -> GradientTransformation:
    """Accept anything with `init` and `update` (an Optax-style named tuple, a plain pair).

    Raises:
        TypeError: `stage` has neither the two attributes nor the two items.
    """
    if isinstance(stage, GradientTransformation):
        return stage
    if hasattr(stage, "init") and hasattr(stage, "update"):
        return GradientTransformation(stage.init, stage.update)
    if isinstance(stage, tuple) and len(stage) == 2 and all(map(callable, stage)):
        return GradientTransformation(*stage)
    raise TypeError(
        f"{stage!r} is not a gradient transformation: expected an object with init and update. "
        "Did you pass the function that makes it, without calling it?"
    )


def identity() -> GradientTransformation:
    """The transformation that changes nothing.

    >>> identity().update({"w": 1.0}, EmptyState())
    ({'w': 1.0}, EmptyState())
    """

    def init(params: Tree) -> EmptyState:
        return EmptyState()

    def update(updates: Tree, state: EmptyState) -> tuple[Tree, EmptyState]:
        return updates, state

    return GradientTransformation(init, update)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """W + U for every leaf, rounded once to the parameter's dtype.

    Args:
        params: tree of parameters.
        updates: tree of the same structure, as a chain returns it (the step already carries its
            sign). Where a leaf is None the parameter is returned as it is.

    Returns:
        New parameters with the dtypes of the old. Half-precision parameters are added to in
        float32 and rounded to nearest once.

    Raises:
        ValueError: the trees differ; the message names the leaf.

    >>> import torch
    >>> apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([0.5, -1.0])})
    {'w': tensor([1.5000, 0.0000])}
    """
    check_same_structure(params, updates, "params", "updates")
    leaves, spec = flatten(params)

    def add(p: Tensor, u: Tensor | None) -> Tensor:
        if u is None:
            return p
        return torch.add(p.to(compute_dtype(p)), u).to(p.dtype)

    return spec.unflatten([add(p, u) for p, u in zip(leaves, spec.flatten_up_to(updates))])


def _name_of(update: Callable[..., Any]) -> str:
    """`momentum` for the function `momentum.<locals>.update`; `stage` where there is no such."""
    outer, _, _ = getattr(update, "__qualname__", "").partition(".<locals>")
    name = outer.rpartition(".")[2]
    return name if name not in ("", "update", "<lambda>") else "stage"


def _ignoring_unknown_context(function: Callable[..., Any], required: int) -> Callable[..., Any]:
    """Give `function` a signature that takes any context and drops what it did not declare.

    `required` positional arguments are always passed; the one after (params) only if declared.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return function
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    most = required + 1 if variadic or len(positional) > required else required

    @functools.wraps(function)
    def adapted(*args: Any, **context: Any) -> Any:
        kept = {name: value for name, value in context.items() if name in known}
        return function(*args[:most], **kept)

    return adapted
