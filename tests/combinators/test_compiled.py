"""Plain steps as one graph: the same numbers, few graphs, and eager where it has to be."""

from __future__ import annotations

import copy
import functools
import inspect
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import funshampoo as fs
from funshampoo.authoring import Refreshing, RefreshSchedule
from funshampoo.operators.leaf_ops import add_gram
from funshampoo.recipes import RECIPES
from tests.refresh.clients import Basis
from tests.trees import assert_close, assert_equal, assert_unchanged, clone, snapshot

pytestmark = pytest.mark.slow

EVERY = 4
SHAPES = {"w": (6, 5), "bias": (5,), "a": (2, 3, 5)}


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch._dynamo.reset()


def tree(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=make, dtype=dtype) for n, s in SHAPES.items()}


def chain(**options: Any) -> fs.GradientTransformation:
    given = {"every": EVERY, "max_size": 5, "momentum": 0.9, "weight_decay": 0.1}
    return fs.shampoo(0.1, **(given | options))


def trained(tx: fs.GradientTransformation, steps: int, **context: Any) -> Any:
    params = tree(0)
    state = tx.init(params)
    for t in range(steps):
        state = fs.update_in_place(tx, tree(t + 1), state, params, **context)
    return params, state


def test_a_refresh_that_was_put_off_is_none_later() -> None:
    """The step that stands for all plain ones is none on which there would have been one."""

    def run(tx: fs.GradientTransformation) -> Any:
        params = tree(0)
        state = tx.init(params)
        for t in range(1, 2 * EVERY + 2):
            context = {"refresh": False} if t < 3 else {}
            state = fs.update_in_place(tx, tree(t), state, params, **context)
        return params, state

    assert_close(run(fs.compiled(chain(), backend="eager")), run(chain()), 1e-10)


def test_the_same_numbers_and_one_graph() -> None:
    """Refreshes, on which the eigendecompositions would be compiled too, are not."""
    counter = CompileCounter()
    mine = trained(fs.compiled(chain(), backend=counter), 3 * EVERY)
    assert_close(mine, trained(chain(), 3 * EVERY), 1e-10)
    assert counter.frame_count == 1
    assert (mine[0]["w"] - tree(0)["w"]).abs().min() > 1e-3


SQUARES = {"w": (8, 8), "v": (4, 4)}  # of which one gradient has full rank: bases are unique


REFRESHING = [n for n, make in RECIPES.items() if "every" in inspect.signature(make).parameters]


@pytest.mark.parametrize("name", REFRESHING)
def test_refreshes_of_every_recipe_are_those_without_a_graph(name: str) -> None:
    """Those after the first too, which may do another thing than it."""
    make = RECIPES[name]
    known = inspect.signature(make).parameters
    options = {key: x for key, x in {"every": 2, "max_size": 4}.items() if key in known}

    def gradient(seed: int) -> dict[str, Tensor]:
        one = torch.Generator().manual_seed(seed)
        draw = functools.partial(torch.randn, generator=one, dtype=torch.float64)
        return {key: draw(shape) for key, shape in SQUARES.items()}

    found = []
    for tx in (make(0.01, **options), fs.compiled(make(0.01, **options), backend="eager")):
        params = gradient(0)
        state = tx.init(params)
        for t in range(1, 5):  # two refreshes, and what the second has changed
            state = fs.update_in_place(tx, gradient(t), state, params)
        found.append(params)
    assert_equal(*found)


def test_steps_with_statistics_have_a_graph_of_their_own() -> None:
    counter = CompileCounter()
    mine = trained(fs.compiled(chain(statistics_every=2), backend=counter), 3 * EVERY)
    assert_close(mine, trained(chain(statistics_every=2), 3 * EVERY), 1e-10)
    assert counter.frame_count == 2  # with and without; refreshes are left to threads
    assert_differ(mine[0], trained(chain(), 3 * EVERY)[0])


def assert_differ(tree: Any, other: Any) -> None:
    assert (tree["w"] - other["w"]).abs().max() > 1e-6


def test_a_start_of_its_own() -> None:
    mine = trained(fs.compiled(chain(start=3), backend="eager"), 2 * EVERY)
    assert_close(mine, trained(chain(start=3), 2 * EVERY), 1e-10)


