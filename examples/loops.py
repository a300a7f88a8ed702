"""Two training loops for the same optimizers: a functional one, and that of torch.optim.

Both also run on several processes, as torchrun starts them: each computes the gradient of its share
of the batch, gradients are averaged, and Shampoo's blocks are shared out (funshampoo.sharded).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import funshampoo
from funshampoo import GradientTransformation, Schedule
from record import record
from tasks import Examples

Recipe = Callable[..., GradientTransformation]

# Each with its own defaults, which are what most people will run.
RECIPES: dict[str, Recipe] = {
    "shampoo": funshampoo.shampoo,
    "adamw": funshampoo.adamw,
    "sgd": partial(funshampoo.sgd, momentum=0.9, nesterov=True),
    "soap": funshampoo.soap,
    "kl_shampoo": funshampoo.kl_shampoo,
    "kl_soap": funshampoo.kl_soap,
    "muon": funshampoo.muon,
    "normuon": funshampoo.normuon,
    "lion": funshampoo.lion,
    "sign_descent": funshampoo.sign_descent,
    "spectral_descent": funshampoo.spectral_descent,
    "eigenvalue_shampoo": funshampoo.eigenvalue_shampoo,
    # its own average goes back a thousand steps, which are more than there are here
    "splus": partial(funshampoo.splus, average=0.9),
    "soap_muon": funshampoo.soap_muon,
    "record": record,
}
AVERAGING = ("splus", "record")  # which know better weights than those that they train
DEFAULT = ("shampoo", "adamw", "sgd")


class Loop(NamedTuple):
    """A loop that has begun: one step on a batch, and the outputs for some inputs."""

    step: Callable[[Examples], Tensor]
    predict: Callable[[Tensor], Tensor]


def functional(network: nn.Module, optimizer: str, schedule: Schedule) -> Loop:
    """Parameters are a dict of tensors, gradients come from torch.func, the state is a value."""
    params = {name: p.detach() for name, p in network.named_parameters()}

    def loss(params: dict[str, Tensor], batch: Examples) -> Tensor:
        return loss_of(functional_call(network, params, batch.inputs), batch.targets)

    gradients_and_loss = grad_and_value(loss)
    tx = RECIPES[optimizer](schedule, **options(optimizer))
    state = tx.init(params)

    def step(batch: Examples) -> Tensor:
        nonlocal params, state
        gradients, batch_loss = gradients_and_loss(params, batch)
        gradients = average_over_ranks(gradients)
        updates, state = tx.update(gradients, state, params)
        params = funshampoo.apply_updates(params, updates)
        value: Tensor = batch_loss
        return value

    def predict(inputs: Tensor) -> Tensor:
        weights = params
        if optimizer in AVERAGING:
            weights = funshampoo.evaluation_parameters(state, params)
        outputs: Tensor = functional_call(network, weights, inputs)
        return outputs

    return Loop(step, predict)


def wrapper(network: nn.Module, optimizer: str, schedule: Schedule) -> Loop:
    """A module, backward(), a torch.optim.Optimizer and a scheduler; DDP averages gradients."""
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    recipe = funshampoo.Optimizer(
        network.named_parameters(), RECIPES[optimizer], lr=1.0, **options(optimizer)
    )
    scheduler = LambdaLR(recipe, lambda count: float(schedule(torch.tensor(count))))

    def step(batch: Examples) -> Tensor:
        loss = loss_of(model(batch.inputs), batch.targets)
        recipe.zero_grad()
        torch.autograd.backward(loss)
        recipe.step()
        scheduler.step()
        return loss.detach()

    def predict(inputs: Tensor) -> Tensor:
        weights = {name: p.detach() for name, p in network.named_parameters()}
        if optimizer in AVERAGING:
            weights = funshampoo.evaluation_parameters(recipe.chain_states()[0], weights)
        outputs: Tensor = functional_call(network, weights, inputs)
        return outputs

    return Loop(step, predict)


LOOPS = {"functional": functional, "wrapper": wrapper}


def options(optimizer: str) -> dict[str, Any]:
    """On several ranks Shampoo shares out its blocks; the others compute the same everywhere."""
    shares = optimizer == "shampoo" and dist.is_initialized()
    return {"distribute": funshampoo.sharded} if shares else {}


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the examples and, in a text, over its positions."""
    return cross_entropy(logits.flatten(0, -2), targets.flatten())


def average_over_ranks(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean of all ranks' gradients, through one buffer."""
    if not dist.is_initialized():
        return gradients
    flat = torch.cat([g.flatten() for g in gradients.values()])
    dist.all_reduce(flat)
    sizes = [g.numel() for g in gradients.values()]
    parts = torch.split(flat / dist.get_world_size(), sizes)
    return {name: part.view_as(g) for (name, g), part in zip(gradients.items(), parts)}


def join_ranks(device: str) -> tuple[int, int]:
    """(rank, number of ranks), after joining the others where torchrun has started them."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return dist.get_rank(), dist.get_world_size()


def leave_ranks() -> None:
    """Leave the others, when all have come so far and nothing refers to the group any more."""
    if dist.is_initialized():
        gc.collect()  # DistributedDataParallel is in a cycle, and holds on to the group
        dist.barrier()
        dist.destroy_process_group()


def share_of(batch: Examples) -> Examples:
    """This rank's examples of a batch."""
    if not dist.is_initialized():
        return batch
    rank, size = dist.get_rank(), dist.get_world_size()
    return Examples(batch.inputs[rank::size], batch.targets[rank::size])
