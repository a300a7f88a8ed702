"""Checks that gradients, state and parameters fit together when a step is entered.

They run where the caller enters, once for all stages and before the first of them runs: a donated
step must not have written to its state when a later stage finds a problem. They compare shapes,
dtypes, devices and names, never values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.nn import Parameter

from funshampoo.core.context import Context, changed
from funshampoo.core.interrupted import check_unmarked, tensors_of
from funshampoo.core.misfit import misfit
from funshampoo.core.parameters import NotAParameterError, check_gradients
from funshampoo.core.placed import any_in_parts
from funshampoo.core.tree import flatten, structures_differ
from funshampoo.state.stages import BlockedState

_LOOK = attrgetter("shape", "dtype", "device", "layout")
_STATE_LOOK = attrgetter("shape", "dtype", "device")
_REMEMBERED = 64  # kinds of parameters and states that one transformation steps in turn


class Looks(NamedTuple):
    """The looks (shape, dtype, device, layout) of what has entered a step.

    Attributes:
        spec, leaves: of the parameters, or of gradients in place of them.
        unlike: whether some gradients have another dtype than their parameters.
        of_module: whether some parameters belong to a module.
    """

    spec: Any
    leaves: list[Any]
    unlike: bool
    of_module: bool


class Entered(NamedTuple):
    """What has entered a step.

    Attributes:
        updates, params: the trees.
        gradients, known: their leaves; without parameters, both those of the gradients.
        alike: whether every parameter has a gradient of its shape, dtype and device, and these are
            parameters that the state is known to fit: then nobody inside compares them again.
    """

    looks: Looks
    updates: Any
    params: Any
    gradients: list[Any]
    known: list[Any]
    alike: bool

    def has(self, updates: Any, params: Any) -> bool:
        """Whether these are its trees, with the same leaves: a stage may have replaced some."""
        if updates is not self.updates or params is not self.params:
            return False
        both: Any = (updates, params)
        now: list[Any] = optree.tree_leaves(both, none_is_leaf=True)
        then = [*self.gradients, *self.known]
        return len(now) == len(then) and all(map(is_, now, then))


class _Known(NamedTuple):
    """A state that fits, and the parameters that it fits, by their looks."""

    spec: Any
    leaves: list[Any]
    nodes: list[Any]
    tensors: list[Any]


_ELSEWHERE: dict[Any, list[_Known]] = {}
"""{what a transformation was built with: the looks that were known most recently}."""


class Fits:
    """The states that belong to a transformation, and their parameters: those that `init` makes.

    Their looks are remembered. For another state, perhaps left by an earlier process, `init` is
    called again, for parameters on the meta device, unless a transformation that was built with the
    same has known it: a loop may rebuild its chain for every step.

    Args:
        init: (params, context) -> state.
        built_with: what that `init` depends on besides.
    """

    def __init__(self, init: Callable[[Any, Any], Any], built_with: Callable[[], Any]) -> None:
        self._init, self._built_with = init, built_with
        self._own: Any = None  # what that returned
        self._known: list[_Known] = []
        self._last: tuple[Any, Callable[[], Any], Looks | None] = (0, lambda: None, None)
        self._stepped = False  # since the last addition

    def remember(self, params: Any, state: Any) -> None:
        """Remember that `init` has made this state for these parameters."""
        leaves, spec = flatten(params)
        self._remember(spec, _looks(leaves), *_look_of(state))

    def checked(self, updates: Any, state: Any, params: Any, context: Context) -> Entered:
        """What enters. `made` remembers its looks, not this: others may enter meanwhile.

        Raises:
            ValueError: gradients, parameters and state do not fit together (names what differs).
            TypeError: a gradient is not a dense real floating tensor, or is on another device.
            InterruptedStepError: the state is half done.
        """
        first = next(iter(tensors_of(state, 1)), None)
        check_unmarked(first)
        leaves, spec = optree.tree_flatten(updates, none_is_leaf=True)
        looks = wanted = _looks(leaves)
        known = leaves
        if params is not None:
            known, other = optree.tree_flatten(params, none_is_leaf=True)
            if spec != other:
                raise ValueError(structures_differ(params, updates, "gradients"))
            wanted = _looks(known)
        same = wanted == looks
        unlike = (not same or None in looks) and check_gradients(leaves, known, updates)
        own = Looks(spec, wanted, unlike, Parameter in map(type, known))
        entered = Entered(own, updates, params, leaves, known, same and params is not None)
        left, its_first, before = self._last
        ids = tuple(map(id, state.values())) if type(state) is dict else id(state)
        if left == ids and its_first() is first and before == own:
            return entered
        nodes, tensors = _look_of(state)
        if self._knows(spec, wanted, nodes, tensors):
            return entered
        unknown = params is None and None in wanted  # without a gradient, and so without a shape
        if not (unknown or _is_nested(context) or any_in_parts(known)):
            given = "gradients" if params is None else "parameters"
            self._check_unknown(state, known, spec, given)
            self._remember(spec, wanted, nodes, tensors)
        return changed(entered, alike=False)

    def made(self, result: Any, looks: Looks) -> None:
        """Remember (updates, state) of a step, and the looks of what entered it.

        Usually the next step continues from this state, which then is not checked again. Its looks
        are remembered too, for its copies: a user's stage may change them, though it should not.
        """
        if type(result) is tuple and len(result) == 2:
            state = result[1]
            first = next(iter(tensors_of(state, 1)), None)
            if first is not None:  # a chain's state is a dict, whose entries may be replaced
                ids = tuple(map(id, state.values())) if type(state) is dict else id(state)
                self._last = ids, weakref.ref(first), looks
            if self._known and not self._stepped:
                look = (looks.spec, looks.leaves, *_look_of(state))
                if not self._knows(*look):
                    self._remember(*look)
                self._stepped = True

    def _knows(self, spec: Any, leaves: list[Any], nodes: list[Any], tensors: list[Any]) -> bool:
        """Whether this is a known one, which then becomes the last to be forgotten."""
        if not self._known:
            self._known = list(_ELSEWHERE.get(self._key(), ()))
        known = self._known  # replaced, never written to: another thread may be reading it
        for i, one in enumerate(known):
            same = one.tensors == tensors and one.leaves == leaves and one.nodes == nodes
            if same and one.spec == spec:
                if i:
                    self._known = [one, *known[:i], *known[i + 1 :]]
                return True
        return False

    def _key(self) -> Any:
        if self._own is None:
            try:
                self._own = self._built_with()
                hash(self._own)
            except Exception:  # of a class of the user's, which may do anything: never shared
                self._own = object()
        return self._own

    def _remember(self, spec: Any, *looks: list[Any]) -> None:
        known = _Known(spec, *looks)
        self._known = [known, *self._known[: _REMEMBERED - 1]]
        self._stepped = False
        own = self._key()
        _ELSEWHERE[own] = [known, *_ELSEWHERE.pop(own, [])[:7]]
        if len(_ELSEWHERE) > _REMEMBERED:
            _ELSEWHERE.pop(next(iter(_ELSEWHERE)), None)

    def _check_unknown(self, state: Any, leaves: Sequence[Any], spec: Any, given: str) -> None:
        try:
            asked = spec.unflatten(list(map(_on_meta, leaves)))
            with torch.random.fork_rng(devices=[]), torch.device("meta"):  # `init` may draw
                wanted = self._init(asked, {})
        except NotAParameterError as error:
            if given == "parameters":
                raise
            raise TypeError(
                f"the gradient of '{error.leaf}' {error.problem}; only dense tensors of a real "
                "floating dtype can be optimized. Convert it, or leave it out of the tree."
            ) from None
        except Exception:  # e.g. it reads values: then the stages find out themselves
            return
        devices = {p.device for p in leaves if isinstance(p, Tensor)}
        if problem := misfit(wanted, state, devices, given):
            raise ValueError(problem)


def _on_meta(p: Any) -> Any:
    """A copy without values; anything but a parameter stays, for `init` to report."""
    if not isinstance(p, Tensor) or p.layout is not torch.strided:
        return p
    return torch.empty(p.shape, dtype=p.dtype, device="meta")


def _is_nested(context: Context) -> bool:
    """Whether a user's combinator passes on a context, which `init` was then called with too."""
    around = context.block_ndim or context.upstream or context.later
    return bool(around) or context.clock is not None


def _looks(leaves: Sequence[Any]) -> list[Any]:
    try:
        return list(map(_LOOK, leaves))
    except AttributeError:  # None, or not a tensor
        return [_LOOK(x) if isinstance(x, Tensor) else None for x in leaves]


def _look_of(state: Any) -> tuple[list[Any], list[Any]]:
    """(types of a state's nodes, looks of its tensors), level by level."""
    kinds: list[Any] = []
    tensors: list[Tensor] = []
    nodes: list[Any] = [state]
    for node in nodes:  # it grows meanwhile
        if isinstance(node, Tensor):
            tensors.append(node)
        elif isinstance(node, dict):
            kinds.append(tuple(node))
            nodes.extend(node.values())
        elif isinstance(node, (tuple, list)):
            # Large, and usually the same object.
            layout = node.layout if isinstance(node, BlockedState) else None
            kinds.append((type(node), len(node), layout))
            nodes.extend([x for x in node if x is not layout] if layout else node)
        else:
            kinds.append(type(node))
    return kinds, list(map(_STATE_LOOK, tensors))
