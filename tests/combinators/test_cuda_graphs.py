"""Steps that are recorded and replayed.

Without a GPU a recording is a list of the operators that were called, which are called again on the
same memory: whatever Python decided is frozen, as in a graph. With one all of it runs once more, on
the GPU.
"""

from __future__ import annotations

import copy
import gc
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import funshampoo as fs
from funshampoo.combinators import recording
from funshampoo.core.live import Live
from funshampoo.recipes import RECIPES
from funshampoo.refresh.jobs import Job
from tests.trees import tensors

SHAPES = {"w": (24, 40), "conv": (8, 4, 3, 3), "bias": (7,), "scale": ()}
EVERY = 5
BAD = 8  # the step on which a gradient is not finite
ABSENT = 9  # and on which one is None
# Two roundings of one step: a rate that is a tensor, sums of another order.
TOLERANCE = {"cpu": 1e-5, "cuda": 2e-3}
TAKE_IN = ("adamw", "lion", "sgd", "sign_descent")  # what is not finite

Grads = dict[str, Tensor | None]


class Tape(TorchDispatchMode):
    """The operators of a step, and what lay in the memory that they have touched."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = [x.untyped_storage() for x in among((args, kwargs))]
        for memory in given:
            if memory.data_ptr() not in self.made:
                self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        found = function(*args, **(kwargs or {}))
        results = among(found)
        places = {x.untyped_storage().data_ptr() for x in results}
        self.made |= places - self.before.keys()
        # A view shares memory that is written to by others; reshape may be one, or a copy.
        if not (function.is_view and places <= {memory.data_ptr() for memory in given}):
            self.calls.append((function, args, kwargs or {}, results))
        return found


def among(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def taped(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """As a graph is recorded, nothing has happened afterwards."""
    tape = Tape()
    with tape:
        run()
    for memory, was in tape.before.values():
        memory.copy_(was)

    def replay() -> None:
        for function, args, kwargs, results in tape.calls:
            for x, y in zip(results, among(function(*args, **kwargs))):
                if x is not y and x.numel():
                    x.copy_(y)

    return replay


class Recorder:
    """Counts, and has something of every kind of device recorded as it would be."""

    def __init__(self, record: Callable[..., Any]) -> None:
        self.record, self.recorded, self.replayed = record, 0, 0

    def __call__(self, run: Callable[[], None], device: torch.device) -> Callable[[], None] | None:
        self.recorded += 1
        replay = self.record(run, device)

        def counted() -> None:
            self.replayed += 1
            replay()

        return None if replay is None else counted


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def recorder(device: str, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder(recording.RECORDERS["cuda"] if device == "cuda" else taped)
    monkeypatch.setitem(recording.RECORDERS, device, found)
    monkeypatch.setattr(Job, "in_threads", lambda job: False)  # where no tape sees them
    return found


def looks_anew(recorder: Recorder) -> None:
    """Where something is decided by values: a CPU's steps look at them, a GPU's don't."""
    if recorder.record is taped:
        recorder.record = lambda run, device: run


def drawn(seed: int, device: str) -> dict[str, Tensor]:
    make = torch.Generator("cpu").manual_seed(seed)
    found = {n: torch.randn(s, generator=make, device="cpu") for n, s in SHAPES.items()}
    return {n: x.to(device) for n, x in found.items()}


def chain_of(name: str) -> fs.GradientTransformation:
    refreshes = "every" in inspect.signature(RECIPES[name]).parameters
    return RECIPES[name](Live("lr", 0.01), **({"every": EVERY} if refreshes else {}))


def rate(t: int) -> float:
    return 0.01 / t if t < 12 else 0.001


