"""A stage under test: its inputs, its results, and how two results are compared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from funshampoo.core.adapting import check_places
from funshampoo.core.applying import apply_updates
from funshampoo.core.contract import GradientTransformation, State, Tree, as_transformation
from funshampoo.core.tree import compute_dtype, flatten, leaf_names, map_leaves


class StageError(AssertionError):
    """A stage violates the contract. Says which, what was seen, and the remedy."""


class Run(NamedTuple):
    """A training run: updates of every step; parameters and states, from before the first on."""

    updates: list[Tree]
    params: list[Tree]
    states: list[State]


class Trial:
    """A stage, its parameters, and a gradient for every step.

    Attributes:
        tx: the stage.
        make: makes another instance, if check_stage was given a function; else returns the same.
        params: the parameters before the first step.
        grads: a tree for each step, with entries of about 1, none of them zero.
        options: the options of check_stage that switch a check off, by name.
        found: results of one check that others use too, by name.
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
        """A step of the stage, with the context passed to check_stage."""
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
        """`run(moves=False)`, which several checks use. Read-only."""
        return self.run(moves=False)

    @functools.cached_property
    def pure(self) -> Run:
        """`run()`, with which several checks compare. Read-only."""
        return self.run()


def _maker(stage: Any) -> Callable[[], GradientTransformation]:
    if callable(stage) and not hasattr(stage, "update"):
        check_places(stage, "stage", (), (), "write check_stage(lambda: mine(0.1))")
        return lambda: as_transformation(stage())
    made = as_transformation(stage)
    return lambda: made


def default_parameters() -> Tree:
    """A matrix, a tensor of order 3, a vector and a scalar, in nested containers."""
    empty = functools.partial(torch.empty, dtype=torch.float64)
    layer = {"weight": empty(3, 2, 4), "bias": empty(5), "scale": empty(())}
    return like({"w": empty(9, 7), "layers": [layer]}, seed=0)  # odd: see `linalg.products`


def like(tree: Tree, seed: int) -> Tree:
    """Normal random numbers with the shapes of these tensors, the same on every call."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    return map_leaves(drawn, tree)


def named(tree: Tree) -> dict[str, Any]:
    """{name: leaf}."""
    return dict(zip(leaf_names(tree), flatten(tree)[0]))


def difference(found: Tree, expected: Tree, tolerance: float = 0.0) -> str:
    """The first difference between two trees, in words; "" if there is none.

    Args:
        tolerance: relative to the largest entry of a tensor, or to 1. 0 compares bits.
    """
    (xs, spec), (ys, other) = flatten(found), flatten(expected)
    if spec == other and not any([_of_leaves(x, y, tolerance) for x, y in zip(xs, ys)]):
        return ""  # without names, which take longer than everything else
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
    apart = (a - b).abs().max().item()  # NaN, if one is: it is within no bound
    if tolerance and apart <= tolerance * max(1.0, b.abs().max().item()):
        return ""
    return f"differs by {apart:.2g}"


def _shown(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


def not_finite(tree: Tree) -> str:
    """The name of the first tensor with a non-finite entry, or ""."""
    for i, x in enumerate(flatten(tree)[0]):
        if isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all():
            return leaf_names(tree)[i]
    return ""


class Snapshot:
    """The values of tensors, to detect a write, even of the same values."""

    def __init__(self, **trees: Tree) -> None:
        self._structures = {what: flatten(tree)[1] for what, tree in trees.items()}
        self._before = [
            (what, i, x, x.clone(), x._version)
            for what, tree in trees.items()
            for i, x in enumerate(flatten(tree)[0])
            if isinstance(x, Tensor)
        ]

    def written(self) -> str:
        """The first tensor written to since, or ""."""
        for what, i, x, value, version in self._before:
            # A value unequal to itself is NaN, on both sides.
            if x._version != version or not torch.equal(x.nan_to_num(), value.nan_to_num()):
                spec = self._structures[what]
                return f"'{leaf_names(spec.unflatten(range(spec.num_leaves)))[i]}' of the {what}"
        return ""


def common_memory(tree: Tree, other: Tree) -> tuple[str, str] | None:
    """The names of two tensors that share memory, the first tree's first."""
    places = {_place(x): i for i, x in enumerate(flatten(other)[0])}
    for i, x in enumerate(flatten(tree)[0]):
        if (place := _place(x)) is not None and place in places:
            return leaf_names(tree)[i], leaf_names(other)[places[place]]
    return None


def _place(x: Any) -> tuple[torch.device, int] | None:
    """The memory of a tensor; None if it has none."""
    lies = isinstance(x, Tensor) and x.numel() > 0
    return (x.device, x.untyped_storage().data_ptr()) if lies else None
