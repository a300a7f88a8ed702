"""`optimizer.state`: what is remembered of every parameter, as torch.optim has it.

Names with a "/" in them are the chain's: "block_0_1/graft/onto/second" is a tensor of the chain's
state, and "shared/clock/steps" one that belongs to nobody and stands with every parameter. All
other names are notes of whoever uses the optimizer, kept, saved and loaded with the parameter.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Protocol

from torch import Tensor

SHARED = "shared/"  # what is nobody's stands with every parameter, so that no tool drops it


class Memory(Protocol):
    """What `States` presents: the optimizer."""

    def entries_of(self, p: Tensor) -> dict[str, Any]:
        """Everything that is remembered of a parameter; {} of one that is not known."""

    def remembered(self) -> list[Tensor]:
        """The parameters of which something is remembered."""

    def remembers(self) -> bool:
        """Whether there is one."""

    def check(self, p: Tensor, entries: Mapping[str, Any]) -> None:
        """Raise where `write` would."""

    def assign(self, p: Tensor, entries: Mapping[str, Any]) -> None:
        """Let these be all its entries, at the next step, or none where one does not fit."""

    def write(self, p: Tensor, entries: Mapping[str, Any]) -> None:
        """Change these entries of a parameter, or none where one does not fit."""

    def forget(self, p: Tensor, names: set[str] | None = None) -> None:
        """Let a parameter start from nothing; or these entries of it."""

    def forget_all(self) -> None:
        """Let everything start from nothing, notes and counters too."""


class Entries(dict[str, Any]):
    """{name: tensor or note} of one parameter: what is written to it counts.

    The tensors are views of the chain's state, and the next step writes to them. A copy is a plain
    dict.
    """

    def __init__(self, values: Mapping[str, Any], memory: Memory, p: Tensor) -> None:
        super().__init__(values)
        self._memory, self._parameter = memory, p

    def _reread(self) -> None:
        super().clear()
        super().update(self._memory.entries_of(self._parameter))

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Change several, or none where one does not fit."""
        self._memory.write(self._parameter, dict(*args, **kwargs))
        self._reread()

    def __ior__(self, other: Any) -> Entries:  # type: ignore[override, misc]
        self.update(other)
        return self

    def setdefault(self, name: str, default: Any = None) -> Any:
        """As a dict's."""
        if name not in self:
            self[name] = default
        return self[name]

    def __delitem__(self, name: str) -> None:
        self.pop(name)

    def pop(self, name: str, *default: Any) -> Any:
        """The entry, which starts from nothing, or the note, which is gone."""
        value = super().pop(name, *default) if default or name in self else self[name]
        self._memory.forget(self._parameter, {name})
        return value

    def popitem(self) -> tuple[str, Any]:
        """As a dict's."""
        name = next(reversed(self))
        return name, self.pop(name)

    def clear(self) -> None:
        """Let the parameter start from nothing."""
        self._memory.forget(self._parameter)
        super().clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)

    def __copy__(self) -> dict[str, Any]:
        return dict(self)


class States(MutableMapping[Tensor, Any]):
    """{parameter: its entries}, with the meaning of torch.optim's defaultdict.

    A parameter whose entries are deleted starts from nothing, and so does what an assigned mapping
    leaves out; the others go on. Of an unknown tensor there is {}, which takes notes.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def __getitem__(self, p: Tensor) -> Entries:
        return Entries(self._memory.entries_of(p), self._memory, p)

    def __setitem__(self, p: Tensor, entries: Mapping[str, Any]) -> None:
        if not isinstance(entries, Mapping):
            raise TypeError(
                f"the state of a parameter is a mapping of names to values, not {entries!r}."
            )
        self._memory.assign(p, dict(entries))

    def __delitem__(self, p: Tensor) -> None:
        if p not in self:
            raise KeyError(p)
        self._memory.forget(p)

    def get(self, p: Tensor, default: Any = None) -> Any:
        """As a dict's: the default of what has nothing."""
        found = self[p]
        return found if found else default

    def pop(self, p: Tensor, *default: Any) -> Any:
        """As a dict's; the parameter starts from nothing."""
        if p not in self and default:
            return default[0]
        found = {name: _kept(x) for name, x in self[p].items()}
        del self[p]
        return found

    def __contains__(self, p: object) -> bool:
        return isinstance(p, Tensor) and bool(self._memory.entries_of(p))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._memory.remembered())

    def __len__(self) -> int:
        return len(self._memory.remembered())

    def __bool__(self) -> bool:
        return self._memory.remembers()

    def become(self, given: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Let this be the state of all parameters; nothing is changed where an entry does not fit.

        Raises:
            KeyError, TypeError, ValueError: one does not.
        """
        for p, entries in given.items():
            self._memory.check(p, entries)
        if not given:
            self.clear()
        for p in [p for p in self if p not in given]:
            del self[p]
        for p, entries in given.items():
            self[p] = entries

    def clear(self) -> None:
        """Let everything start from nothing."""
        self._memory.forget_all()

    def __repr__(self) -> str:
        return repr(dict(self.items()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, ({p: dict(entries) for p, entries in self.items()},)


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def is_note(name: Any) -> bool:
    """Whether an entry is a client's, and none of the chain's.

    >>> is_note("rho"), is_note("shared/clock/steps")
    (True, False)
    """
    return not (isinstance(name, str) and "/" in name)


def is_shared(name: str) -> bool:
    """Whether an entry is nobody's, and stands with every parameter."""
    return name.startswith(SHARED)


def check_entry(name: str, value: Any, known: Mapping[str, Any]) -> None:
    """The value can stand in the place of this entry of the chain's.

    Raises:
        KeyError: there is no such place.
        TypeError: it is no tensor.
        ValueError: it has another shape or dtype.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise KeyError(
            f"the optimizer has no entry '{name}' for this parameter{hint} Names of your own have "
            "no '/' in them."
        )
    place = known[name]
    if not isinstance(value, Tensor):
        raise TypeError(f"'{name}' is a tensor of the optimizer's state, not {value!r}.")
    if value.shape != place.shape or value.dtype != place.dtype:
        raise ValueError(
            f"'{name}' is {place.dtype} of shape {tuple(place.shape)}; the value is "
            f"{value.dtype} of shape {tuple(value.shape)}."
        )