def trained(
    tx: fs.GradientTransformation, device: str, steps: int, spoils: bool = False
) -> tuple[dict[str, Tensor], Any]:
    params = drawn(0, device)
    state = tx.init(params)
    for t in range(1, steps + 1):
        grads: Grads = {**drawn(t, device)}
        if spoils and t == BAD:
            grads["w"] = torch.full_like(params["w"], torch.nan)
        if spoils and t == ABSENT:
            grads["bias"] = None
        state = fs.update_in_place(tx, grads, state, params, hyper={"lr": rate(t)})
    return params, state


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The way from the first parameters, relative."""
    for name, x in expected.items():
        way = (x - drawn(0, str(x.device))[name]).norm()
        error = (found[name] - x).norm()
        assert error <= tolerance * way, f"{name}: {float(error / way):.1e}"


@pytest.mark.parametrize("spoils", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_replayed_steps_are_those_without(
    name: str, spoils: bool, device: str, recorder: Recorder
) -> None:
    """Refreshes among them, a rate that moves, a gradient that is bad and one that is absent."""
    if spoils and name in TAKE_IN:
        pytest.skip("it takes in what is not finite")
    if spoils:
        looks_anew(recorder)
    expected, state = trained(chain_of(name), device, 24, spoils)
    found, graphed = trained(fs.cuda_graphed(chain_of(name)), device, 24, spoils)
    assert recorder.replayed >= 16
    assert_near(found, expected, TOLERANCE[device])
    clocks = [[int(x) for x in tensors(s) if x.dtype == torch.int64] for s in (state, graphed)]
    assert clocks[0] == clocks[1]
    assert all(x.isfinite().all() for x in tensors(graphed) if x.is_floating_point())


@pytest.mark.parametrize("name", ["shampoo", "soap"])
def test_a_refresh_is_recorded_where_its_rule_waits_for_nothing(
    name: str, device: str, recorder: Recorder
) -> None:
    """Of small matrices, too, which a GPU would decompose else."""
    trained(fs.cuda_graphed(chain_of(name)), device, 29)
    assert recorder.recorded == 2
    # The first two refreshes and the first plain step are not: the rate moves in between. On a
    # GPU the very first of each may wait once more, for constants.
    assert 29 - 5 <= recorder.replayed <= 29 - 3


def test_a_refresh_that_waits_runs_as_it_is(device: str, recorder: Recorder) -> None:
    def make() -> fs.GradientTransformation:
        solver = fs.linalg.eigh(relative_epsilon=1e-3)
        return fs.shampoo(Live("lr", 0.01), every=EVERY, solver=solver)

    expected, _ = trained(make(), device, 24)
    found, _ = trained(fs.cuda_graphed(make()), device, 24)
    assert recorder.recorded == (1 if device == "cuda" else 2)  # eigh waits
    assert_near(found, expected, TOLERANCE[device])


def test_schedules_count_on(device: str, recorder: Recorder) -> None:
    """A function of the counter, which a graph has to read anew on every step."""
    rate = fs.schedules.warmup_cosine(0.1, 4, 20)

    def make() -> fs.GradientTransformation:
        return fs.chain(
            fs.scale_by_adam(0.9, 0.99, own_steps=False), fs.scale_by_learning_rate(rate)
        )

    def run(tx: fs.GradientTransformation) -> dict[str, Tensor]:
        params = drawn(0, device)
        state = tx.init(params)
        for t in range(1, 21):
            state = fs.update_in_place(tx, drawn(t, device), state, params)
        return params

    expected, found = run(make()), run(fs.cuda_graphed(make()))
    assert recorder.replayed >= 18
    assert_near(found, expected, TOLERANCE[device])


@pytest.mark.parametrize("make", [fs.schedule_free, fs.scale_by_learning_rate])
def test_so_does_that_of_a_stage_alone(
    make: Callable[..., fs.GradientTransformation], device: str, recorder: Recorder
) -> None:
    """Whose counter is inside of its state."""
    found = []
    for tx in (
        make(fs.schedules.linear(0.1, 0.0, 9)),
        fs.cuda_graphed(make(lambda t: 0.1 - t / 90)),
    ):
        params = drawn(0, device)
        state = tx.init(params)
        for t in range(1, 9):
            state = fs.update_in_place(tx, drawn(t, device), state, params)
        found.append(params)
    assert recorder.replayed >= 6
    assert_near(*found, TOLERANCE[device])


def test_in_tf32_may_stand_on_either_side(device: str, recorder: Recorder) -> None:
    makers = [
        lambda: fs.in_tf32(fs.cuda_graphed(chain_of("soap"))),
        lambda: fs.cuda_graphed(fs.in_tf32(chain_of("soap"))),
    ]
    one, other = (trained(make(), device, 12)[0] for make in makers)
    assert recorder.replayed > 12
    assert_near(one, other, TOLERANCE[device])


def test_a_state_goes_on_by_either(device: str, recorder: Recorder) -> None:
    """It has the names of the chain's own, so that a run may switch between steps."""
    plain, graphed = chain_of("shampoo"), fs.cuda_graphed(chain_of("shampoo"))
    expected, _ = trained(plain, device, 20)
    params = drawn(0, device)
    state = plain.init(params)
    for t in range(1, 21):
        tx = plain if t <= 4 or 10 < t <= 14 else graphed
        if t == 11:
            saved = copy.deepcopy(fs.state.state_dict(state))
            state = fs.state.load_state_dict(plain.init(params), saved).state
        state = fs.update_in_place(tx, drawn(t, device), state, params, hyper={"lr": rate(t)})
    assert recorder.replayed > 4
    assert_near(params, expected, TOLERANCE[device])


