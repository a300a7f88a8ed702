"""One parameter group of the wrapper: its chain's state, which follows the parameters."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter, is_lazy

from funshampoo.core.checks import check_flag
from funshampoo.core.contract import GradientTransformation, unwatched
from funshampoo.core.interrupted import Watched, check_whole, mark
from funshampoo.core.tree import detached, problem_of_gradient
from funshampoo.distributed.gathering import gathered
from funshampoo.optim.building import Builder, Built, other_structure
from funshampoo.optim.entries import SHARED, is_note, is_shared
from funshampoo.optim.names import Names
from funshampoo.optim.vocabulary import Method, Vocabulary
from funshampoo.state.checkpoint import (
    FORMAT,
    FORMAT_KEY,
    carried_over,
    load_state_dict,
    named_tensors,
)
from funshampoo.state.parts import PART_KEY, part_of
from funshampoo.state.places import block_names
from funshampoo.state.stages import BlockedState, LearningRateState, walk

_LAZY = UninitializedParameter  # which has no shape
ByParameter = dict[Tensor, dict[str, Tensor]]  # without what is shared
Look = tuple[Any, ...]


class Left(NamedTuple):
    """What is remembered of a parameter that is in no group, or not yet in its new one."""

    entries: dict[str, Tensor]
    shared: dict[str, Tensor]


class _Known(NamedTuple):
    """A parameter as the state was made for it."""

    name: str
    parameter: Tensor
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size


class Ready(NamedTuple):
    """A state for a group, with the chain and the parameters that it belongs to.

    Attributes:
        look: how the group looked when it was made for it.
        fresh: whether nothing but `init` has made it, of parameters as they were then.
    """

    built: Built
    known: list[_Known]
    state: Any
    look: Look = ()
    fresh: bool = False

    def check_gradients(self) -> None:
        """Raise if there is one that can't be stepped on.

        Raises:
            RuntimeError: a sparse one.
        """
        for k in self.known:
            if problem := problem_of_gradient(k.parameter.grad, k.parameter):
                raise RuntimeError(f"the gradient of '{k.name}' {problem}.")


class GroupRun:
    """The state of one group, made when needed, and its steps.

    Args:
        group: of `param_groups`; the run belongs to this dict, whatever its place in the list.
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
        self.group = group
        self._names = Names(first)
        self._builder = Builder(method, options)
        self._known: list[_Known] = []
        self._state: Any = None
        self._untouched = False  # made for a reader, and neither stepped nor written to
        self._anew: set[Tensor] = set()  # what starts from nothing, as soon as anybody looks
        self._looked_at: Look = ()
        self._read: tuple[Any, ByParameter, dict[str, Tensor]] | None = None
        self.names()
        self._built = self._builder.built(words, group)

    def names(self) -> list[str]:
        """The names of all its parameters; see `Names`."""
        return self._names.of(self.group)

    @property
    def has_state(self) -> bool:
        """Whether there is one that has been stepped, loaded or written to."""
        return self._state is not None and not self._untouched

    def look(self) -> Look:
        """What decides which parameters have a state, quickly."""
        names = self.group.get("param_names")
        seen = [
            (id(p), p.requires_grad, p.device, p.dtype, None if type(p) is _LAZY else p.shape)
            for p in self.group["params"]
        ]
        return seen, None if names is None else list(names)

    def is_as(self, look: Look) -> bool:
        """Whether the state was made for the parameters as they are."""
        return self.has_state and look == self._looked_at

    def prepared(self, left: Mapping[Tensor, Left], look: Look) -> Ready:
        """The state for a step of the group as it is now; the run itself goes on as it was.

        Where parameters came or went, were moved, converted or unfrozen, or a part was switched on
        or off, what still has a place is carried over, by parameter.

        Args:
            left: of parameters that come from elsewhere.
            look: as the group looks.

        Raises:
            ValueError: what was edited changes the blocks. The state stays as it was.
        """
        self._settle()
        check_flag("maximize", self.group.get("maximize", False))
        built = self._builder.edited(self.group, self._built)
        same_chain = not other_structure(built, self._built)
        if self.is_as(look) and same_chain and not (left and left.keys() & set(self.parameters())):
            return Ready(built, self._known, self._state, look)
        known, state = self._followed(built, same_chain, left)
        fresh = not self.has_state and not any([k.parameter in left for k in known])
        return Ready(built, known, state, look, fresh)

    def _followed(
        self, built: Built, same_chain: bool, left: Mapping[Tensor, Left]
    ) -> tuple[list[_Known], Any]:
        with_state = set(self.parameters()) if self.has_state else set()
        known = self._trainable(self.group, with_state | left.keys())
        arrived = [left[k.parameter] for k in known if k.parameter in left]
        if not self.has_state and not arrived:
            return known, _fresh(built, known)
        same = same_chain and not arrived and _same_parameters(known, self._known)
        if self.has_state and same:
            return known, self._state
        return known, self._carried_over(built, known, left)

    def _carried_over(self, built: Built, known: list[_Known], left: Mapping[Tensor, Left]) -> Any:
        mine, shared = self.entries() if self.has_state else ({}, {})
        flat: dict[str, Tensor] = {}
        try:
            fresh = _fresh(built, known)
            blocks = _blocks(fresh)
            for k in known:
                from_elsewhere = left.get(k.parameter)
                entries = mine.get(k.parameter)
                if from_elsewhere is not None:
                    entries = from_elsewhere.entries
                    shared = shared or from_elsewhere.shared
                _check_same_blocks(k.name, entries or {}, blocks)
                flat |= {f"{k.name}/{entry}": x for entry, x in (entries or {}).items()}
            return carried_over(fresh, gathered(built.transformation, {**flat, **shared}))
        except ValueError as error:
            raise ValueError(
                "the parameter group was edited in a way that its state can't follow; nothing was "
                "changed. Undo it (max_size, merge, keep, or a parameter's shape), let the "
                "parameter start anew (del optimizer.state[parameter]), or go on with a new "
                f"optimizer. {error}"
            ) from error

    def adopt(self, ready: Ready) -> None:
        """Go on from here."""
        self._built, self._known, self._state, self._looked_at, self._untouched = ready
        self._anew.clear()

    def step(self) -> None:
        """Read the gradients, and step, as prepared. What has no gradient is left alone."""
        if not self._known:
            return
        self._untouched, self._read = False, None
        built = self._built
        assert built.transformation is not None
        ascends = self.group.get("maximize", False)
        gradients = {k.name: _gradient(k.parameter, ascends) for k in self._known}
        params = {k.name: k.parameter.detach() for k in self._known}
        with Watched(self._state, params):
            self._state = unwatched(
                built.transformation, gradients, self._state, params, hyper=built.numbers()
            )

    def released(self, tensors: Collection[Tensor]) -> dict[Tensor, Left]:
        """Copies of what is remembered of these."""
        if not self.has_state or not tensors:
            return {}
        entries, shared = self.entries()
        return {
            p: Left(
                {name: x.detach().clone() for name, x in entries[p].items()},
                {name: x.detach().clone() for name, x in shared.items()},
            )
            for p in tensors
            if p in entries and p not in self._anew
        }

    def parameters(self) -> list[Tensor]:
        """Those that the state was made for."""
        return [k.parameter for k in self._known]

    def gone(self) -> list[Tensor]:
        """Those of them that are in the group no more."""
        here = set(self.group["params"])
        return [p for p in self.parameters() if p not in here]

    def entries(self) -> tuple[ByParameter, dict[str, Tensor]]:
        """({parameter: {name: view}}, what is shared) of the state.

        Where there is none yet, one is made to be read; the first step makes its own.
        """
        if self._state is None:
            built = self._builder.edited(self.group, self._built)
            known = self._trainable(self.group, set())
            self.adopt(Ready(built, known, _fresh(built, known), fresh=True))
        if self._read is None or self._read[0] is not self._state:
            check_whole(self._state)
            self._read = self._state, *self._by_parameter()
        return self._read[1:]

    def _by_parameter(self) -> tuple[ByParameter, dict[str, Tensor]]:
        owners = {k.name: k.parameter for k in self._known}
        own: dict[str, dict[str, Tensor]] = {k.name: {} for k in self._known}
        shared: dict[str, Tensor] = {}
        for owner, rest, x in named_tensors(self._state):
            if owner in own:
                own[owner][rest] = x
            else:
                shared["/".join(filter(None, [owner, rest]))] = x
        return {owners[name]: entries for name, entries in own.items()}, shared

    def mark_interrupted(self) -> None:
        """The step of all groups that this one was part of did not come to its end."""
        mark(self._state)
        self._read = None

    def written_to(self) -> None:
        """The state has been changed, or is about to be: the first step has to keep it."""
        self._untouched = False

    def without(self, p: Tensor, names: Collection[str] | None) -> None:
        """Let a parameter, or these entries of it, start from nothing."""
        if names is None:  # nobody sees its entries until the next step
            self._anew.add(p)
            return
        entries, shared = self.entries()
        kept = {name: x for name, x in entries[p].items() if name not in names}
        rest = {name: x for name, x in shared.items() if SHARED + name not in names}
        self._state = self._refilled({**entries, p: kept}, rest)
        self.written_to()

    def settle(self, p: Tensor) -> None:
        """Reset this parameter now, if it was deleted."""
        if p in self._anew:
            self._settle()

    def _settle(self) -> None:
        """Reset the parameters whose state was deleted."""
        anew = self._anew.intersection(self.parameters())
        if anew and self._state is not None:
            entries, shared = self.entries()
            kept = {p: own for p, own in entries.items() if p not in anew}
            self._state = self._refilled(kept, shared)
        self._anew.clear()

    def _refilled(self, entries: ByParameter, shared: Mapping[str, Tensor]) -> Any:
        """A fresh state with these entries."""
        self._built = self._builder.edited(self.group, self._built)  # a copy has none
        names = {k.parameter: k.name for k in self._known}
        flat = {f"{names[p]}/{entry}": x for p, own in entries.items() for entry, x in own.items()}
        return carried_over(_fresh(self._built, self._known), {**flat, **shared})

    def forget(self) -> None:
        """Let everything start from nothing."""
        self._known, self._state, self._untouched, self._read = [], None, False, None
        self._anew.clear()

    def loaded(
        self,
        group: dict[str, Any],
        saved: Mapping[Tensor, Mapping[str, Any]],
        own_part: bool,
        *,
        strict: bool,
        cast: bool,
    ) -> tuple[Ready, dict[Tensor, dict[str, Any]]]:
        """A fresh state with saved values, and the notes among them; the run goes on as it was.

        Args:
            group: as it will be after loading.
            saved: {parameter: its entries, those that are shared among them}; one that is not
                there starts from nothing.
            own_part: whether this was read for this rank alone, whatever it says of parts.
        """
        built = self._builder.edited(group, self._built)
        own = {p for p, e in saved.items() if any(not is_note(n) and not is_shared(n) for n in e)}
        names = copy.copy(self._names)  # the run's own stay, if this fails
        known = self._trainable(group, own, names)
        fresh = _fresh(built, known)
        flat: dict[str, Any] = {FORMAT_KEY: torch.tensor(FORMAT, device="cpu")}
        notes: dict[Tensor, dict[str, Any]] = {}
        places = {"/".join([owner, rest]): x for owner, rest, x in named_tensors(fresh)}
        for k in known:
            if k.parameter not in saved:
                flat |= {name: x for name, x in places.items() if name.startswith(f"{k.name}/")}
        for name, p in zip(names.of(group), group["params"]):
            for entry, x in saved.get(p, {}).items():
                full = f"{name}/{entry}"
                if full not in places and is_note(entry):
                    notes.setdefault(p, {})[entry] = x
                    continue
                if is_shared(entry) and full not in places:  # a stage may be called "shared", too
                    full = entry.removeprefix(SHARED)
                if isinstance(x, Tensor):
                    flat[full] = x
                elif x != {}:  # torch's helpers put {} where the checkpoint has nothing
                    raise ValueError(f"'{full}' is no tensor: the checkpoint is damaged.")
        if not known:  # all are frozen, so that even what is shared had no place to be saved in
            return Ready(built, known, fresh), notes
        if own_part:
            flat[PART_KEY] = part_of(fresh).entry()
        found = load_state_dict(fresh, flat, strict=strict, cast=cast)
        return Ready(built, known, found.state), notes

    def with_state(self, state: Any) -> Ready:
        """Another state in the place of the current one."""
        return Ready(self._built, self._known, state, self._looked_at)

    def state(self) -> Any:
        """The chain's state; where there is none yet, one to be read."""
        self._settle()
        self.entries()
        return self._state

    @property
    def transformation(self) -> GradientTransformation | None:
        """The chain; None in a copy that has not been stepped."""
        return self._built.transformation

    def _trainable(
        self, group: dict[str, Any], others: Set[Tensor], names: Names | None = None
    ) -> list[_Known]:
        """The parameters that require gradients and have a shape, and these others, each once."""
        found: dict[Tensor, _Known] = {}
        for name, p in zip((names or self._names).of(group), group["params"]):
            if (p.requires_grad or p in others) and p not in found and not is_lazy(p):
                found[p] = _Known(name, p, p.device, p.dtype, p.shape)
        return list(found.values())

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the chain is made anew."""
        changed = {"_built": self._built.for_a_copy(), "_looked_at": (), "_read": None}
        return {**self.__dict__, **changed}


def _same_parameters(a: list[_Known], b: list[_Known]) -> bool:
    return len(a) == len(b) and all(
        x.parameter is y.parameter and x.name == y.name and x[2:] == y[2:] for x, y in zip(a, b)
    )


def _fresh(built: Built, known: list[_Known]) -> Any:
    """A state that can be stepped, whatever mode the caller is in."""
    assert built.transformation is not None
    with torch.inference_mode(False), torch.no_grad():
        state = built.transformation.init({k.name: detached(k.parameter) for k in known})
    if not built.words.takes_rate:
        _check_scaled_once(built, state)
    return state


def _check_scaled_once(built: Built, state: Any) -> None:
    """The updates of a method that takes no rate are multiplied by one, here or in the method."""
    rates = sum(isinstance(node, LearningRateState) for _, node in walk(state))
    if "lr" not in built.arguments and not rates:
        raise TypeError(
            "the method takes no learning rate, and nothing in it scales by one: its updates would "
            "be added as they are, uphill if they are gradients. Give lr=; or lr=None if it scales "
            "them by a negative number in another way than by scale_by_learning_rate."
        )
    if built.arguments.get("lr") is not None and rates > 1:
        raise TypeError(
            "the transformation scales by a learning rate already, and lr= would do it again: give "
            "it without scale_by_learning_rate, or give its recipe."
        )


def _check_same_blocks(
    name: str, entries: Mapping[str, Tensor], blocks: Mapping[str, set[str]]
) -> None:
    """What is remembered of a parameter is of blocks that it has."""
    ours = blocks.get(name, set())
    theirs = {entry.split("/")[0] for entry in entries if entry.startswith("block")}
    if ours and not theirs <= ours:
        raise ValueError(f"'{name}' falls into other blocks than before.")


def _blocks(state: Any) -> dict[str, set[str]]:
    """{parameter: the names of its blocks}."""
    found: dict[str, set[str]] = {}
    for _, node in walk(state):
        if isinstance(node, BlockedState):
            for rows in block_names(node.layout).values():
                for parameter, block in rows.values():
                    found.setdefault(parameter, set()).add(block)
    return found


def _gradient(p: Tensor, ascends: bool) -> Tensor | None:
    """None where a frozen parameter still has an old gradient."""
    g = p.grad if p.requires_grad else None
    return -g if ascends and g is not None else g
