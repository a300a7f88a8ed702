"""The role of every parameter of real models, and what a user overrules."""

from __future__ import annotations

import copy
from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import funshampoo as fs
from funshampoo.blocks import Stacked
from funshampoo.models.roles import kinds
from tests.models.zoo import ZOO, Experts, HeadFirst, gpt2

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, of nested tensors


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_has_its_role(name: str) -> None:
    make, expected = ZOO[name]
    model = make()
    wanted = dict.fromkeys((n for n, _ in model.named_parameters()), "vector")
    for role, patterns in expected.items():
        for pattern in patterns:
            fitting = [n for n in wanted if fnmatchcase(n, pattern)]
            assert fitting, pattern
            wanted |= dict.fromkeys(fitting, role)
    assert fs.roles(model) == wanted


def test_names_say_nothing() -> None:
    """A linear layer called embedding is a matrix, and a table called head an embedding."""
    model = nn.Module()
    model.embedding = nn.Linear(4, 4)
    model.head = nn.Embedding(7, 4)
    model.in_proj_weight = nn.Parameter(torch.zeros(12, 3))
    model.bias = nn.Linear(4, 3)
    assert fs.roles(model) == {
        "in_proj_weight": "matrix",
        "embedding.weight": "matrix",
        "embedding.bias": "vector",
        "head.weight": "embedding",
        "bias.weight": "head",
        "bias.bias": "vector",
    }


def test_a_tied_weight_is_one_entry_and_a_head() -> None:
    model = HeadFirst()
    model.out.weight = model.tokens.weight
    found = fs.roles(model)
    assert found["out.weight"] == "head"
    assert list(found) == [name for name, _ in model.named_parameters()]
    encoder_and_decoder = nn.ModuleList([nn.Embedding(9, 4), nn.Embedding(9, 4)])
    encoder_and_decoder[1].weight = encoder_and_decoder[0].weight
    assert fs.roles(encoder_and_decoder) == {"0.weight": "embedding"}


def test_frozen_parameters_have_roles_too() -> None:
    model = Experts().requires_grad_(False)
    assert Counter(fs.roles(model).values()) == {"vector": 3, "experts": 2, "matrix": 1, "head": 1}


SHAPES = {
    "matrix": (4, 3),
    "row": (1, 3),
    "stack": (2, 4, 3),
    "kernel": (4, 3, 3, 3),
    "positions": (1, 5, 3),
    "token": (1, 1, 3),
    "bias": (4,),
    "scale": (),
}
BY_SHAPE = {
    "matrix": "matrix",
    "row": "vector",
    "stack": "experts",
    "kernel": "convolution",
    "positions": "embedding",
    "token": "vector",
    "bias": "vector",
    "scale": "vector",
}


def test_of_plain_tensors_the_shape_decides() -> None:
    params = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert fs.roles(params) == BY_SHAPE
    nested = {"a": [params["matrix"], params["bias"]], "b": (params["stack"],)}
    assert fs.roles(nested, {"a.1": "embedding"}) == {
        "a": ["matrix", "embedding"],
        "b": ("experts",),
    }


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ("fused", {"in_proj_weight": Stacked(parts=3), "out_proj.weight": None}),
        ("each", {"in_proj_weight": Stacked(parts=6), "out_proj.weight": None}),
        ("whole", {"in_proj_weight": None, "out_proj.weight": None}),
    ],
)
def test_heads_are_taken_apart_as_asked(heads: Any, expected: dict[str, Any]) -> None:
    found = kinds(nn.MultiheadAttention(8, 2), heads=heads)
    assert {n: k.stacked for n, k in found.items() if k.role != "vector"} == expected
    found = kinds(nn.MultiheadAttention(8, 2, kdim=4, vdim=4), heads=heads)
    apart = Stacked(parts=2) if heads == "each" else None
    assert [found[f"{x}_proj_weight"].stacked for x in "qkv"] == [apart] * 3
    found = kinds(gpt2(), heads=heads)
    parts = {"fused": 3, "each": 6, "whole": None}[heads]
    wanted = parts and Stacked(axis=1, parts=parts)
    assert found["transformer.h.1.attn.c_attn.weight"].stacked == wanted
    assert found["transformer.h.1.attn.c_attn.weight"].transposed


