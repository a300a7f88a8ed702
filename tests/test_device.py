"""Other devices than the CPU: nothing is made on the wrong one, nothing is read from it.

A meta tensor has a device of its own and no values: an operation that mixes it with a CPU tensor
of one or more axes raises, and so does reading it. So the meta device shows, without a GPU, that a
step stays on its device and never waits for it.

What has the marker `gpu` is skipped where there is none: `pytest -m gpu`, or `make device`. The
first of them matter most.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.func import vmap

import funshampoo as fs
from tests.table import Case, every_case
from tests.trees import assert_close, assert_equal, clone, gradients, problem, tensors, train

GPU = "cuda"
SHAPES = {"w": (200, 300), "conv": (64, 32, 3, 3), "bias": (300,), "scale": ()}
STEPS = 6  # a refresh on the first, the fourth, ...
EVERY = 4
DAMPING = 1e-3


def to(tree: Any, device: str) -> Any:
    return optree.tree_map(lambda x: x.to(device), tree)


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of sizes that a GPU's kernels are made for, with ragged blocks."""
    make = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=make).to(dtype) for name, shape in SHAPES.items()}


def shampoo(**options: Any) -> fs.GradientTransformation:
    """Damped so much that rounding in float32 stays small."""
    common = {"every": EVERY, "max_size": 128, "momentum": 0.9, "weight_decay": 0.01}
    return fs.shampoo(0.01, **common | {"relative_epsilon": DAMPING} | options)


def trained(
    tx: fs.GradientTransformation,
    device: str,
    grads: list[Any],
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], Any]:
    """Parameters, those that there are gradients for, and state after donated steps."""
    params = {name: x.to(device) for name, x in drawn(0, dtype).items() if name in grads[0]}
    state = tx.init(params)
    for g in grads:
        on_device = {k: x if x is None else x.to(device) for k, x in g.items()}
        state = fs.update_in_place(tx, on_device, state, params)
    return params, state


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The way from the first parameters to `found` is that to `expected`, relative."""
    begin = drawn(0, torch.float64)
    for name, x in expected.items():
        mine, theirs = (y.detach().cpu().double() for y in (found[name], x))
        way, error = (theirs - begin[name]).norm(), (mine - theirs).norm()
        assert error <= tolerance * way, f"{name}: {float(error / way):.1e}"


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """What waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


SOLVERS: dict[str, Callable[..., Any]] = {
    "eigh": fs.linalg.eigh,
    "coupled_newton": fs.linalg.coupled_newton,
    "newton_schulz": fs.linalg.newton_schulz,
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SOLVERS)
def test_float32_trajectories_are_those_of_the_cpu(name: str) -> None:
    tx = shampoo(solver=SOLVERS[name](relative_epsilon=DAMPING))
    grads = [drawn(t) for t in range(1, STEPS + 1)]
    expected, _ = trained(tx, "cpu", grads)
    found, _ = trained(tx, GPU, grads)
    assert_near(found, expected, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"product_dtype": torch.bfloat16}, {"packed": True}])
def test_options_of_a_gpu_err_by_no_more_than_they_say(options: dict[str, Any]) -> None:
    grads = [drawn(t) for t in range(1, STEPS + 1)]
    expected, _ = trained(shampoo(), "cpu", grads)
    found, _ = trained(shampoo(**options), GPU, grads)
    assert_near(found, expected, 0.05 if "product_dtype" in options else 1e-3)


@pytest.mark.gpu
def test_half_precision_parameters_are_those_of_the_cpu() -> None:
    grads = [drawn(t, torch.bfloat16) for t in range(1, STEPS + 1)]
    expected, _ = trained(shampoo(), "cpu", grads, torch.bfloat16)
    found, _ = trained(shampoo(), GPU, grads, torch.bfloat16)
    for name, x in expected.items():
        assert found[name].dtype == torch.bfloat16
        scale = x.float().abs().max()
        assert (found[name].cpu().float() - x.float()).abs().max() <= 2**-7 * scale  # a bit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_at_random_has_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    """Of updates that are a product with a power of two, which no kernel rounds."""
    tx = fs.chain(fs.scale(-(2.0**-10)), fs.stochastic_rounding())
    grads = [drawn(t) for t in range(1, STEPS + 1)]
    expected, _ = trained(tx, "cpu", grads, dtype)
    found, _ = trained(tx, GPU, grads, dtype)
    nearest, _ = trained(fs.scale(-(2.0**-10)), "cpu", grads, dtype)
    for name, x in expected.items():
        assert torch.equal(found[name].cpu(), x)
        assert x.ndim == 0 or not torch.equal(nearest[name], x)


