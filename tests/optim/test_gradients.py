"""Gradients that are missing, late, sparse, shared or scaled; parameters that change under way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import funshampoo as fs
from tests.optim.runs import (
    ADAMW,
    BARE,
    EVERYTHING,
    METHODS,
    SHAMPOO,
    Method,
    assert_same,
    copies,
    functional,
    grads_of,
    moved,
    name_of,
    parameters,
    run,
)
from tests.optim.test_protocol import batch, model_of, train
from tests.trees import tensors

OFTEN = SHAMPOO._replace(name="every_1", options={**SHAMPOO.options, "every": 1})
OWN_STEPS = [OFTEN, EVERYTHING._replace(options={**EVERYTHING.options, "every": 1}), ADAMW, BARE]


def without(grads: Any, name: str, steps: range) -> Any:
    return [
        {n: x for n, x in g.items() if n != name or t not in steps} for t, g in enumerate(grads)
    ]


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_none_once_leaves_the_parameter_and_its_state_alone(method: Method) -> None:
    params = parameters()
    grads = without(grads_of(8), "p3", range(4, 5))
    tx = method.transformation()
    expected, _ = functional([(tx, g) for g in grads], params)
    optimizer = method.optimizer(params.items())
    run(optimizer, params, grads[:4])
    before, state = copies(params), own_state(optimizer, params["p3"])
    run(optimizer, params, grads[4:5])
    assert "p3" not in moved(params, before)
    assert_same(own_state(optimizer, params["p3"]), state)
    run(optimizer, params, grads[5:])
    assert_same(params, expected)


def own_state(optimizer: fs.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Without the weights that from_reference keeps for all blocks together."""
    shared = ("weight",) if "group_steps" in optimizer.param_groups[0] else ()
    entries = optimizer.state[p].items()
    return {
        k: x.clone() for k, x in entries if not k.startswith("shared/") and not k.endswith(shared)
    }


@pytest.mark.parametrize("method", OWN_STEPS, ids=name_of)
def test_a_late_parameter_moves_as_one_that_starts_fresh(method: Method) -> None:
    """Measured elsewhere: bias corrected by all steps; a first gradient at step 5 is its first."""
    params, grads = parameters(), grads_of(9)
    optimizer = method.optimizer(params.items())
    before = copies(params)
    run(optimizer, params, without(grads, "p5", range(4)))
    fresh = {"p5": parameters()["p5"]}
    alone = method.optimizer(fresh.items())
    run(alone, fresh, [{"p5": g["p5"]} for g in grads[4:]])
    # Alone its blocks are stacked otherwise, so that sums are rounded in another order.
    assert_same({"p5": params["p5"]}, fresh, 1e-12)
    shared = method._replace(options={**method.options, "own_steps": False})
    if method is OFTEN:  # the fixture provokes the mistake
        late = parameters()
        run(shared.optimizer(late.items()), late, without(grads, "p5", range(4)))
        assert float((late["p5"] - fresh["p5"]).detach().abs().max()) > 0.01
    assert moved(params, before) == params.keys()


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_steps_without_any_gradient_count_as_they_do_elsewhere(method: Method) -> None:
    """As many steps as calls: a rank can't know whether another one has a gradient."""
    params, grads = parameters(), grads_of(4)
    given = [{}, {}, *grads[:2], {}, *grads[2:]]
    tx = method.transformation()
    expected, _ = functional([(tx, g) for g in given], params)
    before = copies(params)
    optimizer = method.optimizer(params.items())
    run(optimizer, params, given[:2])
    assert not moved(params, before)
    run(optimizer, params, given[2:])
    assert_same(params, expected)


def test_a_sparse_gradient_is_an_error_before_any_group_moves() -> None:
    table = torch.nn.Embedding(4, 3, sparse=True)
    dense = Parameter(torch.ones(2))
    groups = [{"params": [("dense", dense)]}, {"params": [("table", table.weight)]}]
    optimizer = SHAMPOO.optimizer(groups)
    table(torch.tensor([1])).sum().backward()
    dense.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="gradient of 'table' is sparse.*SparseAdam"):
        optimizer.step()
    assert torch.equal(dense.detach(), torch.ones(2))


@pytest.mark.parametrize("kind", ["coupled", "decoupled"])
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_never_written_to(kind: str, maximize: bool) -> None:
    """Also where they are views of one flat bucket, as DDP makes them."""
    params, grads = parameters(), grads_of(5)
    group = {"params": params.items(), "maximize": maximize}
    optimizer = EVERYTHING.optimizer([group], weight_decay_kind=kind)
    twins = parameters()
    other = EVERYTHING.optimizer(
        [{"params": twins.items(), "maximize": maximize}], weight_decay_kind=kind
    )
    bucket = torch.zeros(sum(p.numel() for p in params.values()), dtype=torch.float64)
    first = 0
    for p in params.values():
        p.grad = bucket[first : first + p.numel()].view_as(p)
        first += p.numel()
    for step in grads:
        for name, p in params.items():
            assert p.grad is not None
            p.grad.copy_(step[name])
        version, values = bucket._version, bucket.clone()
        optimizer.step()
        assert bucket._version == version
        assert torch.equal(bucket, values)
    run(other, twins, grads)
    assert_same(params, twins)


