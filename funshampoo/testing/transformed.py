"""Checks for every stage: vmap, torch.compile and derivatives work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funshampoo.core.applying import apply_updates
from funshampoo.core.contract import REFRESH, Tree
from funshampoo.core.tree import flatten, map_leaves
from funshampoo.testing.trial import Trial, difference, like, not_finite

MEMBERS = 3
SOME_STEPS = 4


def ensembles_are_loops(trial: Trial) -> None:
    """torch.func.vmap of init and update over several models gives the same as a loop."""
    members = [like(trial.params, seed=m) for m in range(MEMBERS)]
    grads = [
        [like(g, seed=1000 * m + t) for m in range(MEMBERS)] for t, g in enumerate(trial.grads)
    ]
    params = _stacked(members)
    state = torch.func.vmap(trial.tx.init)(params)
    for g in grads:
        updates, state = torch.func.vmap(trial.step)(_stacked(g), state, params)
        params = apply_updates(params, updates)
    for m, member in enumerate(members):
        alone = trial.run([g[m] for g in grads], member).params[-1]
        mine = map_leaves(lambda x, m=m: x[m], params)
        if seen := difference(mine, alone, trial.tolerance):
            trial.fail(
                f"under vmap, member {m} of an ensemble ends with other parameters, {seen}",
                "Let no axis be reduced over that the stage does not know, and take no decision "
                "by the values of all members together.",
            )


def _stacked(trees: list[Tree]) -> Any:
    return map_leaves(lambda *xs: torch.stack(xs), *trees)


def compiles_to_one_graph(trial: Trial) -> None:
    """torch.compile(fullgraph=True), for steps without a refresh: the same, and one graph."""
    backend = "eager" if trial.options["compile"] is True else str(trial.options["compile"])
    graphs = 0

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        found = torch._dynamo.lookup_backend(backend)(graph, inputs)
        graphs += 1  # not if torch starts over, as it does on an error in the line above
        return found

    tx, context = trial.tx, {"refresh": False, **trial.context, **_of_a_whole_step(trial)}

    def plain(g: Tree, state: Any, params: Tree) -> Any:
        return tx.update(g, state, params, **context)

    torch._dynamo.reset()
    compiled = torch.compile(plain, fullgraph=True, backend=counted)
    state = tx.init(trial.params)
    for t, g in enumerate(trial.grads, start=1):
        expected = plain(g, state, trial.params)
        if seen := difference(compiled(g, state, trial.params), expected, trial.tolerance):
            trial.fail(
                f"step {t} in torch.compile gives other results, {seen}",
                "Let nothing be remembered beside the state: a graph is traced once.",
            )
        state = expected[1]
    if graphs > 1:
        trial.fail(
            f"torch.compile made {graphs} graphs for {len(trial.grads)} steps that refresh nothing",
            "No Python number may change from step to step: count in a 0-dimensional tensor. A "
            "factory that inject_hyperparams calls on every step needs takes_live = True. Nor may "
            "strides of the state change, as those of QR's result do: keep it .contiguous().",
        )


def _of_a_whole_step(trial: Trial) -> dict[str, int]:
    """`step=`, for a stage that does something besides refreshes on some steps."""
    for t in range(1, len(trial.grads) + 1):
        if not all([label.startswith(REFRESH) for label in trial.tx.phase(t)]):
            return {"step": t}
    return {}


def gradients_flow(trial: Trial) -> None:
    """torch.func.grad of a scalar of the updates, with respect to the gradient, is finite."""
    weights = flatten(like(trial.params, seed=2))[0]
    for t in (0, len(trial.grads) // 2):
        state, params = trial.pure.states[t], trial.pure.params[t]

        def number(g: Tree, state: Any = state, params: Tree = params) -> Tensor:
            updates, _ = trial.step(g, state, params)
            return torch.stack([(u * w).sum() for u, w in zip(flatten(updates)[0], weights)]).sum()

        if name := not_finite(torch.func.grad(number)(trial.grads[t])):
            trial.fail(
                f"the derivative of the updates of step {t + 1} by the gradient of '{name}' is "
                "not finite",
                "Keep roots and quotients away from zero before they are taken, by torch.where on "
                "their argument; for a stage without a derivative, pass differentiable=False.",
            )


def derivatives_are_right(trial: Trial) -> None:
    """Derivatives of the path of some steps w.r.t. initial parameters and gradients, both modes.

    Compared with central differences where two of them agree: elsewhere there is no derivative, and
    below float64 they mean nothing. The path excludes its start, which would swamp short steps.
    """
    leaves = flatten(trial.params)[0]
    if any([x.dtype != torch.float64 for x in leaves]):
        return
    grads = trial.grads[:SOME_STEPS]
    weights = flatten(like(trial.params, seed=2))[0]

    def moved(tree: Tree, seed: int, by: Tensor) -> Tree:
        return map_leaves(lambda x, d: x + by * d, tree, like(tree, seed))

    def number(by: Tensor) -> Tensor:
        params = moved(trial.params, 3, by)
        state, way = trial.tx.init(params), torch.zeros_like(by)
        for t, g in enumerate(grads):
            updates, state = trial.step(moved(g, 200 + t, by), state, params)
            params = apply_updates(params, updates)
            found = [(u * w).sum() for u, w in zip(flatten(updates)[0], weights)]
            way = way + torch.stack(found).sum()
        return way

    def difference_quotient(h: float) -> float:
        return ((number(zero + h) - number(zero - h)) / (2 * h)).item()

    zero, one = leaves[0].new_zeros(()), leaves[0].new_ones(())
    expected = difference_quotient(1e-5)
    bound = 2e-3 * max(abs(expected), 1e-3 * abs(number(zero).item()))
    for way, found in (
        ("torch.func.grad", torch.func.grad(number)(zero).item()),
        ("torch.func.jvp", torch.func.jvp(number, (zero,), (one,))[1].item()),
    ):
        if abs(found - expected) <= bound:
            continue
        if abs(difference_quotient(3e-6) - expected) > bound / 10:
            return
        trial.fail(
            f"by {way} a derivative through {len(grads)} steps is {found:.4g}, by differences "
            f"{expected:.4g}",
            "Detach nothing that depends on gradients or parameters, keep copies that autograd can "
            "follow, and try a torch.autograd.Function by torch.autograd.gradcheck; for a stage "
            "without a derivative, pass differentiable=False.",
        )