@pytest.mark.gpu
def test_a_donated_plain_step_waits_for_nothing() -> None:
    """Nor does one whose gradient is not finite, or the wrapper's."""
    grads = [to(drawn(t), GPU) for t in range(4)]
    grads[2]["conv"][3] = torch.nan
    params = to(drawn(0), GPU)
    tx = shampoo(max_failures=None)
    state = tx.init(params)
    for t, g in enumerate(grads):
        with without_waiting() if t > 1 else contextlib.nullcontext():
            state = fs.update_in_place(tx, g, state, params, refresh=t == 0)

    leaves = {name: torch.nn.Parameter(x) for name, x in to(drawn(0), GPU).items()}
    optimizer = fs.Shampoo(leaves.items(), 0.01, every=10, max_size=128)
    for t, g in enumerate(grads):
        for name, p in leaves.items():
            p.grad = g[name]
        with without_waiting() if t > 1 else contextlib.nullcontext():
            optimizer.step()


@pytest.mark.gpu
def test_gradients_that_are_absent_or_not_finite_hold_their_blocks_alone() -> None:
    grads: list[Any] = [drawn(t) for t in range(1, STEPS + 1)]
    grads[1]["bias"] = None
    grads[2]["w"][150, 20] = torch.inf
    grads[4]["scale"] = torch.tensor(torch.nan)
    expected, _ = trained(shampoo(), "cpu", grads)
    found, state = trained(shampoo(), GPU, grads)
    assert_near(found, expected, 1e-3)
    assert all(x.isfinite().all() for x in tensors(state) if x.is_floating_point())


@pytest.mark.gpu
def test_failures_in_a_row_stop_it() -> None:
    bad = drawn(1)
    bad["w"][0, 0] = torch.nan
    with pytest.raises(fs.FailureLimitError, match="w block_0_0"):
        trained(shampoo(max_failures=3), GPU, [bad] * 2 * EVERY)


@pytest.mark.gpu
def test_a_donated_step_gives_the_numbers_of_a_pure_one() -> None:
    grads = [to(drawn(t), GPU) for t in range(1, STEPS + 1)]
    pure, _, _ = train(shampoo(), to(drawn(0), GPU), grads, fs.apply_updates)
    donated, _ = trained(shampoo(), GPU, grads)
    assert_near(donated, pure, 1e-4)


@pytest.mark.gpu
def test_a_saved_state_resumes_on_the_gpu() -> None:
    """Through a file that is read to the CPU, as one of another machine may be."""
    grads = [drawn(t) for t in range(1, STEPS + 1)]
    expected, _ = trained(shampoo(), GPU, grads)
    params, state = trained(shampoo(), GPU, grads[:3])
    file = io.BytesIO()
    torch.save(fs.state.state_dict(state), file)
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    tx = shampoo()
    state = fs.state.load_state_dict(tx.init(params), saved).state
    for g in grads[3:]:
        state = fs.update_in_place(tx, to(g, GPU), state, params)
    assert_near(params, expected, 1e-4)
    health = fs.state.health(state, file=io.StringIO())
    assert health.held == sum(side.failures for side in health.factors) == 0


@pytest.mark.gpu
def test_the_wrapper_resumes_on_the_gpu() -> None:
    def optimizer_of(params: dict[str, Tensor]) -> tuple[dict[str, torch.nn.Parameter], Any]:
        leaves = {name: torch.nn.Parameter(x.clone()) for name, x in params.items()}
        return leaves, fs.Shampoo(leaves.items(), 0.01, every=EVERY, max_size=128)

    def go_on(leaves: dict[str, torch.nn.Parameter], optimizer: Any, steps: range) -> None:
        for t in steps:
            for name, g in to(drawn(t), GPU).items():
                leaves[name].grad = g
            optimizer.step()

    leaves, optimizer = optimizer_of(to(drawn(0), GPU))
    go_on(leaves, optimizer, range(1, 4))
    saved = to(optimizer.state_dict()["state"], "cpu") | {}
    others, resumed = optimizer_of({name: p.detach() for name, p in leaves.items()})
    resumed.load_state_dict(clone(optimizer.state_dict()) | {"state": saved})
    for parts in ((leaves, optimizer), (others, resumed)):
        go_on(*parts, range(4, STEPS + 1))
    assert_near(others, leaves, 1e-4)


