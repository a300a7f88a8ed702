"""The named tuples that stages own and later stages may read.

A *tree* below has the structure of the updates that reach the stage: the parameters' own or, inside
`blocked`, a dict {stack: tensor} with a leading block axis. N is the number of blocks in a stack;
outside `blocked` the axis is absent. Floating-point tensors are float32 or wider.

Every weight is the total weight of the gradients in an average: it follows the average's recursion
with 1 for the gradient, so that average / weight is the weighted mean. With a constant beta it is 1
- beta^t, where t is the number of gradients that this block has had. Without bias correction it
starts at 1 and stays there.

`meaning` says which values are possible, so that `load_state_dict` can refuse others; fields that
it does not name have to be finite.

`steps`, if a state has it, counts the steps of everything in it: () int64 on the CPU, or the empty
tuple () if an enclosing stage counts, or nothing in it needs the count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from funshampoo.state.meaning import meaning

Tree = Any
Counter = Tensor | tuple[()]


@meaning(factors="factor", weight="weight of factors")
class KroneckerState(NamedTuple):
    """State of `kronecker_statistics`: L_i, one factor matrix per side.

    Attributes:
        factors: tree of tuples, one entry per side: (N, d_i, d_i), only its triangle if `packed`
            and large, or () for a side that is not preconditioned.
        weight: tree of (N,); () on the CPU if all blocks count together.
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
    """The value computed by refreshes from one matrix per block, and the last refresh's report.

    Attributes:
        value: a tuple of tensors (N, ...): for `root_inverse` the root X (N, d, d), only its
            triangle if `packed` and large, and with `basis_tolerance` the eigenvectors (N, d, d)
            that it was computed in, as columns. Before the first refresh, what the stage starts
            with: multiples of the identity.
        residual: (N,), error of the value, as estimated by the solver or rule (see
            `funshampoo.linalg.InverseRoot`); -1 before a refresh, and if it is not estimated.
        condition: (N,), condition number of the matrix; -1 in the same cases.
        failures: (N,) int64, how many refreshes kept the old value because the new one failed.
        streak: (N,) int64, how many of the latest refreshes in a row did.
        rounds: (N,) int64, how many refreshes gave a new value.
    """

    value: tuple[Tensor, ...]
    residual: Tensor
    condition: Tensor
    failures: Tensor
    streak: Tensor
    rounds: Tensor


class RefreshedState(NamedTuple):
    """State of `root_inverse`, and of every stage that refreshes values.

    Attributes:
        kept: tree of tuples, one entry per side: `Kept`, or () for a side left alone.
    """

    kept: Tree
    steps: Counter = ()


class ClockState(NamedTuple):
    """State of `chain`, if it counts for everything in it."""

    steps: Counter


class GraftState(NamedTuple):
    """State of `graft`: the states of the two methods."""

    direction: Any
    onto: Any
    steps: Counter = ()


@meaning(average="linear", weight="weight of average")
class EmaState(NamedTuple):
    """State of `ema`: filtered gradient M (a tree like the updates), its weight (tree of (N,))."""

    average: Tree
    weight: Tree


@meaning(buffer="linear", seen="weight of buffer")
class TraceState(NamedTuple):
    """State of `trace`: momentum buffer B (a tree like the updates), and `seen`, a tree of (N,).

    `seen` is 1 for a block that has had a step and 0 before; it is an empty tuple if dampening does
    not need it.
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
    """State of `scale_by_adam`: first moment M and second moment V with their weights, trees.

    `first` and `first_weight` are empty tuples if beta1 is 0.
    """

    first: Tree
    first_weight: Tree
    second: Tree
    second_weight: Tree


@meaning(second="nonnegative")
class RmsState(NamedTuple):
    """State of `scale_by_rms`: the second moment V, a tree like the updates."""

    second: Tree


@meaning(second="nonnegative")
class AdagradState(NamedTuple):
    """State of `scale_by_adagrad`: the sum of squares V, a tree like the updates."""

    second: Tree


@meaning(second="nonnegative", weight="weight of second")
class SecondMomentState(NamedTuple):
    """State of `scale_by_second_moment`: V, a tree like the updates, and its weight, tree of (N,).

    The weight is () on the CPU if all blocks count together.
    """

    second: Tree
    weight: Tree


@meaning(second="nonnegative")
class RowsState(NamedTuple):
    """State of `normalize_rows`: the mean square v of every row, a tree of (N, r)."""

    second: Tree


class ScheduleState(NamedTuple):
    """State of a stage with a schedule."""

    steps: Counter = ()


class LearningRateState(NamedTuple):
    """State of `scale_by_learning_rate`, by which other code detects that stage."""

    steps: Counter = ()


@meaning(hyperparams="number")
class HyperparamsState(NamedTuple):
    """State of `inject_hyperparams`.

    Attributes:
        hyperparams: {name: 0-dimensional tensor}, float32 unless given as a tensor. To change one,
            replace its entry between steps.
        inner: the state of the transformation that the factory makes.
        ranges: {name: {"[0.0, 1.0)": ()}}: the values that the stages that read a number accept, so
            that `load_state_dict` refuses others; {} if a user's factory does not declare them. It
            is stored in keys, like `BlockedState.layout`.
    """

    steps: Counter
    hyperparams: dict[str, Tensor]
    inner: Any
    ranges: dict[str, dict[str, tuple[()]]] = {}  # noqa: RUF012, never written to


@meaning(total="linear", seen="count", used="count", skipped="count")
class MultiStepsState(NamedTuple):
    """State of `multi_steps`.

    Attributes:
        steps: micro-steps so far, () int64 on the CPU; () if an enclosing stage counts them.
        total: tree, the sum of the finite micro-gradients since the last real step.
        seen: tree of () int64 on the CPU, how many micro-gradients since then were not None.
        used: () float32, how many micro-batches are in `total`.
        skipped: () int64, how many were left out so far for being non-finite.
        inner: the state of the wrapped transformation.
    """

    steps: Counter
    total: Tree
    seen: Tree
    used: Tensor
    skipped: Tensor
    inner: Any


class MaskedState(NamedTuple):
    """State of `masked`: the wrapped transformation's, on a tree with holes."""

    inner: Any


