"""One parameter group of the wrapper: its chain, and the chain's state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funshampoo.combinators.compilation import compiled
from funshampoo.core.contract import GradientTransformation, update_in_place
from funshampoo.core.live import Live
from funshampoo.core.tree import problem_of_gradient
from funshampoo.optim.vocabulary import Method, Vocabulary, untouched
from funshampoo.state.checkpoint import (
    FORMAT,
    FORMAT_KEY,
    load_state_dict,
    named_tensors,
    state_dict,
)
from funshampoo.state.places import block_names
from funshampoo.state.stages import BlockedState, LearningRateState, walk

_MANY = 4  # graphs of one group, from which on an edit on every step is likely
_SHARED = "shared/"  # what is nobody's stands with every parameter, so that no tool drops it


class _Known(NamedTuple):
    """A parameter as the state was made for it."""

    name: str
    parameter: Tensor
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size


class _Chain(NamedTuple):
    """A chain and what it was built from; it is left out of copies, since it holds functions.

    Attributes:
        raw: what it read of the group.
        structure: what of the arguments can change the structure of the state.
        live: the numbers that it looks up on every step; see `core.live`.
        hyper: their values.
        inputs: what a graph reads them from, so that others make no new one; {} without a graph.
    """

    words: Vocabulary
    raw: list[Any]
    arguments: dict[str, Any]
    structure: Any
    transformation: GradientTransformation | None
    live: dict[str, Live]
    hyper: dict[str, Any]
    inputs: dict[str, Tensor]


class Ready(NamedTuple):
    """A state for a group, with the chain and the parameters that it belongs to."""

    chain: _Chain
    known: list[_Known]
    state: Any


class GroupRun:
    """The chain of one group, rebuilt when its numbers change, and the state, made when needed.

    Args:
        group: of `param_groups`.
        words: of the group's method.
        method: of the groups that have none of their own.
        first: how many parameters the groups before it have.
        options: of `compiled`; None: as it is.
    """

    def __init__(
        self,
        group: dict[str, Any],
        words: Vocabulary,
        method: Method,
        first: int,
        options: Mapping[str, Any] | None,
    ) -> None:
        self._method = method
        self._options = options
        self._first = first
        self._known: list[_Known] = []
        self._state: Any = None
        self._looked_at: tuple[Any, ...] = ()
        self._graphs = 0
        self.names(group)
        self._chain = self._built(words, group)

    def names(self, group: Mapping[str, Any]) -> list[str]:
        """The names of all its parameters: those given, or param_0, param_1, ...

        A parameter that the group holds twice has its first name.

        Raises:
            ValueError: there are too few names, or two parameters have one.
        """
        parameters = group["params"]
        given = group.get("param_names")
        if given and len(given) != len(parameters):
            raise ValueError(
                f"the group has {len(parameters)} parameters and {len(given)} param_names."
            )
        owners: dict[str, int] = {}
        names: dict[int, str] = {}
        for i, p in enumerate(parameters):
            name = names.setdefault(id(p), given[i] if given else f"param_{self._first + i}")
            if owners.setdefault(name, id(p)) != id(p):
                raise ValueError(f"two parameters of the group are named '{name}'.")
        return [names[id(p)] for p in parameters]

    def prepare(self, group: dict[str, Any]) -> None:
        """Find out all that can be wrong with a step, before any group is stepped."""
        self.current(group)
        for known in self._known:
            _check_gradient(known)

    def step(self, group: Mapping[str, Any]) -> None:
        """Read the gradients, and step, as prepared. What has no gradient is left alone."""
        chain = self._chain
        assert chain.transformation is not None
        if not self._known:
            return
        for name, x in chain.inputs.items():
            x.fill_(chain.hyper[name])  # not in `prepare`: a step that fails must not change it
        ascends = group.get("maximize", False)
        gradients = {known.name: _gradient(known.parameter, ascends) for known in self._known}
        detached = {known.name: known.parameter.detach() for known in self._known}
        hyper = {**chain.hyper, **chain.inputs}
        self._state = update_in_place(
            chain.transformation, gradients, self._state, detached, hyper=hyper
        )

    def current(self, group: dict[str, Any]) -> Any:
        """The state for the group as it is now.

        Where parameters were moved, converted or unfrozen, or a part was switched on or off, what
        still has a place is carried over by name.

        Raises:
            ValueError: what was edited changes the blocks. The state stays as it was.
        """
        chain = self._chain_of(group)
        look = _look(group)
        seen = self._state is not None and look == self._looked_at
        known = self._known
        if not seen:
            known = self._trainable(group, {id(k.parameter) for k in self._known})
        if self._state is None:
            state = _fresh(chain, known)
        elif _needs_another_state(chain, self._chain) or not (
            seen or _same_parameters(known, self._known)
        ):
            state = _carried_over(chain, known, self._state)
        else:
            state = self._state
        self.adopt(Ready(chain, known, state))
        self._looked_at = look
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
    ) -> Ready:
        """A fresh state with saved values; the run itself is not changed.

        Args:
            group: as it will be after loading.
            saved: {parameter: its entries}.
        """
        chain = self._chain_of(group)
        own = [id(p) for p, entries in saved.items() if any(map(_is_own, entries))]
        known = self._trainable(group, own)
        fresh = _fresh(chain, known)
        if not known:  # all are frozen, so that even what is shared had no place to be saved in
            return Ready(chain, known, fresh)
        places = state_dict(fresh)
        flat = {FORMAT_KEY: torch.tensor(FORMAT, device="cpu")}
        for name, p in zip(self.names(group), group["params"]):
            if saved.get(p, {}).keys() >= {"exp_avg", "exp_avg_sq"}:
                raise ValueError(
                    "this is the state of an AdamW of torch.optim: seed_from_adamw(state_dict) "
                    "takes its moments over."
                )
            for entry, x in saved.get(p, {}).items():
                if not isinstance(x, Tensor):
                    raise ValueError(
                        f"'{entry}' of '{name}' is no tensor: that is another optimizer's state."
                    )
                full = f"{name}/{entry}"  # of a stage named "shared", perhaps
                mine = _is_own(entry) or full in places
                flat[full if mine else entry.removeprefix(_SHARED)] = x
        found = load_state_dict(fresh, flat, strict=strict, cast=cast)
        return Ready(chain, known, found.state)

    def adopt(self, ready: Ready) -> None:
        """Go on from here."""
        self._chain, self._known, self._state = ready
        self._looked_at = ()

    def with_state(self, group: dict[str, Any], state: Any) -> Ready:
        """Another state in the place of the current one."""
        self.current(group)
        return Ready(self._chain, self._known, state)

    def _chain_of(self, group: dict[str, Any]) -> _Chain:
        before = self._chain
        method = group.get("method", self._method)
        if before.words.method is not method:
            return self._built(Vocabulary(method), group)
        words = before.words
        if before.transformation is None:  # a copy
            return self._built(words, group)
        raw = words.raw(group)
        if untouched(raw, before.raw):
            return before
        edited = words.edited(raw, before.raw, before.arguments, before.live)
        arguments = words.arguments(group) if edited is None else edited
        if edited is None and not words.same_chain(
            arguments, before.arguments, before.live, in_graph=self._options is not None
        ):
            return self._built(words, group)
        hyper = words.hyper(arguments, before.live)
        for name, live in before.live.items():
            if hyper[name] is not before.hyper[name]:
                for check in live.checks:
                    _by_torchs_names(check, hyper[name])
        return before._replace(raw=raw, arguments=arguments, hyper=hyper)

    def _built(self, words: Vocabulary, group: Mapping[str, Any]) -> _Chain:
        arguments = words.arguments(group)
        live = words.live(arguments)
        built = _by_torchs_names(words.build, words.with_live(arguments, live))
        hyper = words.hyper(arguments, live)
        inputs: dict[str, Tensor] = {}
        if self._options is not None:
            _check_compilable(words, arguments, live)
            inputs = {n: _input(x) for n, x in hyper.items() if not isinstance(x, Tensor)}
            built = compiled(built, **self._options)
            self._graphs += 1
            if self._graphs == _MANY:
                warnings.warn(
                    "compile: param_groups are edited again and again, and every edit is compiled "
                    "anew, which takes seconds, but for that of a number that the recipe looks up "
                    "on every step, as those of funshampoo do. Keep the rest as it is, or leave "
                    "out compile.",
                    stacklevel=2,
                )
        structure = words.structure(arguments, live)
        return _Chain(words, words.raw(group), arguments, structure, built, live, hyper, inputs)

    def _trainable(self, group: Mapping[str, Any], others: Collection[int]) -> list[_Known]:
        """The parameters that require gradients, and those with these identities, each once."""
        seen: dict[int, _Known] = {}
        for name, p in zip(self.names(group), group["params"]):
            if (p.requires_grad or id(p) in others) and id(p) not in seen:
                seen[id(p)] = _Known(name, p, p.device, p.dtype, p.shape)
        return list(seen.values())

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the chain is made anew."""
        chain = self._chain._replace(transformation=None, raw=[], live={}, inputs={})
        return {**self.__dict__, "_chain": chain, "_looked_at": ()}