def test_one_chain_may_step_several_models_in_turn(device: str, recorder: Recorder) -> None:
    expected, _ = trained(chain_of("soap"), device, 12)
    tx = fs.cuda_graphed(chain_of("soap"))
    all_params = [drawn(0, device) for _ in range(3)]
    states = [tx.init(params) for params in all_params]
    for t in range(1, 13):
        for i, params in enumerate(all_params):
            grads = drawn(t, device)
            states[i] = fs.update_in_place(tx, grads, states[i], params, hyper={"lr": rate(t)})
    assert recorder.replayed > 3 * 6
    for params in all_params:
        assert_near(params, expected, TOLERANCE[device])


def test_parameters_that_move_are_never_recorded(device: str, recorder: Recorder) -> None:
    """Which would take longer than the step."""
    tx, params = fs.cuda_graphed(fs.sgd(0.1, momentum=0.9)), drawn(0, device)
    state, before = tx.init(params), []
    for t in range(6):
        before.append(params)  # kept, so that nothing gets its memory
        params = {name: x.clone() for name, x in params.items()}
        state = fs.update_in_place(tx, drawn(t, device), state, params)
    assert recorder.recorded == 0


def test_gradients_and_what_a_caller_keeps_are_untouched(device: str, recorder: Recorder) -> None:
    tx, params = fs.cuda_graphed(chain_of("shampoo")), drawn(0, device)
    state = tx.init(params)
    given = [drawn(t, device) for t in range(8)]
    for grads in given:
        state = fs.update_in_place(tx, grads, state, params)
    assert recorder.replayed > 0
    for t, grads in enumerate(given):
        assert all(torch.equal(g, drawn(t, device)[name]) for name, g in grads.items())


def test_a_write_is_noticed_by_autograd(device: str, recorder: Recorder) -> None:
    """A graph of before the step must not be gone through backwards after it."""
    tx, w = fs.cuda_graphed(fs.sgd(0.1)), torch.ones(3, device=device, requires_grad=True)
    params = {"w": w.detach()}
    state = tx.init(params)
    for _ in range(4):
        loss = (w * w).sum()
        state = fs.update_in_place(tx, {"w": torch.ones(3, device=device)}, state, params)
    assert recorder.replayed > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_counter_of_failures_is_looked_at(device: str, recorder: Recorder) -> None:
    looks_anew(recorder)
    chain = fs.chain(fs.trace(0.9), fs.scale(-0.1))
    tx = fs.cuda_graphed(fs.guarded(chain, max_failures=6, every=4))
    params = drawn(0, device)
    bad = {name: torch.full_like(x, torch.inf) for name, x in params.items()}
    state = tx.init(params)
    for _ in range(7):
        state = fs.update_in_place(tx, bad, state, params)
    with pytest.raises(fs.FailureLimitError):
        fs.update_in_place(tx, bad, state, params)
    assert recorder.replayed > 0


def by_partition(graphs: bool) -> fs.GradientTransformation:
    """Who counts is around it."""
    rate = fs.schedules.linear(0.1, 0.0, 30)
    tx = fs.chain(fs.scale_by_adam(), fs.scale_by_learning_rate(rate))
    parts = {"a": fs.cuda_graphed(tx) if graphs else tx, "b": fs.sgd(rate)}
    return fs.partition(parts, {"w": "a", "conv": "a", "bias": "b", "scale": "b"})


def in_one_memory(graphs: bool) -> fs.GradientTransformation:
    """A stage whose state has a tensor twice, one of which it replaces."""

    def init(params: Any) -> Any:
        x = torch.zeros_like(params["bias"])
        return {"sum": x, "before": x}

    def update(updates: Any, state: Any) -> Any:
        total = state["sum"] + updates["bias"]
        step = {name: -0.01 * u for name, u in updates.items()} | {"bias": -0.01 * state["before"]}
        return step, {"sum": total, "before": state["sum"]}

    tx = fs.GradientTransformation(init, update, "twice")
    return fs.cuda_graphed(tx) if graphs else tx


