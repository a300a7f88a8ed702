"""Never poisoned: a gradient that is not finite changes nothing but a counter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funshampoo.core.checks import check_count
from funshampoo.core.clock import new_counter, read_counter
from funshampoo.core.contract import GradientTransformation, Tree, any_refreshes, as_transformation
from funshampoo.core.modes import is_traced, unwrapped
from funshampoo.core.tree import cast, check_parameters, compute_dtype, flatten, map_leaves
from funshampoo.linalg.norms import block_norm
from funshampoo.state.places import Place, block_names, map_tensors
from funshampoo.state.stages import GuardedState, Kept, find_state, walk


class FailureLimitError(RuntimeError):
    """A block failed `max_failures` times in a row. Raised on every rank at the same step."""


def guarded(
    inner: GradientTransformation, *, max_failures: int | None = 20, every: int = 10
) -> GradientTransformation:
    """Hold a block whose gradient is not finite: its update is zero, its state stays as it was.

    Inside `blocked` every block is judged by itself; elsewhere all leaves are held together. A
    gradient G counts as not finite where ‖G‖² is NaN or above 2^-20 of the largest number of its
    dtype (in float32, ‖G‖ above about 1.8e16), so that sums of squares do not overflow in the
    statistics. Parameters are not looked at. What is held is counted in the state;
    `funshampoo.state.health` prints it. Step counters, fields called `steps`, go on.

    Where the verdict can be read without waiting (a gradient on the CPU), a step without failures
    pays one pass over the gradient. Elsewhere (a GPU, torch.func, torch.compile) nothing waits:
    both outcomes are computed and one is chosen on the device, which takes a second copy of the
    state for the length of the step.

    Args:
        inner: everything that is to be protected, so the whole chain inside `blocked`. Stages
            outside run on: a momentum there moves the parameters on a held step too.
        max_failures: this many failures in a row of one block, steps held or roots that the solver
            failed on, are an error; None never stops. The error comes at the beginning of a
            step, before anything is changed, so that the state is whole. Inside torch.compile
            there is none: look at `health`. Around ranks, `sharded` has this argument.
        every: steps between two looks at the counters, since looking waits for the device. They
            fall on multiples of it, as refreshes do.

    State: `GuardedState`.

    Raises:
        ValueError, TypeError: max_failures or every out of range.
        FailureLimitError: from update, at the first look after `max_failures` in a row.

    Reference: Optax, `apply_if_finite`.

    >>> import torch
    >>> from funshampoo import blocked, trace
    >>> tx = blocked(guarded(trace(0.9)), max_size=2)
    >>> state = tx.init({"w": torch.zeros(4)})
    >>> g = {"w": torch.tensor([1.0, 2.0, float("nan"), 3.0])}
    >>> updates, state = tx.update(g, state)
    >>> updates["w"], state.inner.held["2"]
    (tensor([1., 2., 0., 0.]), tensor([0, 1]))
    """
    inner = as_transformation(inner)
    if max_failures is not None:
        check_count("max_failures", max_failures)
    check_count("every", every)

    def init(params: Tree, *, block_ndim: int = 0, **context: Any) -> GuardedState:
        check_parameters(params, "guarded")

        def none_yet(x: Tensor) -> Tensor:
            return x.new_zeros(x.shape[:block_ndim], dtype=torch.int64)

        held, streak = map_leaves(none_yet, params), map_leaves(none_yet, params)
        state = inner.init(params, block_ndim=block_ndim, **context)
        return GuardedState(new_counter(), held, streak, state)

    def update(
        updates: Tree,
        state: GuardedState,
        params: Tree = None,
        *,
        gradient: Tree = None,
        block_ndim: int = 0,
        donate: bool = False,
        stops: bool = True,
        whole: Any = None,
        finite: bool = False,
        **context: Any,
    ) -> tuple[Tree, GuardedState]:
        done = read_counter(state.steps) if stops and max_failures is not None else None
        if max_failures is not None and done and (done + 1) % every == 0:
            # The first tile of a step answers for all blocks, before anything has changed.
            everywhere = find_state(whole, GuardedState) or state
            _stop_at(max_failures, everywhere, context.get("layout", {}))
        source = updates if gradient is None else gradient
        context["block_ndim"] = block_ndim
        finite = finite or bool(surely_usable(flatten(source)[0]))
        norms = None if finite else _norms(source, updates, block_ndim)
        if finite or _all_usable(flatten(norms)[0]):
            if gradient is not None:
                context["gradient"] = gradient
            out, new = inner.update(updates, state.inner, params, donate=donate, **context)
            streak = map_leaves(
                lambda u, n: n if u is None else torch.zeros_like(n), updates, state.streak
            )
            return out, GuardedState(state.steps + 1, state.held, streak, new)
        fine = _verdicts(norms, block_ndim)
        if gradient is not None:
            context["gradient"] = map_leaves(_zeroed, gradient, fine)
        safe = map_leaves(_zeroed, updates, fine)
        out, new = inner.update(safe, state.inner, params, donate=False, **context)
        out = map_leaves(_zeroed, out, fine)
        new = _merged(new, state.inner, fine, block_ndim)
        held = map_leaves(lambda f, n: n if f is None else n + ~f, fine, state.held)
        streak = map_leaves(
            lambda f, n: n if f is None else torch.where(f, 0, n + 1), fine, state.streak
        )
        return out, GuardedState(state.steps + 1, held, streak, new)

    refreshes = any_refreshes({"inner": inner})
    return GradientTransformation(init, update, name=inner.name, refreshes=refreshes)


def _stop_at(max_failures: int, state: GuardedState, layout: Mapping[str, Any]) -> None:
    if limit_reached(failure_report(state), max_failures):
        held = state.held if layout else {}
        present = {stack: n for stack, n in held.items() if isinstance(n, Tensor)}
        rows = {stack: range(counts.shape[-1]) for stack, counts in present.items()}
        raise failure_limit_error(failing_blocks(state, max_failures, layout, rows), max_failures)


def _norms(source: Tree, updates: Tree, block_ndim: int) -> Tree:
    """A tree of ‖G‖, (N,) or (). None where there is no gradient."""

    def norm(g: Tensor | None, u: Tensor | None) -> Tensor | None:
        if g is None or u is None:
            return None
        return block_norm(cast(g, compute_dtype(g)), block_ndim)

    return map_leaves(norm, source, updates)


def _usable(norm: Tensor) -> Tensor:
    return norm * norm <= _limit(norm.dtype)


def _limit(dtype: torch.dtype) -> float:
    """Of ‖G‖²."""
    return torch.finfo(dtype).max * 2.0**-20


def _all_usable(norms: Sequence[Tensor | None]) -> bool:
    """Whether all can be used, as far as that can be read without waiting for a device."""
    found = [unwrapped(norm) for norm in norms if norm is not None]
    return all([norm is not None and norm.is_cpu and bool(_usable(norm).all()) for norm in found])


def surely_usable(gradients: Sequence[Tensor | None]) -> bool | None:
    """Whether `guarded` holds none of these for sure; None where that can't be read now."""
    found = [g for g in gradients if g is not None]
    if is_traced() or not all([g.is_cpu and g.is_floating_point() for g in found]):
        return None
    # The norm of a whole leaf is that of its blocks at least.
    squares: dict[torch.dtype, list[Tensor]] = {}
    for g in found:
        flat = cast(g, compute_dtype(g)).reshape(-1)
        squares.setdefault(flat.dtype, []).append(torch.dot(flat, flat))
    return all([bool((torch.stack(x) <= _limit(dtype)).all()) for dtype, x in squares.items()])