def test_pure_where_it_is_called_so() -> None:
    tx, params = fs.compiled(chain(), backend="aot_eager"), tree(0)
    _, state = tx.update(tree(1), tx.init(params), params)
    before = snapshot(params, state)
    updates, new = tx.update(tree(2), state, params)
    assert_unchanged(before, params, state)
    expected = chain().update(tree(2), state, params)
    assert_close((updates, new), expected, 1e-10)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_large_factors_are_accumulated_in_place(backend: str) -> None:
    """Also from one triangle; the state's memory stays where it is."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler")
    make = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(512, 256, generator=make)}
    grads = [{"w": torch.randn(512, 256, generator=make)} for _ in range(3)]
    plain = fs.shampoo(0.1, every=100)
    tx = fs.compiled(plain, backend=backend)
    state = tx.init(params)
    state = fs.update_in_place(tx, grads[0], state, params)
    other_params, other = clone(params), clone(state)
    factor = fs.state.find_state(state, fs.state.KroneckerState).factors["512x256"][0]
    place = factor.data_ptr()
    for g in grads[1:]:
        state = fs.update_in_place(tx, g, state, params)
        other = fs.update_in_place(plain, g, other, other_params)
    new = fs.state.find_state(state, fs.state.KroneckerState).factors["512x256"][0]
    assert new.data_ptr() == place
    assert_close(params, other_params, 1e-5)
    assert_close(state, other, 1e-4)


def test_large_factors_are_a_node_of_the_graph() -> None:
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    tx, params = fs.compiled(fs.shampoo(0.1), backend=backend), {"w": torch.randn(256, 256)}
    state = fs.update_in_place(tx, {"w": torch.randn(256, 256)}, tx.init(params), params)
    fs.update_in_place(tx, {"w": torch.randn(256, 256)}, state, params)
    assert sum("accumulate_gram_" in name for name in names) == 2
    assert not any("baddbmm_" in name for name in names)


def test_the_operator_is_what_it_stands_for() -> None:
    old, x = torch.randn(2, 512, 512), torch.randn(2, 512, 300)
    old = old + old.mT
    expected = add_gram(old, x, 0.9, 0.1, donate=False)
    torch.testing.assert_close(expected, 0.9 * old + 0.1 * x @ x.mT, rtol=1e-4, atol=1e-4)
    torch.ops.funshampoo.accumulate_gram_(old, x, 0.9, 0.1)
    assert torch.equal(old, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20])
def test_a_gradient_that_is_not_finite_is_held(value: float) -> None:
    def run(tx: fs.GradientTransformation) -> Any:
        params = tree(0, torch.float32)
        state = tx.init(params)
        for t in range(EVERY + 2):
            grads = tree(t + 1, torch.float32)
            if t in (1, EVERY - 1):  # on a plain step and on one that refreshes
                grads["w"][0, 0] = value
            state = fs.update_in_place(tx, grads, state, params)
        return params, state

    mine, expected = run(fs.compiled(chain(), backend="eager")), run(chain())
    assert_close(mine, expected, 1e-5)
    held = fs.state.find_state(mine[1], fs.state.GuardedState).held
    assert sum(int(n.sum()) for n in held.values()) == 2


def test_failures_in_a_row_are_an_error_here_too() -> None:
    counter = CompileCounter()
    tx = fs.compiled(chain(max_failures=2, every=4), backend=counter)
    params = tree(0)
    state = tx.init(params)
    for t in range(2):
        state = fs.update_in_place(tx, tree(t + 1), state, params)
    assert counter.frame_count == 1
    bad = {n: g * torch.nan for n, g in params.items()}
    for _ in range(5):
        state = fs.update_in_place(tx, bad, state, params)
    with pytest.raises(fs.FailureLimitError):  # at the next look
        fs.update_in_place(tx, bad, state, params)


def test_a_missing_gradient() -> None:
    counter = CompileCounter()
    tx, plain = fs.compiled(chain(), backend=counter), chain()
    params = tree(0)
    state = tx.init(params)
    other_params, other = clone(params), clone(state)
    for t in range(EVERY + 2):
        grads = {**tree(t + 1), **({"w": None} if t % 2 else {})}
        state = fs.update_in_place(tx, grads, state, params)
        other = fs.update_in_place(plain, grads, other, other_params)
    assert_close((params, state), (other_params, other), 1e-10)
    assert counter.frame_count == 1


def test_refresh_and_step_decide_as_elsewhere() -> None:
    tx, params = fs.compiled(chain(), backend="eager"), tree(0)
    _, state = tx.update(tree(1), tx.init(params), params)

    def root(**context: Any) -> Tensor:
        _, new = tx.update(tree(2), state, params, **context)
        return of_a_matrix(new)

    def of_a_matrix(state: Any) -> Tensor:
        kept = fs.state.find_state(state, fs.state.RefreshedState).kept
        return next(sides for sides in kept.values() if len(sides) == 2)[0].value[0]

    old = of_a_matrix(state)
    assert torch.equal(root(), old)
    assert torch.equal(root(step=EVERY + 1), old)
    assert not torch.equal(root(step=EVERY), old)
    assert not torch.equal(root(refresh=True), old)


def test_under_torch_func_it_is_what_is_inside() -> None:
    tx, params = fs.compiled(chain(), backend="eager"), tree(0)
    many = {n: torch.stack([p, 2 * p]) for n, p in params.items()}
    grads = {n: torch.stack([p, 3 * p]) for n, p in tree(1).items()}

    def updates(tx: fs.GradientTransformation) -> Any:
        state = torch.func.vmap(tx.init)(many)
        return torch.func.vmap(tx.update)(grads, state, many)

    assert_equal(updates(tx), updates(chain()))


def test_a_stage_whose_schedule_is_hidden_is_an_error_that_names_it() -> None:
    hidden = fs.GradientTransformation(chain().init, chain().update, "hidden")
    beside = fs.partition(
        {"seen": chain(), "hidden": hidden}, {"w": "hidden", "bias": "seen", "a": "seen"}
    )
    injected = fs.inject_hyperparams(lambda rate: fs.chain(hidden, fs.scale(rate)))(0.5)
    for inner in (hidden, beside, injected):
        with pytest.raises(ValueError, match="'hidden' may do other things.*phase="):
            fs.compiled(inner, backend="eager")
    tx = fs.compiled(fs.inject_hyperparams(fs.shampoo)(0.1, every=EVERY), backend="eager")
    assert_close(
        trained(tx, EVERY),
        trained(fs.inject_hyperparams(fs.shampoo)(0.1, every=EVERY), EVERY),
        1e-6,
    )


def test_what_can_not_be_traced_leaves_a_donated_state_whole() -> None:
    def broken() -> fs.GradientTransformation:
        def update(updates: Any, state: Any) -> Any:
            torch._dynamo.graph_break()
            return updates, state

        return fs.GradientTransformation(lambda params: (), update)

    tx = fs.compiled(fs.chain(fs.trace(0.9), broken()), backend="eager")
    params = tree(0)
    state = tx.init(params)
    before = snapshot(params, state)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        fs.update_in_place(tx, tree(1), state, params)
    assert_unchanged(before, params, state)


def test_numbers_in_the_context_make_no_graphs() -> None:
    """Each would be compiled into one, up to Dynamo's limit."""

    def by_value() -> fs.GradientTransformation:
        def update(updates: Any, state: Any, params: Any = None, *, value: Any = 1.0) -> Any:
            return {n: value * u for n, u in updates.items()}, state

        return fs.GradientTransformation(lambda params: (), update)

    counter = CompileCounter()
    tx, params = fs.compiled(by_value(), backend=counter), tree(0)
    for t in range(12):
        updates, _ = tx.update(params, (), params, value=float(t))
        assert torch.equal(updates["w"], t * params["w"])
    assert counter.frame_count == 0
    for t in range(12):
        updates, _ = tx.update(params, (), params, value=torch.tensor(float(t)))
        assert torch.equal(updates["w"], t * params["w"])
    assert counter.frame_count == 1


