"""The two tasks of examples/train.py as ensembles: a member for every rate and seed, in one vmap.

Only what is compared differs: members of equal seeds have equal initial parameters and batches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import funshampoo as fs
from benchmarks import curves, text
from examples.networks import ConvNet, Transformer
from funshampoo.core.contract import GradientTransformation, Schedule

Params: TypeAlias = dict[str, Tensor]
Method: TypeAlias = Callable[[Any, "Task"], GradientTransformation]
"""The chain for a learning rate, which may be a tensor."""

CHUNK = 16  # members that are evaluated together


class Task(NamedTuple):
    """Data, network, and how it is trained.

    Attributes:
        schedule, constant: from the largest rate; `constant` without the way down, for methods that
            average instead.
        measure: by what `goal` is judged, on the test examples.
        order: rows of a seed's batches, (steps, batch).
        hidden: names of the hidden matrices and kernels; not embeddings, the head, vectors.
    """

    name: str
    build: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    schedule: Callable[[Any], Schedule]
    constant: Callable[[Any], Schedule]
    measure: Literal["accuracy", "loss"]
    goal: float
    order: Callable[[int], Tensor]
    hidden: frozenset[str]
    steps: int
    evaluate_every: int

    def start(self, seed: int) -> Params:
        """A seed's initial parameters."""
        torch.manual_seed(seed)
        return {name: p.detach() for name, p in self.build().named_parameters()}


class Run(NamedTuple):
    """One training.

    Attributes:
        reached: the step of the first evaluation that met the goal; None: none did.
        losses: on the test examples, every `evaluate_every` steps; None: not finite.
        accuracy: at the end.
    """

    rate: float
    seed: int
    reached: int | None
    losses: list[float | None]
    accuracy: float

    @property
    def final(self) -> float:
        """Test loss at the end; infinity where it is none."""
        return math.inf if self.losses[-1] is None else self.losses[-1]


def digits(steps: int = 150) -> Task:
    """As in examples/train.py: 97 % of the test images, at a constant rate."""
    images, targets = curves.digits(torch.device("cpu"))
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = drawn[: curves.TESTS], drawn[curves.TESTS :]

    def order(seed: int) -> Tensor:
        make = torch.Generator().manual_seed(seed)
        epochs = -(-steps // (len(train) // curves.BATCH))
        whole = len(train) // curves.BATCH * curves.BATCH
        passes = [torch.randperm(len(train), generator=make)[:whole] for _ in range(epochs)]
        return torch.cat(passes).view(-1, curves.BATCH)[:steps]

    return Task(
        name="digits",
        build=ConvNet,
        train=(images[train], targets[train]),
        test=(images[test], targets[test]),
        schedule=fs.schedules.constant,
        constant=fs.schedules.constant,
        measure="accuracy",
        goal=0.97,
        order=order,
        hidden=hidden_of(ConvNet()),
        steps=steps,
        evaluate_every=5,
    )


def characters(steps: int = 150, width: int = 32, batch: int = 8) -> Task:
    """The text of examples/train.py, a narrower transformer and smaller batches; warm-up, cosine.

    Two layers, heads of 16; a loss of 2.5 is the goal there, with more steps and 2,048 characters.
    """
    data = text.text(torch.device("cpu"))

    def order(seed: int) -> Tensor:
        make = torch.Generator().manual_seed(seed)
        return torch.randint(len(data.train), (steps, batch), generator=make)

    def build() -> nn.Module:
        return Transformer(data.vocabulary, text.CONTEXT, width, layers=2, heads=width // 16)

    warmup = steps // 10 + 1
    return Task(
        name="text",
        build=build,
        train=text.pair(data.train),
        test=text.pair(data.test),
        schedule=lambda rate: fs.schedules.warmup_cosine(rate, warmup, steps + 1),
        constant=lambda rate: fs.schedules.join(
            [fs.schedules.linear(0.0, rate, warmup), fs.schedules.constant(rate)], [warmup]
        ),
        measure="loss",
        goal=2.6,
        order=order,
        hidden=hidden_of(build()),
        steps=steps,
        evaluate_every=10,
    )


def hidden_of(network: nn.Module) -> frozenset[str]:
    """What goes to a method of matrices in `funshampoo.for_model`."""
    return frozenset(n for n, r in fs.roles(network).items() if r in ("matrix", "convolution"))


TASKS = {"digits": digits, "text": characters}


def loss_of(task: Task, network: nn.Module) -> Callable[[Params, Tensor, Tensor], Tensor]:
    """Mean cross-entropy by parameters, inputs and targets."""

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(network, params, (x,)).flatten(0, -2), y.flatten())

    return loss


def train(
    task: Task, method: Method, members: Sequence[tuple[float, int]], averages: bool = False
) -> list[Run]:
    """A run for every (rate, seed), all at once.

    Args:
        averages: the method knows better weights than those that it trains.
    """
    network = task.build()
    loss = loss_of(task, network)
    starts = {seed: task.start(seed) for seed in {seed for _, seed in members}}
    params = {
        name: torch.stack([starts[s][name] for _, s in members]) for name in starts[members[0][1]]
    }
    rates = torch.tensor([rate for rate, _ in members])
    orders = torch.stack([task.order(seed) for _, seed in members], 1)

    def begin(rate: Tensor, params: Params) -> Any:
        return method(rate, task).init(params)

    def step(rate: Tensor, params: Params, state: Any, x: Tensor, y: Tensor) -> tuple[Params, Any]:
        updates, state = method(rate, task).update(grad(loss)(params, x, y), state, params)
        return fs.apply_updates(params, updates), state

    def judge(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional_call(network, params, (x,)).flatten(0, -2)
        right = (logits.argmax(-1) == y.flatten()).float().mean()
        return cross_entropy(logits, y.flatten()), right

    points = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        state = vmap(begin)(rates, params)
        for t, rows in enumerate(orders, start=1):
            x, y = (part[rows] for part in task.train)
            params, state = vmap(step)(rates, params, state, x, y)
            if t % task.evaluate_every == 0 or t == task.steps:
                weights = vmap(fs.evaluation_parameters)(state, params) if averages else params
                found = vmap(judge, (0, None, None), chunk_size=CHUNK)(weights, *task.test)
                points.append((t, *(x.tolist() for x in found)))
    return [_run(task, i, member, points) for i, member in enumerate(members)]


def _run(task: Task, i: int, member: tuple[float, int], points: list[Any]) -> Run:
    losses = [loss[i] for _, loss, _ in points]
    shares = [share[i] for *_, share in points]
    met = (
        [s >= task.goal for s in shares]
        if task.measure == "accuracy"
        else [x <= task.goal for x in losses]
    )
    reached = next((t for (t, *_), m in zip(points, met) if m), None)
    kept = [round(x, 4) if math.isfinite(x) else None for x in losses]
    return Run(*member, reached, kept, round(shares[-1], 4))