def few(tree: Any) -> Any:
    """Of `problem` one leaf of each order up to 3: operators on meta tensors are slow."""
    first, second = tree["layers"]
    return {"w": tree["w"], "layers": [first, {"scale": second["scale"]}]}


@every_case
def test_a_step_stays_on_its_device_and_reads_nothing(case: Case) -> None:
    """Refreshes by coupled Newton alone ask the device whether they are done."""
    tx, params = case.make(), to(few(problem()), "meta")
    state = tx.init(params)
    by_newton = case.name == "root_inverse:newton"
    refresh = {"refresh": False} if by_newton else {}
    for g in gradients(3):
        updates, state = tx.update(to(few(g), "meta"), state, params, donate=True, **refresh)
        params = fs.apply_updates(params, updates)
        assert all(u.device.type == "meta" for u in tensors(updates))
    on_the_host = [x for x in tensors(state) if x.device.type == "cpu"]
    assert all(x.ndim == 0 for x in on_the_host)  # counters, and scheduled hyperparameters


@pytest.mark.gpu
@every_case
def test_a_gpu_gives_the_numbers_of_the_cpu(case: Case) -> None:
    """Eigenvectors are the same where they are unique: of statistics of full rank."""
    if case.name in OF_RANK_1:
        pytest.skip("all but one of its eigenvectors are anybody's")
    by_basis = any(word in case.name for word in OF_A_BASIS)
    params, *grads = map(squares, range(6)) if by_basis else (problem(), *gradients(5))
    cpu, _, _ = train(case.make(), params, grads, fs.apply_updates)
    there = [to(g, GPU) for g in grads]
    cuda, _, _ = train(case.make(), to(params, GPU), there, fs.apply_updates)
    assert_close(to(cuda, "cpu"), cpu, 1e-6 if by_basis else 1e-8)


OF_A_BASIS = ("basis", "adaptive", "soap", "kl", "eigenvalue", "gate", "tf32", "graphed")
OF_RANK_1 = ("from_reference:eigenvalue_corrected",)  # it merges a small matrix to a vector


def squares(seed: int) -> dict[str, Tensor]:
    """What has no row or column too many, in blocks of 4 or whole: one gradient has full rank."""
    make = torch.Generator().manual_seed(seed)
    shapes = {"w": (8, 8), "v": (4, 4)}
    return {n: torch.randn(s, generator=make, dtype=torch.float64) for n, s in shapes.items()}


LOOK_AT_EVERY_STEP = ("from_reference:primal_average",)


@pytest.mark.gpu
@every_case
def test_a_plain_step_on_a_gpu_does_not_wait_for_it(case: Case) -> None:
    if case.name in LOOK_AT_EVERY_STEP:
        pytest.skip("every step is a refresh")
    tx, params = case.make(), to(problem(), GPU)
    state = tx.init(params)
    # The guards of the table look at their counters on every second step, and that waits.
    first, second, third = (to(g, GPU) for g in gradients(3))
    _, state = tx.update(first, state, params)
    _, state = tx.update(second, state, params, refresh=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tx.update(third, state, params, refresh=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_an_ensemble_on_a_gpu_with_a_schedule() -> None:
    tx = fs.shampoo(fs.schedules.cosine(0.1, 10), every=2)
    params = optree.tree_map(lambda x: torch.stack([x, 2 * x]), to(problem(), GPU))
    state = vmap(tx.init)(params)
    for g in gradients(3):
        stacked = optree.tree_map(lambda x: torch.stack([x, x]), to(g, GPU))
        updates, state = vmap(tx.update)(stacked, state, params)
        params = fs.apply_updates(params, updates)
    first, _, _ = train(tx, problem(), gradients(3), fs.apply_updates)
    assert_close(optree.tree_map(lambda x: x[0].cpu(), params), first, 1e-8)


@every_case
def test_a_default_device_changes_nothing(case: Case) -> None:
    """Tensors are made where the parameters are, counters on the CPU."""
    expected = train(case.make(), problem(), gradients(3), fs.apply_updates)
    params, grads = problem(), gradients(3)
    # Not by set_default_device: torch 2.8 could say no default device from there on.
    with torch.device("meta"):
        found = train(case.make(), params, grads, fs.apply_updates)
    assert_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
def test_a_compiled_plain_step_gives_the_numbers_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longest, so it comes last."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    grads = [{name: drawn(t)[name] for name in ("conv", "scale")} for t in range(1, STEPS + 1)]
    expected, _ = trained(shampoo(), GPU, grads)
    found, _ = trained(fs.compiled(shampoo()), GPU, grads)
    assert_near(found, expected, 1e-3)
