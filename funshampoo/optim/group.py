"""One parameter group of the wrapper, and its chain's state, which follows the parameters."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Set
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from funshampoo.core.applying import Entering
from funshampoo.core.context import context_of
from funshampoo.core.contract import GradientTransformation
from funshampoo.core.interrupted import Watched, check_whole, mark
from funshampoo.core.modes import for_keeps
from funshampoo.core.placed import detached
from funshampoo.distributed.collectives import ProcessGroup
from funshampoo.distributed.gathering import sharing_groups
from funshampoo.optim.building import Builder, structure_differs
from funshampoo.optim.entries import SHARED, with_shared
from funshampoo.optim.execution import Execution
from funshampoo.optim.names import Names
from funshampoo.optim.ready import (
    ByParameter,
    Known,
    Plan,
    Ready,
    Snapshot,
    Unattached,
    initial_state,
    is_initial,
    same_parameters,
    state_with_entries,
)
from funshampoo.optim.saved import Saved, flattened, with_state
from funshampoo.optim.vocabulary import Method, Vocabulary
from funshampoo.state.checkpoint import carried_over, load_state_dict
from funshampoo.state.naming import named_tensors
from funshampoo.state.parts import PART_KEY, part_of


class GroupRun:
    """The state of one group, created when needed, and its steps.

    Args:
        group: the entry of `param_groups`; the run belongs to this dict, wherever it is listed.
        vocabulary: of the group's method.
        method: the method of groups that have none of their own.
        first: the number of parameters in the groups before this one.
        execution: what is wrapped around its chain.
    """

    def __init__(
        self,
        group: dict[str, Any],
        vocabulary: Vocabulary,
        method: Method,
        first: int,
        execution: Execution,
    ) -> None:
        self.group = group
        self._names = Names(first)
        self._builder = Builder(group, method, execution)
        self.known: list[Known] = []  # the same object until the state's parameters change
        self._state: Any = None
        self._fresh: Watched | None = None  # a state as made by init, which a reader may write to
        self._snapshot: Snapshot = ()
        self._cache: tuple[Any, ByParameter, dict[str, Tensor]] | None = None
        self.names()
        self._built = self._builder.build(vocabulary, group)

    def names(self) -> list[str]:
        """The names of all parameters of the group; see `Names`."""
        return self._names.of(self.group)

    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the group's current method."""
        return self._builder.current(self.group, self._built).vocabulary

    @property
    def has_state(self) -> bool:
        """Whether there is a state that was stepped, loaded or written to (also in place)."""
        return self._state is not None and (self._fresh is None or self._fresh.was_written())

    @property
    def _lasts(self) -> bool:
        """Whether the state need not be made anew: it has to be kept, or is of no parameters."""
        return self.has_state or (self._state is not None and not self.known)

    def snapshot(self) -> Snapshot:
        """A quickly made snapshot of what decides which parameters have a state."""
        names = self.group.get("param_names")
        seen = [
            (id(p), p.requires_grad, p.device, p.dtype, None if is_lazy(p) else p.shape)
            for p in self.group["params"]
        ]
        return seen, None if names is None else list(names)

    def is_made_for(self, snapshot: Snapshot) -> bool:
        """Whether the state was made for the parameters as they are now."""
        return self._lasts and snapshot == self._snapshot

    def planned(self, unattached: Unattached, snapshot: Snapshot) -> Plan:
        """The plan for a step of the group as it is now.

        Args:
            unattached: entries that parameters continue from in place of those in a state; {} for
                one that starts from nothing.
            snapshot: the group's current `snapshot`.

        Raises:
            TypeError, ValueError: an edited value is out of range.
        """
        built = self._builder.current(self.group, self._built)
        assigned = unattached and unattached.keys() & set(self.parameters())
        fits = self._lasts and not assigned and not structure_differs(built, self._built)
        if fits and snapshot == self._snapshot:
            return Plan(built, self.known, snapshot)
        with_state = set(self.parameters()) if self.has_state else set()
        brought = {p for p, entries in unattached.items() if entries}
        known = self._trainable(self.group, with_state | brought)
        if fits and same_parameters(known, self.known):
            return Plan(built, self.known, snapshot)
        remembered = brought | (with_state - unattached.keys())
        new = {k.parameter for k in known if k.parameter not in remembered}
        return Plan(built, known, snapshot, new)

    def prepared(self, plan: Plan, unattached: Unattached) -> Ready:
        """The state for the planned step; the run itself is not changed.

        Where parameters came or went, were moved, converted or unfrozen, or a part was switched on
        or off, the entries that still have a place are carried over, by parameter.

        Raises:
            ValueError: the edit changes the blocks. The state stays as it was.
        """
        built, known, snapshot = plan[:3]
        if known is self.known:
            return Ready(built, known, self._state, snapshot, fresh=not self.has_state)
        if not self.has_state and not any([unattached.get(k.parameter) for k in known]):
            return Ready(built, known, initial_state(built, known), snapshot, fresh=True)
        entries = self.entries() if self.has_state else ({}, {})
        return Ready(built, known, state_with_entries(built, known, *entries, unattached), snapshot)

    def adopt(self, ready: Ready) -> None:
        """Continue from this chain and state."""
        self._built, self.known, self._state, self._snapshot, fresh = ready
        self._fresh = Watched(self._state).begin() if fresh else None

    def entering(self, watched: Watched, values: Mapping[str, Any]) -> Entering | None:
        """The prepared step with its inputs checked; None if the group has no parameters to step.

        Args:
            watched: this run's, from `watched`.
            values: the caller's own, of which this method gets those that it declares.

        Raises:
            FailureLimitError: gradients or roots failed too often in a row.
            RuntimeError: a sparse gradient.
            ValueError, TypeError: a gradient or parameter can't be stepped; the error names it.
        """
        if not self.known:
            return None
        built = self._built
        assert built.transformation is not None
        own = {k.name: k.parameter for k in self.known}
        # A frozen parameter may still have an old gradient.
        gradients = {name: p.grad if p.requires_grad else None for name, p in own.items()}
        params = dict(zip(own, detached(own.values())))
        tx = built.transformation
        declared = {n: x for n, x in values.items() if tx.accepts is None or n in tx.accepts}
        names = {**declared, "donate": True, "hyper": built.hyper}
        given = context_of(names, tx.accepts, tx.live, tx.wants)
        ascends = self.group.get("maximize", False)
        return Entering(tx, gradients, self._state, params, given, ascends).checked(watched.state)

    def step(self, entering: Entering | None) -> None:
        """Make this step. Parameters without a gradient are left alone."""
        if entering is not None:
            self._fresh, self._cache = None, None
            self._state = entering.applied()

    def watched(self) -> Watched:
        """A record of version counters, which shows whether a step has written to anything.

        Raises:
            InterruptedStepError: the state is half done.
        """
        return Watched(self._state, self.parameters()).begin()

    @for_keeps()
    def copied_entries(self, tensors: Collection[Tensor]) -> Unattached:
        """Copies of the state entries of these parameters."""
        if not self.has_state or not tensors:
            return {}
        entries, shared = self.entries()
        kept = [p for p in tensors if p in entries]
        own = {p: with_shared(entries[p], shared) for p in kept}
        return {p: {n: x.detach().clone() for n, x in own[p].items()} for p in kept}

    def parameters(self) -> list[Tensor]:
        """The parameters that the state was made for."""
        return [k.parameter for k in self.known]

    def entries(self) -> tuple[ByParameter, dict[str, Tensor]]:
        """({parameter: {name: view}}, shared entries) of the state.

        If there is no state yet, one is made for reading only; the first step makes its own.
        """
        if self._state is None:
            built = self._builder.current(self.group, self._built)
            known = self._trainable(self.group, set())
            self.adopt(Ready(built, known, initial_state(built, known), fresh=True))
        if self._cache is None or self._cache[0] is not self._state:
            check_whole(self._state)
            self._cache = self._state, *self._by_parameter()
        return self._cache[1:]

    def entries_of(self, p: Tensor) -> dict[str, Tensor]:
        """The entries of one parameter that has a state, with the shared ones."""
        entries, shared = self.entries()
        return with_shared(entries[p], shared)

    def _by_parameter(self) -> tuple[ByParameter, dict[str, Tensor]]:
        own: dict[str, dict[str, Tensor]] = {k.name: {} for k in self.known}
        shared: dict[str, Tensor] = {}
        for owner, rest, x in named_tensors(self._state):
            if owner in own:
                own[owner][rest] = x
            else:
                shared["/".join(filter(None, [owner, rest]))] = x
        return {k.parameter: own[k.name] for k in self.known}, shared

    def mark_interrupted(self) -> None:
        """Mark the state as half done: the step over all groups was interrupted."""
        mark(self._state)
        self._cache = None

    def mark_written(self) -> None:
        """Note that the state has been changed, or is about to be: the first step must keep it."""
        self._fresh = None

    def reset_entries(self, p: Tensor, names: Collection[str]) -> None:
        """Reset these entries of a parameter."""
        entries, shared = self.entries()
        kept = {name: x for name, x in entries[p].items() if name not in names}
        rest = {name: x for name, x in shared.items() if SHARED + name not in names}
        self._built = self._builder.current(self.group, self._built)  # a copied run has no chain
        named = [(k.name, kept if k.parameter is p else entries[k.parameter]) for k in self.known]
        flat = {f"{name}/{entry}": x for name, own in named for entry, x in own.items()}
        self._state = carried_over(initial_state(self._built, self.known), {**flat, **rest})
        self.mark_written()

    def forget(self) -> None:
        """Reset everything."""
        self.known, self._state, self._fresh, self._cache = [], None, None, None

    def planned_load(self, group: dict[str, Any], saved: Saved) -> Plan:
        """The plan for a state with saved values; nothing is made, so no rank waits for another.

        Args:
            group: the group as it will be after loading.
            saved: {parameter: its entries, including the shared ones}; a parameter that is
                missing starts from nothing.

        Raises:
            TypeError, ValueError: a value in the group is out of range.
        """
        built = self._builder.current(group, self._built)
        names = copy.copy(self._names)  # a copy, so that a failure leaves the run's own alone
        return Plan(built, self._trainable(group, with_state(saved), names), ())

    def loaded(
        self,
        plan: Plan,
        group: dict[str, Any],
        saved: Saved,
        own_part: bool,
        *,
        strict: bool,
        cast: bool,
    ) -> tuple[Ready, dict[Tensor, dict[str, Any]]]:
        """A fresh state with saved values, and the saved notes; the run itself is not changed.

        Args:
            plan, group, saved: the plan made from the other two, see `planned_load`.
            own_part: whether this was read for this rank alone, whatever its part label says.
        """
        built, known = plan.built, plan.known
        state = initial_state(built, known)
        named = list(zip(copy.copy(self._names).of(group), group["params"]))
        flat, notes = flattened(saved, named, {k.name for k in known}, state)
        if not known:  # all are frozen, so even shared entries had no parameter to be saved under
            return Ready(built, known, state), notes
        if own_part:
            flat[PART_KEY] = part_of(state).entry()
        found = load_state_dict(state, flat, strict=strict, cast=cast)
        return Ready(built, known, found.state, fresh=is_initial(found.state, state)), notes

    def with_state(self, state: Any) -> Ready:
        """This run's chain and parameters with another state."""
        return Ready(self._built, self.known, state, self._snapshot)

    def check_edit(self, entries: Mapping[str, Any]) -> None:
        """Raise if the group could not be stepped with these hyperparameters.

        Raises:
            TypeError, ValueError: one is out of range.
        """
        self._builder.current({**self.group, **entries}, self._built)

    def state(self) -> Any:
        """The chain's state; if there is none yet, one made for reading only."""
        self.entries()
        return self._state

    def peek(self) -> Any:
        """The chain's state, even if it is half done; None if there is none."""
        return self._state

    @property
    def transformation(self) -> GradientTransformation | None:
        """The chain; None in a copy that has not been stepped."""
        return self._built.transformation

    def sharing_groups(self) -> list[ProcessGroup | None]:
        """The groups of ranks that share its blocks, or will: of a copy, or before a first step."""
        built = self._built
        if built.transformation is None:
            built = self._builder.current(self.group, built)
        return sharing_groups(built.transformation, self.group["params"])

    def _trainable(
        self, group: dict[str, Any], others: Set[Tensor], names: Names | None = None
    ) -> list[Known]:
        """The parameters with a shape that require gradients or are in `others`, each once."""
        found: dict[Tensor, Known] = {}
        for name, p in zip((names or self._names).of(group), group["params"]):
            if (p.requires_grad or p in others) and p not in found and not is_lazy(p):
                found[p] = Known(name, p, p.device, p.dtype, p.shape)
        return list(found.values())

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the chain is left out and rebuilt."""
        changed: dict[str, Any] = {"_snapshot": (), "_cache": None, "_fresh": None}
        if not self.has_state:
            changed |= {"known": [], "_state": None}
        return {**self.__dict__, **changed, "_built": self._built.without_functions()}
