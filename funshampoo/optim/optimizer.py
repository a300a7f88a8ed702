"""A torch.optim.Optimizer around any chain, for code written for torch.optim."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from funshampoo.core.contract import GradientTransformation
from funshampoo.distributed.join import Joining
from funshampoo.optim.execution import execution
from funshampoo.optim.group import GroupRun
from funshampoo.optim.loading import Checked, checked, given_to, loaded_together
from funshampoo.optim.memory import Group, Memory
from funshampoo.optim.saved import is_adamws, saved_group
from funshampoo.optim.seeding import checked_seeds
from funshampoo.optim.states import States
from funshampoo.optim.vocabulary import Vocabulary, check_given
from funshampoo.optim.whole import WholeEntries, entries_of_all_ranks, numbers_of, part_of_this_rank


class Optimizer(torch.optim.Optimizer, Joining):
    """A torch.optim.Optimizer that runs a chain of gradient transformations.

    Args:
        params: parameters, (name, parameter) pairs, or dicts as in torch.optim. A dict may
            hold its own hyperparameters and, under "method", its own recipe.
        method: a recipe such as `funshampoo.shampoo`, or a transformation.
        hyperparameters: the recipe's arguments, by torch.optim's names: lr for learning_rate, betas
            for (beta1, beta2). If the method takes no learning rate, as no transformation does, its
            updates are multiplied by -lr. Omit lr if it contains `scale_by_learning_rate`; pass
            lr=None if it scales by a negative number in another way.
        consolidate: where blocks are sharded over ranks, `state_dict` returns the whole state on
            every rank. It is then a collective that every rank must call. For programs in which
            all of them do, such as Accelerate's save_state; else see `consolidate_state_dict`.
        accept_adamw: `load_state_dict` also takes the state of torch's AdamW or Adam, through
            `seed_from_adamw`. So a program that resumes from a checkpoint by itself, as Trainers
            do, can continue from one of AdamW's, at the rate that its scheduler had reached.
        compile: True compiles plain steps with torch.compile, see `funshampoo.compiled`; a dict is
            True with torch.compile's options. A graph stays valid when a number of a funshampoo
            recipe changes, unless that switches something on; for your own recipe, if lr is a
            tensor that it reads on every step (as `scale_by_learning_rate` does).
        cuda_graph: True records steps as CUDA graphs, group by group, and replays them: see
            `funshampoo.cuda_graphed`, docs/gpu.md. Valid as for compile, if the tensor is on a GPU.
        tf32: True rounds the products of every step to TF32 on a GPU: see `funshampoo.in_tf32`.
        stochastic_rounding: True for parameters in bfloat16 or float16 (without any the first step
            raises ValueError), which lose small steps otherwise; `funshampoo.stochastic_rounding`.

    The next step uses what param_groups hold: a learning-rate scheduler, or you, may change any of
    it. A part that is switched on (momentum from 0) starts from nothing; one that is switched off
    loses its memory. `maximize=True` in a group ascends.

    The state follows the tensors. Parameters may leave or join a group, change their order or their
    group, and groups may be appended, removed or put in other dicts: each parameter continues from
    its own averages, and a new tensor starts from nothing. Where blocks are sharded, every rank has
    to make the same edit.

    A parameter whose gradient is None is left alone; its averages are corrected by the gradients
    that it has had. One with requires_grad=False has no state until that changes, does not move,
    and keeps any state that it had before. p.grad is never written to.

    `state` and `state_dict` present the state by parameter, in flat names such as
    "block_0_1/graft/onto/second" below each; `load_state_dict` checks everything before it changes
    anything. Where blocks are sharded, each rank has its own part: see `consolidate_state_dict`, or
    save all parts and load what `funshampoo.state.merged` makes of them, on any number of ranks.

    If Ctrl-C or an exception ends a step while it writes, the state is half done: the next step,
    save or read raises `InterruptedStepError`, until a checkpoint is loaded or `state.clear()` is
    called.

    Raises:
        TypeError: an argument that the method does not know, or lacks; a flag is not a bool (for
            compile, or a dict). At the first step: no learning rate scales the updates, or two do.
        ValueError: an argument out of range; compile or cuda_graph with distribute, with a tensor
            that is not read on every step, or with one another; compile with stagger.

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
        cuda_graph: bool = False,
        tf32: bool = False,
        stochastic_rounding: bool = False,
        consolidate: bool = False,
        accept_adamw: bool = False,
        **hyperparameters: Any,
    ) -> None:
        check_given(params)
        self._method = method
        flags = {"consolidate": consolidate, "accept_adamw": accept_adamw, "tf32": tf32}
        flags |= {"cuda_graph": cuda_graph, "stochastic_rounding": stochastic_rounding}
        self._execution = execution(compile, flags)
        self._consolidate, self._accept_adamw = consolidate, accept_adamw
        self._memory = Memory({"compile": compile, **flags})
        self._whole: WholeEntries | None = None
        self._model_order: Sequence[str] = ()  # set by `for_model`, whose groups have another
        self._vocabulary = Vocabulary(method, hyperparameters)
        super().__init__(params, {"maximize": False, **self._vocabulary.defaults(hyperparameters)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with hyperparameters of their own; see torch.optim.Optimizer.

        Entries that the method does not know are kept for other readers; one that looks like a
        misspelt hyperparameter raises a warning, also if it comes later.
        """
        vocabulary = self._vocabulary
        if isinstance(param_group, dict):
            if "params" not in param_group:
                raise ValueError(
                    f"the group has no 'params', but {sorted(map(str, param_group))}: give its "
                    "parameters under that name."
                )
            if "method" in param_group:
                vocabulary = Vocabulary(param_group["method"], param_group)
                param_group = {**vocabulary.defaults({}), **param_group}
            vocabulary.warn_unknown(param_group)
        memory = self._match()
        super().add_param_group(param_group)
        *others, group = self.param_groups
        try:
            memory.runs.append(self._run_of(group, others, vocabulary))
        except Exception:
            self.param_groups.pop()
            raise

    def _run_of(
        self, group: Group, before: Sequence[Group], vocabulary: Vocabulary | None = None
    ) -> GroupRun:
        """The run of a new group, possibly one that was put into `param_groups` by hand."""
        if not isinstance(group.get("params"), list):
            raise TypeError("the params of a group are a list: add_param_group makes one.")
        first = sum(len(other["params"]) for other in before)
        if vocabulary is None:
            own = group.keys() - self.defaults.keys()
            method = group.get("method", self._method)
            vocabulary = self._vocabulary if method is self._method else Vocabulary(method, own)
            vocabulary.warn_unknown(group, edited=True)
            for name, value in {**vocabulary.defaults({}), **self.defaults}.items():
                group.setdefault(name, value)
        known = vocabulary.first_rate  # the constructor's lr, whatever lr is later
        if known is not None and group.get(known) is None and "lr" in group:
            group[known] = copy.deepcopy(group["lr"])
        return GroupRun(group, vocabulary, self._method, first, self._execution)

    def _match(self) -> Memory:
        """The memory, with one run per group, for the groups as they are now."""
        self._memory.match(self.param_groups, self._run_of)
        return self._memory

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **values: Any) -> Any:
        """One step. A closure is called first, with gradients enabled; its loss is returned.

        Stages of yours get those `values` whose names they declare, as value=loss. Where blocks are
        sharded, they have to be the same on all ranks.

        Raises:
            RuntimeError: a sparse gradient (names the parameter); `values`, inside `Join`.
            TypeError, ValueError: an edit in param_groups is out of range, or changes the blocks.
                As with a sparse gradient, nothing has moved.
            FailureLimitError: gradients or roots failed too often in a row, in any group. Nothing
                has moved.
        """
        loss = None
        if not (closure is None or callable(closure)):
            raise TypeError(f"closure is {closure!r}; give a function that returns the loss.")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._sync_joined(values)
        self._step_groups(values)
        return loss

    @_disable_dynamo  # torch.compiler.disable, without two seconds of import
    def _step_groups(self, values: Mapping[str, Any]) -> None:
        """Not traced when a whole step is compiled: `compile=True` handles that."""
        self._match().step(values)
        self._whole = None

    def _chains(self) -> list[GradientTransformation]:
        chains = [run.transformation for run in self._match().runs]
        return [tx for tx in chains if tx is not None]

    @property
    def state(self) -> Any:
        """{parameter: {name: value}}, as torch.optim has it; see `optim.states.States`.

        Writes take effect: writing to an entry of the chain changes it; an entry of your own stays
        with the parameter, and is saved and loaded. A parameter that is deleted, or assigned {},
        starts from nothing; so does everything after `state.clear()`, or `state = {}`.

        The tensors are views of the chain's state, which the next step overwrites. Before the first
        step they show a fresh state.
        """
        if "_memory" not in self.__dict__:  # torch.optim.Optimizer reads it before there is one
            return {}
        return States(self._match())

    @state.setter
    def state(self, value: Mapping[Tensor, Mapping[str, Any]]) -> None:
        if "param_groups" not in self.__dict__:  # torch.optim.Optimizer sets an empty one
            return
        self.state.replace_all({p: dict(entries) for p, entries in value.items()})

    def chain_states(self) -> list[Any]:
        """The state of every group's chain, for `funshampoo.state`, e.g. its `health`. Read-only.

        The next step writes to it.

        >>> from funshampoo.optim import Shampoo
        >>> from funshampoo.state import health
        >>> optimizer = Shampoo([torch.nn.Parameter(torch.zeros(2, 3))])
        >>> found = health(optimizer.chain_states()[0])  # doctest: +ELLIPSIS
        0 steps, 0 micro-batches skipped, 0 times a block held
        factor     matrices  residual condition failures  worst
        ...
        """
        memory = self._match()
        memory.apply_edits()
        return [run.state() for run in memory.runs]

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim, readable by torch.load(weights_only=True).

        The tensors are the optimizer's own, as in torch.optim, and the next step changes some and
        replaces others: save it, or keep a copy.deepcopy of it.

        Functions and solvers among the hyperparameters are saved as text; loading keeps those given
        at construction.

        Where blocks are sharded it is this rank's part, so labelled; with consolidate=True, or on
        the rank for which `consolidate_state_dict` was called since the last step, it is the whole.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        if self._consolidate and not self._has_whole():
            self.consolidate_state_dict(to=None)
        index = numbers_of(self.param_groups)
        if self._whole is not None and self._has_whole():
            entries = self._whole.entries
        else:
            entries = part_of_this_rank(self._match(), index)
        groups = [saved_group(g, [index[p] for p in g["params"]]) for g in self.param_groups]
        found: Any = {"state": entries, "param_groups": groups}
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, found)
            found = found if replaced is None else replaced
        return found  # type: ignore[no-any-return]

    def _has_whole(self) -> bool:
        return self._whole is not None and self._whole.is_current(self._match())

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Gather the ranks' parts, so that `state_dict` returns the whole until the next step.

        Like torch.distributed.optim.ZeroRedundancyOptimizer's, and called by Lightning. A
        collective: every rank that shares blocks has to call it. The whole is held in host memory.
        After groups are edited, `state_dict` and `chain_states` are collectives too, until a step.

        Args:
            to: the rank, in the sharing group, that gets it; None: every rank. Every rank also
                gets it where no blocks are sharded, as for AdamW on DTensors.
        """
        memory = self._match()
        found = entries_of_all_ranks(memory, numbers_of(self.param_groups), to)
        self._whole = self._whole if found is None else WholeEntries(memory, found)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, cast: bool = False
    ) -> None:
        """Load what `state_dict` returned: all of it or, if it does not fit, nothing.

        Args:
            state_dict: from an optimizer with as many groups and parameters, in any order if both
                have names. Where blocks were sharded: the whole, from `consolidate_state_dict` or
                `funshampoo.state.merged`, on any number of ranks; or, on as many ranks, the part
                that this rank saved.
            strict, cast: see `funshampoo.state.load_state_dict`.

        Where blocks are sharded it is a collective: all ranks load, or none does. The
        hyperparameters become the saved ones, as in torch.optim; a function or solver given at
        construction stays. Names that only the checkpoint has are adopted. A checkpoint by full
        names, as from torch.distributed.checkpoint.state_dict, may lack parameters, which then
        start from nothing; torch itself checks for them in its strict mode.

        Raises:
            ValueError: other groups, names missing or unknown, other shapes or dtypes.
        """
        memory = self._match()

        def check() -> Checked:
            given = given_to(self, state_dict, strict)
            if self._accept_adamw and any(map(is_adamws, given["state"].values())):
                return checked_seeds(memory, given, self._model_order, rates=True)
            return checked(memory, self.param_groups, given, strict=strict, cast=cast)

        with memory.all_or_nothing(self.param_groups):
            found = loaded_together(memory, "load_state_dict", check)
            for group, entries in zip(self.param_groups, found.groups):
                group.update(entries)
            memory.replace(found.ready, found.notes)
        self._whole = None
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def seed_from_adamw(self, saved: Mapping[str, Any]) -> None:
        """Take over the moments of a torch.optim.AdamW, to switch in the middle of a run.

        Hyperparameters stay as they are here. Call it before the first step, or after
        `state.clear()`. Where blocks are sharded it is a collective: all ranks load, or none does.

        Args:
            saved: its state_dict(), for the same parameters: matched by name if both were given
                names, else by order; for `for_model`, in the model's order, in one group.

        Raises:
            ValueError: see `funshampoo.state.seed_from_adamw`; or the names given to both
                optimizers differ; or `for_model` is given several groups without names.
        """
        memory = self._match()
        memory.apply_edits()
        with memory.all_or_nothing(self.param_groups):
            check = functools.partial(checked_seeds, memory, saved, self._model_order)
            memory.replace_states(loaded_together(memory, "seed_from_adamw", check).ready)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: built chains are left out and rebuilt."""
        copied = ("defaults", "param_groups", "_method", "_vocabulary", "_memory", "_model_order")
        options = ("_execution", "_consolidate", "_accept_adamw")
        return {"_whole": None, **{name: self.__dict__[name] for name in (*copied, *options)}}
