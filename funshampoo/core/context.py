"""What a stage may know about a step, besides its updates, state and the parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from funshampoo.core.checks import check_flag, check_step, hint
from funshampoo.core.tree import flatten

NOTHING: Mapping[str, Any] = {}  # read-only


class Context(NamedTuple):
    """What a chain passes down to its stages. A function gets the names that it declares.

    Attributes:
        upstream: the new states of the stages before this one, outermost first.
        earlier: the old states of the stages before this one, outermost first. With `donate`, they
            have already been overwritten.
        later: the old states of the stages after it, in its chain and then in the enclosing ones:
            for an earlier stage that reads a later one's state.
        gradient: what entered the innermost scope, such as `blocked`; None outside any.
        donate: the state passed in is consumed and its memory may be reused, including memory that
            it shares with earlier states.
        block_ndim: number of leading axes of every leaf that count blocks: 1 in `blocked`, else 0.
        step: the number of this step, from 1; None if it is not known on the host.
        refresh: True or False: the caller decides whether cached values are recomputed.
        clock: steps so far, () int64 on the CPU; None if nothing counts.
        rows: in block space {stack: a number for every row, counted through all stacks}, for
            whichever rows are here.
        alive: a tree like the updates of (N,) floating-point numbers, () outside block space: 0
            where a gradient was not finite, has been replaced by zeros, and must change nothing,
            else 1. None: all are 1.
        hyper: {name: number or tensor}: the values of live numbers, see `core.live`.
        extra: the caller's own keyword arguments, see `with_cut`.
        entered: what entered the outermost transformation (`core.fit.Entered`), for a part that
            gets the same trees. Neither callers nor functions can use this name, or the next.
        usable: everything that enters has been checked to be finite.
    """

    upstream: tuple[Any, ...] = ()
    earlier: tuple[Any, ...] = ()
    later: tuple[Any, ...] = ()
    gradient: Any = None
    donate: bool = False
    block_ndim: int = 0
    step: int | None = None
    refresh: bool | None = None
    clock: Tensor | None = None
    rows: Mapping[str, Sequence[int]] | None = None
    alive: Any = None
    hyper: Mapping[str, Any] = NOTHING
    extra: Mapping[str, Any] = NOTHING
    entered: Any = None
    usable: bool = False

    @property
    def previous(self) -> tuple[Any, ...]:
        """The old states of all other stages, passed to a function that declares this name."""
        return (*self.earlier, *self.later)


EMPTY = Context()
_OWN = ("extra", "entered", "usable")
PLACES = {n: i for i, n in enumerate(Context._fields) if n not in _OWN}


NodeT = TypeVar("NodeT", bound=tuple[Any, ...])


def changed(node: NodeT, **changes: Any) -> NodeT:
    """`node._replace(...)`, for a context, a state or another named tuple.

    torch 2.8 can't trace _replace; on 2.11 a graph that returns its result returns an empty tuple.
    Nor does 2.8 trace a part of a named tuple, node[1:].
    """
    kind: Any = type(node)
    found: NodeT = kind(*map(changes.get, kind._fields, node))
    return found


def context_of(
    names: Mapping[str, Any],
    accepted: Collection[str] | None,
    live: frozenset[str] | None = None,
    wanted: Collection[str] = (),
) -> Context:
    """Build the context from these keywords.

    Args:
        names: fields of `Context`, and the caller's own.
        accepted: the caller's own names that some stage declares; None: a stage takes any keyword.
        live: the names in `hyper` that some stage reads; None: possibly any.
        wanted: those of the caller's own names that have no default.

    Raises:
        TypeError: no stage knows a name, or it is close to one of the context's; one that a stage
            wants is missing; `donate` or `refresh` is not a bool, `step` not an int, `hyper` not a
            dict.
        ValueError: no stage reads the names in `hyper`, see `check_heard`; `step` is below 1.

    >>> context_of({"step": 3}, set()).step
    3
    """
    if not names and not wanted:
        return EMPTY
    own = {name: value for name, value in names.items() if name not in PLACES}
    for name in own:
        if accepted is None or name not in accepted:
            _check_known(name, accepted)
    for name in sorted(wanted):
        if name not in own:
            raise TypeError(
                f"a stage here needs '{name}': pass {name}=... to update or to Optimizer.step, or "
                "give the keyword a default."
            )
    for name in ("donate", "refresh"):
        if names.get(name) is not None:
            check_flag(name, names[name])
    if names.get("step") is not None:
        check_step(names["step"])
    hyper = NOTHING if names.get("hyper") is None else names["hyper"]
    if not isinstance(hyper, Mapping):
        raise TypeError(f"hyper is {hyper!r}; give a dict, {{name: number or tensor}}.")
    if hyper:
        check_heard(hyper, live)
    given = {name: value for name, value in names.items() if name in PLACES}
    return Context(**{**given, "hyper": hyper}, extra=own)


def with_cut(context: Context, updates: Any, cut: Callable[[Any], Any]) -> Context:
    """The context, with the caller's trees that are like the updates cut as these are.

    A tree is like them if it has their structure and, for each, a tensor of its shape; where the
    update is None, of any. What else the caller passes, such as a loss, stays as it is.
    """
    if not context.extra:
        return context
    leaves, spec = flatten(updates)

    def own(value: Any) -> Any:
        if isinstance(value, Tensor) and not value.ndim:  # a loss, say, beside a bare number
            return value
        found, its = flatten(value)
        alike = its == spec and all([_is_like(x, u) for x, u in zip(found, leaves)])
        return cut(value) if alike else value

    return changed(context, extra={name: own(value) for name, value in context.extra.items()})


def _is_like(x: Any, update: Any) -> bool:
    return isinstance(x, Tensor) and (update is None or x.shape == update.shape)


def as_keywords(context: Context) -> dict[str, Any]:
    """The names that are set, for a function that takes any keyword."""
    given = {name: context[i] for name, i in PLACES.items() if context[i] is not EMPTY[i]}
    return given | dict(context.extra)


def _check_known(name: str, accepted: Collection[str] | None) -> None:
    known = [*PLACES, *(accepted or ())]
    near = hint(name, known, least=0.8 if accepted is None else 0.6)
    if accepted is None and near == ".":
        return
    raise TypeError(
        f"no stage here knows '{name}'{near} A stage that wants a value of the caller's declares "
        "its name as a keyword of update."
    )


def check_own(names: Collection[str], accepted: Sequence[Collection[str] | None]) -> None:
    """Check that these are the caller's own names, and that a chain knows each.

    Args:
        accepted: by each chain; None: any.

    Raises:
        TypeError: nobody knows a name, or the context has another value of that name.
    """
    known = None if None in accepted else {name for own in accepted for name in own or ()}
    for name in names:
        if name in PLACES:
            raise TypeError(f"'{name}' is not the caller's to say here: the optimizer itself does.")
        if known is None or name not in known:
            _check_known(name, known)


def check_heard(given: Collection[str], known: frozenset[str] | None) -> None:
    """Check that some stage reads what a caller passes in `hyper`.

    A number whose part of the recipe is switched off (dampening without momentum) is not read, but
    is allowed along with others that are: the wrapper passes all numbers of a group.

    Args:
        given: names.
        known: names that stages read; None: some stage may read any.

    Raises:
        ValueError: none of the names is read; or one is not, and is close to one that is read and
            not given. Names the nearest.
    """
    if known is None or not given or known.issuperset(given):
        return
    missing, some_read = known.difference(given), not known.isdisjoint(given)
    if some_read and not missing:
        return  # the usual call by the wrapper, on every step
    unread = sorted(set(given) - known)
    wrong = next((name for name in unread if hint(name, missing) != "."), None)
    if wrong is None and some_read:
        return
    name = unread[0] if wrong is None else wrong
    names = ", ".join(sorted(known))
    raise ValueError(
        f"hyper: no stage here reads a live number '{name}'{hint(name, missing)} "
        + (
            f"Live are {names}."
            if known
            else "None is live: build the chain with funshampoo.authoring.Live."
        )
    )