OF_PARAMETERS = "of parameters"


class WrappedState(NamedTuple):
    """State of a combinator made by `wrapping`: its own, and that of the wrapped part.

    Attributes:
        pace: {"once": ()} if it steps `inner` at most once per step, as funshampoo's own do, so
            that no count in it can exceed the clock; {OF_PARAMETERS: ()} if `own` is a tree in
            the parameters' named tuple, and no state with trees in it. In keys, like a layout.
    """

    own: Any
    inner: Any
    steps: Counter = ()
    pace: dict[str, tuple[()]] = {}  # noqa: RUF012, never written to


class EveryKState(NamedTuple):
    """State of `every_k`, and of statistics on some steps: that of the part run every k-th step."""

    inner: Any
    steps: Counter = ()


class PartitionState(NamedTuple):
    """State of `partition`: {label: state}."""

    inner: dict[str, Any]
    steps: Counter = ()


class BlockedState(NamedTuple):
    """State of `blocked`: the inner state in stacks, and which rows belong to which parameter.

    Attributes:
        inner: the state of the wrapped transformation.
        layout: {parameter: {stack: {span: ()}}}. A span such as "4:10 2x3+0,1" says that this
            parameter's blocks are the rows 4 to 9 of the stack, in row-major order of a grid of 2x3
            blocks that starts at block (0, 1) of the parameter. It is stored in keys, with nothing
            below them, so that the state describes itself while pytrees find no leaf in it: vmap
            has nothing to batch, torch.compile nothing to trace. See `Span`.
    """

    inner: Any
    layout: dict[str, dict[str, dict[str, tuple[()]]]]
    steps: Counter = ()


@meaning(average="nonnegative", accepted="count", pending="count <= held", held="count")
class SpikeState(NamedTuple):
    """State of `guarded` with a `spike_factor`: trees of (N,), or () outside block space.

    Attributes:
        average: of ‖G‖, over the accepted nonzero gradients.
        accepted: int64, how many of these there were since the average started.
        pending: int64, how many spikes were held since the last accepted one.
        held: int64, how many spikes were held in total.
    """

    average: Tree
    accepted: Tree
    pending: Tree
    held: Tree


@meaning(held="count", streak="count <= held")
class GuardedState(NamedTuple):
    """State of `guarded`.

    Attributes:
        held: tree of (N,) int64: on how many steps a block was held, for a non-finite gradient or a
            spike. () outside block space, where all leaves are held together.
        streak: the same for the latest steps in a row.
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
    """State of `sharded`: the inner state of the blocks that this rank owns.

    Attributes:
        inner: the state of the wrapped transformation, on the owned rows of the stacks (outside
            block space: on the owned leaves).
        owned: {stack: {"first:last": ()}}, which rows of the full stacks these are; outside block
            space {leaf: {"owned": ()} or {"elsewhere": ()}}.
        ranks: {"0 of 4": ()}, this rank and the number of ranks that share.
        report: (4,) float32, over the blocks of all ranks: how often one was held, the longest
            streak of that, how many roots failed, the longest streak of that.
        run: () int64 on the CPU, the same on all ranks: the run number, derived at the first step
            from all ranks' data for it; 0 before that, and on a single rank.
    """

    inner: Any
    owned: dict[str, dict[str, tuple[()]]]
    ranks: dict[str, tuple[()]]
    report: Tensor
    steps: Counter = ()
    run: Counter = ()
