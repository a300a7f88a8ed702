"""The contract: a gradient transformation is a pair of pure functions over pytrees.

    init(params) -> state
    update(updates, state, params=None, **context) -> (updates, state)

It is Optax's contract (https://optax.readthedocs.io, `GradientTransformation`) with one addition:
`update` may take keyword arguments, the *context*. A chain hands down

    gradient    what entered the innermost scope (see `funshampoo.blocked`); absent outside a scope
    upstream    the new states of the stages before this one, outermost first
    donate      True: the state passed in is consumed and its memory may be reused, also what it
                shares with the states before it
    block_ndim  how many leading axes of every leaf count blocks: 1 inside `blocked`, else 0
    step        the number of this step, counted from 1, when the caller knows it on the host
    refresh     True or False: whether this step recomputes the roots, decided by the caller
    finite      True: somebody has looked at what enters here, and a guard need not

and whatever else the caller passes. `init` receives `upstream` and `block_ndim` likewise. A
function that does not declare one of these names never sees it, so that a two- or three-argument
`update` written for Optax works unchanged.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funshampoo.core.modes import are_apart, is_plain
from funshampoo.core.tree import check_same_structure, compute_dtype, flatten, leaf_names

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
        apply: `apply(updates, state, params, **context) -> state`, for callers who own both state
            and parameters: as `update` with donate=True, followed by W ← W + U in the parameters'
            own memory. None where nothing is won by that; see `update_in_place`.
        refreshes: `refreshes(state, step=None) -> bool`: whether the update of this state, step
            number `step` if the caller knows, recomputes roots by the transformation's own
            schedule. A combinator answers for its parts (`any_refreshes`). None: nothing does.

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
    apply: Callable[..., State] | None = None
    refreshes: Callable[..., bool] | None = None

    def __post_init__(self) -> None:
        # Frozen for everybody else; this is the way in.
        object.__setattr__(self, "name", self.name or _name_of(self.update))
        object.__setattr__(self, "init", _adapted(self.init, 1, ()))
        object.__setattr__(self, "update", _adapted(self.update, 2, ("params",)))
        if self.apply is not None:
            object.__setattr__(self, "apply", _adapted(self.apply, 3, ()))

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        yield self.init
        yield self.update


def stateless(function: Callable[..., Tree], name: str = "") -> GradientTransformation:
    """A stage without a state from `function(updates, params=None, **context) -> updates`.

    >>> import torch
    >>> sign = stateless(lambda updates: {name: u.sign() for name, u in updates.items()}, "sign")
    >>> sign.update({"w": torch.tensor([3.0, -2.0])}, EmptyState())[0]
    {'w': tensor([ 1., -1.])}
    """
    call = _adapted(function, 1, ("params",))

    def update(
        updates: Tree, state: EmptyState, params: Tree = None, **context: Any
    ) -> tuple[Tree, EmptyState]:
        return call(updates, params, **context), state

    return GradientTransformation(lambda params: EmptyState(), update, name or _name_of(function))


def renamed(stage: GradientTransformation, name: str) -> GradientTransformation:
    """The same functions under another name."""
    return GradientTransformation(stage.init, stage.update, name, stage.apply, stage.refreshes)


@dataclass(frozen=True)
class AnyRefreshes:
    """`GradientTransformation.refreshes` of a combinator: it does when one of its parts does.

    Args:
        parts_of: state -> {name: part}.
        state_of: (state, name) -> the part's state.
    """

    parts_of: Callable[[Any], Mapping[str, GradientTransformation]]
    state_of: Callable[[Any, str], Any] = getattr

    def __call__(self, state: State, step: int | None = None) -> bool:
        """Whether roots are recomputed."""
        asked = [(name, part.refreshes) for name, part in self.parts_of(state).items()]
        return any([ask(self.state_of(state, name), step) for name, ask in asked if ask])

    def unasked(self, state: State) -> list[State]:
        """The states of those parts, at any depth, that do not say when they refresh."""
        found = []
        for name, part in self.parts_of(state).items():
            found += unasked_states(part.refreshes, self.state_of(state, name))
        return found


def any_refreshes(
    parts: Mapping[str, GradientTransformation], state_of: Callable[[Any, str], Any] = getattr
) -> AnyRefreshes | None:
    """`AnyRefreshes` of these parts; None where no part ever refreshes."""
    if all(part.refreshes is None for part in parts.values()):
        return None
    return AnyRefreshes(lambda state: parts, state_of)


def unasked_states(refreshes: Callable[..., bool] | None, state: State) -> list[State]:
    """What of a state is nobody's who says when it refreshes."""
    if refreshes is None:
        return [state]
    unasked = getattr(refreshes, "unasked", None)
    return [] if unasked is None else list(unasked(state))