def test_sgd_without_options_adds_the_gradient_and_keeps_no_reference() -> None:
    params, grads = parameters(), grads_of(1)
    optimizer = fs.Optimizer(params.items(), fs.sgd, lr=1.0, momentum=0.9)
    run(optimizer, params, grads)
    buffers = copies({n: optimizer.state[p]["trace/buffer"] for n, p in params.items()})
    for p in params.values():
        assert p.grad is not None
        p.grad.fill_(float("nan"))
    for name, p in params.items():
        assert torch.equal(optimizer.state[p]["trace/buffer"], buffers[name])


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_with_a_graph() -> None:
    model = model_of()
    optimizer = EVERYTHING.optimizer(model.named_parameters())
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward(create_graph=True)
        assert all(p.grad is not None and p.grad.requires_grad for p in model.parameters())
        optimizer.step()
    assert not any(x.requires_grad for e in optimizer.state.values() for x in e.values())
    for p in model.parameters():
        p.grad = None  # breaks the cycle between parameters and gradients


def test_clipped_and_accumulated_gradients() -> None:
    model, twin = model_of().double(), model_of().double()
    optimizer = SHAMPOO.optimizer(model.named_parameters())
    other = SHAMPOO.optimizer(twin.named_parameters())
    for step in range(5):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        x = batch(step).double()
        for half in x.chunk(2):
            (model(half).square().mean() / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.2
        optimizer.step()
        other.zero_grad()
        (twin(x).square().mean() * 0.1 / (norm + 1e-6)).backward()
        other.step()
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()), 1e-9)


def test_a_scaler_that_skips_a_step_for_inf() -> None:
    model, twin = model_of(), model_of()
    optimizer = SHAMPOO.optimizer(model.named_parameters())
    other = SHAMPOO.optimizer(twin.named_parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(6):
        optimizer.zero_grad()
        loss = model(batch(step)).square().mean()
        scaler.scale(loss * (float("inf") if step == 3 else 1.0)).backward()
        scaler.unscale_(optimizer)
        before = copies(dict(model.named_parameters()))
        scaler.step(optimizer)
        scaler.update()
        assert bool(moved(dict(model.named_parameters()), before)) == (step != 3)
    assert scaler.get_scale() == 512.0
    for step in (0, 1, 2, 4, 5):
        train(twin, other, range(step, step + 1))
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()), 1e-5)


def test_tied_parameters_are_one() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(4, 4, False), torch.nn.Linear(4, 4, False)
            self.down.weight = self.up.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).tanh())

    model = Tied().double()
    start = model.up.weight.detach().clone()
    optimizer = ADAMW.optimizer(model.named_parameters())
    x = torch.ones(1, 4, dtype=torch.float64)
    model(x).sum().backward()
    w = Parameter(start.clone())
    w.grad = model.up.weight.grad
    twin = torch.optim.AdamW([w], lr=0.05, betas=(0.8, 0.95), weight_decay=0.1)
    optimizer.step()
    twin.step()
    assert model.down.weight is model.up.weight
    assert torch.allclose(model.up.weight, w, rtol=0, atol=1e-12)


def test_a_parameter_listed_twice_is_stepped_once_and_saved_once() -> None:
    w, v = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = fs.Optimizer([w, v, w], fs.sgd, lr=0.1, momentum=0.9)
    w.grad, v.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert torch.equal(w.detach(), v.detach())
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["params"] == [0, 1, 0]
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert torch.equal(w.detach(), v.detach())
    assert torch.allclose(w, torch.full((3,), 1 - 0.1 - 0.19))


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_frozen_then_unfrozen(method: Method) -> None:
    """A parameter that is frozen for a while goes on from the state that it had."""
    params, grads = parameters(), grads_of(9)
    optimizer = method.optimizer(params.items())
    run(optimizer, params, grads[:3])
    params["p3"].requires_grad_(False)
    before = copies(params)
    run(optimizer, params, grads[3:6])  # its gradient is an old one, or another's
    assert "p3" not in moved(params, before)
    params["p3"].requires_grad_(True)
    run(optimizer, params, grads[6:])
    tx = method.transformation()
    expected, _ = functional([(tx, g) for g in without(grads, "p3", range(3, 6))], parameters())
    assert_same(params, expected)


