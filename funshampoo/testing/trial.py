"""A stage on trial: what it is fed, what it made of that, and how two results are compared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from funshampoo.core.applying import apply_updates
from funshampoo.core.contract import GradientTransformation, State, Tree, as_transformation
from funshampoo.core.tree import compute_dtype, flatten, leaf_names, map_leaves


class StageError(AssertionError):
    """A stage does not do what every stage has to. Says which, what was seen, and the remedy."""


class Run(NamedTuple):
    """A training: the updates of every step, and parameters and states from before the first."""

    updates: list[Tree]
    params: list[Tree]
    states: list[State]


class Trial:
    """A stage, its parameters, and a gradient for every step.

    Attributes:
        tx: the stage.
        make: makes another one, where check_stage was given a function; else gives the same.
        params: the parameters before the first step.
        grads: a tree for each step, of order 1 and nowhere zero.
        options: those of check_stage that switch a check off, by name.
        found: what one check has made and others look at too, by name.
        tolerance: by which two results may differ, relative to the largest entry of a tensor.
    """

    def __init__(
        self, stage: Any, params: Tree, steps: int, context: dict[str, Any], **options: bool | str
    ) -> None:
        self.make = _maker(stage)
        self.tx = self.make()
        self.params = default_parameters() if params is None else params
        self.options = options
        self.found: dict[str, Any] = {}
        self.context = context
        self.grads = [like(self.params, seed=100 + t) for t in range(steps)]
        dtypes = [compute_dtype(x) for x in flatten(self.params)[0]]
        self.tolerance = max([torch.finfo(dtype).eps ** 0.5 for dtype in dtypes])

    def fail(self, seen: str, remedy: str) -> NoReturn:
        """Raise a StageError."""
        raise StageError(f"{self.tx!r}: {seen}. {remedy}")

    def step(self, g: Tree, state: State, params: Tree, **context: Any) -> tuple[Tree, State]:
        """A step of the stage, with what the caller of check_stage wants to be passed."""
        updates, new = self.tx.update(g, state, params, **{**self.context, **context})
        return updates, new

    def run(
        self,
        grads: list[Tree] | None = None,
        params: Tree = None,
        moves: bool = True,
        **context: Any,
    ) -> Run:
        """All steps, with new parameters after each; by default with the trial's own trees.

        Args:
            moves: False keeps the parameters: updates need not fit them.
        """
        params = self.params if params is None else params
        run = Run([], [params], [self.tx.init(params)])
        for g in self.grads if grads is None else grads:
            updates, state = self.step(g, run.states[-1], run.params[-1], **context)
            run.updates.append(updates)
            run.params.append(apply_updates(run.params[-1], updates) if moves else params)
            run.states.append(state)
        return run

    @functools.cached_property
    def still(self) -> Run:
        """`run(moves=False)`, which several checks look at. Nobody may write to it."""
        return self.run(moves=False)

    @functools.cached_property
    def pure(self) -> Run:
        """`run()`, which several checks compare with. Nobody may write to it."""
        return self.run()


def _maker(stage: Any) -> Callable[[], GradientTransformation]:
    if callable(stage) and not hasattr(stage, "update"):
        return lambda: as_transformation(stage())
    made = as_transformation(stage)
    return lambda: made


def default_parameters() -> Tree:
    """A matrix, a tensor of order 3, a vector and a scalar, in nested containers."""
    empty = functools.partial(torch.empty, dtype=torch.float64)
    layer = {"weight": empty(3, 2, 4), "bias": empty(5), "scale": empty(())}
    return like({"w": empty(6, 5), "layers": [layer]}, seed=0)


def like(tree: Tree, seed: int) -> Tree:
    """Normal numbers in the place of these tensors, the same on every call."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    return map_leaves(drawn, tree)


def named(tree: Tree) -> dict[str, Any]:
    """{name: leaf}."""
    return dict(zip(leaf_names(tree), flatten(tree)[0]))


def difference(found: Tree, expected: Tree, tolerance: float = 0.0) -> str:
    """What is the first difference between two trees; "" where there is none.

    Args:
        tolerance: relative to the largest entry of a tensor, or to 1. 0 compares bits.
    """
    (xs, spec), (ys, other) = flatten(found), flatten(expected)
    if spec == other and not any([_of_leaves(x, y, tolerance) for x, y in zip(xs, ys)]):
        return ""  # without names, which take longer than all the rest
    mine, others = named(found), named(expected)
    if mine.keys() != others.keys():
        return f"'{sorted(mine.keys() ^ others.keys())[0]}' is in one of them only"
    for name, x in mine.items():
        if problem := _of_leaves(x, others[name], tolerance):
            return f"'{name}' {problem}"
    return ""


def _of_leaves(x: Any, y: Any, tolerance: float) -> str:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return "" if x is y else f"is {_shown(x)} in one and {_shown(y)} in the other"
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        return f"is {_shown(x)} in one and {_shown(y)} in the other"
    if torch.equal(x, y) or not x.numel():
        return ""
    a, b = x.to(torch.float64), y.to(torch.float64)
    apart = (a - b).abs().max().item()  # NaN, where one is: no bound holds
    if tolerance and apart <= tolerance * max(1.0, b.abs().max().item()):
        return ""
    return f"differs by {apart:.2g}"


def _shown(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


def not_finite(tree: Tree) -> str:
    """The name of the first tensor with an entry that is not finite, or ""."""
    for i, x in enumerate(flatten(tree)[0]):
        if isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all():
            return leaf_names(tree)[i]
    return ""


class Snapshot:
    """What tensors were, so that a write to one is seen: also a write of what was there."""

    def __init__(self, **trees: Tree) -> None:
        self._structures = {what: flatten(tree)[1] for what, tree in trees.items()}
        self._before = [
            (what, i, x, x.clone(), x._version)
            for what, tree in trees.items()
            for i, x in enumerate(flatten(tree)[0])
            if isinstance(x, Tensor)
        ]

    def written(self) -> str:
        """The first tensor that was written to since, or ""."""
        for what, i, x, value, version in self._before:
            # What is not equal to itself is NaN, on both sides.
            if x._version != version or not torch.equal(x.nan_to_num(), value.nan_to_num()):
                spec = self._structures[what]
                return f"'{leaf_names(spec.unflatten(range(spec.num_leaves)))[i]}' of the {what}"
        return ""


def common_memory(tree: Tree, other: Tree) -> tuple[str, str] | None:
    """The names of two tensors that lie in one piece of memory, the first one's first."""
    places = {_place(x): i for i, x in enumerate(flatten(other)[0])}
    for i, x in enumerate(flatten(tree)[0]):
        if (place := _place(x)) is not None and place in places:
            return leaf_names(tree)[i], leaf_names(other)[places[place]]
    return None


def _place(x: Any) -> tuple[torch.device, int] | None:
    """The memory that a tensor lies in; None for what lies nowhere."""
    lies = isinstance(x, Tensor) and x.numel() > 0
    return (x.device, x.untyped_storage().data_ptr()) if lies else None