def of_a_state_that_grows(graphs: bool) -> fs.GradientTransformation:
    """And widens to float64."""

    def update(updates: Any, state: Any) -> Any:
        state = torch.cat([state.double()[-3:], updates["bias"].double().mean()[None] / 3])
        return {name: -0.01 * state.sum().to(u) * u for name, u in updates.items()}, state

    tx = fs.GradientTransformation(lambda params: params["bias"].new_zeros(0), update, "grows")
    return fs.cuda_graphed(tx) if graphs else tx


@pytest.mark.parametrize("make", [by_partition, in_one_memory, of_a_state_that_grows])
def test_what_is_around_and_inside(
    make: Callable[[bool], fs.GradientTransformation], device: str, recorder: Recorder
) -> None:
    found = []
    for graphs in (False, True):
        tx, params = make(graphs), drawn(0, device)
        state = tx.init(params)
        for t in range(1, 13):
            state = fs.update_in_place(tx, drawn(t, device), state, params)
        found.append(params)
    assert recorder.replayed >= 3
    assert_near(*found[::-1], TOLERANCE[device])


def test_another_kind_of_state_at_the_same_address(device: str, recorder: Recorder) -> None:
    """As where it is loaded, or grows, into memory that was freed."""

    def update(updates: Any, state: Any) -> Any:
        return {name: -0.01 * state.sum().to(u) * u for name, u in updates.items()}, state

    memory = torch.arange(1.0, 7.0, device=device)
    kinds = [memory[:3], memory[:2], memory[::2], memory.view(torch.float64), memory[:3]]
    found = []
    for graphs in (False, True):
        now = iter(kinds)
        tx = fs.GradientTransformation(lambda params, now=now: next(now), update, "sums")
        tx, params = fs.cuda_graphed(tx) if graphs else tx, drawn(0, device)
        state: Any = None
        for t in range(20):
            state = state if t % 4 else tx.init(params)
            state = fs.update_in_place(tx, drawn(t, device), state, params)
        found.append(params)
    assert recorder.recorded == 4  # the first kind has come back
    assert_near(*found[::-1], TOLERANCE[device])


def edited(graphs: bool, device: str) -> dict[str, Tensor]:
    """Steps that are asked for in other ways from time to time."""
    tx = fs.chain(fs.trace(Live("momentum", 0.9)), chain_of("shampoo"))
    tx = fs.cuda_graphed(tx) if graphs else tx
    params = drawn(0, device)
    state = tx.init(params)
    for t in range(1, 40):
        hyper = {"lr": rate(t)} | ({} if t % 7 < 3 else {"momentum": 0.5 + 0.01 * t})
        options: dict[str, Any] = {"refresh": False} if t < 4 or 11 < t < 19 else {}
        if t > 24:
            hyper["lr"] = torch.tensor([0.1 / t])
        with torch.inference_mode(t % 9 < 4):
            grads = drawn(t, device)
            state = fs.update_in_place(tx, grads, state, params, hyper=hyper, **options)
        if t == 20:  # the same memory, other rows and columns
            w = params["w"]
            params = {**params, "w": w.view(w.shape[::-1]).mT}
        if t == 30:
            tx = copy.deepcopy(tx)
    return {**params, "w": params["w"].mT.reshape(SHAPES["w"])}


def test_steps_that_are_asked_for_in_other_ways(device: str, recorder: Recorder) -> None:
    expected, found = (edited(graphs, device) for graphs in (False, True))
    assert recorder.replayed > 10
    assert_near(found, expected, TOLERANCE[device])


def test_a_default_device_leaves_it_as_it_is(device: str, recorder: Recorder) -> None:
    with torch.device(device):
        trained(fs.cuda_graphed(chain_of("soap")), device, 12)
    assert recorder.replayed > 5


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Embedding(11, 16), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 11)]
    return nn.Sequential(*layers).to(device)


