"""The chain of a parameter group, rebuilt when an edit of the group requires it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from funshampoo.core.checks import check_flag
from funshampoo.core.contract import GradientTransformation
from funshampoo.core.live import Live
from funshampoo.core.modes import in_a_mode, unwrapped
from funshampoo.migrate.wording import raise_naming
from funshampoo.optim.execution import Execution
from funshampoo.optim.values import untouched
from funshampoo.optim.vocabulary import Method, Vocabulary

_MANY = 4  # this many graphs of one group: probably it is edited on every step


class Built(NamedTuple):
    """A chain and what it was built from. Copies leave the chain out, since it holds functions.

    Attributes:
        raw: the entries of the group that it was built from.
        structure: the part of the arguments that can change the structure of the state.
        live: the numbers that the chain looks up on every step; see `core.live`.
        hyper: their values, for the context.
    """

    vocabulary: Vocabulary
    raw: list[Any]
    arguments: dict[str, Any]
    structure: Any
    transformation: GradientTransformation | None
    live: dict[str, Live]
    hyper: dict[str, Any]

    def without_functions(self) -> Built:
        """A copy without the fields that pickle and deepcopy can't handle."""
        return self._replace(transformation=None, raw=[], live={})


class Builder:
    """Builds the chains of one group.

    Args:
        group: their group.
        method: the method of a group that has none of its own.
        execution: what is wrapped around the chains.
    """

    def __init__(self, group: dict[str, Any], method: Method, execution: Execution) -> None:
        self._group = group
        self._method = method
        self._execution = execution
        self._graphs = 0
        self._entries = set(group)  # those that it has had
        self._size = len(group)

    def build(self, vocabulary: Vocabulary, group: Mapping[str, Any]) -> Built:
        """The chain of a group.

        Raises:
            TypeError, ValueError: an argument is missing or out of range.
        """
        arguments = vocabulary.arguments(group)
        live = vocabulary.live(arguments)
        transformation = _by_torchs_names(vocabulary.build, vocabulary.with_live(arguments, live))
        hyper = vocabulary.hyper(arguments, live)
        for name, x in hyper.items():
            if isinstance(x, Tensor):  # numbers were checked when the chain was built
                _check_value(live[name], x)
        self._execution.check(arguments, {*live, vocabulary.rate}, transformation)
        if self._execution.in_graphs:
            self._count_graph()
        transformation = self._execution.wrap(transformation)
        structure = vocabulary.structure(arguments, live)
        raw = vocabulary.raw(group)
        return Built(vocabulary, raw, arguments, structure, transformation, live, hyper)

    def current(self, group: Mapping[str, Any], before: Built) -> Built:
        """The chain for the group as it is now: the previous one, if it is still valid.

        Raises:
            TypeError, ValueError: an edited value is out of range.
        """
        check_flag("maximize", group.get("maximize", False))
        if group is self._group and len(group) != self._size:  # not one that may be refused
            self._warn_new(before.vocabulary)
        method = group.get("method", self._method)
        if before.vocabulary.method is not method:
            return self.build(Vocabulary(method), group)
        vocabulary = before.vocabulary
        if before.transformation is None:  # a copy
            return self.build(vocabulary, group)
        raw = vocabulary.raw(group)
        if untouched(raw, before.raw):
            return before
        arguments, in_graph = vocabulary.arguments(group), self._execution.in_graphs
        if not vocabulary.same_chain(arguments, before.arguments, before.live, in_graph):
            return self.build(vocabulary, group)
        hyper = vocabulary.hyper(arguments, before.live)
        for name, live in before.live.items():
            if hyper[name] is not before.hyper[name]:
                _check_value(live, hyper[name])
        return before._replace(raw=raw, arguments=arguments, hyper=hyper)

    def _warn_new(self, vocabulary: Vocabulary) -> None:
        """Warn, once, of what has come to the group and looks like a misspelt hyperparameter."""
        new = self._group.keys() - self._entries
        self._entries, self._size = self._entries | new, len(self._group)
        vocabulary.warn_unknown(new, edited=True)

    def _count_graph(self) -> None:
        self._graphs += 1
        if self._graphs == _MANY:
            word = "cuda_graph" if self._execution.cuda_graph else "compile"
            warnings.warn(
                f"{word}: param_groups are edited again and again, and every edit is compiled "
                "anew, which takes time, but for that of a number that the recipe looks up on "
                "every step, as those of funshampoo do. Keep the rest as it is, or leave out "
                f"{word}.",
                stacklevel=2,
            )


def structure_differs(now: Built, before: Built) -> bool:
    """Whether a state of one chain may not fit the other."""
    same_method = now.vocabulary.method is before.vocabulary.method
    return now is not before and not (same_method and now.structure == before.structure)


def _check_value(live: Live, value: Any) -> None:
    """Raise if a live number is out of range; a tensor is read only if that needs no sync."""
    readable = isinstance(value, Tensor) and value.device.type == "cpu" and not in_a_mode()
    plain = unwrapped(value) if readable else None
    if plain is not None and plain.numel() == 1:
        value = plain.item()
    for check in live.checks:
        try:
            _by_torchs_names(check, value)
        except (TypeError, ValueError) as error:
            raise_naming(error, live.name.partition("[")[0])


def _by_torchs_names(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it; an error about `learning_rate` becomes one about lr, the group's name for it."""
    try:
        return function(*arguments)
    except (TypeError, ValueError) as error:
        if not str(error).startswith("learning_rate "):
            raise
        raise type(error)(str(error).replace("learning_rate", "lr", 1)) from error