def _verdicts(norms: Tree, block_ndim: int) -> Tree:
    """A tree of (N,) or () bool: whether each block can be used. None where there is no gradient.

    Outside block space all leaves share one verdict.
    """
    verdicts = map_leaves(lambda norm: None if norm is None else _usable(norm), norms)
    leaves, spec = flatten(verdicts)
    known = [f for f in leaves if f is not None]
    if block_ndim or not known:
        return verdicts
    together = torch.stack([f.to(known[0].device) for f in known]).all()
    return spec.unflatten([None if f is None else together.to(f.device) for f in leaves])


def _zeroed(x: Tensor | None, fine: Tensor | None) -> Tensor | None:
    if x is None or fine is None:
        return x
    return torch.where(fine.reshape(fine.shape + (1,) * (x.ndim - fine.ndim)), x, 0.0)


def _merged(new: Any, old: Any, fine: Tree, block_ndim: int) -> Any:
    """The new state where the gradient could be used, else the old; step counters go on."""
    if not block_ndim:
        leaves = [f for f in flatten(fine)[0] if f is not None]

        def choose_all(place: Place, a: Tensor, b: Tensor) -> Tensor:
            counts_steps = place.path[-1:] == ("steps",)
            return a if counts_steps else torch.where(leaves[0].to(a.device), a, b)

        return map_tensors(choose_all, new, old) if leaves else new

    def choose(place: Place, a: Tensor, b: Tensor) -> Tensor:
        if a is b or place.stack is None or a.ndim == 0 or fine[place.stack] is None:
            return a
        flags = fine[place.stack]
        return torch.where(flags.reshape(flags.shape + (1,) * (a.ndim - 1)), a, b)

    return map_tensors(choose, new, old, stacks=fine.keys())


