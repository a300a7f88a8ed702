"""What ranks that share blocks must compare of an optimizer: everything it steps, and its edits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from funshampoo.distributed.agreement import fingerprint_of
from funshampoo.distributed.collectives import ProcessGroup, gathered_objects, rank_and_size
from funshampoo.distributed.described import Line, described_value
from funshampoo.distributed.disagreement import PreviousStep, announce_change, difference
from funshampoo.distributed.gathering import spreads
from funshampoo.optim.group import GroupRun
from funshampoo.optim.ready import Plan


class OptimizerAgreement:
    """Compares this rank's optimizer with those of the other ranks; the `Caller` of its chains.

    Args:
        options: {name: value} of the optimizer's options.

    Attributes:
        options: the same.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self._runs: list[GroupRun] = []  # at the last step or save
        self._seen: list[Any] = []
        self._spreads: list[Any] = []  # those that involve other ranks
        self._groups: dict[Tensor, int] = {}  # the parameters' group numbers
        self._plans: Sequence[Plan] = ()
        self._ascends: list[bool] = []
        self._call = "step"
        self.fingerprint = 0

    def check_same_call(self, call: str) -> None:
        """Make sure that all ranks are in this call, which is not a step. A collective.

        Raises:
            RuntimeError: some ranks are in a step; on every rank.
        """
        self._call = call
        try:
            for group, steps in self._steps():
                announce_change(steps, self.description, group)
        finally:
            self._call = "step"

    def check_same_edits(self, runs: list[GroupRun], plans: Sequence[Plan]) -> None:
        """Before a step or a save of the groups, make sure that all ranks made the same edits.

        A collective if blocks are sharded and anything was edited.

        Raises:
            RuntimeError: the edits differ; on every rank.
        """
        self._plans, self._ascends = plans, [run.group.get("maximize", False) for run in runs]
        if not self._spreads:
            return
        each = zip(runs, plans)
        now = [x for run, plan in each for x in (run, plan.built.transformation, plan.known)]
        then = [x for run in self._runs for x in (run, run.transformation, run.known)]
        if len(now) == len(then) and all(map(is_, now, then)):
            return
        for group, steps in self._steps():
            announce_change(steps, self.description, group)
            everyone = gathered_objects((self._edited(), self.description()), group)
            for rank, (edited, description) in enumerate(everyone):
                if edited != everyone[0][0]:
                    raise RuntimeError(difference(everyone[0][1], description, rank))
        for spread in self._spreads:
            spread.agreement.reset()

    def _steps(self) -> Iterator[tuple[ProcessGroup | None, list[PreviousStep]]]:
        """(process group, the last step of each `sharded` part in it), for every process group."""
        for group in _distinct([spread.group for spread in self._spreads]):
            mine = [spread for spread in self._spreads if spread.group is group]
            steps = [step for s in mine if (step := s.agreement.previous_step()) is not None]
            if steps:
                yield group, steps

    def record(self, runs: list[GroupRun]) -> None:
        """Update what is compared, now that the states are for the groups as they are."""
        each = zip(runs, self._ascends)
        seen = [x for run, up in each for x in (run, run.transformation, run.known, up)]
        if len(seen) != len(self._seen) or not all(map(is_, seen, self._seen)):
            self._seen, self._runs = seen, list(runs)
            stepped = [run.transformation for run in runs if run.known]
            found = _distinct([spread for tx in stepped for spread in spreads(tx)])
            self._spreads = [s for s in found if rank_and_size(s.group)[1] > 1]
            if self._spreads:
                self.fingerprint = fingerprint_of(self.lines(), 24)
                self._groups = {k.parameter: i for i, run in enumerate(runs) for k in run.known}
        for spread in self._spreads:  # another optimizer may step the same transformation
            spread.agreement.caller = self

    def lines(self) -> list[Line]:
        """See `Caller`."""
        found = [(name, repr(value)) for name, value in self.options.items()]
        found.append(("the number of groups", str(len(self._plans))))
        for i, (plan, ascends) in enumerate(zip(self._plans, self._ascends)):
            found.append((f"group {i}: method", plan.built.vocabulary.method_name))
            found.append((f"group {i}: maximize", str(ascends)))
        return found

    def description(self) -> list[Line]:
        """See `Caller`."""
        found = [("the call", self._call), *self.lines(), *hyperparameters_of(self._plans)]
        for i, plan in enumerate(self._plans):
            found.append((f"group {i}: the number of parameters", str(len(plan.known))))
            for k, text in enumerate(self._parameters(i, plan)):
                found.append((f"group {i}: parameter {k}", text))
        return found

    def _edited(self) -> list[Any]:
        """What is equal on ranks that made the same edits, whatever the order of parameters."""
        texts = [sorted(self._parameters(i, plan)) for i, plan in enumerate(self._plans)]
        return [self.lines(), hyperparameters_of(self._plans), texts]

    def _parameters(self, group: int, plan: Plan) -> Iterator[str]:
        for known in plan.known:
            before = self._groups.get(known.parameter, group)
            yield (
                f"'{known.name}', {tuple(known.shape)}, {known.dtype}"
                + (f", that was in group {before}" if before != group else "")
                + (", that starts from nothing" if known.parameter in plan.fresh_parameters else "")
            )

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: a copy has not met any other rank."""
        return {"options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["options"])  # type: ignore[misc]


def hyperparameters_of(plans: Sequence[Plan]) -> list[Line]:
    """The hyperparameters of all groups."""
    return [
        line
        for i, plan in enumerate(plans)
        for name, value in plan.built.arguments.items()
        for line in described_value(value, f"group {i}: {name}")
    ]


def _distinct(found: Sequence[Any]) -> list[Any]:
    """The distinct objects, by identity."""
    return [x for i, x in enumerate(found) if not any([x is other for other in found[:i]])]
