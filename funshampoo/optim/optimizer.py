"""A torch.optim.Optimizer around any chain, for code that was written for torch.optim."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from funshampoo.core.contract import GradientTransformation, Hyper
from funshampoo.migrate.reference import from_reference
from funshampoo.migrate.seeding import seed_from_adamw
from funshampoo.optim.group import GroupRun, Ready
from funshampoo.optim.options import ShampooOptions
from funshampoo.optim.vocabulary import Vocabulary, is_plain, without_objects
from funshampoo.recipes.shampoo import shampoo


class Optimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer that runs a chain of gradient transformations.

    Args:
        params: parameters, (name, parameter) pairs, or dicts as torch.optim takes them. A dict may
            hold its own hyperparameters and, under "method", its own recipe.
        method: a recipe such as `funshampoo.shampoo`, or a transformation.
        hyperparameters: the recipe's arguments, by torch.optim's names: lr for learning_rate, betas
            for (beta1, beta2). Where the method takes no learning rate, as no transformation does,
            its updates are multiplied by -lr; give none if it has `scale_by_learning_rate` in it,
            and lr=None if it scales by a negative number in another way.
        compile: True compiles plain steps by torch.compile, see `funshampoo.compiled`; a dict is
            True with torch.compile's options. The graph goes on for another learning rate if the
            recipe is one of funshampoo, or lr a tensor, which a recipe of your own has to read on
            every step (`scale_by_learning_rate` does). Any other edit makes a new graph.

    What param_groups hold is what the next step uses: a learning-rate scheduler, or you, may change
    any of it. A part that is switched on (momentum from 0) starts from nothing; one that is
    switched off loses its memory. `maximize=True` in a group ascends.

    A parameter whose gradient is None is left alone and its averages are corrected by the gradients
    that it has had. One with requires_grad=False has no state until that changes, is not moved, and
    keeps the state that it had before. p.grad is never written to.

    `state` and `state_dict` present the state by parameter, in flat names such as
    "block_0_1/graft/onto/second" below each; `load_state_dict` checks all of it before it changes
    anything. Where blocks are sharded, each rank has its own part: save them all, and load the
    union that `funshampoo.state.merged` makes, on any number of ranks.

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
        **hyperparameters: Any,
    ) -> None:
        self._method = method
        if not isinstance(compile, (bool, Mapping)):
            raise TypeError(
                f"compile is {compile!r}; give True, or a dict of torch.compile's options."
            )
        self._compile = dict(compile) if isinstance(compile, Mapping) else {} if compile else None
        self._runs: list[GroupRun] = []
        self._words = Vocabulary(method, hyperparameters)
        super().__init__(params, {"maximize": False, **self._words.defaults(hyperparameters)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with hyperparameters of their own; see torch.optim.Optimizer."""
        words = self._words
        if isinstance(param_group, dict):
            if "method" in param_group:
                words = Vocabulary(param_group["method"], param_group)
                words.check_group(param_group)
                param_group = {**words.defaults({}), **param_group}
            else:
                words.check_group(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        reference = getattr(words.method, "func", words.method) is from_reference
        if reference and group["peak_lr"] is None:  # the constructor's lr, whatever lr is later
            group["peak_lr"] = copy.deepcopy(group["lr"])
        first = sum(len(other["params"]) for other in self.param_groups[:-1])
        try:
            self._runs.append(GroupRun(group, words, self._method, first, self._compile))
        except Exception:
            self.param_groups.pop()
            raise

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
        for run, group in zip(self._runs, self.param_groups):
            run.prepare(group)
        for run, group in zip(self._runs, self.param_groups):
            run.step(group)
        return loss

    @property
    def state(self) -> Any:
        """{parameter: {name: tensor}}, made of views when it is asked for.

        What else is put into it is gone the next time. {} for what has no state.
        """
        found: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        for run, group in zip(self._runs, self.param_groups):
            found |= run.by_parameter(group)
        return found

    @state.setter
    def state(self, value: Any) -> None:
        if value:  # torch.optim.Optimizer sets an empty one
            raise AttributeError("state can't be set: load_state_dict does, all of it or nothing.")

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
        return [run.current(group) for run, group in zip(self._runs, self.param_groups)]

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim has it, readable by torch.load(weights_only=True).

        Its tensors are the optimizer's own, as torch.optim's are, and the next step changes some
        and replaces others: save it, or keep a copy.deepcopy of it.

        Functions and solvers among the hyperparameters are left out; loading keeps the ones given
        at construction.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        index: dict[Tensor, int] = {}
        groups = []
        first = 0
        for group in self.param_groups:
            for i, p in enumerate(group["params"], first):
                index.setdefault(p, i)
            first += len(group["params"])
            rest = {name: value for name, value in group.items() if name != "params"}
            groups.append({**without_objects(rest), "params": [index[p] for p in group["params"]]})
        found: Any = {
            "state": {index[p]: entries for p, entries in self.state.items()},
            "param_groups": groups,
        }
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, found)
            found = found if replaced is None else replaced
        return found  # type: ignore[no-any-return]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, cast: bool = False
    ) -> None:
        """Load what `state_dict` returned; either all of it or, where it does not fit, nothing.

        Args:
            state_dict: of an optimizer with as many groups and parameters. Where blocks were
                sharded, the union of all ranks' by `funshampoo.state.merged`.
            strict, cast: see `funshampoo.state.load_state_dict`.

        The hyperparameters become the saved ones, as in torch.optim; a function or solver given at
        construction stays.

        Raises:
            ValueError: other groups, names missing or unknown, other shapes or dtypes.
        """
        given: Any = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, given)
            given = given if replaced is None else replaced
        self._check_fits(given, strict)
        ready: list[tuple[dict[str, Any], Ready]] = []
        for run, group, saved in zip(self._runs, self.param_groups, given["param_groups"]):
            merged = {**group, **_hyperparameters(saved, group)}
            entries = {
                p: given["state"].get(index, {})
                for p, index in zip(group["params"], saved["params"])
            }
            ready.append((merged, run.loaded(merged, entries, strict=strict, cast=cast)))
        for run, group, (merged, found) in zip(self._runs, self.param_groups, ready):
            group.update(merged)
            run.adopt(found)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def seed_from_adamw(self, saved: Mapping[str, Any]) -> None:
        """Take over the moments of a torch.optim.AdamW, so that a run in progress can switch.

        Hyperparameters stay as they are here.

        Args:
            saved: its state_dict(), for the same parameters in the same order.

        Raises:
            ValueError: see `funshampoo.state.seed_from_adamw`; or both optimizers were given names,
                and they differ.
        """
        runs = list(zip(self._runs, self.param_groups))
        names = [run.names(group) for run, group in runs]
        _check_names(saved, [name for group in names for name in group])
        ready = []
        for i, (run, group) in enumerate(runs):
            # Two groups may use the same name: only this one's are its own.
            own = [n if i == j else f"group {j}/{n}" for j, g in enumerate(names) for n in g]
            seeded = seed_from_adamw(run.current(group), saved, own)
            ready.append(run.with_state(group, seeded))
        for (run, _), found in zip(runs, ready):
            run.adopt(found)

    def _check_fits(self, given: Any, strict: bool) -> None:
        """The checkpoint has our groups, and no state of anything else."""
        if not {"state", "param_groups"} <= given.keys():
            raise ValueError("this is no state_dict of an optimizer: see funshampoo.state for one.")
        saved: list[list[Any]] = [group["params"] for group in given["param_groups"]]
        ours = [len(group["params"]) for group in self.param_groups]
        theirs = [len(indices) for indices in saved]
        if ours != theirs:
            raise ValueError(
                f"the checkpoint has groups of {theirs} parameters, this optimizer of {ours}: "
                "build it with the same groups."
            )
        foreign = given["state"].keys() - {index for indices in saved for index in indices}
        if strict and foreign:
            raise ValueError(
                f"the checkpoint has a state for {min(map(str, foreign))}, which is in none of its "
                "groups."
            )

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy. Built chains are left out: they are made anew."""
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "_method": self._method,
            "_compile": self._compile,
            "_runs": self._runs,
            "_words": self._words,
        }


def _hyperparameters(saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved group says of hyperparameters: of functions it knows nothing."""
    return {
        name: copy.deepcopy(value)
        for name, value in saved.items()
        if name not in ("params", "param_names") and is_plain(group.get(name))
    }


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
