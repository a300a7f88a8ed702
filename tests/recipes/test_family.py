"""The recipes without factor matrices: against torch.optim, plain equations and the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.recipes import RECIPES
from funshampoo.state.nodes import walk
from funshampoo.state.stages import Kept
from tests.sooner import these
from tests.trees import assert_close, gradients, problem, tensors, train

D = torch.float64
DATA = torch.load(Path(__file__).parents[1] / "reference" / "reference.pt", weights_only=True)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=D).to(dtype)


SHAPES = {"a": (24, 40), "b": (24, 40), "c": (33, 17), "d": (16, 16)}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="no Muon in torch 2.8")
@pytest.mark.parametrize("scale", ["muon", "adam"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torch_s_to_rounding_of_the_last_sum(nesterov: bool, scale: str) -> None:
    """In bfloat16 as there. A momentum of another rounding would show here by 1e-3."""
    params = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    tx = fs.muon(
        0.02,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=0.05,
        scale=scale,  # type: ignore[arg-type]
        dtype=torch.bfloat16,
    )
    own = [p.clone().requires_grad_() for p in params.values()]
    theirs = torch.optim.Muon(
        own,
        lr=0.02,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=0.05,
        adjust_lr_fn="original" if scale == "muon" else "match_rms_adamw",
    )
    state = tx.init(params)
    for t in range(6):
        grads = {name: randn(*x.shape, seed=100 + t) for name, x in params.items()}
        state = fs.update_in_place(tx, grads, state, params)
        for p, g in zip(own, grads.values()):
            p.grad = g.clone()
        theirs.step()
        for p, q in zip(params.values(), own):
            assert (p - q.detach()).abs().max() < 1e-6


def test_muon_in_float32_is_its_equation() -> None:
    w = randn(5, 9)
    tx = fs.muon(0.02, weight_decay=0.1)
    params, state, B = {"w": w}, tx.init({"w": w}), torch.zeros(5, 9)
    for t in range(4):
        g = randn(5, 9, seed=t + 1)
        updates, state = tx.update({"w": g}, state, params)
        params = fs.apply_updates(params, updates)
        B = 0.95 * B + 0.05 * g
        X = 0.05 * g + 0.95 * B
        X = X / X.norm()
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X
        w = w * (1 - 0.02 * 0.1) - 0.02 * X
        assert torch.allclose(params["w"], w, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "recipe", [fs.muon, fs.normuon, fs.spectral_descent], ids=lambda r: r.__name__
)
def test_what_is_no_matrix_gets_adamw(recipe: Any) -> None:
    params, grads = problem(), gradients(4)
    found, _, _ = train(recipe(0.05), params, grads, fs.apply_updates)
    adamw, _, _ = train(fs.adamw(0.05), params, grads, fs.apply_updates)
    for layer, other, start in zip(found["layers"], adamw["layers"], params["layers"]):
        for name, x in layer.items():
            if x.ndim < 2:
                assert torch.allclose(x, other[name], rtol=1e-12)
            else:
                assert not torch.allclose(x, other[name], rtol=0, atol=1e-3)
                assert not torch.equal(x, start[name])


def test_the_routing_can_be_told() -> None:
    params, grads = problem(), gradients(3)
    tx = fs.muon(0.05, matrices=lambda tree: {"w": True, "layers": False}, others=fs.sgd(0.1))
    found, _, _ = train(tx, params, grads, fs.apply_updates)
    sgd, _, _ = train(fs.sgd(0.1), params, grads, fs.apply_updates)
    muon, _, _ = train(fs.muon(0.05), params, grads, fs.apply_updates)
    assert_close(found["layers"], sgd["layers"], 1e-12)
    assert_close(found["w"], muon["w"], 1e-12)


@pytest.mark.parametrize("merge", ["none", "small", "matrix"])
@pytest.mark.parametrize(
    "recipe", [fs.muon, fs.normuon, fs.spectral_descent, fs.soap_muon], ids=lambda r: r.__name__
)
def test_a_matrix_that_merging_makes_a_vector_is_no_matrix(recipe: Any, merge: Any) -> None:
    """A layer with one output, say: the others' method has it, and nobody's error names a stack."""
    shapes = {"w": (6, 5), "out": (1, 6), "conv": (1, 4, 1), "one": (1, 1)}
    params = {name: torch.ones(shape, dtype=D) for name, shape in shapes.items()}
    found, _, _ = train(recipe(0.1, merge=merge), params, [params], fs.apply_updates)
    adamw, _, _ = train(fs.adamw(0.1), params, [params], fs.apply_updates)
    same = {name for name in shapes if torch.allclose(found[name], adamw[name], rtol=1e-12)}
    assert same == (set() if merge == "none" else {"out", "conv", "one"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: fs.muon(0.1, matrices=True),
        lambda: fs.soap_muon(0.1, matrices=True),
        lambda: fs.blocked(fs.orthogonalize(), max_size=2),
        fs.orthogonalize,
    ],
)
def test_a_vector_that_is_called_a_matrix_is_refused_by_its_name(make: Any) -> None:
    """Which inside of blocks is a stack's."""
    params = {"weight": torch.zeros(4, 6), "layers": [{"bias": torch.zeros(2)}]}
    with pytest.raises(ValueError, match=r"'layers.0.bias' has the shape \(2,\) and is no matrix"):
        make().init(params)


