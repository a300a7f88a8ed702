"""The checks of `check_stage` can fail: for every one a stage that fails there, and says so."""

from __future__ import annotations

import collections
import functools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo import GradientTransformation
from funshampoo.authoring import (
    Refreshing,
    RefreshSchedule,
    each_matrix,
    map_leaves,
    matmul,
    power,
    random_normal,
    rotate,
    unfold,
    update_leaves,
)
from funshampoo.state import meaning
from funshampoo.testing import StageError, check_stage
from tests.refresh.clients import Basis


class Average(NamedTuple):
    average: Any


@meaning(best="any")
class Best(NamedTuple):
    best: Any


class Counted(NamedTuple):
    average: Any
    steps: Any


def stage(leaf: Callable[..., Any], init: Any = torch.zeros_like, **given: Any) -> Any:
    """A stage with one tensor a leaf, from `leaf(u, m) -> (update, m)`."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        out, average = update_leaves(leaf, updates, (state.average,))
        return out, Average(average)

    return GradientTransformation(
        lambda params: Average(map_leaves(init, params)), update, "broken", **given
    )


def mean(u: Any, m: Any) -> Any:
    m = torch.lerp(m, u.to(m.dtype), 0.1)
    return m.clone(), m


def mean_of_what_is_old(u: Any, m: Any) -> Any:
    """Of an operator that torch has deprecated."""
    warnings.warn_explicit("old", DeprecationWarning, "script.py", 1, "torch.jit._script")
    return mean(u, m)


def wide(p: Any) -> Any:
    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))


def right() -> Any:
    return stage(mean, wide)


def probes() -> Any:
    """Random numbers at the beginning, and others on every step."""

    def init(params: Any, *, block_ndim: int = 0) -> Any:
        def leaf(p: Any) -> Tensor:
            drawn = random_normal(p.shape[block_ndim:], torch.tensor(0), wide(p).dtype)
            return drawn.expand(p.shape).clone()

        return Average(map_leaves(leaf, params))

    def update(updates: Any, state: Any, *, clock: Any, block_ndim: int = 0) -> Any:
        def leaf(u: Any, m: Any) -> Any:
            return u + m * random_normal(u.shape[block_ndim:], clock, m.dtype), m.clone()

        out, average = update_leaves(leaf, updates, (state.average,))
        return out, Average(average)

    return GradientTransformation(init, update)


def returns_a_field() -> Any:
    """The average for the state, from which the second step can't read it."""
    first = right()
    return other_update(lambda u, s: (u, first.update(u, s)[1].average), lambda p: first.init(p))


def other_update(update: Callable[..., Any], init: Any = None) -> Any:
    return GradientTransformation(init or right().init, update, "broken")


