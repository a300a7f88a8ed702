"""A torch.optim.Optimizer around any chain, for code that was written for torch.optim."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any, Unpack

import torch
from torch import Tensor

from funshampoo.core.contract import GradientTransformation, Hyper
from funshampoo.core.placed import is_in_parts
from funshampoo.distributed.gathering import are_well, collected, sharing_groups, without_parts
from funshampoo.distributed.join import Joining
from funshampoo.migrate.reference import from_reference
from funshampoo.migrate.seeding import seed_from_adamw
from funshampoo.optim.entries import SHARED, States
from funshampoo.optim.group import GroupRun, Ready
from funshampoo.optim.memory import Memory
from funshampoo.optim.options import ShampooOptions
from funshampoo.optim.saved import (
    check_fits,
    check_ours,
    indices_of,
    is_adamws,
    loaded_group,
    saved_group,
)
from funshampoo.optim.vocabulary import Vocabulary, check_rate
from funshampoo.recipes.shampoo import shampoo
from funshampoo.state.checkpoint import check
from funshampoo.state.parts import PART_KEY, Part, merged, part_of


class Optimizer(torch.optim.Optimizer, Joining):
    """A torch.optim.Optimizer that runs a chain of gradient transformations.

    Args:
        params: parameters, (name, parameter) pairs, or dicts as torch.optim takes them. A dict may
            hold its own hyperparameters and, under "method", its own recipe.
        method: a recipe such as `funshampoo.shampoo`, or a transformation.
        hyperparameters: the recipe's arguments, by torch.optim's names: lr for learning_rate, betas
            for (beta1, beta2). Where the method takes no learning rate, as no transformation does,
            its updates are multiplied by -lr; give none if it has `scale_by_learning_rate` in it,
            and lr=None if it scales by a negative number in another way.
        consolidate: where blocks are sharded over ranks, have `state_dict` return the whole, on
            every rank: a collective then, which every rank has to call. For programs in which they
            all do, as Accelerate's save_state; see `consolidate_state_dict` for others.
        accept_adamw: have `load_state_dict` take the state of torch's AdamW or Adam, too, by
            `seed_from_adamw`: so a program that resumes from a checkpoint by itself, as Trainers
            do, can go on from one that AdamW saved, at the rate that its scheduler had reached.
        compile: True compiles plain steps by torch.compile, see `funshampoo.compiled`; a dict is
            True with torch.compile's options. The graph goes on for another learning rate if the
            recipe is one of funshampoo, or lr a tensor, which a recipe of your own has to read on
            every step (`scale_by_learning_rate` does). Any other edit makes a new graph.

    What param_groups hold is what the next step uses: a learning-rate scheduler, or you, may change
    any of it. A part that is switched on (momentum from 0) starts from nothing; one that is
    switched off loses its memory. `maximize=True` in a group ascends.

    The state follows the tensors. Parameters may leave a group, come to it, or change their order
    or their group, and groups may be appended, removed or put in other dicts: each parameter goes
    on from its own averages, and a new tensor starts from nothing. Where blocks are sharded, every
    rank has to make the same edit.

    A parameter whose gradient is None is left alone and its averages are corrected by the gradients
    that it has had. One with requires_grad=False has no state until that changes, is not moved, and
    keeps the state that it had before. p.grad is never written to.

    `state` and `state_dict` present the state by parameter, in flat names such as
    "block_0_1/graft/onto/second" below each; `load_state_dict` checks all of it before it changes
    anything. Where blocks are sharded, each rank has its own part: see `consolidate_state_dict`, or
    save them all, and load the union that `funshampoo.state.merged` makes, on any number of ranks.

    A step that Ctrl-C or an exception ends while it writes leaves a state that is half done: the
    next step, save or read raises `InterruptedStepError`, until a checkpoint is loaded or
    `state.clear()` is called.

    Raises:
        TypeError: an argument that the method does not know, or lacks; compile is no bool and no
            dict. At the first step: nobody scales by a learning rate, or two do.
        ValueError: an argument out of range; compile with distribute, stagger, or a tensor that is
            not lr.

    >>> import funshampoo
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = Optimizer(model.parameters(), funshampoo.adamw, lr=1e-3)
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    >>> model(torch.ones(3)).sum().backward()
    >>> optimizer.step()
    >>> scheduler.step()
    >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]
    (0.0001, (0.9, 0.999))
    """

    def __init__(
        self,
        params: Any,
        method: Callable[..., GradientTransformation] | GradientTransformation,
        *,
        compile: bool | Mapping[str, Any] = False,
        consolidate: bool = False,
        accept_adamw: bool = False,
        **hyperparameters: Any,
    ) -> None:
        self._method = method
        if not isinstance(compile, (bool, Mapping)):
            raise TypeError(
                f"compile is {compile!r}; give True, or a dict of torch.compile's options."
            )
        for name, flag in (("consolidate", consolidate), ("accept_adamw", accept_adamw)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} is {flag!r}; give True or False.")
        self._compile = dict(compile) if isinstance(compile, Mapping) else {} if compile else None
        self._consolidate, self._accept_adamw = consolidate, accept_adamw
        self._memory = Memory()
        self._whole: tuple[list[Any], dict[Any, Any]] | None = None
        self._words = Vocabulary(method, hyperparameters)
        super().__init__(params, {"maximize": False, **self._words.defaults(hyperparameters)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with hyperparameters of their own; see torch.optim.Optimizer.

        Entries that the method does not know are kept, for whoever reads them; one that looks like
        a misspelt hyperparameter is warned of.
        """
        words = self._words
        if isinstance(param_group, dict):
            if "method" in param_group:
                words = Vocabulary(param_group["method"], param_group)
            words.note_unknown(param_group)
            if "method" in param_group:
                param_group = {**words.defaults({}), **param_group}
        memory = self._match()
        super().add_param_group(param_group)
        *others, group = self.param_groups
        reference = getattr(words.method, "func", words.method) is from_reference
        if reference and group["peak_lr"] is None:  # the constructor's lr, whatever lr is later
            group["peak_lr"] = copy.deepcopy(group["lr"])
        try:
            memory.runs.append(self._run_of(group, others, words))
        except Exception:
            self.param_groups.pop()
            raise

    def _run_of(
        self,
        group: dict[str, Any],
        before: Sequence[dict[str, Any]],
        words: Vocabulary | None = None,
    ) -> GroupRun:
        """The run of a new group, one that was put into `param_groups` by hand perhaps."""
        if not isinstance(group.get("params"), list):
            raise TypeError("the params of a group are a list: add_param_group makes one.")
        first = sum(len(other["params"]) for other in before)
        if words is None:
            own = group.keys() - self.defaults.keys()
            method = group.get("method", self._method)
            words = self._words if method is self._method else Vocabulary(method, own)
            for name, value in {**words.defaults({}), **self.defaults}.items():
                group.setdefault(name, value)
        return GroupRun(group, words, self._method, first, self._compile)

    def _match(self) -> Memory:
        """What is remembered, with one run a group as the groups are now."""
        self._memory.match(self.param_groups, self._run_of)
        return self._memory

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. A closure is called first, with gradients enabled; its loss is returned.

        Raises:
            RuntimeError: a sparse gradient (names the parameter).
            TypeError, ValueError: what was edited in param_groups is out of range, or changes the
                blocks. As with a sparse gradient, nothing has moved then.
            FailureLimitError: gradients or roots that failed too often in a row. Groups before the
                one that it comes from have stepped then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._meet_joined()
        self._step_groups()
        return loss

    def _step_groups(self) -> None:
        memory = self._match()
        memory.prepare()
        self._whole = None
        begun = 0
        try:
            for run in memory.runs:
                begun += 1
                run.step()
        except Exception:
            raise
        except BaseException:  # Ctrl-C between two groups, too
            if begun > 1:
                for run in memory.runs:
                    run.mark_interrupted()
            raise

    def _chains(self) -> list[GradientTransformation]:
        chains = [run.transformation for run in self._match().runs]
        return [tx for tx in chains if tx is not None]

    @property
    def state(self) -> Any:
        """{parameter: {name: value}}, as torch.optim has it; see `optim.entries.States`.

        What is written to it counts: an entry of the chain's changes, one of your own stays with
        the parameter, is saved and loaded. A parameter that is deleted, or assigned {}, starts from
        nothing; so does everything after `state.clear()`, or `state = {}`.

        The tensors are views of the chain's state, to which the next step writes. Before the first
        step they show a fresh one.
        """
        if "_memory" not in self.__dict__:  # torch.optim.Optimizer looks before there is one
            return {}
        return States(self._match())

    @state.setter
    def state(self, value: Mapping[Tensor, Mapping[str, Any]]) -> None:
        if "param_groups" not in self.__dict__:  # torch.optim.Optimizer sets an empty one
            return
        given = {p: dict(entries) for p, entries in value.items()}
        states, memory = self.state, self._memory
        for p, entries in given.items():
            memory.check(p, entries)
        if not given:
            states.clear()
        for p in [p for p in states if p not in given]:
            del states[p]
        for p, entries in given.items():
            states[p] = entries

    def chain_states(self) -> list[Any]:
        """The state of every group's chain, for `funshampoo.state`: its `health`, say. To be read.

        The next step writes to it.

        >>> from funshampoo.state import health
        >>> optimizer = Shampoo([torch.nn.Parameter(torch.zeros(2, 3))])
        >>> found = health(optimizer.chain_states()[0])  # doctest: +ELLIPSIS
        0 steps, 0 micro-batches skipped, 0 times a block held
        factor     matrices  residual condition failures  worst
        ...
        """
        memory = self._match()
        memory.follow()
        return [run.state() for run in memory.runs]

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim has it, readable by torch.load(weights_only=True).

        Its tensors are the optimizer's own, as torch.optim's are, and the next step changes some
        and replaces others: save it, or keep a copy.deepcopy of it.

        Functions and solvers among the hyperparameters leave a text in their places; loading keeps
        the ones given at construction.

        Where blocks are sharded it is this rank's part, and says so; with consolidate=True, or on
        the rank for which `consolidate_state_dict` was called since the last step, it is the whole.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        if self._consolidate and not self._is_whole():
            self.consolidate_state_dict(to=None)
        index = self._index()
        entries = self._whole[1] if self._whole and self._is_whole() else self._entries(index)
        groups = [saved_group(g, [index[p] for p in g["params"]]) for g in self.param_groups]
        found: Any = {"state": entries, "param_groups": groups}
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, found)
            found = found if replaced is None else replaced
        return found  # type: ignore[no-any-return]

    def _index(self) -> dict[Tensor, int]:
        """The number of every parameter."""
        index: dict[Tensor, int] = {}
        for i, p in enumerate([p for group in self.param_groups for p in group["params"]]):
            index.setdefault(p, i)
        return index

    def _entries(self, index: Mapping[Tensor, int]) -> dict[Any, dict[str, Any]]:
        """{number of a parameter: what this rank remembers of it}."""
        memory = self._match()
        memory.follow()
        found = {i: memory.saved(p) for p, i in index.items()}
        found = {i: entries for i, entries in found.items() if entries}
        for run in memory.runs:
            self._label(run, found, index, part_of(run.state()))
        return found

    def _label(self, run: GroupRun, found: Any, index: Mapping[Tensor, int], part: Part) -> None:
        """Say with the first parameter of a group which part of its state this is."""
        first = next((i for i in map(index.get, run.group["params"]) if i in found), None)
        if first is not None:
            found[first] = {**found[first], SHARED + PART_KEY: part.entry()}

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Bring together what the ranks have, so that `state_dict` gives the whole until a step.

        As torch.distributed.optim.ZeroRedundancyOptimizer's, for whose sake Lightning calls it. A
        collective: every rank that shares blocks has to call it. The whole is held in host memory.
        After an edit of groups `state_dict` and `chain_states` are collectives, too, until a step.

        Args:
            to: the rank, in the group that shares, that gets it; None: every rank. Every rank,
                too, where no blocks are shared out, as of AdamW on DTensors.
        """
        memory, index = self._match(), self._index()
        groups = [g for run in memory.runs for g in sharing_groups(run.transformation)]
        if any(group is not groups[0] for group in groups):
            raise NotImplementedError(
                "the parameter groups share out their blocks over different process groups: save "
                "every rank's state_dict and merge them (funshampoo.state.merged)."
            )
        found: dict[Any, Any] = {}
        failure: Exception | None = None
        try:
            found = self._entries(index)
        except Exception as error:  # the others are waiting
            failure = error
        sharded: list[Any] = [p for p in index if is_in_parts(p)]
        meshes = [p.device_mesh for p in sharded]
        if meshes and are_well(meshes, failure is None):
            found = without_parts(found)
        elif meshes and failure is None:
            failure = RuntimeError(
                "another rank could not say what it has; its own error says why."
            )
        whole = not groups
        if groups:
            parts = collected(groups[0], None if failure else found, to)
            whole = parts is not None and failure is None
            if parts is not None and failure is None and None in parts:
                raise RuntimeError(
                    f"rank {parts.index(None)} could not say what it has; its own error says why."
                )
            found = merged(parts) if parts is not None and failure is None else {}
        if failure is not None:
            raise failure
        if whole:
            for run in memory.runs:
                self._label(run, found, index, Part(0, 1))
            self._whole = self._stamp(), found

    def _is_whole(self) -> bool:
        """Whether what was consolidated is of the states as they are."""
        if self._whole is None:
            return False
        now, then = self._stamp(), self._whole[0]
        return now[0] == then[0] and len(now) == len(then) and all(map(is_, now[1:], then[1:]))

    def _stamp(self) -> list[Any]:
        """What changes with all that is saved: groups, writes, the states by identity."""
        memory = self._match()
        looks = [run.look() for run in memory.runs]
        return [(memory.writes, looks), *[run.state() for run in memory.runs]]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, cast: bool = False
    ) -> None:
        """Load what `state_dict` returned; either all of it or, where it does not fit, nothing.

        Args:
            state_dict: of an optimizer with as many groups and parameters; where both have names,
                in any order. Where blocks were sharded: the whole, of `consolidate_state_dict` or
                `funshampoo.state.merged`, on any number of ranks; or, on as many ranks, the part
                that this rank saved.
            strict, cast: see `funshampoo.state.load_state_dict`.

        The hyperparameters become the saved ones, as in torch.optim; a function or solver given at
        construction stays. Names that only the checkpoint has are adopted. A checkpoint by full
        names, as torch.distributed.checkpoint.state_dict has it, may lack parameters: torch checks
        that itself, if it is to be strict. They start from nothing.

        Raises:
            ValueError: other groups, names missing or unknown, other shapes or dtypes.
        """
        given: Any = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, given)
            given = given if replaced is None else replaced
        check_fits(given, self.param_groups, strict)
        if self._accept_adamw and any(map(is_adamws, given["state"].values())):
            rates = [_rates(saved) for saved in given["param_groups"]]
            self.seed_from_adamw(given)
            for group, found in zip(self.param_groups, rates):
                group.update(found)
        else:
            self._load(given, strict, cast)
        self._whole = None
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load(self, given: Mapping[str, Any], strict: bool, cast: bool) -> None:
        memory = self._match()
        by_name = any(isinstance(index, str) for index in given["state"])
        found_indices = indices_of(given["param_groups"], self.param_groups)
        indices = {id(g): found for g, found in zip(self.param_groups, found_indices)}
        ready: list[Ready] = []
        groups: list[dict[str, Any]] = []
        notes: dict[Tensor, dict[str, Any]] = {}
        for run, group, saved in zip(memory.runs, self.param_groups, given["param_groups"]):
            groups.append(loaded_group(saved, group))
            entries = {}
            for p, index in zip(group["params"], indices[id(group)]):
                if index in given["state"] or not by_name:
                    entries[p] = given["state"].get(index, {})
                    check_ours(entries[p])
            one, found = run.loaded(groups[-1], entries, by_name, strict=strict, cast=cast)
            ready.append(one)
            notes |= found
        for group, loaded in zip(self.param_groups, groups):
            group.update(loaded)
        memory.replace(ready, notes)

    def seed_from_adamw(self, saved: Mapping[str, Any]) -> None:
        """Take over the moments of a torch.optim.AdamW, so that a run in progress can switch.

        Hyperparameters stay as they are here.

        Args:
            saved: its state_dict(), for the same parameters in the same order.

        Raises:
            ValueError: see `funshampoo.state.seed_from_adamw`; or both optimizers were given names,
                and they differ.
        """
        memory = self._match()
        memory.follow()
        names = [run.names() for run in memory.runs]
        if all(group.get("param_names") for group in self.param_groups):
            _check_names(saved, [name for group in names for name in group])
        ready = []
        for i, run in enumerate(memory.runs):
            # Two groups may use the same name: only this one's are its own.
            own = [n if i == j else f"group {j}/{n}" for j, g in enumerate(names) for n in g]
            ready.append(run.with_state(seed_from_adamw(run.state(), saved, own)))
        for one in ready:
            check(one.state)
        memory.seeded(ready)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy. Built chains are left out: they are made anew."""
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "_method": self._method,
            "_compile": self._compile,
            "_consolidate": self._consolidate,
            "_accept_adamw": self._accept_adamw,
            "_memory": self._memory,
            "_whole": None,
            "_words": self._words,
        }