def test_without_parameters_nobody_knows_the_sides_of_a_missing_gradient() -> None:
    tx, params = fs.muon(0.1, weight_decay=0.0, others=fs.lion(0.1)), problem()
    with pytest.raises(ValueError, match="pass params to update, or say which leaves are"):
        tx.update({**params, "w": None}, tx.init(params))


@pytest.mark.parametrize(
    "recipe", [fs.muon, fs.normuon, fs.spectral_descent], ids=lambda r: r.__name__
)
def test_a_bad_gradient_is_held_and_counted(recipe: Any) -> None:
    params, grads = problem(), gradients(4)
    bad = {**grads[2], "w": grads[2]["w"] * float("nan")}
    bad["layers"] = [{**grads[2]["layers"][0], "bias": torch.full((5,), float("inf"), dtype=D)}]
    bad["layers"].append(grads[2]["layers"][1])
    _, history, state = train(recipe(0.1), params, [*grads[:2], bad, grads[3]], fs.apply_updates)
    assert all(x.isfinite().all() for x in tensors((history, state)))
    assert not history[2]["w"].any()
    assert history[2]["layers"][0]["weight"].any()
    assert history[3]["w"].any()


@pytest.mark.parametrize("distribute", ["yes", 3])
def test_a_wrong_distribute_says_what_it_wants(distribute: Any) -> None:
    with pytest.raises(TypeError, match="give funshampoo.sharded, or a partial of it"):
        fs.muon(0.1, distribute=distribute)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("spectral", fs.spectral_descent), ("sign_descent", fs.sign_descent)],
)
def test_the_reference_s_runs(name: str, recipe: Any) -> None:
    """Data of facebookresearch/optimizers in float64; see tests/reference/README.md."""
    config = DATA["configs"][name]
    data = DATA["problems"][config["problem"]]
    tx = recipe(config["args"]["lr"], beta1=config["args"]["betas"][0])
    params = list(data["params0"])
    state, worst, largest = tx.init(params), 0.0, 0.0
    for t, grads in enumerate(data["grads"]):
        updates, state = tx.update([g.double() for g in grads], state, params)
        params = fs.apply_updates(params, updates)
        for p, u, path in zip(params, updates, config["params"]):
            worst = max(worst, float((p - path[t]).abs().max()))
            largest = max(largest, float(u.abs().max()))
    assert worst <= max(1e-9, 1000 * config["sensitivity"]) * largest


@pytest.mark.parametrize("shape", [(4, 3), (5,)], ids=str)
def test_a_look_ahead_of_soap_is_its_equation(shape: tuple[int, ...]) -> None:
    """In the bases of the first step, which no later one of these renews; a vector has none."""
    beta1, beta2, rate = 0.95, 0.9, 0.1
    tx = fs.soap(
        rate, beta1=beta1, beta2=beta2, every=1000, nesterov=True, weight_decay=0.0, merge="none"
    )
    generator = torch.Generator().manual_seed(0)
    first, *grads = torch.randn(5, *shape, generator=generator, dtype=torch.float64)
    params = {"w": torch.zeros(shape, dtype=torch.float64)}
    state = tx.init(params)
    updates, state = tx.update({"w": first}, state, params)
    assert not updates["w"].any()
    found = [node for _, node in walk(state) if isinstance(node, Kept)]
    bases = [kept.value[0][0] for kept in found]
    assert len(bases) == (2 if len(shape) == 2 else 0)
    m = v = torch.zeros(shape, dtype=torch.float64)
    for t, g in enumerate(grads, start=1):
        updates, state = tx.update({"w": g}, state, params)
        r = bases[0].mT @ g @ bases[1] if bases else g
        m, v = beta1 * m + (1 - beta1) * r, beta2 * v + (1 - beta2) * r**2
        ahead = (beta1 * m + (1 - beta1) * r) / (1 - beta1 ** (t + 1))
        step = -rate * ahead / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        step = bases[0] @ step @ bases[1].mT if bases else step
        torch.testing.assert_close(updates["w"], step, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(4, 3), (5,)], ids=str)