def test_stages_that_are_right_pass() -> None:
    check_stage(right)
    check_stage(torchs_power, bitwise=False, compile=False, differentiable=False)
    for function in (
        lambda x: matmul(matmul(x, x.mT), x),
        lambda x: x.sign() * power(x.abs(), 0.3),
        lambda x: matmul(*each_matrix(torch.linalg.qr, x)),
    ):
        check_stage(functools.partial(of_stacks, function), compile=False, differentiable=False)
    check_stage(lambda: fs.chain(probes()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_stage(lambda: stage(mean_of_what_is_old, wide), compile=False)
    check_stage(fs.chain(right(), fs.scale(2.0)), params={"w": torch.randn(3, 2)})
    check_stage(best_value, compile=False)
    check_stage(best_value, context={"value": torch.tensor(1.0)}, compile=False)


def best_value() -> Any:
    """The state of docs/checkpoints.md, which is not finite before the first value."""

    def update(updates: Any, state: Any, params: Any = None, *, value: Any = None) -> Any:
        return updates, state if value is None else Best(torch.maximum(state.best, value))

    return other_update(update, lambda params: Best(torch.tensor(-math.inf)))


def bare() -> Any:
    return other_update(lambda updates, state: updates)


def number_at_first() -> Any:
    return stage(mean, lambda p: 0)


def number_later() -> Any:
    return other_update(lambda u, s: (u, 1), lambda params: torch.zeros(()))


def writes_to_the_gradient() -> Any:
    return stage(lambda u, m: (u.mul_(2), m), wide)


def writes_what_was_there() -> Any:
    return stage(lambda u, m: (u + m.mul_(1), m.clone()), wide)


def init_writes() -> Any:
    return stage(mean, lambda p: torch.zeros_like(p.mul_(1)))


def remembers_outside() -> Any:
    seen = []

    def leaf(u: Any, m: Any) -> Any:
        seen.append(u)
        return u * len(seen), m

    return stage(leaf, wide)


def draws() -> Any:
    return stage(lambda u, m: (u * torch.rand_like(u), m), wide)


def refreshes_untold() -> Any:
    """The gradient in bases that are refreshed; it takes the whole context, as the guide's does."""
    bases = Refreshing(lambda block: [Basis(d) for d in block], RefreshSchedule(3))

    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        def read(side: int, u: Any) -> Any:
            return lambda x: matmul(x, x.mT), unfold(u, side, context.block_ndim)

        state = bases.update(updates, state, (updates,), read, context)

        def leaf(u: Any, sides: Any) -> Any:
            Q = [kept.value[0] for kept in sides]
            return (rotate(u, Q, context.block_ndim),)

        return update_leaves(leaf, updates, (), (state.kept,))[0], state

    return GradientTransformation(bases.init, update, "broken", counts=True)


def branches_untold() -> Any:
    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        factor = 2.0 if context.step is not None and context.step % 2 else 1.0
        return map_leaves(lambda u: u if u is None else u * factor, updates), state

    return fs.chain(GradientTransformation(lambda params: (), update, counts=True))


def begins_at_random() -> Any:
    return stage(mean, lambda p: torch.rand_like(p, dtype=wide(p).dtype))


def grows() -> Any:
    return stage(lambda u, m: (u.clone(), torch.cat([m, u.reshape(-1)])), lambda p: p.new_zeros(0))


def takes_means_and_says_elementwise() -> Any:
    return stage(lambda u, m: (u - u.mean(), m.clone()), wide, elementwise=True)


def takes_means_of_rows_and_says_elementwise() -> Any:
    return stage(
        lambda u, m: (u - u.mean(-1, keepdim=True) if u.ndim else u.clone(), m.clone()),
        wide,
        elementwise=True,
    )


def remembers_sums_and_says_elementwise() -> Any:
    return stage(lambda u, m: (u.clone(), m + u.sum()), wide, elementwise=True)


def becomes_another_dtype() -> Any:
    return stage(lambda u, m: (u.clone(), m.float()), torch.zeros_like)


def fills_in_later() -> Any:
    return other_update(lambda u, s: (u, (torch.zeros(()),)), lambda params: ())


def update_of_another_shape() -> Any:
    return stage(lambda u, m: (u.sum(), m), wide)


def returns_its_state() -> Any:
    return stage(lambda u, m: (u + m,) * 2, wide)


def keeps_the_parameter() -> Any:
    return stage(mean, lambda p: p)


def keeps_the_gradient() -> Any:
    return stage(lambda u, m: (u + m, u), wide)


def donates(leaf: Callable[..., Any]) -> Any:
    def update(updates: Any, state: Any, params: Any = None, *, donate: bool = False) -> Any:
        def own(u: Any, m: Any) -> Any:
            return leaf(u, m) if donate else mean(u, m)

        out, average = update_leaves(own, updates, (state.average,))
        return out, Average(average)

    return other_update(update, stage(mean, wide).init)


def donates_another_sum() -> Any:
    return donates(lambda u, m: (lambda new: (new.clone(), new))(m.mul_(0.9).add_(0.1 * u)))


def donates_the_gradient() -> Any:
    return donates(lambda u, m: mean(u.mul_(1), m))


def donates_old_updates() -> Any:
    def leaf(u: Any, m: Any) -> Any:
        m.lerp_(u.to(m.dtype), 0.1)
        return m, m

    return donates(leaf)


def apply_of_its_own() -> Any:
    def apply(updates: Any, state: Any, params: Any, context: Any) -> Any:
        for p in torch.utils._pytree.tree_leaves(params):
            p.add_(1)
        return state

    return GradientTransformation(right().init, right().update, "broken", apply=apply)


def none_is_zero() -> Any:
    def update(updates: Any, state: Any) -> Any:
        filled = map_leaves(
            lambda u, m: torch.zeros_like(m) if u is None else u, updates, state.average
        )
        return right().run(filled, state, None, fs.core.context.EMPTY)

    return other_update(update)


def forgets_on_none() -> Any:
    def update(updates: Any, state: Any) -> Any:
        out, new = right().update(updates, state)
        kept = map_leaves(lambda u, m: m * 0 if u is None else m, updates, new.average)
        return out, Average(kept)

    return other_update(update)


def breaks_on_none() -> Any:
    return other_update(lambda updates, state: (map_leaves(lambda u: u * 2, updates), state))


def depends_on_others() -> Any:
    return fs.clip_by_global_norm(0.1)


def remembers_by_step() -> Any:
    calls: dict[Any, int] = {}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        done = calls.setdefault(int(state.steps), len(calls))
        out, inner = right().update(updates, Average(state.average))
        scaled = map_leaves(lambda u: None if u is None else u * (1 + done), out)
        return scaled, Counted(inner.average, state.steps + 1)

    return other_update(
        update, lambda params: Counted(right().init(params).average, torch.zeros((), dtype=int))
    )


def hides_from_checkpoints() -> Any:
    """In a container that optree knows, and checkpoints don't."""

    def update(updates: Any, state: Any) -> Any:
        return map_leaves(lambda u: u, updates), Average(collections.deque([state.average[0] + 1]))

    return other_update(update, lambda params: Average(collections.deque([torch.zeros(())])))


class ShardedState(NamedTuple):
    """It has the name of another, whose report steps make anew."""

    inner: Any
    report: Any


def is_taken_for_another() -> Any:
    def update(updates: Any, state: Any) -> Any:
        return map_leaves(lambda u: u, updates), ShardedState((), state.report + 1)

    return other_update(update, lambda params: ShardedState((), torch.zeros(())))


def has_no_name() -> Any:
    def init(params: Any) -> Any:
        return {"inner": {"a/b": torch.zeros(()), "a": {"b": torch.zeros(())}}}

    return other_update(lambda u, s: (u, s), init)


def half_precision() -> Any:
    return stage(lambda u, m: (u.clone(), torch.lerp(m, u, 0.1)))


def overflows() -> Any:
    return stage(lambda u, m: (u * 1e4 * 1e4 * 1e-8, m), wide)


def one_dtype() -> Any:
    def update(updates: Any, state: Any) -> Any:
        total = torch.cat([u.reshape(-1) for u in updates_of(updates)])
        check = total.dtype == updates_of(updates)[0].dtype
        if not check:
            raise TypeError("several dtypes")
        return map_leaves(lambda u: u, updates), state

    return other_update(update)


def updates_of(tree: Any) -> list[Any]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if x is not None]


def one_number_a_leaf() -> Any:
    return other_update(
        lambda u, s: (u, s), lambda params: Average(map_leaves(lambda p: torch.zeros(3), params))
    )


def a_list_of_numbers() -> Any:
    return other_update(
        lambda u, s: (u, s), lambda params: Counted(right().init(params).average, torch.ones(2))
    )


def first_row_first() -> Any:
    return stage(lambda u, m: (u - u[:1] if u.ndim else u * 1, m), wide)


def across_blocks() -> Any:
    return stage(lambda u, m: (u / u.norm(), m), wide)


def of_stacks(function: Callable[[Tensor], Tensor]) -> Any:
    def leaf(u: Any, m: Any) -> Any:
        return (function(u.double()).to(u) if u.ndim == 3 else u), m

    return stage(leaf, wide)


def rounds_by_place() -> Any:
    """As products, powers and torch.linalg do, but on every CPU."""

    def leaf(u: Any, m: Any) -> Any:
        if u.ndim:
            odd = (torch.arange(len(u)) % 2 > 0).reshape(-1, *(1,) * (u.ndim - 1))
            u = torch.where(odd, torch.nextafter(u, torch.zeros_like(u)), u)
        return u, m

    return stage(leaf, wide)


def torchs_power() -> Any:
    return of_stacks(lambda x: x.sign() * x.abs() ** 0.3)


def no_third_axis() -> Any:
    def leaf(u: Any, m: Any) -> Any:
        if u.ndim > 3:
            raise ValueError("a tensor of order 4")
        return mean(u, m)

    return stage(leaf, wide)


def ignores_alive() -> Any:
    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        return right().run(updates, state, params, context)

    return other_update(update)


def spreads_nan() -> Any:
    def update(updates: Any, state: Any, *, alive: Any = None) -> Any:
        def leaf(u: Any, fine: Any, m: Any) -> Any:
            u = torch.where(fine.reshape(-1, *(1,) * (u.ndim - 1)) > 0, u, math.nan)
            return mean(u, m)

        if alive is None:
            return right().update(updates, state)
        out, average = update_leaves(leaf, updates, (state.average,), (alive,))
        return out, Average(average)

    return other_update(update)


def item() -> Any:
    return stage(lambda u, m: (u * 2 if u.sum().item() > 0 else u * 1, m), wide)


def all_members_together() -> Any:
    def leaf(u: Any, m: Any) -> Any:
        inner = torch._C._functorch.get_unwrapped(u) if is_batched(u) else u
        return u * inner.abs().max(), m

    def is_batched(u: Any) -> bool:
        return torch._C._functorch.is_batchedtensor(u)

    return stage(leaf, wide)


def counts_in_python() -> Any:
    """By the host, from a tensor: what torch.compile can't."""
    return stage(lambda u, m: (u * len(m.tolist()) if m.ndim else u * 1, m), wide)


def prints() -> Any:
    def leaf(u: Any, m: Any) -> Any:
        torch._dynamo.graph_break()
        return mean(u, m)

    return stage(leaf, wide)


def changes_its_layout() -> Any:
    def leaf(u: Any, m: Any) -> Any:
        if m.ndim != 2:
            return mean(u, m)
        new = torch.lerp(m, u.to(m.dtype), 0.1)
        return u * 1, new.mT.contiguous().mT if m.is_contiguous() else new.contiguous()

    return stage(leaf, wide)


def differs_in_a_graph() -> Any:
    return stage(lambda u, m: (u * (2 if torch.compiler.is_compiling() else 1), m), wide)


def leaves_torch() -> Any:
    return stage(lambda u, m: (u + torch.as_tensor(u.double().numpy()), m), wide)


def no_derivative() -> Any:
    return stage(lambda u, m: (((u - u) ** 2).sqrt() + u, m), wide)


class Cube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return ctx.saved_tensors[0] ** 2 * 3 * g


class WrongCube(Cube):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return ctx.saved_tensors[0] ** 2 * 3 * t

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return ctx.saved_tensors[0] ** 2 * 2 * g


def without_jvp() -> Any:
    return stage(lambda u, m: (Cube.apply(u), m), wide)


def wrong_backward() -> Any:
    return stage(lambda u, m: (WrongCube.apply(u), m), wide)


def detaches() -> Any:
    return stage(lambda u, m: (u / (1 + u.detach().abs()), m), wide)


def detaches_in_short_steps() -> Any:
    return stage(lambda u, m: (1e-5 * u / (1 + u.detach().abs()), m), wide)


def detaches_first_weights() -> Any:
    return stage(lambda u, m: (u + 0.1 * m, m.clone()), lambda p: wide(p) + p.detach())


OUTSIDE = {"blocks": False}
DERIVATIVES = {"blocks": False, "vmap": False, "compile": False}
BROKEN: list[tuple[Callable[[], Any], str, dict[str, Any]]] = [
    (bare, "update returned a dict. Return a pair", {}),
    (number_at_first, "the state of 'broken' holds 0, a int", {}),
    (number_later, "the state that update returned holds 1 at", {}),
    (init_writes, "init wrote to 'layers.0.bias' of the parameters", {}),
    (writes_to_the_gradient, "update wrote to 'layers.0.bias' of the gradients", {}),
    (writes_what_was_there, "update wrote to 'average.layers.0.bias' of the state", {}),
    (remembers_outside, "twice with the same arguments gave two results", {}),
    (draws, "twice with the same arguments gave two results.*random_normal", {}),
    (refreshes_untold, r"step 2 is of the same phase as step 1, .*schedule\.phase\(\)", {}),
    (branches_untold, "step 2 is of the same phase as step 1, and gives other results", {}),
    (begins_at_random, "init called twice with the same parameters gave two states", {}),
    (grows, r"is torch.float64 \(5,\) on cpu after step 1, and torch.float64 \(0,\)", {}),
    (
        takes_means_and_says_elementwise,
        "step 1 on half the first side of every leaf is not that half .*says elementwise=True",
        {},
    ),
    (
        takes_means_of_rows_and_says_elementwise,
        "step 1 on half the (first|last) side of every leaf is not that half",
        {},
    ),
    (
        remembers_sums_and_says_elementwise,
        "step 1 on half the first side of every leaf is not that half",
        {},
    ),
    (becomes_another_dtype, "is torch.float32 .* after step 1, and torch.float64", {}),
    (returns_a_field, "the state of step 1 has another structure than that of init", {}),
    (fills_in_later, "the state of step 1 has another structure than that of init", {}),
    (update_of_another_shape, r"the update of 'layers.0.bias' is torch.float64 \(\)", {}),
    (returns_its_state, "lies in the memory of the update of 'layers.0.bias'", {}),
    (keeps_the_parameter, "in the state of init lies in the memory of the parameter", {}),
    (keeps_the_gradient, "lies in the memory of the gradient of", {}),
    (donates_the_gradient, "a donated step wrote to '0.layers.0.bias' of the gradients", {}),
    (donates_old_updates, "the updates of step 1 with donate=True are others", {}),
    (donates_another_sum, "with donate=True are others", {}),
    (apply_of_its_own, "step 1 by update_in_place gives other numbers", {}),
    (none_is_zero, "the gradient of 'w' was None, and its update is not", {}),
    (forgets_on_none, "the gradient of 'w' was None, and its state changed", {}),
    (breaks_on_none, "a gradient of None raised TypeError", {}),
    (depends_on_others, "a gradient of None for 'w' changed the updates of other leaves", {}),
    (remembers_by_step, "after torch.save and torch.load step 4 gives other updates", {}),
    (has_no_name, "state_dict and load_state_dict raised ValueError: two tensors", {"none": False}),
    (hides_from_checkpoints, "the state of 'broken' has tensors in a deque", {}),
    (is_taken_for_another, "went through state_dict and load_state_dict is another one", {}),
    (half_precision, "of the state is torch.bfloat16, where the parameters are", {}),
    (overflows, "in step 1 is not finite, at float16", {}),
    (one_dtype, "a tree of several dtypes raised TypeError: several dtypes", {}),
    (one_number_a_leaf, r"has shape \(3,\) where stack '5' has 5 rows", {}),
    (a_list_of_numbers, r"'steps' of the state, shape \(2,\), belongs to no stack", {}),
    (first_row_first, "a block in another order has other updates in step 1", {}),
    (across_blocks, "a block without the other blocks of its stack has other updates", {}),
    (
        rounds_by_place,
        "elsewhere in its stack is rounded otherwise .*matmul, .*by power, .*each_matrix",
        {},
    ),
    (no_third_axis, "block space raised ValueError: a tensor of order 4. Declare block_ndim", {}),
    (ignores_alive, "whose gradient was NaN was moved as by a gradient of zeros", {}),
    (spreads_nan, "a gradient of NaN in a block got into 'inner.average", {}),
    (item, "torch.func.vmap raised RuntimeError.*read no tensor on the host", OUTSIDE),
    (
        all_members_together,
        "under vmap, member 0 of an ensemble ends with other parameters",
        {"blocks": False},
    ),
    (
        counts_in_python,
        "torch.compile raised .*choose by torch.where",
        {"vmap": False, "blocks": False},
    ),
    (prints, "torch.compile raised Unsupported", {}),
    (changes_its_layout, "made 2 graphs for 6 steps .*strides of the state", {}),
    (differs_in_a_graph, "step 1 in torch.compile gives other results", {}),
    (leaves_torch, "torch.func.grad raised", {"vmap": False, "compile": False}),
    (no_derivative, "the derivative of the updates of step 1 .* is not finite", {}),
    (without_jvp, "implement the jvp .* needs both a backward and a jvp", DERIVATIVES),
    (wrong_backward, r"torch\.func\.grad a derivative through .*gradcheck", DERIVATIVES),
    (detaches, r"torch\.func\.grad a derivative through .*Detach nothing", DERIVATIVES),
    (detaches_in_short_steps, r"a derivative through .*Detach nothing", DERIVATIVES),
    (detaches_first_weights, r"a derivative through .*Detach nothing", DERIVATIVES),
]


@pytest.mark.parametrize(
    ("broken", "message", "options"), BROKEN, ids=[row[0].__name__ for row in BROKEN]
)
def test_what_a_broken_stage_is_told(
    broken: Callable[[], Any], message: str, options: dict[str, Any]
) -> None:
    with pytest.raises(StageError, match=rf"(?s)^<.*\)>: .*{message}") as error:
        check_stage(broken, **options)
    assert str(error.value).rstrip().endswith(".")
    assert not re.search(r"funshampoo\.(core|linalg|operators)", str(error.value))  # may move
