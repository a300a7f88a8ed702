"""What the wrapper remembers of every parameter, in any group or in none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from funshampoo.core.context import check_own
from funshampoo.core.modes import for_keeps
from funshampoo.core.tree import HALF
from funshampoo.optim.agreement import OptimizerAgreement
from funshampoo.optim.entries import check_entry, is_note, split_shared, with_shared
from funshampoo.optim.group import GroupRun
from funshampoo.optim.ready import Ready, Unattached

Group = dict[str, Any]
MakeRun = Callable[[Group, Sequence[Group]], GroupRun]


class Memory:
    """The runs of all groups, the entries of parameters that left one, and clients' notes.

    A run belongs to the dict of its group, an entry to its tensor: groups may be edited, moved or
    replaced, and the next step finds what is still valid.

    Args:
        options: {name: value} of the optimizer's options, which must be the same on all ranks.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._agreement = OptimizerAgreement(options)
        self.runs: list[GroupRun] = []
        self._unattached: Unattached = {}  # with {} for what starts from nothing at the next step
        self.notes: dict[Tensor, dict[str, Any]] = {}
        self.writes = 0  # the number of changes made between steps

    def match(self, groups: Sequence[Group], make: MakeRun) -> None:
        """Match the runs to the groups, one each; entries of removed groups are kept.

        Args:
            make: makes a run from a group and the groups before it.
        """
        known = {id(run.group): run for run in self.runs}
        runs = [
            known.pop(id(group)) if id(group) in known else make(group, groups[:i])
            for i, group in enumerate(groups)
        ]
        for run in known.values():
            self._unattached = run.copied_entries(run.parameters()) | self._unattached
        self.runs = runs

    def check_same_call(self, call: str) -> None:
        """Called before a collective that is not part of a step; see `OptimizerAgreement`."""
        self._agreement.check_same_call(call)

    def step(self, values: Mapping[str, Any]) -> None:
        """Step all groups as they are now. An exception after a first write marks all as half done.

        Args:
            values: the caller's own, by the names that stages declare.

        Raises:
            FailureLimitError, ValueError, TypeError: from any group, before anything has moved in
                any of them; a state can't follow an edit; a parameter is in two groups.
            InterruptedStepError: a state is half done.
        """
        self.apply_edits()
        runs = self.runs
        if values:
            check_own(values, [tx.accepts for run in runs if (tx := run.transformation)])
        watched = [run.watched() for run in runs]
        entering = [run.entering(watch, values) for run, watch in zip(runs, watched)]
        try:
            for run, step in zip(runs, entering):
                run.step(step)
        except BaseException:  # also Ctrl-C between two groups
            if any([watch.was_written() for watch in watched]):
                for run in runs:
                    run.mark_interrupted()
            raise

    def apply_edits(self) -> None:
        """Have every state follow the edits of its group, before it is stepped or saved.

        A collective if blocks are sharded and anything was edited.
        """
        snapshots = [run.snapshot() for run in self.runs]
        unattached = self._unattached
        if not all([run.is_made_for(snapshot) for run, snapshot in zip(self.runs, snapshots)]):
            _check_apart(self.runs)
            if self._agreement.options.get("stochastic_rounding"):
                _check_rounded(self.runs)
            for run in self.runs:
                here = set(run.group["params"])
                gone = [p for p in run.parameters() if p not in here]
                unattached = run.copied_entries(gone) | unattached
        plans = [run.planned(unattached, snapshot) for run, snapshot in zip(self.runs, snapshots)]
        self._agreement.check_same_edits(self.runs, plans)
        ready = [run.prepared(plan, unattached) for run, plan in zip(self.runs, plans)]
        self.adopt(ready)
        self._agreement.record(self.runs)
        if unattached:
            here = {known.parameter for one in ready for known in one.known}
            self._unattached = {p: own for p, own in unattached.items() if own and p not in here}

    def adopt(self, ready: Sequence[Ready]) -> None:
        """Continue from these states, one per run."""
        for run, one in zip(self.runs, ready):
            run.adopt(one)

    @contextlib.contextmanager
    def all_or_nothing(self, groups: Sequence[Group]) -> Iterator[None]:
        """A context that undoes partial changes if any exception, or Ctrl-C, leaves it.

        Groups, runs and this object get their old entries back; these must not be written in place.
        """
        parts = [*groups, *[vars(run) for run in self.runs], vars(self)]
        before = [dict(part) for part in parts]
        try:
            yield
        except BaseException:
            for part, entries in zip(parts, before):
                part.clear()
                part.update(entries)
            raise

    def replace(self, ready: Sequence[Ready], notes: dict[Tensor, dict[str, Any]]) -> None:
        """Continue from these states and notes, and forget everything else."""
        self.replace_states(ready)
        self._unattached, self.notes = {}, notes
        for run, one in zip(self.runs, ready):
            if one.fresh:  # else parameters replaced before the first step would keep their state
                run.forget()

    def entries_of(self, p: Tensor) -> dict[str, Any]:
        """Everything that is remembered of a parameter; {} for an unknown one."""
        return {**self._chain_entries(p), **self.notes.get(p, {})}

    def remembered(self) -> list[Tensor]:
        """The parameters that have entries, in the order of the groups."""
        here = [p for run in self.runs for p in [*run.entries()[0], *run.group["params"]]]
        known = dict.fromkeys([*here, *self._unattached, *self.notes])
        return [p for p in known if self.entries_of(p)]

    def checked(self, p: Tensor, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the entries that are the chain's; the rest are notes.

        Raises:
            KeyError, TypeError, ValueError: an entry of the chain does not fit.
        """
        run = self._run_with(p, even_if_unattached=True)
        known = dict(self._unattached.get(p, {}))  # also those that its new group does without
        if run is not None:
            known |= run.entries_of(p)
        chain = {name: x for name, x in entries.items() if name in known or not is_note(name)}
        for name, x in chain.items():
            check_entry(name, x, None if run is None else known)
        return chain

    def write(self, p: Tensor, entries: Mapping[str, Any]) -> None:
        """Change these entries of a parameter, or none of them if one does not fit.

        What is written to a parameter that has no state yet, because it is frozen, in no group, or
        has just joined one, is kept until a step includes it.
        """
        chain = self.checked(p, entries)
        self.writes += 1
        run, known = self._run_with(p), self._chain_entries(p)
        if run is None and chain:
            self._unattached[p] = {**known, **chain}
        elif run is not None and chain:
            with for_keeps():
                for name, x in chain.items():
                    known[name].copy_(x)
            run.mark_written()
        notes = {name: x for name, x in entries.items() if name not in chain}
        if notes:
            self.notes.setdefault(p, {}).update(notes)

    @for_keeps()
    def assign(self, p: Tensor, entries: Mapping[str, Any]) -> None:
        """Make these the entries of a parameter, from the next step on.

        Nothing is written to the current state, since they may be views of it.
        """
        chain = self.checked(p, entries)
        own, _ = split_shared(chain)
        self.write(p, {name: x for name, x in chain.items() if name not in own})
        self.notes.pop(p, None)
        if notes := {name: x for name, x in entries.items() if name not in chain}:
            self.notes[p] = notes
        known, shared = split_shared(self._chain_entries(p))
        if not _are_the_same(own, known):
            copies = {name: x.detach().clone() for name, x in own.items()}
            self._unattached[p] = with_shared(copies, shared) if own else {}

    def forget(self, p: Tensor, names: set[str] | None = None) -> None:
        """Reset a parameter, or only these entries of it."""
        self.writes += 1
        notes, run = self.notes.pop(p, {}), self._run_with(p)
        if names is None:
            self._unattached[p] = {}
            return
        if kept := {name: x for name, x in notes.items() if name not in names}:
            self.notes[p] = kept
        if p in self._unattached:
            own = self._unattached[p].items()
            self._unattached[p] = {name: x for name, x in own if name not in names}
        elif run is not None and (gone := names - notes.keys()):
            run.reset_entries(p, gone)

    def replace_states(self, ready: Sequence[Ready]) -> None:
        """Continue from these states."""
        self.writes += 1
        self.adopt(ready)

    def forget_all(self) -> None:
        """Reset everything, including notes and counters."""
        self.writes += 1
        for run in self.runs:
            run.forget()
        # New dicts: `all_or_nothing` may restore the old ones.
        self._unattached = {p: {} for run in self.runs for p in run.group["params"]}
        self.notes = {}

    def _run_with(self, p: Tensor, even_if_unattached: bool = False) -> GroupRun | None:
        """The run whose state has this parameter; runs with a read-only state come last.

        None if entries wait in `_unattached` for the next step: brought along, or assigned.
        """
        if p in self._unattached and not even_if_unattached:
            return None
        for stepped in (True, False):
            for run in self.runs:
                if run.has_state is stepped and p in run.entries()[0]:
                    return run
        return None

    def _chain_entries(self, p: Tensor) -> dict[str, Tensor]:
        run = self._run_with(p)
        if run is not None:
            return run.entries_of(p)
        return dict(self._unattached.get(p, {}))


def _are_the_same(entries: Mapping[str, Any], known: Mapping[str, Tensor]) -> bool:
    """Whether these are the very views of the state, from a client that did not move them."""
    return entries.keys() == known.keys() and all(
        isinstance(x, Tensor) and x.data_ptr() == known[name].data_ptr()
        for name, x in entries.items()
    )


def _check_apart(runs: Sequence[GroupRun]) -> None:
    """The check of torch.optim's add_param_group, which an edited list bypasses."""
    seen: dict[Tensor, int] = {}
    for i, run in enumerate(runs):
        for name, p in zip(run.names(), run.group["params"]):
            if seen.setdefault(p, i) != i:
                raise ValueError(
                    f"parameter '{name}' is in the groups {seen[p]} and {i}: take it out of one."
                )


def _check_rounded(runs: Sequence[GroupRun]) -> None:
    """Raise if nothing would be rounded: autocast and FSDP keep parameters in float32."""
    dtypes = {p.dtype for run in runs for p in run.group["params"]}
    if dtypes and dtypes.isdisjoint(HALF):
        raise ValueError(
            f"stochastic_rounding is True and no parameter is in bfloat16 or float16, but in "
            f"{', '.join(sorted(map(str, dtypes)))}: leave it out, or convert the model before, as "
            "by model.to(torch.bfloat16)."
        )
