"""The optimizers that are timed, with equal settings where they have the option.

Ours and torch's are always there; others are built if their package can be imported, and leave a
sentence in the table if it cannot, or if it does not run here. Equal settings: float32, a filter of
0.9, statistics and Adam grafting of 0.99, grafting's epsilon 1e-8, no decay, no momentum, and the
same block size; SOAP and Muon graft nothing. Where a method has an option that its makers call the
default and we turn off, the name in the table says so; but our Shampoo preconditions vectors, as
the reference does, where its name does not say "diagonal", its default.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import funshampoo
from benchmarks.timing import Contender
from funshampoo.recipes import RECIPES

LR = 1e-4
BETAS = (0.9, 0.99)
EVERY = 4  # steps between refreshes while timing; averages at other intervals are computed

Params = Mapping[str, nn.Parameter]


class Method(NamedTuple):
    """How to build one.

    Attributes:
        name: for the table; {share} is replaced by the share of the parameters that it can take.
        build: makes an object with `step()` from {name: parameter} and a block size. An ImportError
            means that its package is missing.
        refreshes: whether the step with this number, from 1, recomputes roots or bases; None for a
            method without.
        ready: first step that is worth timing.
        blocks: whether it has a block size.
        matrices_only: takes 2-dimensional parameters alone.
        most: number of parameters from which on its steps take too long to wait for.
        compiles: its first step takes too long for a quick run.
    """

    name: str
    build: Callable[[Params, int], Any]
    refreshes: Callable[[int], bool] | None = None
    ready: int = 1
    blocks: bool = True
    matrices_only: bool = False
    most: float = math.inf
    compiles: bool = False

    def taken(self, params: Params) -> dict[str, nn.Parameter]:
        """The parameters that it can take."""
        return {n: p for n, p in params.items() if p.ndim == 2 or not self.matrices_only}

    def contender(self, params: Params, size: int, gradients: list[list[Tensor]]) -> Contender:
        """Ready to be timed: its k-th step reads the k-th set of gradients, over and over.

        All methods of a work share its parameters: a step's time does not depend on their values,
        and the rate is small enough to keep them finite.
        """
        taken = self.taken(params)
        places = [i for i, name in enumerate(params) if name in taken]
        optimizer = self.build(taken, size)
        sets = _endless([[g[i] for i in places] for g in gradients])

        def prepare() -> None:
            for p, g in zip(taken.values(), next(sets)):
                p.grad = g  # some set it to None, so every time

        def kind(t: int) -> str | None:
            if t < self.ready:
                return None
            return "refresh" if self.refreshes and self.refreshes(t) else "plain"

        kinds = ("plain", "refresh") if self.refreshes else ("plain",)
        return Contender(self.label(params), optimizer.step, prepare, kind, kinds)

    def label(self, params: Params) -> str:
        """The name, with the share of the parameters filled in."""
        return self.name.format(share=f"{self.share(params):.0%}")

    def share(self, params: Params) -> float:
        """Of all numbers, those in parameters that it can take."""
        taken, whole = (sum(p.numel() for p in x.values()) for x in (self.taken(params), params))
        return taken / whole


class Functional:
    """The chain in a pure functional loop, as a `step()`: update, then apply."""

    def __init__(self, params: Params, size: int) -> None:
        options = {"every": EVERY, "max_size": size, "vectors": "blocks"}
        self.tx = funshampoo.shampoo(LR, beta1=BETAS[0], beta2=BETAS[1], **options)
        self.leaves = params
        self.params = {name: p.detach().clone() for name, p in params.items()}
        self.state = self.tx.init(self.params)

    def step(self) -> None:
        """The gradients are handed over in .grad, as to the others."""
        grads = {name: p.grad for name, p in self.leaves.items()}
        updates, self.state = self.tx.update(grads, self.state, self.params)
        self.params = funshampoo.apply_updates(self.params, updates)


def _wrapper(params: Params, size: int, **options: Any) -> Any:
    own = {"every": EVERY, "max_size": size, "vectors": "blocks"} | options
    return funshampoo.Shampoo(params.items(), LR, BETAS, **own)


_diagonal = functools.partial(_wrapper, vectors="diagonal")
_low_precision = functools.partial(_wrapper, product_dtype=torch.bfloat16)
_compiled = functools.partial(_wrapper, compile=True)
_packed = functools.partial(_wrapper, packed=True)


def _adamw_foreach(params: Params, size: int) -> Any:
    return torch.optim.AdamW(params.values(), LR, foreach=True)


def _adamw_fused(params: Params, size: int) -> Any:
    return torch.optim.AdamW(params.values(), LR, fused=True)


def _muon(params: Params, size: int) -> Any:
    return torch.optim.Muon(params.values(), LR, weight_decay=0.0)


def recipe(name: str, **options: Any) -> Method:
    """One of ours by its name, without decay, and otherwise with its own defaults.

    It is refreshed when its chain says so, and cut into blocks if it can be. Muon and its kin get
    the matrices alone: the rest would be AdamW's.
    """
    make = RECIPES[name]
    takes = inspect.signature(make).parameters
    own = {k: x for k, x in {"weight_decay": 0.0, "every": EVERY}.items() if k in takes} | options
    blocks = "max_size" in takes

    def build(params: Params, size: int) -> Any:
        sized = {**own, "max_size": size} if blocks else own
        return funshampoo.Optimizer(params.items(), make, lr=LR, **sized)

    def refreshes(t: int) -> bool:
        return any(part.startswith("refresh") for part in phase(t))

    phase = make(LR, **own).phase
    what = ", ".join(str(x).removeprefix("torch.") for x in options.values())
    matrices = "matrices" in takes
    return Method(
        f"funshampoo.{name}" + (f", {what}" if what else "") + " (matrices: {share})" * matrices,
        build,
        refreshes if "every" in takes else None,
        blocks=blocks,
        matrices_only=matrices,
        most=1e8,
    )


def _reference(packed: bool) -> Callable[[Params, int], Any]:
    def build(params: Params, size: int) -> Any:
        package = importlib.import_module("distributed_shampoo")
        types = importlib.import_module("distributed_shampoo.shampoo_types")
        return package.DistributedShampoo(
            list(params.values()),
            lr=LR,
            betas=BETAS,
            epsilon=1e-8,
            max_preconditioner_dim=size,
            precondition_frequency=EVERY,
            start_preconditioning_step=EVERY,
            grafting_config=types.AdamPreconditionerConfig(beta2=BETAS[1], epsilon=1e-8),
            distributed_config=types.SingleDeviceDistributedConfig(
                target_parameter_dimensionality=2
            ),
            preconditioner_config=types.RootInvShampooPreconditionerConfig(
                use_symmetric_packing=packed
            ),
        )

    return build


def _dash(params: Params, size: int) -> Any:
    package = importlib.import_module("pytorch_optimizer")
    on_gpu = next(iter(params.values())).is_cuda
    return package.DASH(
        list(params.values()),
        lr=LR,
        betas=BETAS,
        block_size=size,
        precondition_frequency=EVERY,
        inverse_root_method="newton_db" if on_gpu else "eigh",
    )


def _soap(params: Params, size: int) -> Any:
    package = importlib.import_module("pytorch_optimizer")
    return package.SOAP(
        list(params.values()),
        lr=LR,
        betas=BETAS,
        weight_decay=0.0,
        precondition_frequency=EVERY,
        max_precondition_dim=1024,
    )


def _heavyball(params: Params, size: int) -> Any:
    package = importlib.import_module("heavyball")
    package.utils.compile_mode = None
    return package.SOAP(
        list(params.values()),
        lr=LR,
        betas=BETAS,
        weight_decay=0.0,
        precondition_frequency=EVERY,
        max_precond_dim=1024,
    )


def _first_and_multiples(t: int) -> bool:
    return t == 1 or t % EVERY == 0


def _multiples(t: int) -> bool:
    return t % EVERY == 0


def _after_multiples(t: int) -> bool:
    return t % EVERY == 1


BASELINE = "AdamW, foreach"
OURS = "funshampoo.Shampoo"
DIAGONAL = f'{OURS}, vectors="diagonal"'
LOW_PRECISION = f"{OURS}, bfloat16 products"
COMPILED = f"{OURS}, compiled"
METHODS = (
    Method(BASELINE, _adamw_foreach, blocks=False),
    Method("AdamW, fused", _adamw_fused, blocks=False),
    Method(OURS, _wrapper, _first_and_multiples),
    Method(DIAGONAL, _diagonal, _first_and_multiples, most=1e8),
    Method(LOW_PRECISION, _low_precision, _first_and_multiples, most=1e8),
    Method(COMPILED, _compiled, _first_and_multiples, most=1e7, compiles=True),
    Method(f"{OURS}, packed", _packed, _first_and_multiples, most=1e7),
    Method("funshampoo, functional (pure)", Functional, _first_and_multiples, most=1e7),
    # The reference applies roots only from its first refresh on, on step EVERY at the earliest.
    Method("reference, unpacked", _reference(packed=False), _multiples, ready=EVERY + 1),
    Method("reference, packed", _reference(packed=True), _multiples, ready=EVERY + 1),
    Method("DASH (pytorch_optimizer)", _dash, _first_and_multiples, most=1e8),
)

FAMILY = (
    Method(BASELINE, _adamw_foreach, blocks=False),
    recipe("shampoo"),
    recipe("soap"),
    Method("SOAP (pytorch_optimizer)", _soap, _after_multiples, blocks=False, most=1e7),
    Method("SOAP (HeavyBall, not compiled)", _heavyball, _multiples, blocks=False, most=1e8),
    recipe("kl_shampoo"),
    recipe("kl_soap"),
    recipe("eigenvalue_shampoo"),
    Method("Muon (torch; matrices: {share})", _muon, blocks=False, matrices_only=True, most=1e8),
    recipe("muon", dtype=torch.bfloat16),
    recipe("muon"),
    recipe("normuon"),
    recipe("spectral_descent"),
    recipe("soap_muon"),
    recipe("splus"),
    recipe("lion"),
)
"""Muon orthogonalizes on every step, torch's in bfloat16. The other SOAPs do not cut into blocks:
sides above 1,024 are left, and in pytorch_optimizer's a kernel is a tensor of four sides (its
merge_dims fails on vectors), so on the convolutional net it does another, smaller thing."""


def _endless(sets: list[list[Tensor]]) -> Any:
    while True:
        yield from sets
