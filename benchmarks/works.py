"""What the optimizers are given to do: parameters of five models, and gradients for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.networks import Transformer
from funshampoo.plan.shapes import model_shapes

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Work:
    """Parameters and gradients.

    Attributes:
        name: for the table.
        network: builds the network, where there is one. Its gradients are those of random data.
        batch: random data for it, of about this many examples.
        shapes: {name: shape} of the parameters where there is no network. Gradients are random.
        heavy: steps can take seconds, so few are timed.
    """

    name: str
    network: Callable[[], nn.Module] | None = None
    batch: Callable[[int], Batch] | None = None
    shapes: dict[str, tuple[int, ...]] | None = None
    heavy: bool = False

    def parameters(self, device: torch.device) -> dict[str, nn.Parameter]:
        """Fresh ones, alike every time."""
        torch.manual_seed(0)
        if self.network is not None:
            return dict(self.network().to(device).named_parameters())
        assert self.shapes is not None
        return {
            name: nn.Parameter(0.02 * torch.randn(shape, device=device))
            for name, shape in self.shapes.items()
        }

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the parameters."""
        if self.shapes is not None:
            return self.shapes
        return {name: tuple(p.shape) for name, p in self.parameters(CPU).items()}

    def gradients(self, device: torch.device, count: int) -> list[list[Tensor]]:
        """Several sets, so that factors are not of rank one. Optimizers step through them."""
        if self.network is None:
            assert self.shapes is not None
            make = torch.Generator(device).manual_seed(1)
            return [
                [torch.randn(s, generator=make, device=device) for s in self.shapes.values()]
                for _ in range(count)
            ]
        assert self.batch is not None
        torch.manual_seed(0)
        network = self.network().to(device)
        sets = []
        for _ in range(count):
            loss = loss_of(network, tuple(x.to(device) for x in self.batch(32)))
            sets.append(list(torch.autograd.grad(loss, list(network.parameters()))))
        return sets


CPU = torch.device("cpu")


def loss_of(network: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy, over the last axis of what the network returns."""
    inputs, targets = batch
    return functional.cross_entropy(network(inputs).flatten(0, -2), targets.flatten())


def perceptron() -> nn.Module:
    """784-512-512-10: 669,706 parameters."""
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def transformer() -> nn.Module:
    """The examples' transformer at width 256 with 4 layers: 3,235,840 parameters."""
    return Transformer(vocabulary=96, context=128, width=256, layers=4, heads=4)


def convnet() -> nn.Module:
    """Four 3×3 convolutions and a linear layer on 32×32 images: 261,322 parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if len(layers) < 9 else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))


def vectors(examples: int) -> Batch:
    return torch.randn(examples, 784), torch.randint(10, (examples,))


def texts(examples: int) -> Batch:
    return torch.randint(96, (examples, 128)), torch.randint(96, (examples, 128))


def images(examples: int) -> Batch:
    return torch.randn(examples, 3, 32, 32), torch.randint(10, (examples,))


MLP = Work("MLP 784-512-512-10", perceptron, vectors)
TRANSFORMER = Work("transformer, width 256, 4 layers", transformer, texts)
CONVNET = Work("convolutional net", convnet, images)
RESNET = Work("ResNet-50 shapes", shapes=model_shapes("resnet-50"), heavy=True)
GPT2 = Work("GPT-2 124M shapes", shapes=model_shapes("gpt2"), heavy=True)
SMALL = Work("100 blocks of 40×40", shapes={f"w{i}": (40, 40) for i in range(100)})

WORKS = (MLP, TRANSFORMER, CONVNET, RESNET, GPT2, SMALL)
