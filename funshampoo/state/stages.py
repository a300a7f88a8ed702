"""The named tuples that stages own and later stages may read.

A *tree* below has the structure of the updates that reach the stage: the parameters' own, or
inside `blocked` a dict {stack: tensor} whose tensors lead with the block axis. N is the number of
blocks in a stack; outside `blocked` it is absent. Floating-point tensors are float32 at least.

Every weight is the total weight of the gradients in an average: it follows the average's own
recursion with 1 in the gradient's place, so that average / weight is the weighted mean. With a
constant beta it is 1 - beta^t, t the number of gradients that this block has seen. Where no bias
correction is wanted it starts at 1 and stays there.

`meaning` says which values are possible, so that `load_state_dict` can refuse others; whatever it
does not name has to be finite.

`steps`, where a state has it, counts the steps of all that is in it: () int64 on the CPU, or ()
where somebody around counts, or nobody in it asks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from funshampoo.state.meaning import meaning

Tree = Any
Counter = Tensor | tuple[()]


@meaning(factors="factor", weight="weight of factors")
class KroneckerState(NamedTuple):
    """Of `kronecker_statistics`: L_i, one factor matrix a side.

    Attributes:
        factors: tree of tuples, one a side: (N, d_i, d_i), its triangle alone if `packed` and
            large, or () for a side that is not preconditioned.
        weight: tree of (N,); () on the CPU where all blocks count together.
    """

    factors: Tree
    weight: Tree


@meaning(
    value="finite",
    residual="any",  # what a refresh reports may be infinite
    condition="any",
    failures="count",
    streak="count <= failures",
    rounds="count",
)
class Kept(NamedTuple):
    """What is computed now and then from one matrix a block, and what the last refresh found.

    Attributes:
        value: a tuple of tensors (N, ...): of `root_inverse` the root X (N, d, d), its triangle
            alone if `packed` and large, and with `basis_tolerance` the eigenvectors (N, d, d) that
            it was computed in, as columns. Before the first refresh, what the stage begins with:
            multiples of the identity.
        residual: (N,), how far off the value is, by the estimate of what computed it (see
            `funshampoo.linalg.InverseRoot`); -1 before, and where nobody estimates it.
        condition: (N,), condition number of what it was computed from; -1 likewise.
        failures: (N,) int64, how many refreshes kept the old value because the new one failed.
        streak: (N,) int64, how many of the latest in a row.
        rounds: (N,) int64, how many refreshes gave a new value.
    """

    value: tuple[Tensor, ...]
    residual: Tensor
    condition: Tensor
    failures: Tensor
    streak: Tensor
    rounds: Tensor


class RefreshedState(NamedTuple):
    """Of `root_inverse`, and of every stage that computes something now and then.

    Attributes:
        kept: tree of tuples, one entry a side: `Kept`, or () for a side left alone.
    """

    kept: Tree
    steps: Counter = ()


class ClockState(NamedTuple):
    """Of `chain`, where it counts for all that is in it."""

    steps: Counter


class GraftState(NamedTuple):
    """Of `graft`: the states of the two methods."""

    direction: Any
    onto: Any
    steps: Counter = ()


@meaning(average="linear", weight="weight of average")
class EmaState(NamedTuple):
    """Of `ema`: the filtered gradient M (a tree like the updates) and its weight (tree of (N,))."""

    average: Tree
    weight: Tree


@meaning(buffer="linear", seen="weight of buffer")
class TraceState(NamedTuple):
    """Of `trace`: the momentum buffer B (a tree like the updates), and `seen`, a tree of (N,).

    `seen` is 1 for a block that has had a step and 0 before; it is an empty tuple where dampening
    does not need it.
    """

    buffer: Tree
    seen: Tree


@meaning(
    first="linear",
    first_weight="weight of first",
    second="nonnegative",
    second_weight="weight of second",
)
class AdamState(NamedTuple):
    """Of `scale_by_adam`: first moment M and second moment V with their weights, trees.

    `first` and `first_weight` are empty tuples where beta1 is 0.
    """

    first: Tree
    first_weight: Tree
    second: Tree
    second_weight: Tree


@meaning(second="nonnegative")
class RmsState(NamedTuple):
    """Of `scale_by_rms`: the second moment V, a tree like the updates."""

    second: Tree


@meaning(second="nonnegative")
class AdagradState(NamedTuple):
    """Of `scale_by_adagrad`: the sum of squares V, a tree like the updates."""

    second: Tree


@meaning(second="nonnegative", weight="weight of second")
class SecondMomentState(NamedTuple):
    """Of `scale_by_second_moment`: V, a tree like the updates, and its weight, a tree of (N,).

    The weight is () on the CPU where all blocks count together.
    """

    second: Tree
    weight: Tree


@meaning(second="nonnegative")
class RowsState(NamedTuple):
    """Of `normalize_rows`: the mean square v of every row, a tree of (N, r)."""

    second: Tree


class ScheduleState(NamedTuple):
    """Of a stage with a schedule."""

    steps: Counter = ()


class LearningRateState(NamedTuple):
    """Of `scale_by_learning_rate`, by which others see that there is one."""

    steps: Counter = ()


@meaning(hyperparams="number")
class HyperparamsState(NamedTuple):
    """Of `inject_hyperparams`.

    Attributes:
        hyperparams: {name: 0-dimensional tensor}, float32 unless given as a tensor. Replace an
            entry between steps and the next step uses it.
        inner: the state of the transformation that the factory makes.
        ranges: {name: {"[0.0, 1.0)": ()}}: what the stages that read a number take, so that
            `load_state_dict` refuses others; {} where a factory of a user's does not say it. It is
            written in keys, as `BlockedState.layout` is.
    """

    steps: Counter
    hyperparams: dict[str, Tensor]
    inner: Any
    ranges: dict[str, dict[str, tuple[()]]] = {}  # noqa: RUF012, never written to


@meaning(total="finite", seen="count", used="count", skipped="count")
class MultiStepsState(NamedTuple):
    """Of `multi_steps`.

    Attributes:
        steps: micro-steps so far, () int64 on the CPU; () where somebody around counts them.
        total: tree, the sum of the finite micro-gradients since the last real step.
        seen: tree of () int64 on the CPU, how many of the micro-gradients since then were not None.
        used: () float32, how many micro-batches are in `total`.
        skipped: () int64, how many were left out so far because they were not finite.
        inner: the state of the wrapped transformation.
    """

    steps: Counter
    total: Tree
    seen: Tree
    used: Tensor
    skipped: Tensor
    inner: Any


class MaskedState(NamedTuple):
    """Of `masked`: the state of the wrapped transformation, on a tree with holes."""

    inner: Any


class WrappedState(NamedTuple):
    """Of a combinator made by `wrapping`: its own state, and that of what it wraps.

    Attributes:
        pace: {"once": ()} where it steps `inner` once a step at most, as those of funshampoo do, so
            that no count in it can be above the clock; else {}. In keys, as a layout is.
    """

    own: Any
    inner: Any
    steps: Counter = ()
    pace: dict[str, tuple[()]] = {}  # noqa: RUF012, never written to


class EveryKState(NamedTuple):
    """Of `every_k`, and of statistics on some steps: the state of what runs on every k-th step."""

    inner: Any
    steps: Counter = ()


class PartitionState(NamedTuple):
    """Of `partition`: {label: state}."""

    inner: dict[str, Any]
    steps: Counter = ()


class BlockedState(NamedTuple):
    """Of `blocked`: the inner state in stacks, and which rows of them are whose.

    Attributes:
        inner: the state of the wrapped transformation.
        layout: {parameter: {stack: {span: ()}}}. A span such as "4:10 2x3+0,1" says that this
            parameter's blocks are the rows 4 to 9 of the stack, in row-major order of a grid of
            2x3 blocks that begins at block (0, 1) of the parameter. It is written in keys, with
            nothing below them, so that the state describes itself while pytrees find no leaf in
            it: vmap has nothing to batch, torch.compile nothing to trace. See `Span`.
    """

    inner: Any
    layout: dict[str, dict[str, dict[str, tuple[()]]]]
    steps: Counter = ()


@meaning(average="nonnegative", accepted="count", pending="count <= held", held="count")
class SpikeState(NamedTuple):
    """Of `guarded` with a `spike_factor`: trees of (N,), or () outside block space.

    Attributes:
        average: of ‖G‖, over the gradients that were accepted and not zero.
        accepted: int64, how many there were since the average began.
        pending: int64, how many spikes were held since the last one that was accepted.
        held: int64, how many spikes were held in all.
    """

    average: Tree
    accepted: Tree
    pending: Tree
    held: Tree


@meaning(held="count", streak="count <= held")
class GuardedState(NamedTuple):
    """Of `guarded`.

    Attributes:
        held: tree of (N,) int64: on how many steps a block was held, since its gradient was not
            finite, or a spike. () outside block space, where all leaves are held together.
        streak: likewise, how many of the latest steps in a row.
        inner: the state of the wrapped transformation.
        spikes: with a `spike_factor`, `SpikeState`; else ().
    """

    held: Tree
    streak: Tree
    inner: Any
    steps: Counter = ()
    spikes: SpikeState | tuple[()] = ()


@meaning(report="nonnegative", run="any")
class ShardedState(NamedTuple):
    """Of `sharded`: the inner state of the blocks that this rank owns.

    Attributes:
        inner: the state of the wrapped transformation, on the owned rows of the stacks (outside
            block space: on the owned leaves).
        owned: {stack: {"first:last": ()}}, which rows of the full stacks they are; outside block
            space {leaf: {"owned": ()} or {"elsewhere": ()}}.
        ranks: {"0 of 4": ()}, this rank and how many share.
        report: (4,) float32, over the blocks of all ranks: how often one was held, the longest
            streak of that, how many roots failed, the longest streak of that.
        run: () int64 on the CPU, the same on all ranks: the number of the run that it is of, found
            at its first step from what all ranks had for it; 0 before, and on one rank.
    """

    inner: Any
    owned: dict[str, dict[str, tuple[()]]]
    ranks: dict[str, tuple[()]]
    report: Tensor
    steps: Counter = ()
    run: Counter = ()