@pytest.mark.parametrize("method", ["shampoo", "soap", "muon"])
def test_the_wrapper_follows_schedulers_edits_and_checkpoints(
    method: str, device: str, recorder: Recorder
) -> None:
    def run(**options: Any) -> nn.Module:
        model = network(device)
        optimizer = fs.for_model(model, method, lr=0.01, **options)
        if method == "muon":  # as some schedulers are given it
            optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        make = torch.Generator().manual_seed(1)
        for t in range(40):
            x = torch.randint(11, (32,), generator=make).to(device)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), (3 * x + 1) % 11).backward()
            optimizer.step()
            scheduler.step()
            if t == 15:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if t == 25:
                optimizer.param_groups[0]["betas"] = (0.8, 0.99)
        return model

    expected, found = run(), run(cuda_graph=True)
    assert recorder.replayed > 60  # of a step every group has one
    begin = network(device)
    for p, q, first in zip(found.parameters(), expected.parameters(), begin.parameters()):
        assert (p - q).norm() <= 10 * TOLERANCE[device] * (q - first).norm()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compile": True}, "compile and cuda_graph do not go together"),
        ({"distribute": fs.sharded}, "cuda_graph and distribute"),
        ({"max_size": torch.tensor(8)}, "max_size"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        fs.Shampoo(network("cpu").parameters(), cuda_graph=True, **options)


@pytest.mark.parametrize("name", ["cuda_graph", "tf32"])
def test_a_flag_is_a_bool(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is 1; give True or False"):
        fs.Shampoo(network("cpu").parameters(), **{name: 1})  # type: ignore[arg-type]


def test_chains_that_cannot_be_recorded(device: str, recorder: Recorder) -> None:
    params = drawn(0, device)
    grads = drawn(1, device)
    tx = fs.cuda_graphed(fs.multi_steps(fs.sgd(0.1), 2))
    with pytest.raises(ValueError, match="multi_steps, and its steps are pure"):
        fs.update_in_place(tx, grads, tx.init(params), params)
    tx = fs.cuda_graphed(fs.shampoo(0.1, distribute=fs.sharded))
    with pytest.raises(ValueError, match="wait for other ranks"):
        fs.update_in_place(tx, grads, tx.init(params), params)

    # Of the chain, or of a solver in it. Where it lies with the parameters a graph reads it.
    elsewhere = torch.empty((), device="meta")
    for inner, says in (
        (fs.sgd(elsewhere), "scale_by_learning_rate"),
        (fs.shampoo(0.1, solver=fs.linalg.eigh(relative_epsilon=elsewhere)), "root_inverse"),
    ):
        tx = fs.cuda_graphed(inner)
        with pytest.raises(ValueError, match=f"'{says}' is a tensor that does not lie on {device}"):
            fs.update_in_place(tx, grads, tx.init(params), params)
    tx = fs.cuda_graphed(fs.sgd(torch.tensor(0.1, device=device)))
    fs.update_in_place(tx, grads, tx.init(params), params)

    def by_step() -> fs.GradientTransformation:
        def update(updates: Any, state: Any, params: Any, step: int) -> Any:
            return updates, state

        return fs.GradientTransformation(lambda params: (), update)

    with pytest.raises(ValueError, match="'by_step'.*phase="):
        fs.cuda_graphed(by_step())


@pytest.mark.gpu
def test_a_plain_step_that_waits_is_told_of() -> None:
    def reading() -> fs.GradientTransformation:
        def update(updates: Any, state: Any) -> Any:
            assert float(updates["bias"].sum()) < 1e9
            return updates, state

        return fs.GradientTransformation(lambda params: (), update)

    tx, params = fs.cuda_graphed(fs.chain(reading(), fs.scale(-0.1))), drawn(0, "cuda")
    state = tx.init(params)
    state = fs.update_in_place(tx, drawn(1, "cuda"), state, params)  # it is watched twice
    with pytest.warns(UserWarning, match="plain steps wait for the GPU"):
        state = fs.update_in_place(tx, drawn(2, "cuda"), state, params)
    for t in range(3, 5):
        state = fs.update_in_place(tx, drawn(t, "cuda"), state, params)
    expected = drawn(0, "cuda")["w"] - 0.1 * sum(drawn(t, "cuda")["w"] for t in range(1, 5))
    torch.testing.assert_close(params["w"], expected)


@pytest.mark.gpu
def test_graphs_go_on_being_recorded_after_all_of_them_are_gone() -> None:
    """Whose memory pool is gone with them."""
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="Synchronization debug mode")
            trained(fs.cuda_graphed(chain_of("shampoo")), "cuda", 12)
        gc.collect()


@pytest.mark.gpu
def test_a_replayed_step_waits_for_nothing() -> None:
    tx, params = fs.cuda_graphed(fs.shampoo(0.01, every=10)), drawn(0, "cuda")
    state = tx.init(params)
    given = [drawn(t, "cuda") for t in range(1, 10)]
    for t, grads in enumerate(given, start=1):
        torch.cuda.set_sync_debug_mode("error" if t > 4 else "default")
        try:
            state = fs.update_in_place(tx, grads, state, params)
        finally:
            torch.cuda.set_sync_debug_mode("default")