def test_errors_are_those_of_what_is_inside() -> None:
    tx, params = fs.compiled(chain(), backend="eager"), tree(0)
    state = fs.update_in_place(tx, tree(1), tx.init(params), params)
    wrong = {
        ValueError: [{**tree(2), "w": torch.ones(3, 3)}, {"w": tree(2)["w"]}],
        TypeError: [{**tree(2), "w": torch.ones(6, 5, dtype=torch.complex64)}],
    }
    before = snapshot(params, state)
    for kind, trees in wrong.items():
        for grads in trees:
            with pytest.raises(kind):
                fs.update_in_place(tx, grads, state, params)
    assert_unchanged(before, params, state)


def test_ranks_are_an_error() -> None:
    tx, params = fs.compiled(chain(distribute=fs.sharded)), tree(0)
    with pytest.raises(ValueError, match="leave out sharded"):
        tx.update(tree(1), tx.init(params), params)


@pytest.mark.parametrize(
    ("before", "value"), [(fs.scale(1e15), 1e10), (fs.chain(fs.scale(1e30), fs.scale(1e30)), 1.0)]
)
def test_a_guard_looks_at_what_it_gets(before: fs.GradientTransformation, value: float) -> None:
    """Not at what enters the chain, which is all that `compiled` has seen."""
    inside = fs.chain(before, fs.guarded(fs.scale_by_rms(0.9)), fs.scale(-0.1))

    def run(tx: fs.GradientTransformation) -> Any:
        params = {"w": torch.ones(3)}
        state = tx.init(params)
        for g in (1e-3, value, 1e-3):
            state = fs.update_in_place(tx, {"w": torch.full((3,), g)}, state, params)
        return params, state

    mine, expected = run(fs.compiled(inside, backend="eager")), run(inside)
    assert_close(mine, expected, 1e-6)
    assert fs.state.find_state(mine[1], fs.state.GuardedState).held["w"] >= 1
    assert mine[0]["w"].isfinite().all()