def is_refresh(
    transformation: GradientTransformation, state: State, context: Mapping[str, Any]
) -> bool:
    """Whether an update in this context recomputes roots, as far as that is known on the host."""
    if context.get("refresh") is not None:
        return bool(context["refresh"])
    ask = transformation.refreshes
    return ask is not None and ask(state, context.get("step"))


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
    return stateless(lambda updates: updates, "identity")


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """W + U for every leaf, rounded once to the parameter's dtype.

    Args:
        params: tree of parameters.
        updates: tree of the same structure, as a chain returns it (the step already carries its
            sign). Where a leaf is None the parameter is returned as it is.

    Returns:
        New parameters with the dtypes of the old. Half-precision parameters are added to in
        float32 and rounded to nearest once. Autograd records the sum: detach parameters that
        require gradients first, unless gradients through training are wanted.

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


def add_in_place(params: Tree, updates: Tree) -> None:
    """W ← W + U in the parameters' own memory, with the roundings of `apply_updates`.

    Raises:
        ValueError: the trees differ; the message names the leaf. Nothing is changed then.

    >>> import torch
    >>> params = {"w": torch.ones(2)}
    >>> add_in_place(params, {"w": torch.tensor([0.5, -1.0])})
    >>> params
    {'w': tensor([1.5000, 0.0000])}
    """
    check_same_structure(params, updates, "params", "updates")
    leaves, spec = flatten(params)
    pairs = [(p, u) for p, u in zip(leaves, spec.flatten_up_to(updates)) if u is not None]
    if torch.compiler.is_compiling():
        # torch 2.13: a graph forgets what it writes into a 0-dimensional float64 input on a CPU.
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
            p.copy_(torch.add(p.to(compute_dtype(p)), u))


def update_in_place(
    transformation: GradientTransformation,
    updates: Tree,
    state: State,
    params: Tree,
    **context: Any,
) -> State:
    """A step that consumes the state and changes the parameters: `update`, then `add_in_place`.

    Where the transformation has an `apply`, its updates are never held all at once.

    Args:
        transformation: any; its state is donated, and with it what earlier states share with it: a
            pure step that refreshes no roots hands the old ones on.
        updates: the gradients. They are not written to.
        params: detached from autograd.

    Returns:
        The new state.

    Raises:
        ValueError: a parameter requires gradients, outside torch.no_grad(). Nothing is changed.

    >>> import torch
    >>> from funshampoo import sgd
    >>> tx = sgd(0.1)
    >>> params = {"w": torch.ones(2)}
    >>> state = update_in_place(tx, {"w": torch.ones(2)}, tx.init(params), params)
    >>> params
    {'w': tensor([0.9000, 0.9000])}
    """
    if torch.is_grad_enabled():
        _check_writable(params)
    context |= {"donate": True}
    if transformation.apply is not None:
        return transformation.apply(updates, state, params, **context)
    found, state = transformation.update(updates, state, params, **context)
    add_in_place(params, found)
    return state


def _check_writable(params: Tree) -> None:
    for i, p in enumerate(flatten(params)[0]):
        if isinstance(p, Tensor) and p.requires_grad and p.is_leaf:
            raise ValueError(
                f"parameter '{leaf_names(params)[i]}' requires gradients, and autograd lets nobody "
                "write to it: pass p.detach(), or step under torch.no_grad()."
            )


def _name_of(update: Callable[..., Any]) -> str:
    """`momentum` for the function `momentum.<locals>.update`; `stage` where there is no such."""
    code = getattr(update, "__code__", None)  # which torch.compile can read, unlike __qualname__
    qualified = code.co_qualname if code is not None else ""
    outer, _, own = qualified.rpartition(".<locals>.")
    name = (outer or own).rpartition(".")[2]
    return "stage" if name in ("", "update", "<lambda>") or name.startswith("_") else name


def _adapted(
    function: Callable[..., Any], required: int, optional: tuple[str, ...]
) -> Callable[..., Any]:
    """Give `function` a signature that takes any context and drops what it did not declare.

    `required` positional arguments are always passed. The `optional` one after them (params) is
    passed by place where the function has that place, by name where it declares it as a keyword.
    """
    positional, needed, known, variadic, any_keyword = _signature(function)
    places = required + len(optional)
    takes_all = any_keyword and positional >= places and not variadic and known >= set(optional)
    if takes_all and needed <= required:
        return function
    most = places if variadic else min(positional, places)

    def adapted(*args: Any, **context: Any) -> Any:
        missing = [context.pop(name, None) for name in optional[len(args) - required :]]
        given = (*args, *missing)
        for name, value in zip(optional[most - required :], given[most:]):
            context[name] = value
        kept = {name: value for name, value in context.items() if any_keyword or name in known}
        return function(*given[:most], **kept)

    return adapted


def _signature(function: Callable[..., Any]) -> tuple[int, int, frozenset[str], bool, bool]:
    """What a function takes.

    (number of positional parameters, of those without a default, names that work as keywords, has
    *args, has **kwargs).

    A plain function is asked for its code object, which torch.compile can trace through where
    `inspect` can't: `inject_hyperparams` builds transformations inside `update`.
    """
    if isinstance(function, types.FunctionType) and not hasattr(function, "__wrapped__"):
        code = function.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        variadic = bool(code.co_flags & inspect.CO_VARARGS)
        any_keyword = bool(code.co_flags & inspect.CO_VARKEYWORDS)
        by_keyword = frozenset(names[code.co_posonlyargcount :])
        # torch.compile can't look at defaults; without them all is adapted, which is right too.
        defaults = () if torch.compiler.is_compiling() else function.__defaults__ or ()
        needed = code.co_argcount - len(defaults)
        return code.co_argcount, needed, by_keyword, variadic, any_keyword
    parameters = list(inspect.signature(function).parameters.values())
    kinds = [p.kind for p in parameters]
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return (
        len(places),
        sum(p.default is p.empty for p in places),
        frozenset(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY),
        inspect.Parameter.VAR_POSITIONAL in kinds,
        inspect.Parameter.VAR_KEYWORD in kinds,
    )
