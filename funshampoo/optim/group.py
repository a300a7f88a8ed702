"""One parameter group of the wrapper: its chain, and the chain's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.base import GradientTransformation
from funshampoo.optim.vocabulary import Method, Vocabulary, same_arguments, structural
from funshampoo.state.checkpoint import (
    FORMAT,
    FORMAT_KEY,
    Loaded,
    load_state_dict,
    named_tensors,
    state_dict,
)
from funshampoo.state.places import owns_all
from funshampoo.state.stages import BlockedState, walk

_SHARED = "shared/"  # what is nobody's stands with every parameter, so that no tool drops it


class _Known(NamedTuple):
    """A parameter as the state was made for it."""

    name: str
    parameter: Tensor
    device: torch.device
    dtype: torch.dtype


class GroupRun:
    """The chain of one group, rebuilt when its numbers change, and the state, made when needed.

    Args:
        group: of `param_groups`.
        method: of the groups that have none of their own.
        first: how many parameters the groups before it have.
    """

    def __init__(self, group: dict[str, Any], method: Method, first: int) -> None:
        self._method = method
        self._first = first
        self._state: Any = None
        self._known: list[_Known] = []
        self._arguments: dict[str, Any] | None = None
        self._built: GradientTransformation | None = None
        self._transformation(group)  # an argument out of range is an error now

    def names(self, group: Mapping[str, Any]) -> list[str]:
        """The names of all its parameters: those given, or param_0, param_1, ..."""
        given = group.get("param_names")
        return given or [f"param_{self._first + i}" for i in range(len(group["params"]))]

    def step(self, group: dict[str, Any]) -> None:
        """Read the gradients, and step. Parameters without a gradient are left alone."""
        state = self.current(group)
        tx = self._transformation(group)
        parameters = {known.name: known.parameter for known in self._known}
        gradients = {name: _gradient(name, p, group) for name, p in parameters.items()}
        if all(g is None for g in gradients.values()) and _alone(state):
            return
        detached = {name: p.detach() for name, p in parameters.items()}
        updates, self._state = tx.update(gradients, state, detached, donate=True)
        for name, p in detached.items():
            _add(p, updates[name])

    def current(self, group: dict[str, Any]) -> Any:
        """The state for the group as it is now.

        Where parameters were moved, frozen or unfrozen, or a part was switched on or off, what
        still has a place is carried over by name.
        """
        before = self._arguments
        tx = self._transformation(group)
        known = self._trainable(group)
        changed = before is None or structural(before) != structural(self._arguments or {})
        if self._state is None:
            self._state = tx.init({k.name: k.parameter.detach() for k in known})
        elif changed or not _same_parameters(known, self._known):
            self._state = _carried_over(tx, known, self._state)
        self._known = known
        return self._state

    def by_parameter(self, group: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """{parameter: {name: view of the state}}."""
        tensors = named_tensors(self.current(group))
        owners = {known.name: known.parameter for known in self._known}
        shared = {
            _SHARED + "/".join(filter(None, [owner, rest])): x
            for owner, rest, x in tensors
            if owner not in owners
        }
        found = {p: dict(shared) for p in owners.values()}
        for owner, rest, x in tensors:
            if owner in owners:
                found[owners[owner]][rest] = x
        return found

    def loaded(
        self,
        group: dict[str, Any],
        saved: Mapping[Tensor, Mapping[str, Any]],
        *,
        strict: bool,
        cast: bool,
    ) -> Loaded:
        """A fresh state with saved values; the run itself is not changed.

        Args:
            group: as it will be after loading.
            saved: {parameter: its entries}.
        """
        vocabulary = self._vocabulary(group)
        tx = vocabulary.build(vocabulary.arguments(group))
        known = self._trainable(group)
        fresh = tx.init({k.name: k.parameter.detach() for k in known})
        flat = {FORMAT_KEY: torch.tensor(FORMAT)}
        for name, p in zip(self.names(group), group["params"]):
            for entry, x in saved.get(p, {}).items():
                key = entry.removeprefix(_SHARED)
                flat[f"{name}/{entry}" if key == entry else key] = x
        return load_state_dict(fresh, flat, strict=strict, cast=cast)

    def adopt(self, group: dict[str, Any], state: Any) -> None:
        """Go on from this state, made for the group as it is now."""
        self._transformation(group)
        self._known = self._trainable(group)
        self._state = state

    def _vocabulary(self, group: Mapping[str, Any]) -> Vocabulary:
        return Vocabulary(group.get("method", self._method))

    def _transformation(self, group: dict[str, Any]) -> GradientTransformation:
        vocabulary = self._vocabulary(group)
        arguments = vocabulary.arguments(group)
        if self._built is None or not same_arguments(arguments, self._arguments or {}):
            self._built = vocabulary.build(arguments)
            self._arguments = arguments
        return self._built

    def _trainable(self, group: Mapping[str, Any]) -> list[_Known]:
        """The parameters that require gradients, each once."""
        seen: dict[int, _Known] = {}
        for name, p in zip(self.names(group), group["params"]):
            if p.requires_grad and id(p) not in seen:
                seen[id(p)] = _Known(name, p, p.device, p.dtype)
        return list(seen.values())

    def __getstate__(self) -> dict[str, Any]:
        """Without the chain, which holds functions: it is made anew."""
        return {**self.__dict__, "_built": None}


def _same_parameters(a: list[_Known], b: list[_Known]) -> bool:
    return len(a) == len(b) and all(
        x.parameter is y.parameter and x[2:] == y[2:] and x.name == y.name for x, y in zip(a, b)
    )


def _carried_over(tx: GradientTransformation, known: list[_Known], old: Any) -> Any:
    fresh = tx.init({k.name: k.parameter.detach() for k in known})
    return load_state_dict(fresh, state_dict(old), strict=False, cast=True).state


def _gradient(name: str, p: Tensor, group: Mapping[str, Any]) -> Tensor | None:
    g = p.grad
    if g is None:
        return None
    if g.layout is not torch.strided:
        raise RuntimeError(
            f"the gradient of '{name}' is sparse: build its layer with sparse=False, or give this "
            "parameter to torch.optim.SparseAdam."
        )
    return -g if group.get("maximize") else g


def _alone(state: Any) -> bool:
    """Whether no other rank waits for this one's updates."""
    return all(owns_all(node) for _, node in walk(state) if isinstance(node, BlockedState))


def _add(p: Tensor, update: Tensor | None) -> None:
    """W ← W + U, rounded once to the parameter's dtype, as `apply_updates` does."""
    if update is None:
        return
    if p.dtype == update.dtype:
        p.add_(update)
    else:
        p.copy_(torch.add(p.to(update.dtype), update))