def test_a_pattern_overrules_and_the_last_one_wins() -> None:
    model = ZOO["text"][0]()
    own = {
        "blocks.*.attention.*.weight": {"role": "heads", "parts": 2},
        "blocks.1.*": "vector",
        "blocks.1.attention.out.weight": {"role": "heads", "parts": 2, "axis": 1, "lr": 3},
    }
    found = kinds(model, own)
    assert found["blocks.0.attention.query.weight"] == ("heads", Stacked(parts=2), False)
    assert found["blocks.1.attention.query.weight"] == ("vector", None, False)
    assert found["blocks.1.attention.out.weight"].stacked == Stacked(axis=1, parts=2)
    assert kinds(Experts(), {"up": {"axis": 2}})["up"].stacked == Stacked(axis=2)
    assert kinds(Experts(), {"up": "convolution"})["up"] == ("convolution", None, False)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"rooter.weight": "vector"}, ValueError, "nearest name is 'router.weight'"),
        ({"router.*": "matrx"}, ValueError, "the role of 'router.weight' is 'matrx'"),
        ({"up_bias": 3}, TypeError, "give a role, or a dict"),
        ({"out.bias": "matrix"}, ValueError, "'out.bias' of shape .2,. is no matrix"),
        ({"router.weight": "heads"}, ValueError, "say how many matrices it is"),
        ({"router.weight": "experts"}, ValueError, "'router.weight' can't have the role 'experts'"),
        ({"router.weight": {"role": "heads", "parts": 4}}, ValueError, "does not divide side 0"),
        ({"router.weight": {"parts": 3}}, ValueError, "give it the role 'heads'"),
        ("router", TypeError, "give .pattern: role"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    overrides: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fs.roles(Experts(), overrides)


def test_what_has_no_shape_or_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0.weight' has no shape yet"):
        fs.roles(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(TypeError, match="takes a module, or a tree of tensors"):
        fs.roles(nn.Linear(2, 2).named_parameters())
    with pytest.raises(ValueError, match="heads is 'all'"):
        fs.roles(nn.Linear(2, 2), heads="all")  # type: ignore[arg-type]


def test_fans_are_those_of_the_matrix_that_is_multiplied_by() -> None:
    """As torch.nn.init counts them, where it can."""
    fans = nn.init._calculate_fan_in_and_fan_out  # (in, out)
    for module in (nn.Linear(5, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, (3, 1), groups=2)):
        own = kinds(module, {"weight": "matrix"} if isinstance(module, nn.Linear) else None)
        outputs, inputs = own["weight"].fans(module.weight.shape)
        assert inputs == fans(module.weight)[0]
        assert outputs == module.weight.shape[0]
    back = nn.ConvTranspose2d(4, 6, 3)
    assert kinds(back)["weight"].fans(back.weight.shape) == (6 * 9, 4)
    model = gpt2()
    found, shapes = kinds(model), {n: p.shape for n, p in model.named_parameters()}
    by_fans = {n.rpartition("h.0.")[2]: found[n].fans(shapes[n]) for n in shapes if "h.0." in n}
    assert by_fans["mlp.c_fc.weight"] == (32, 8)
    assert by_fans["attn.c_attn.weight"] == (8, 8)
    assert by_fans["ln_1.weight"] == (8, 1)
    assert found["transformer.wpe.weight"].fans((16, 8)) == (8, 1)


class Adapted(nn.Module):
    """A frozen table with a change of low rank, in the parameters that peft's LoRA has."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.base_layer = nn.Embedding(tokens, width).requires_grad_(False)
        self.a = nn.ParameterDict({"default": nn.Parameter(torch.zeros(2, tokens))})
        self.b = nn.ParameterDict({"default": nn.Parameter(torch.zeros(width, 2))})


def test_a_factor_of_a_table_with_a_column_for_every_token_is_read_as_the_table_is() -> None:
    """As a matrix, it had a factor matrix with a side for every token."""
    found = kinds(nn.Sequential(Adapted(20, 8), nn.Linear(8, 8)))
    assert found["0.a.default"].role == "embedding"
    assert found["0.a.default"].fans((2, 20)) == (2, 1)
    assert found["0.b.default"].role == "matrix"


class BesideATable(nn.Module):
    """Two matrices with as many columns, or rows, as the table beside them has rows."""

    def __init__(self, trained: bool, inner: int) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32).requires_grad_(trained)
        self.up = nn.Parameter(torch.zeros(64, inner))
        self.down = nn.Parameter(torch.zeros(inner, 64))


@pytest.mark.parametrize(("trained", "inner"), [(True, 16), (False, 48)])
def test_a_matrix_with_a_side_of_a_table_s_length_is_a_factor_only_if_it_can_be(
    trained: bool, inner: int
) -> None:
    """A change of low rank is of a table that does not change itself, and is smaller than it."""
    found = fs.roles(nn.Sequential(BesideATable(trained, inner), nn.Linear(4, 4)))
    assert found["0.up"] == found["0.down"] == "matrix"


def test_roles_are_labels_for_partition() -> None:
    model = Experts()
    params = {name: p.detach() for name, p in model.named_parameters()}
    recipes = {
        **dict.fromkeys(fs.models.ROLES, fs.adamw(0.01)),
        "matrix": fs.soap(0.01),
        "experts": fs.shampoo(0.01, merge=Stacked()),
    }
    tx = fs.partition(recipes, fs.roles(model))
    x, y = torch.randn(16, 6), torch.randn(16, 2)

    def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return (torch.func.functional_call(model, params, (x,)) - y).square().mean()

    state, first = tx.init(params), loss(params)
    for _ in range(20):
        updates, state = tx.update(torch.func.grad(loss)(params), state, params)
        params = fs.apply_updates(params, updates)
    assert loss(params) < first
    blocks = {n.split("/")[1] for n in fs.state.state_dict(state) if n.startswith("up/")}
    assert blocks == {"block_0_0_0", "block_1_0_0", "block_2_0_0"}


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm as a hook": nn.utils.weight_norm,
    "spectral_norm as a hook": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("way", PARAMETRIZED)
@pytest.mark.parametrize(
    ("layer", "role"),
    [
        (nn.Conv1d(4, 6, 3), "convolution"),
        (nn.ConvTranspose2d(4, 6, 3), "convolution"),
        (nn.Embedding(9, 4), "embedding"),
        (nn.Linear(4, 6), "matrix"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_a_weight_is_made_of_is_what_the_weight_would_be(
    way: str, layer: nn.Module, role: str
) -> None:
    made = PARAMETRIZED[way](copy.deepcopy(layer))
    for model in (nn.Sequential(made, nn.Linear(4, 3)), nn.ModuleDict({"a": made})):
        vectors = {n for n, p in model.named_parameters() if sum(d > 1 for d in p.shape) < 2}
        found = fs.roles(model)
        whole = [n for n in found if n not in vectors and not n.startswith("1.")]
        ends = role == "matrix" and isinstance(model, nn.ModuleDict)
        assert [found[n] for n in whole] == ["head" if ends else role]
        assert all(found[n] == "vector" for n in vectors)


def test_to_ask_for_roles_runs_nothing() -> None:
    """spectral_norm makes a step of power iteration whenever its weight is asked for."""
    model = nn.Sequential(nn.Linear(4, 6), parametrizations.spectral_norm(nn.Linear(6, 3)))
    before = copy.deepcopy(model.state_dict())
    assert fs.roles(model)["1.parametrizations.weight.original"] == "head"
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