@pytest.mark.parametrize(
    ("method", "corrects"),
    [
        (fs.adamw, True),
        (fs.soap, True),
        (fs.eigenvalue_shampoo, True),
        (fs.kl_soap, False),
        (fs.kl_shampoo, False),
    ],
)
def test_a_look_ahead_is_the_mean_of_two_steps(
    method: Any, corrects: bool, shape: tuple[int, ...]
) -> None:
    """beta1 M + (1-beta1) R is over a root in which beta1 has no part: so the step is the mean of
    those with beta1 and with 0, each by the weight of its average. Bases are renewed meanwhile.
    """
    beta, options = 0.9, {"weight_decay": 0.0, "beta2": 0.95}
    options |= {} if method is fs.adamw else {"every": 2, "merge": "none"}
    ahead = method(0.1, beta1=beta, nesterov=True, **options)
    runs = [ahead, method(0.1, beta1=beta, **options), method(0.1, beta1=0.0, **options)]
    params = {"w": torch.zeros(shape, dtype=torch.float64)}
    states = [tx.init(params) for tx in runs]
    seen = -1 if method in (fs.soap, fs.kl_soap, fs.kl_shampoo) else 0  # bases, no step
    for t in range(7):
        g = {"w": randn(*shape, seed=t + 1, dtype=torch.float64)}
        steps = []
        for i, tx in enumerate(runs):
            updates, states[i] = tx.update(g, states[i], params)
            steps.append(updates["w"])
        seen += 1
        total = 1 - beta ** (seen + 1) if corrects else 1.0
        plain = beta * (1 - beta**seen if corrects else 1.0) * steps[1]
        torch.testing.assert_close(steps[0], (plain + (1 - beta) * steps[2]) / total)
        assert steps[0].any() == (seen > 0)
        assert t < 2 or not torch.equal(steps[0], steps[1])


@pytest.mark.parametrize("beta2", [0.99, 0.0])  # at 0 it looks ahead from the last gradient
def test_lion_is_its_equation(beta2: float) -> None:
    w, m = randn(7, dtype=D), torch.zeros(7, dtype=D)
    tx = fs.lion(0.1, beta2=beta2, weight_decay=0.2)
    params, state = {"w": w}, tx.init({"w": w})
    for t in range(5):
        g = randn(7, seed=t + 1, dtype=D)
        updates, state = tx.update({"w": g}, state, params)
        params = fs.apply_updates(params, updates)
        w = w * (1 - 0.1 * 0.2) - 0.1 * (0.9 * m + 0.1 * g).sign()
        m = beta2 * m + (1 - beta2) * g
        assert torch.allclose(params["w"], w, rtol=1e-12)


@pytest.mark.parametrize("method", [fs.muon, fs.normuon, fs.lion, fs.sign_descent])
def test_the_wrapper_takes_the_recipes(method: Any) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = fs.Optimizer(model.named_parameters(), method, lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    x = torch.ones(2, 4)
    before = model.weight.detach().clone()
    for moved in (True, False):  # in the second step the rate is 0
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()
        assert torch.equal(model.weight.detach(), before) != moved
        before = model.weight.detach().clone()


def test_the_wrapper_knows_that_averages_scale_by_their_rate() -> None:
    model = torch.nn.Linear(4, 3)
    method = fs.chain(fs.scale_by_adam(0.0), fs.schedule_free(0.1))
    optimizer = fs.Optimizer(model.named_parameters(), method)
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    (state,) = optimizer.chain_states()
    params = {name: p.detach() for name, p in model.named_parameters()}
    assert fs.evaluation_parameters(state, params).keys() == params.keys()


@pytest.mark.parametrize("shape", [(3_000_000_000,), (1_500_000, 2000)], ids=str)
@pytest.mark.parametrize("name", these([*RECIPES], sooner={"soap", "muon"}))
def test_three_billion_numbers_on_the_meta_device(name: str, shape: tuple[int, ...]) -> None:
    """No index of 32 bits, and nothing of d² numbers for a side that gets no matrix."""
    params = {"w": torch.empty(shape, device="meta")}
    tx = RECIPES[name](0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].shape == shape