def _rates(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler has written to a group."""
    found = {name: copy.deepcopy(saved[name]) for name in ("lr", "initial_lr") if name in saved}
    for rate in found.values():
        check_rate(rate)
    return found


def _check_names(saved: Mapping[str, Any], ours: Sequence[str]) -> None:
    groups = saved["param_groups"]
    if not all("param_names" in group for group in groups):
        return
    theirs = [name for group in groups for name in group["param_names"]]
    for a, b in zip(theirs, ours):
        if a != b:
            raise ValueError(f"the AdamW has '{a}' where this optimizer has '{b}'.")


class Shampoo(Optimizer):
    """`funshampoo.shampoo` as a torch.optim.Optimizer.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of them with hyperparameters.
        lr: learning rate; with grafting onto Adam, start from what AdamW likes.
        betas: decay of the gradient filter and of the statistics.
        epsilon: absolute damping; the default damping is relative, see `funshampoo.shampoo`.
        weight_decay: decoupled by default; weight_decay_kind= chooses another kind.
        momentum, nesterov: heavy-ball momentum on the preconditioned step.
        every: steps between two refreshes of the roots.
        max_size: longest side of a block.
        options: everything else that `funshampoo.shampoo` takes: grafting, stagger, solver,
            distribute=funshampoo.sharded for data-parallel ranks, compile=True, ...

    See `Optimizer` for groups, schedulers and checkpoints.

    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = Shampoo(model.parameters(), lr=0.01, weight_decay=1e-4)
    >>> model(torch.ones(3)).sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-2,
        betas: tuple[Hyper, Hyper] = (0.9, 0.99),
        epsilon: Hyper = 0.0,
        *,
        weight_decay: Hyper = 0.0,
        momentum: Hyper = 0.0,
        nesterov: bool = False,
        every: int = 10,
        max_size: int | None = 1024,
        **options: Unpack[ShampooOptions],
    ) -> None:
        super().__init__(
            params,
            shampoo,
            lr=lr,
            betas=betas,
            epsilon=epsilon,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            every=every,
            max_size=max_size,
            **options,
        )
