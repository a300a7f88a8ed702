"""`optimizer.state`: what is remembered of every parameter, in torch.optim's form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from funshampoo.optim.entries import unlabelled
from funshampoo.optim.memory import Memory


class Entries(dict[str, Any]):
    """{name: tensor or note} of one parameter; writing to it changes the optimizer's state.

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
        """Change several entries, or none of them if one does not fit."""
        self._memory.write(self._parameter, unlabelled(dict(*args, **kwargs)))
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
        """Remove and return: an entry of the chain starts from nothing, a note is gone."""
        value = super().pop(name, *default) if default or name in self else self[name]
        self._memory.forget(self._parameter, {name})
        return value

    def popitem(self) -> tuple[str, Any]:
        """As a dict's."""
        name = next(reversed(self))
        return name, self.pop(name)

    def clear(self) -> None:
        """Reset the parameter."""
        self._memory.forget(self._parameter)
        super().clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)

    def __copy__(self) -> dict[str, Any]:
        return dict(self)


class States(MutableMapping[Tensor, Any]):
    """{parameter: its entries}, with the semantics of torch.optim's defaultdict.

    A parameter whose entries are deleted starts from nothing, and so does what an assigned mapping
    leaves out; the others continue. An unknown tensor has {}, to which notes can be added.
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
        self._memory.assign(p, unlabelled(entries))

    def __delitem__(self, p: Tensor) -> None:
        if p not in self:
            raise KeyError(p)
        self._memory.forget(p)

    def get(self, p: Tensor, default: Any = None) -> Any:
        """As a dict's: the default for a parameter without entries."""
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

    def replace_all(self, given: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Make this the state of all parameters; nothing is changed if an entry does not fit.

        Raises:
            KeyError, TypeError, ValueError: an entry does not fit.
        """
        for p, entries in given.items():
            self._memory.checked(p, unlabelled(entries))
        if not given:
            self.clear()
        for p in [p for p in self if p not in given]:
            del self[p]
        for p, entries in given.items():
            self[p] = entries

    def clear(self) -> None:
        """Reset everything."""
        self._memory.forget_all()

    def __repr__(self) -> str:
        return repr(dict(self.items()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, ({p: dict(entries) for p, entries in self.items()},)


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