def _by_torchs_names(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it; what it says of `learning_rate` is said of lr, as the group has it."""
    try:
        return function(*arguments)
    except (TypeError, ValueError) as error:
        if not str(error).startswith("learning_rate "):
            raise
        raise type(error)(str(error).replace("learning_rate", "lr", 1)) from error


def _check_compilable(
    words: Vocabulary, arguments: Mapping[str, Any], live: Mapping[str, Live]
) -> None:
    for other in ("distribute", "stagger"):
        if arguments.get(other):
            raise ValueError(f"compile and {other} do not go together: leave out one of them.")
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name not in live and name != words.rate:
            raise ValueError(
                f"{name} is a tensor, which may have been written to, so that every step would be "
                "compiled anew: give a number, or leave out compile."
            )


def _input(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


def _look(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides which parameters have a state, quickly."""
    names = group.get("param_names")
    seen = [(id(p), p.requires_grad, p.device, p.dtype, p.shape) for p in group["params"]]
    return seen, None if names is None else list(names)


def _is_own(entry: str) -> bool:
    return not entry.startswith(_SHARED)


def _needs_another_state(now: _Chain, before: _Chain) -> bool:
    if now is before:
        return False
    if now.words.method is not before.words.method:
        return True
    return bool(now.structure != before.structure)


def _same_parameters(a: list[_Known], b: list[_Known]) -> bool:
    return len(a) == len(b) and all(
        x.parameter is y.parameter and x.name == y.name and x[2:] == y[2:] for x, y in zip(a, b)
    )


def _fresh(chain: _Chain, known: list[_Known]) -> Any:
    assert chain.transformation is not None
    state = chain.transformation.init({k.name: k.parameter.detach() for k in known})
    if not chain.words.takes_rate:
        _check_scaled_once(chain, state)
    return state


def _check_scaled_once(chain: _Chain, state: Any) -> None:
    """The updates of a method that takes no rate are multiplied by one, here or in the method."""
    rates = sum(isinstance(node, LearningRateState) for _, node in walk(state))
    if "lr" not in chain.arguments and not rates:
        raise TypeError(
            "the method takes no learning rate, and nothing in it scales by one: its updates would "
            "be added as they are, uphill if they are gradients. Give lr=; or lr=None if it scales "
            "them by a negative number in another way than by scale_by_learning_rate."
        )
    if chain.arguments.get("lr") is not None and rates > 1:
        raise TypeError(
            "the transformation scales by a learning rate already, and lr= would do it again: give "
            "it without scale_by_learning_rate, or give its recipe."
        )


def _carried_over(chain: _Chain, known: list[_Known], old: Any) -> Any:
    fresh = _fresh(chain, known)
    try:
        _check_same_blocks(fresh, old)
        return load_state_dict(fresh, state_dict(old), strict=False, cast=True).state
    except ValueError as error:
        raise ValueError(
            "the parameter group was edited in a way that its state can't follow; nothing was "
            "changed. Undo it (max_size, merge, keep, or a parameter's shape), or go on with a new "
            f"optimizer. {error}"
        ) from error


def _check_same_blocks(state: Any, other: Any) -> None:
    ours, theirs = _blocks(state), _blocks(other)
    for parameter in ours.keys() & theirs.keys():
        if ours[parameter] != theirs[parameter]:
            raise ValueError(f"'{parameter}' falls into other blocks than before.")


def _blocks(state: Any) -> dict[str, set[str]]:
    """{parameter: the names of its blocks}."""
    found: dict[str, set[str]] = {}
    for _, node in walk(state):
        if isinstance(node, BlockedState):
            for rows in block_names(node.layout).values():
                for parameter, block in rows.values():
                    found.setdefault(parameter, set()).add(block)
    return found


def _check_gradient(known: _Known) -> None:
    if problem := problem_of_gradient(known.parameter.grad, known.parameter):
        raise RuntimeError(f"the gradient of '{known.name}' {problem}.")


def _gradient(p: Tensor, ascends: bool) -> Tensor | None:
    """None where a frozen parameter still has an old gradient."""
    g = p.grad if p.requires_grad else None
    return -g if ascends and g is not None else g