def test_accumulation_goes_around_it() -> None:
    params = {"w": torch.ones(3)}
    wrong = fs.compiled(fs.multi_steps(fs.sgd(0.1), every=2), backend="eager")
    with pytest.raises(ValueError, match="multi_steps.compiled"):
        wrong.update(params, wrong.init(params), params)
    tx = fs.multi_steps(fs.compiled(fs.sgd(0.1), backend="eager"), every=2)
    state = tx.init(params)
    for g in (1.0, 3.0):
        updates, state = tx.update({"w": torch.full((3,), g)}, state, params)
    torch.testing.assert_close(updates["w"], torch.full((3,), -0.2))


def test_many_chains_in_one_process() -> None:
    """Dynamo's limit of graphs is not shared: it is eight of a function."""
    for i in range(10):
        tx = fs.compiled(fs.sgd(0.1 + i), backend="eager")
        p = {"w": torch.ones(i + 2)}
        updates, _ = tx.update(p, tx.init(p), p)
        torch.testing.assert_close(updates["w"], -(0.1 + i) * p["w"])


class TestWrapper:
    def pair(self, **options: Any) -> tuple[CompileCounter, list[torch.optim.Optimizer]]:
        counter = CompileCounter()
        found = []
        for compiles in ({"backend": counter}, False):
            params = [(n, torch.nn.Parameter(p)) for n, p in tree(0).items()]
            given = {"every": EVERY, "max_size": 5, "weight_decay": 0.1} | options
            found.append(fs.Shampoo(params, lr=0.1, compile=compiles, **given))
        return counter, found

    def step(self, optimizers: list[torch.optim.Optimizer], t: int) -> None:
        for optimizer in optimizers:
            for p, g in zip(optimizer.param_groups[0]["params"], tree(t + 1).values()):
                p.grad = g
            optimizer.step()

    def assert_same(self, optimizers: list[torch.optim.Optimizer]) -> None:
        a, b = ([p.detach() for p in o.param_groups[0]["params"]] for o in optimizers)
        assert_close(a, b, 1e-10)

    def test_a_scheduler_makes_no_new_graph(self) -> None:
        counter, both = self.pair()
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in both]
        for t in range(3 * EVERY):
            self.step(both, t)
            for scheduler in schedulers:
                scheduler.step()
        self.assert_same(both)
        assert counter.frame_count == 1

    @pytest.mark.parametrize(
        ("edit", "graphs"),
        [
            ({"weight_decay": 0.2, "betas": (0.8, 0.95), "grafting_epsilon": 1e-3}, 1),
            ({"weight_decay": 0.0}, 2),
            ({"momentum": 0.9}, 2),
        ],
        ids=["numbers", "a part off", "a part on"],
    )
    def test_edits_make_new_graphs_where_the_chain_is_another(
        self, edit: dict[str, Any], graphs: int
    ) -> None:
        counter, both = self.pair()
        for t in range(2 * EVERY):
            if t == EVERY + 1:
                for o in both:
                    o.param_groups[0].update(edit)
            self.step(both, t)
        self.assert_same(both)
        assert counter.frame_count == graphs

    @pytest.mark.parametrize("other", [{}, {"weight_decay": 0.3}])
    def test_a_rate_out_of_range(self, other: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="lr"):
            fs.Shampoo([torch.nn.Parameter(torch.ones(2))], lr=-1.0, compile=True)
        _, both = self.pair()
        self.step(both, 0)
        both[0].param_groups[0].update({"lr": -1.0, **other})
        with pytest.raises(ValueError, match="lr"):
            both[0].step()

    def test_what_fails_leaves_the_rate(self) -> None:
        _, both = self.pair()
        for t in range(2):
            self.step(both, t)
        for optimizer in both:
            saved = optimizer.state_dict()
            saved["param_groups"][0]["lr"] = 5.0
            saved["state"][0]["a/unknown"] = torch.ones(1)
            with pytest.raises(ValueError, match="unknown"):
                optimizer.load_state_dict(saved)
            group = optimizer.param_groups[0]
            names = group["param_names"]
            group.update(lr=5.0, param_names=["w"])
            with pytest.raises(ValueError, match="param_names"):
                optimizer.step()
            group.update(lr=0.1, param_names=names)
        self.step(both, 2)
        self.assert_same(both)

    def test_edits_on_every_step_are_warned_of(self) -> None:
        _, both = self.pair()
        for t in range(2):
            both[0].param_groups[0]["momentum"] = 0.9 * (1 - t)
            self.step(both, t)
        both[0].param_groups[0]["momentum"] = 0.9
        with pytest.warns(UserWarning, match="every edit is compiled anew"):
            self.step(both, 2)

    def test_copies_and_checkpoints_go_on(self) -> None:
        _, both = self.pair()
        for t in range(EVERY + 2):
            self.step(both, t)
        copies = [copy.deepcopy(o) for o in both]
        _, fresh = self.pair()
        for new, old in zip(fresh, both):
            new.load_state_dict(old.state_dict())
            for p, q in zip(new.param_groups[0]["params"], old.param_groups[0]["params"]):
                p.data.copy_(q)
        for t in range(EVERY + 2, 2 * EVERY + 2):
            for some in (both, copies, fresh):
                self.step(some, t)
        for some in (both, copies, fresh):
            self.assert_same(some)
        self.assert_same([both[0], copies[0]])
        self.assert_same([both[0], fresh[0]])

    def test_a_recipe_of_ones_own_keeps_its_numbers(self) -> None:
        """It may compute with the rate once, so that a tensor would be read once too."""

        def own(learning_rate: float) -> fs.GradientTransformation:
            return fs.chain(fs.trace(0.9), fs.scale(-learning_rate))

        p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        mine = fs.Optimizer([p], own, lr=0.1, compile={"backend": "eager"})
        other = fs.Optimizer([q], own, lr=0.1)
        for _ in range(3):
            for optimizer, x in ((mine, p), (other, q)):
                x.grad = torch.ones(3)
                optimizer.step()
                optimizer.param_groups[0]["lr"] *= 0.5
        assert_close(p.detach(), q.detach(), 1e-6)

    @pytest.mark.parametrize("recipe", [fs.shampoo, "own", fs.from_reference])
    def test_a_rate_that_is_a_tensor_or_has_another_name(self, recipe: Any) -> None:
        def own(learning_rate: Any) -> fs.GradientTransformation:
            return fs.chain(fs.trace(0.9), fs.scale_by_learning_rate(learning_rate))

        counter = CompileCounter()
        found = []
        for compiles in ({"backend": counter}, False):
            p = torch.nn.Parameter(tree(0)["w"])
            rate = 0.1 if recipe is fs.from_reference else torch.tensor(0.1)
            method = own if recipe == "own" else recipe
            own_name = {"precondition_frequency": 4} if recipe is fs.from_reference else {}
            optimizer = fs.Optimizer([p], method, lr=rate, compile=compiles, **own_name)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            for t in range(6):
                p.grad = tree(t + 1)["w"]
                optimizer.step()
                scheduler.step()
            found.append(p.detach())
        assert_close(found[0], found[1], 1e-6)
        assert counter.frame_count == 1

    def test_tensors_are_read_on_every_step_or_an_error(self) -> None:
        counter, both = self.pair(weight_decay=torch.tensor(0.1))
        for t in range(EVERY + 2):
            for o in both:
                o.param_groups[0]["weight_decay"].mul_(0.5)
            self.step(both, t)
        self.assert_same(both)
        assert counter.frame_count == 1

        def own(learning_rate: float, decay: Any) -> fs.GradientTransformation:
            return fs.chain(fs.add_decayed_weights(decay), fs.scale(-learning_rate))

        p = torch.nn.Parameter(torch.ones(3))
        with pytest.raises(ValueError, match="decay is a tensor"):
            fs.Optimizer([p], own, lr=0.1, decay=torch.tensor(0.1), compile=True)

    @pytest.mark.parametrize("value", [None, "inductor", 1])
    def test_what_compile_may_be(self, value: Any) -> None:
        with pytest.raises(TypeError, match="compile is"):
            fs.Shampoo([torch.nn.Parameter(torch.ones(2))], lr=0.1, compile=value)

    @pytest.mark.parametrize("options", [{"stagger": True}, {"distribute": fs.sharded}])
    def test_what_does_not_go_together(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"compile and {next(iter(options))}"):
            self.pair(**options)

    def test_a_recipe_that_distributes_nothing_is_compiled(self) -> None:
        """As in the notebook invent_an_optimizer: a function is there, and does nothing."""

        def own(learning_rate: float, distribute: Any = lambda inner: inner) -> Any:
            return fs.blocked(distribute(fs.scale_by_learning_rate(learning_rate)))

        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        fs.Optimizer([p], own, lr=0.5, compile={"backend": "eager"}).step()
        assert p.tolist() == [0.5] * 3
        with pytest.raises(ValueError, match="compile and distribute"):
            fs.Optimizer([p], own, lr=0.5, distribute=fs.sharded, compile=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parameters_of_order_0_move_too(dtype: torch.dtype) -> None:
    """Not with torch 2.13's graphs: written to, a float64 one on a CPU stays as it is."""
    for tx in (chain(), fs.sgd(0.1, momentum=0.9)):
        mine, other = (
            {"s": torch.ones((), dtype=dtype), "w": torch.ones(3, dtype=dtype)} for _ in range(2)
        )
        gradients = {"s": torch.ones((), dtype=dtype), "w": torch.ones(3, dtype=dtype)}
        compiled = fs.compiled(tx, backend="aot_eager")
        state, expected = compiled.init(mine), tx.init(other)
        for _ in range(EVERY):
            state = fs.update_in_place(compiled, gradients, state, mine)
            expected = fs.update_in_place(tx, gradients, expected, other)
        assert_close(mine, other, 1e-6)
        assert float(mine["s"]) < 0.8


@pytest.mark.parametrize("word", ["compiled", "cuda_graphed"])
def test_refreshes_on_steps_that_nobody_told_are_refused(word: str) -> None:
    """A graph did on all steps what the first one did: no refresh, or one on each."""
    bases = Refreshing(lambda block: [Basis(d) for d in block], RefreshSchedule(3))

    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        def read(side: int, u: Any) -> Any:
            return lambda x: x @ x.mT, u.mT if side else u

        return updates, bases.update(updates, state, (updates,), read, context)

    def stage(**given: Any) -> Any:
        own = fs.GradientTransformation(bases.init, update, "untold", counts=True, **given)
        return getattr(fs, word)(fs.chain(fs.masked(fs.chain(fs.trace(0.9), own), True)))

    with pytest.raises(ValueError, match=f"{word}: 'untold' refreshes values, and does not say"):
        stage().init({"w": torch.ones(3, 2)})
    stage(phase=bases.schedule.phase()).init({"w": torch.ones(3, 2)})
