"""What code written for torch.optim asks of an optimizer besides its numbers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

import funshampoo as fs
from tests.optim.runs import (
    ADAMW,
    EVERYTHING,
    METHODS,
    REFERENCE,
    SGD,
    SHAMPOO,
    Method,
    assert_same,
    copies,
    grads_of,
    moved,
    name_of,
    parameters,
    run,
)


def model_of(seed: int = 0) -> torch.nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(step))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()


def test_a_closure_has_gradients_and_its_loss_is_returned() -> None:
    model, twin = model_of(), model_of()
    optimizer, other = (SHAMPOO.optimizer(m.named_parameters()) for m in (model, twin))
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(batch(0)).square().mean()
        assert torch.is_grad_enabled()
        loss.backward()
        losses.append(loss)
        return loss

    with torch.no_grad():
        returned = optimizer.step(closure)
    assert returned is losses[0]
    assert len(losses) == 1
    assert optimizer.step() is None
    train(twin, other, range(1))
    other.step()
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))


def test_step_hooks_see_the_step_once_each() -> None:
    params = parameters()
    optimizer = SHAMPOO.optimizer(params.items())
    seen: list[str] = []
    start = copies(params)

    def before(opt: Any, args: Any, kwargs: Any) -> None:
        seen.append("before" if not moved(params, start) else "late")

    def after(opt: Any, args: Any, kwargs: Any) -> None:
        seen.append("after" if moved(params, start) else "early")

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append("global")),
    ]
    run(optimizer, params, grads_of(1))
    for handle in handles:
        handle.remove()
    run(optimizer, params, grads_of(1))
    assert seen == ["before", "after", "global"]


def test_a_step_pre_hook_may_give_another_closure() -> None:
    optimizer = SHAMPOO.optimizer(parameters().items())
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 7), {}))
    assert optimizer.step() == 7


def test_state_dict_hooks() -> None:
    params = parameters()
    optimizer = SHAMPOO.optimizer(params.items())
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append(opt))
    handle = optimizer.register_state_dict_post_hook(lambda opt, saved: {"packed": saved})
    packed = optimizer.state_dict()
    assert seen == [optimizer]
    assert packed.keys() == {"packed"}
    handle.remove()
    optimizer.register_state_dict_post_hook(lambda opt, saved: saved.update(note=1))
    assert optimizer.state_dict().keys() == {"state", "param_groups", "note"}


def test_load_state_dict_hooks() -> None:
    params, grads = parameters(), grads_of(4)
    optimizer = SHAMPOO.optimizer(params.items())
    run(optimizer, params, grads)
    saved = optimizer.state_dict()
    other = SHAMPOO.optimizer(parameters().items())
    steps = []

    def before(opt: Any, given: dict[str, Any]) -> dict[str, Any]:
        given["touched"] = True  # a shallow copy: the caller's dict stays as it is
        return given["packed"]

    other.register_load_state_dict_pre_hook(before)
    other.register_load_state_dict_post_hook(
        lambda opt: steps.append(next(iter(opt.state.values()))["shared/clock/steps"])
    )
    packed = {"packed": saved}
    other.load_state_dict(packed)
    assert packed.keys() == {"packed"}
    assert [int(s) for s in steps] == [4]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    """With zeros in the gradients' memory afterwards, nothing of the state has become zero."""
    model, twin = model_of(), model_of()
    optimizer = EVERYTHING.optimizer(model.named_parameters())
    other = EVERYTHING.optimizer(twin.named_parameters())
    for step in range(5):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        for p in model.parameters():
            assert p.grad is None if set_to_none else not p.grad.any()
    train(twin, other, range(5))
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))


def test_the_profiler_sees_one_step_and_one_zero_grad() -> None:
    model = model_of()
    optimizer = fs.Shampoo(model.parameters())
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        train(model, optimizer, range(1))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#Shampoo.step"] == 1
    assert counts["Optimizer.zero_grad#Shampoo.zero_grad"] == 1


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_a_deepcopy_of_model_and_optimizer_goes_on_by_itself(method: Method) -> None:
    model = model_of()
    optimizer = method.optimizer(model.named_parameters())
    train(model, optimizer, range(4))
    other, twin = copy.deepcopy((model, optimizer))
    at_copy = copies(dict(model.named_parameters()))
    train(other, twin, range(4, 8))
    assert not moved(dict(model.named_parameters()), at_copy)
    train(model, optimizer, range(4, 8))
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()))
    assert moved(dict(model.named_parameters()), at_copy)


