"""The meaning of a state's numbers, as far as it limits their valid values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_RELATED = {"count": " <= ", "weight": " of "}  # kinds that may name another field

StateClass = TypeVar("StateClass", bound=type)

KINDS = {
    "finite": "neither infinite nor NaN: a momentum, a root, whatever is not declared",
    "linear": "finite, and linear in the updates: `in_eigenbasis` turns it with the bases",
    "any": "whatever it likes: reports that nothing is computed from",
    "number": "not NaN: a hyperparameter, which may be infinite to switch a limit off",
    "nonnegative": "finite and ≥ 0: a sum or an average of squares",
    "weight": "in [0, 1]: the total weight of the gradients in an average, 1 - beta^t; one that is "
    "a 'weight of second' is not 0 beside a field `second` that is not",
    "factor": "a sum or an average of A Aᵀ, packed or not: |L_ij| ≤ √(L_ii L_jj)",
    "orthonormal": "a tree of `Kept` whose first values are bases, QQᵀ = I but for rows of zeros, "
    "those of coordinates that no gradient has touched",
    "count": "≥ 0 and not above the clock; 'count <= held' is not above the field `held` either",
    "steps": "the clock, ≥ 0; every field of this name is one",
}


def meaning(**fields: str) -> Callable[[StateClass], StateClass]:
    """Declare what the fields of a stage's named tuple mean, so that checkpoints can be checked.

    Args:
        fields: {field: kind}, one of `KINDS`. A field that is not named has to be finite; "any"
            opts out.

    Raises:
        ValueError: no such kind, or no such field.

    >>> from typing import NamedTuple
    >>> from torch import Tensor
    >>> @meaning(worst="any", hits="count")
    ... class MyState(NamedTuple):
    ...     average: Tensor
    ...     worst: Tensor
    ...     hits: Tensor
    """

    def declared(state: StateClass) -> StateClass:
        known = getattr(state, "_fields", ())
        for field, kind in fields.items():
            base, relation, other = parts_of(kind)
            if base not in KINDS or relation not in ("", _RELATED.get(base)):
                raise ValueError(f"meaning: {field} is {kind!r}; known kinds: {', '.join(KINDS)}.")
            for name in filter(None, (field, other)):
                if name not in known:
                    raise ValueError(f"meaning: {state.__name__} has no field '{name}'.")
        state._meaning = fields  # type: ignore[attr-defined]
        return state

    return declared


def parts_of(kind: str) -> tuple[str, str, str]:
    """The base of a kind, its relation to another field, and that field.

    >>> parts_of("count <= held"), parts_of("weight of average"), parts_of("finite")
    (('count', ' <= ', 'held'), ('weight', ' of ', 'average'), ('finite', '', ''))
    """
    relation = next((word for word in _RELATED.values() if word in kind), "")
    base, _, other = kind.partition(relation) if relation else (kind, "", "")
    return base, relation, other


def is_declared(state: type) -> bool:
    """Whether this class declares what its fields mean."""
    return hasattr(state, "_meaning")


def kind_of(state: Any, field: str) -> str:
    """The kind of a field of this class; "finite" if not declared.

    >>> kind_of(tuple, "average")
    'finite'
    """
    if field == "steps":
        return "steps"
    found: str = getattr(state, "_meaning", {}).get(field, "finite")
    return found