@pytest.mark.parametrize("method", OWN_STEPS, ids=name_of)
def test_unfrozen_late(method: Method) -> None:
    params, grads = parameters(), grads_of(7)
    params["p3"].requires_grad_(False)
    optimizer = method.optimizer(params.items())
    run(optimizer, params, grads[:3])
    assert params["p3"] not in optimizer.state  # no memory for what never moves
    params["p3"].requires_grad_(True)
    run(optimizer, params, grads[3:])
    tx = method.transformation()
    late = without(grads, "p3", range(3))
    expected, _ = functional([(tx, g) for g in late], parameters())
    assert_same(params, expected, 1e-12)


def test_all_frozen() -> None:
    params = parameters()
    for p in params.values():
        p.requires_grad_(False)
    optimizer = SHAMPOO.optimizer(params.items())
    before = copies(params)
    run(optimizer, params, grads_of(2))
    assert not moved(params, before)
    optimizer.load_state_dict(optimizer.state_dict())
    for p in params.values():
        p.requires_grad_(True)
    run(optimizer, params, grads_of(2))
    assert moved(params, before) == params.keys()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    ("start", "end"),
    [
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=["double", "bfloat16", "float"],
)
@pytest.mark.parametrize("method", [SHAMPOO, ADAMW], ids=name_of)
def test_converted_after_construction(
    method: Method, start: torch.dtype, end: torch.dtype, steps: int
) -> None:
    """model.double() and its like keep the parameters' identity: the state follows by name."""
    model = torch.nn.Module()
    for name, p in parameters(start).items():
        model.register_parameter(name, p)
    params = dict(model.named_parameters())
    optimizer = method.optimizer(params.items())
    run(optimizer, params, grads_of(steps, start))
    model.to(end)
    run(optimizer, params, grads_of(3, end, seed=200))
    assert all(p.dtype == end for p in params.values())
    kept = torch.float64 if end == torch.float64 else torch.float32
    state = optimizer.state[params["p0"]]
    assert {x.dtype for x in state.values() if x.is_floating_point()} == {kept}
    # By hand: the same transformation, with parameters and state cast in between.
    now, tx = copies(parameters(start)), method.transformation()
    now, old = functional([(tx, g) for g in grads_of(steps, start)], now)
    now = {name: p.to(end) for name, p in now.items()}
    if old is not None:
        saved = fs.state.state_dict(old)
        old = fs.state.load_state_dict(tx.init(now), saved, cast=True).state
    expected, _ = functional([(tx, g) for g in grads_of(3, end, seed=200)], now, old)
    assert_same(params, expected)


def test_moved_to_another_device() -> None:
    """No second device is at hand, so the state is told that it was made on one."""
    params, twins, grads = parameters(), parameters(), grads_of(6)
    optimizer = SHAMPOO.optimizer(params.items())
    run(optimizer, params, grads[:3])
    (group_run,) = optimizer._memory.runs
    elsewhere = torch.device("cuda", 0)
    group_run.known = [known._replace(device=elsewhere) for known in group_run.known]
    group_run._snapshot = ()
    before = {x.untyped_storage().data_ptr() for x in tensors(group_run._state) if x.ndim}
    optimizer._memory.apply_edits()
    after = {x.untyped_storage().data_ptr() for x in tensors(group_run._state) if x.ndim}
    assert not before & after  # another state, of the same values
    run(optimizer, params, grads[3:])
    run(SHAMPOO.optimizer(twins.items()), twins, grads)
    assert_same(params, twins)


def test_a_parameter_of_another_shape_is_an_error_that_names_it() -> None:
    params = parameters()
    optimizer = SHAMPOO.optimizer(params.items())
    run(optimizer, params, grads_of(2))
    params["p0"].grad = None
    params["p0"].data = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"can't follow.*p0"):
        optimizer.step()


def test_a_complex_parameter_is_an_error_that_names_it() -> None:
    optimizer = SHAMPOO.optimizer([("z", Parameter(torch.zeros(2, dtype=torch.complex64)))])
    with pytest.raises(TypeError, match="'z' is complex"):
        optimizer.step()


@pytest.mark.parametrize("method", [SHAMPOO, ADAMW], ids=name_of)
def test_a_lazy_layer_joins_after_its_first_forward(method: Method) -> None:
    """As in torch.optim: its parameters are the same objects, which have no shape before."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LazyLinear(2)).double()
    optimizer = method.optimizer(model.parameters())
    optimizer.state_dict()
    x = torch.ones(2, 4, dtype=torch.float64)
    model[0](x).sum().backward()
    optimizer.step()
    model(x).square().sum().backward()
    before = copies(dict(model.named_parameters()))
    optimizer.step()
    assert moved(dict(model.named_parameters()), before) == before.keys()