def failure_report(state: Any, device: torch.device | None = None) -> Tensor:
    """(4,) float32: blocks held, longest streak; roots failed, longest streak. Waits for nothing.

    Args:
        state: of any transformation; without a `guarded` in it the first two numbers are 0.
        device: of the report; by default that of the counters.
    """
    guards: list[GuardedState] = []
    refreshed: list[Kept] = []
    for _, node in walk(state):
        if isinstance(node, GuardedState):
            guards.append(node)
        elif isinstance(node, Kept):
            refreshed.append(node)
    held = [x for guard in guards for x in flatten(guard.held)[0]]
    streak = [x for guard in guards for x in flatten(guard.streak)[0]]
    numbers = [
        _reduced(held, torch.sum),
        _reduced(streak, torch.amax),
        _reduced([kept.failures for kept in refreshed], torch.sum),
        _reduced([kept.streak for kept in refreshed], torch.amax),
    ]
    if device is None:
        device = next((x.device for x in (*held, *(kept.residual for kept in refreshed))), None)
    return torch.stack([n.to(device, torch.float32) for n in numbers])


def _reduced(tensors: list[Tensor], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum or the maximum over several tensors; 0 without any."""
    parts = [reduce(x) for x in tensors if x.numel()]
    if not parts:
        return torch.zeros((), device="cpu")
    return reduce(torch.stack([x.to(parts[0].device) for x in parts]))


def limit_reached(report: Tensor, max_failures: int) -> bool:
    """Whether a streak of a `failure_report` has reached the limit. Waits for the device."""
    plain = unwrapped(report)
    if plain is None or plain.is_meta:
        return False
    return bool(plain.reshape(-1, 4)[:, 1::2].max() >= max_failures)


def failing_blocks(
    state: Any,
    max_failures: int,
    layout: Mapping[str, Any],
    rows: Mapping[str, Sequence[int]],
) -> list[str]:
    """The blocks at the limit: "w block_0_1: gradient not finite". Waits for the device.

    Args:
        state: taken from inside block space, or from outside with empty `rows`.
        layout: of the `BlockedState` around it; may be empty.
        rows: {stack: the rows of the full stack that the state holds}.
    """
    found: list[str] = []

    def look(place: Place, x: Tensor) -> Tensor:
        plain = unwrapped(x)
        if place.path[-1:] != ("streak",) or plain is None:
            return x
        cause = "refresh of its statistics failed" if place.kind is Kept else "gradient not finite"
        worst = plain.reshape(-1, plain.shape[-1]).amax(0) if plain.ndim else plain.reshape(1)
        for i in (worst >= max_failures).nonzero().flatten().tolist():
            block: tuple[str, ...] = (".".join(place.leaf) or "all parameters",)
            if place.stack is not None:
                known = rows.get(place.stack, place.rows)
                row = i if known is None else known[i]
                names = block_names(place.layout or layout).get(place.stack, {})
                block = names.get(row, (f"stack {place.stack} row {row}",))
            found.append(f"{' '.join(block)}: {cause}")
        return x

    map_tensors(look, state, stacks=rows.keys() if rows else None)
    return list(dict.fromkeys(found))


def failure_limit_error(blocks: Sequence[str], max_failures: int) -> FailureLimitError:
    """The error that names the blocks."""
    listed = "; ".join(blocks[:5]) + (f"; and {len(blocks) - 5} more" if len(blocks) > 5 else "")
    return FailureLimitError(
        f"failed {max_failures} times in a row (max_failures={max_failures}), or more until this "
        f"look: {listed}. A gradient that is not finite has entered nothing, and where a refresh "
        "failed the old value is in use. Look at the loss and the data of these steps, lower the "
        "learning rate, or give max_failures=None (to shampoo, guarded or sharded) to go on."
    )
