"""Rates over width: the factors, and the spectral norms of updates that they are made for."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funshampoo as fs
from benchmarks import transfer
from examples.networks import Transformer
from funshampoo.blocks import Stacked
from funshampoo.models.kinds import Kind
from funshampoo.models.transfer import RULES
from funshampoo.optim.vocabulary import Vocabulary
from funshampoo.recipes import RECIPES
from tests.models.zoo import gpt2, mixtral

D = torch.float64
SHAPES = [(48, 48), (192, 48), (48, 192), (192, 192)]


def gradient(outputs: int, inputs: int, t: int) -> Tensor:
    """Of a layer whose inputs are about one and whose outputs count equally, as the rules assume.

    A sum of a few products δ hᵀ: two of directions that all steps share, and four of this step.
    """
    common, own = (torch.Generator().manual_seed(seed) for seed in (0, 1000 + t))
    sizes = 1 + torch.randn(2, generator=own, dtype=D)  # first, to be the same for all shapes
    sums = torch.zeros(outputs, inputs, dtype=D)
    for generator, weights in ((common, sizes), (own, torch.full((4,), 0.5, dtype=D))):
        h = torch.randn(len(weights), inputs, generator=generator, dtype=D)
        delta = torch.randn(len(weights), outputs, generator=generator, dtype=D) / outputs
        sums += (delta.T * weights) @ h
    return sums


def size_of_update(tx: fs.GradientTransformation, shape: tuple[int, int], steps: int = 24) -> float:
    """‖U‖ / √(outputs / inputs): of what a layer makes of inputs of RMS 1, the largest RMS.

    The mean of a dozen: single ones depend on bases of null spaces, which rounding chooses.
    """
    params = {"w": torch.zeros(shape, dtype=D)}
    state, found = tx.init(params), []
    for t in range(steps):
        updates, state = tx.update({"w": gradient(*shape, t)}, state, params)
        if t >= steps // 2:
            found.append(torch.linalg.matrix_norm(updates["w"], 2).item())
    return sum(found) / len(found) / math.sqrt(shape[0] / shape[1])


NONE: dict[str, Any] = {"grafting": None, "every": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "lion": ("lion", {}),
    "sgd": ("sgd", {}),
    "sgd, momentum": ("sgd", {"momentum": 0.9}),
    "muon": ("muon", {}),
    "muon, scale adam": ("muon", {"scale": "adam"}),
    "muon, no scale": ("muon", {"scale": None}),
    "normuon": ("normuon", {}),
    "spectral_descent": ("spectral_descent", {}),
    "soap": ("soap", {"every": 2}),
    "soap in blocks": ("soap", {"every": 2, "max_size": 32}),
    "shampoo like adam": ("shampoo", {"every": 4}),
    "shampoo like adam, in blocks": ("shampoo", {"every": 4, "max_size": 32}),
    "shampoo like rms": ("shampoo", {"every": 4, "grafting": "rms"}),
    "shampoo like adagrad": ("shampoo", {"every": 4, "grafting": "adagrad"}),
    "shampoo like sgd": ("shampoo", {"every": 4, "grafting": "sgd"}),
    "shampoo 1/4": ("shampoo", NONE),
    "shampoo 1/3": ("shampoo", {**NONE, "exponents": {2: 1 / 3}}),
    "shampoo 1/2": ("shampoo", {**NONE, "exponents": {2: 1 / 2}}),
    "shampoo 1/4 in blocks": ("shampoo", {**NONE, "max_size": 32}),
    "shampoo 1/2 in blocks": ("shampoo", {**NONE, "max_size": 32, "exponents": {2: 1 / 2}}),
    "shampoo, one side": ("shampoo", {**NONE, "exponents": {2: {0: 0.5, 1: 0.0}}}),
}


def chain_of(method: str, options: dict[str, Any]) -> fs.GradientTransformation:
    decays = "weight_decay" in Vocabulary(RECIPES[method]).defaults({})
    return RECIPES[method](1.0, **({"weight_decay": 0.0} if decays else {}), **options)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_update_is_as_long_at_every_width(case: str) -> None:
    """Both sides by themselves, and together: the rule's rate times the update stays."""
    method, options = CASES[case]
    arguments = {**Vocabulary(RECIPES[method]).defaults({}), **options}
    sizes = [size_of_update(chain_of(method, options), shape) for shape in SHAPES]
    rates = [RULES[method](Kind("matrix"), shape, arguments) for shape in SHAPES]
    products = [size * rate for size, rate in zip(sizes, rates)]
    assert max(products) < 1.6 * min(products), products
    if case not in ("shampoo 1/2", "shampoo, one side", "normuon"):  # and as it is it would not
        assert max(sizes) > 1.6 * min(sizes), sizes


def network(width: int) -> nn.Module:
    with torch.device("meta"):
        return Transformer(20, 16, width, layers=2, heads=2)