def test_a_deepcopy_of_the_optimizer_alone_has_parameters_of_its_own() -> None:
    params, grads = parameters(), grads_of(8)
    optimizer = SHAMPOO.optimizer(params.items())
    run(optimizer, params, grads[:4])
    twin = copy.deepcopy(optimizer)
    own = dict(zip(params, twin.param_groups[0]["params"]))
    at_copy = copies(params)
    run(twin, own, grads[4:])
    assert not moved(params, at_copy)
    run(optimizer, params, grads[4:])
    assert_same(params, own)


def test_a_deepcopy_has_a_tensor_of_its_own_as_rate() -> None:
    model = model_of()
    optimizer = SHAMPOO.optimizer(model.named_parameters(), lr=torch.tensor(0.05))
    train(model, optimizer, range(2))
    other, twin = copy.deepcopy((model, optimizer))
    twin.param_groups[0]["lr"].mul_(0.5)
    train(other, twin, range(2, 4))
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)
    optimizer.param_groups[0]["lr"] = 0.025
    train(model, optimizer, range(2, 4))
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()))


@pytest.mark.parametrize("method", [SHAMPOO, EVERYTHING, SGD, ADAMW, REFERENCE], ids=name_of)
def test_a_pickle_goes_on(method: Method) -> None:
    model = model_of()
    optimizer = method.optimizer(model.named_parameters())
    train(model, optimizer, range(4))
    other, twin = pickle.loads(pickle.dumps((model, optimizer)))
    train(other, twin, range(4, 8))
    train(model, optimizer, range(4, 8))
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()))
    twin.add_param_group({"params": [("late", Parameter(torch.zeros(2)))]})
    assert len(twin.param_groups) == 2


def test_repr_shows_the_hyperparameters() -> None:
    text = repr(fs.Shampoo([Parameter(torch.zeros(2))], lr=0.03, momentum=0.9))
    assert text.startswith("Shampoo (")
    assert "    lr: 0.03\n" in text
    assert "    momentum: 0.9\n" in text


def test_the_class_is_the_recipe() -> None:
    params, twins, grads = parameters(), parameters(), grads_of(6)
    given: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.9), "max_size": 4, "grafting": "rms"}
    run(fs.Shampoo(params.items(), **given), params, grads)
    run(fs.Optimizer(twins.items(), fs.shampoo, **given), twins, grads)
    assert_same(params, twins)
    with pytest.raises(TypeError, match="did you mean 'momentum'"):
        fs.Shampoo(params.values(), momentun=0.9)


def test_state_is_read_as_torchs() -> None:
    params = parameters()
    next(iter(params.values())).requires_grad_(False)
    optimizer = SHAMPOO.optimizer(params.items())
    frozen, *others = params.values()
    assert optimizer.state[frozen] == {}
    assert all(optimizer.state[p] for p in others)
    assert optimizer.state.keys() == set(others)
    assert all(type(x) is dict for x in copy.deepcopy(optimizer.state).values())


@pytest.mark.parametrize("method", [fs.shampoo, fs.soap, fs.muon])
def test_a_training_step_that_is_compiled_whole_leaves_the_step_out(method: Any) -> None:
    """Traced, it would meet a counter that can't be read, and make a graph a step until then."""

    def trained(compiles: bool) -> list[torch.Tensor]:
        model = model_of()
        optimizer = fs.Optimizer(model.parameters(), method, lr=0.1)

        def training_step(x: torch.Tensor) -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        run = torch.compile(training_step, backend="eager") if compiles else training_step
        for step in range(11):  # a refresh at 10
            run(batch(step))
        return [p.detach() for p in model.parameters()]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        found = trained(compiles=True)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    finally:
        torch._dynamo.reset()
    assert all(x.equal(y) for x, y in zip(found, trained(compiles=False), strict=True))
    assert 1 <= graphs <= 3