# {method: (factors of hidden matrices, of (4n, n), of (n, 4n))} from width 16 to 64
WIDER: dict[str, tuple[dict[str, Any], tuple[float, float, float]]] = {
    "adamw": ({}, (1 / 4, 1 / 4, 1 / 4)),
    "soap": ({}, (1 / 2, 1 / 2, 1 / 2)),
    "shampoo": ({}, (1 / 4, 1 / 4, 1 / 4)),
    "muon": ({}, (1, 1, 1)),
    "lion": ({}, (1 / 4, 1 / 4, 1 / 4)),
    "sgd": ({}, (1, 1, 1)),
}
MORE: list[tuple[str, dict[str, Any], tuple[float, float, float]]] = [
    ("shampoo", {"grafting": "sgd"}, (1, 1, 1)),
    ("shampoo", {**NONE, "exponents": None}, (1, 1, 1)),
    ("shampoo", {**NONE, "exponents": None, "max_size": 16}, (1 / 4, 1 / 4, 1 / 4)),  # 16 × blocks
    ("muon", {"scale": "adam"}, (1 / 2, 1 / 2, 1 / 2)),
]


@pytest.mark.parametrize(
    ("method", "options", "factors"), [*((m, o, f) for m, (o, f) in WIDER.items()), *MORE]
)
def test_the_groups_of_a_wider_model_have_their_rates(
    method: str, options: dict[str, Any], factors: tuple[float, float, float]
) -> None:
    optimizer = fs.for_model(
        network(64), method, lr=0.1, other_lr=0.01, scale_rates="mup", base=network(16), **options
    )
    rates = {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]}
    hidden = ["attention.value", "perceptron.0", "perceptron.2"]
    for name, factor in zip(hidden, factors):
        assert rates[f"blocks.1.{name}.weight"] == pytest.approx(0.1 * factor), name
    assert rates["readout.weight"] == pytest.approx(0.01 / 4)
    unscaled = ("embedding.weight", "position", "norm.weight", "blocks.0.perceptron.0.bias")
    assert {rates[name] for name in unscaled} == {0.01}
    stated = {n: g["rate_factor"] for g in optimizer.param_groups for n in g["param_names"]}
    assert stated["readout.weight"] == 1 / 4


@pytest.mark.parametrize("method", WIDER)
def test_the_base_itself_keeps_its_rates(method: str) -> None:
    same = {"scale_rates": "mup", "base": {n: p.shape for n, p in network(16).named_parameters()}}
    optimizer = fs.for_model(network(16), method, lr=0.1, other_lr=0.01, **same)
    assert all(g["rate_factor"] == 1 for g in optimizer.param_groups)


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_fans_are_of_each_matrix_of_a_stack() -> None:
    """GPT-2's fused, transposed projection; experts; and a side that does not grow."""
    wide = fs.for_model(
        gpt2(n_embd=32), "muon", lr=1.0, scale_rates="mup", base=gpt2(), weight_decay=0.0
    )
    assert {g["rate_factor"] for g in wide.param_groups if g["role"] == "heads"} == {1.0}
    (head,) = [g for g in wide.param_groups if g["role"] == "head"]
    assert head["rate_factor"] == 1 / 4
    narrow, options = mixtral(), {"scale_rates": "mup"}
    wide = fs.for_model(
        mixtral(intermediate_size=48),
        "adamw",
        lr=1.0,
        base=narrow,
        **options,  # type: ignore[arg-type]
    )
    factors = {n: g["rate_factor"] for g in wide.param_groups for n in g["param_names"]}
    experts = "model.layers.0.mlp.experts"
    assert factors[f"{experts}.down_proj"] == 1 / 4  # its inputs
    assert factors[f"{experts}.gate_up_proj"] == 1


def test_the_rule_sees_how_a_stack_is_cut() -> None:
    rule = functools.partial(RULES["shampoo"], Kind("heads", Stacked(parts=3)))
    arguments = {**Vocabulary(fs.shampoo).defaults({}), "grafting": None}
    whole = rule((48, 16), {**arguments, "merge": Stacked(parts=3)})
    cut = rule((48, 16), {**arguments, "merge": Stacked(parts=3), "max_size": 8})
    assert (whole, cut) == (1, 1 / 2)  # a square; of four blocks


def mine(learning_rate: float = 0.1) -> fs.GradientTransformation:
    return fs.scale(-learning_rate)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"base": Transformer(20, 16, 16, layers=1)}, ValueError, "base has no 'blocks.1."),
        (
            {"base": {n: (3,) for n, _ in network(16).named_parameters()}},
            ValueError,
            "and .3,. in base",
        ),
        ({"method": "sign_descent"}, ValueError, "gets sign_descent, for which no rule is known"),
        ({"method": mine}, ValueError, "gets mine, for which no rule is known"),
        ({"grafting": fs.scale_by_sgd()}, ValueError, "grafting onto a transformation of yours"),
        ({"lr": torch.tensor(0.1)}, TypeError, "lr has to be a number, no tensor"),
        ({"others": "muon"}, ValueError, "no rule for the role embedding"),
    ],
)
def test_what_has_no_rule_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {"method": "shampoo", "lr": 0.1, "scale_rates": "mup"}
    with pytest.raises(error, match=message):
        fs.for_model(network(64), **(given | {"base": network(16)} | arguments))


def test_the_benchmark_trains_and_compares() -> None:
    data = transfer.text(torch.device("cpu"))
    runs = [
        transfer.train("muon", width, scaled, rate, 2, data)
        for width, scaled in ((32, False), (64, False), (64, True))
        for rate in (0.02, 0.04)
    ]
    lines = transfer.table(runs).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| muon", "32", "tuned"],
        ["| muon", "64", "as they are"],
        ["| muon", "64", "mup"],
    ]
    assert all(math.isfinite(run.loss) for run in runs)
