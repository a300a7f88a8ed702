"""The front door: groups by role, state by name, the table, and what is warned of or refused."""

from __future__ import annotations

import functools
import inspect
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import funshampoo as fs
from funshampoo.blocks import Stacked
from funshampoo.models import METHOD_ROLES
from funshampoo.models.groups import for_new_runs
from funshampoo.recipes import ELEMENTWISE, LOOK_AHEAD, OF_ADAMS_LENGTH, RECIPES
from tests.models.zoo import ZOO, Experts, ResNet, gpt2, llama, mixtral

D = torch.float64


def one_step(model: nn.Module, optimizer: Any, loss: Callable[[], Tensor]) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss())
    optimizer.step()


def tokens(model: nn.Module) -> Callable[[], Tensor]:
    codes = torch.randint(20, (4, 17), generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        out = model(codes[:, :-1])
        logits = out if isinstance(out, Tensor) else out.logits
        return cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten())

    return loss


def pictures(model: nn.Module) -> Callable[[], Tensor]:
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return lambda: cross_entropy(model(x), torch.tensor([0, 1, 2, 0]))


def points(model: nn.Module) -> Callable[[], Tensor]:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    return lambda: cross_entropy(model(x), torch.arange(8) % 2)


def test_the_registry_says_of_every_recipe_whether_it_knows_matrices() -> None:
    """Who adds a recipe gives it `merge`, so that experts are matrices to it, or lists it."""
    for name, recipe in RECIPES.items():
        assert ("merge" in inspect.signature(recipe).parameters) is (name not in ELEMENTWISE), name


@pytest.mark.parametrize("method", RECIPES)
def test_every_recipe_trains_a_model_with_experts(method: str) -> None:
    torch.manual_seed(0)
    model = Experts()
    optimizer = fs.for_model(model, method, lr=0.01)
    loss = points(model)
    before = loss().item()
    for _ in range(20):
        one_step(model, optimizer, loss)
    assert loss().item() < before
    groups = {g["role"]: g for g in optimizer.param_groups}
    assert list(groups) == ["matrix", "head", "experts", "vector"]
    assert groups["matrix"]["method"] is groups["experts"]["method"] is RECIPES[method]
    assert groups["head"]["method"] is groups["vector"]["method"] is fs.adamw
    assert groups["experts"].get("merge") == (None if method in ELEMENTWISE else Stacked())


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "text": (ZOO["text"][0], tokens),
    "resnet": (ResNet, pictures),
    "gpt2": (gpt2, tokens),
    "llama": (llama, tokens),
    "mixtral": (mixtral, tokens),
}


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("method", ["shampoo", "soap", "muon"])
@pytest.mark.parametrize("name", MODELS)
def test_real_models_train(name: str, method: str) -> None:
    torch.manual_seed(0)
    make, task = MODELS[name]
    model = make().eval()  # no dropout
    optimizer = fs.for_model(model, method, lr=0.01, other_lr=0.01)
    loss = task(model)
    before = loss().item()
    for _ in range(8):
        one_step(model, optimizer, loss)
    assert loss().item() < before
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len(list(model.parameters()))  # each once, tied ones too


@pytest.mark.parametrize("method", ["shampoo", "soap", "muon"])
def test_what_is_taken_apart_steps_as_separate_matrices(method: str) -> None:
    """Query, key and value of nn.MultiheadAttention, against an optimizer of three matrices."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, bias=False, dtype=D)
    parts = [nn.Parameter(w.clone()) for w in attention.in_proj_weight.detach().split(8)]
    optimizer = fs.for_model(attention, method, lr=0.1)
    separate = fs.Optimizer(parts, RECIPES[method], lr=0.1, **for_new_runs(RECIPES[method]))
    for t in range(5):
        g = torch.randn(24, 8, generator=torch.Generator().manual_seed(t), dtype=D)
        attention.in_proj_weight.grad = g
        for p, own in zip(parts, g.split(8)):
            p.grad = own
        optimizer.step()
        separate.step()
    for own, p in zip(attention.in_proj_weight.detach().split(8), parts):
        assert torch.allclose(own, p.detach(), rtol=0, atol=1e-11)


def test_shampoo_begins_with_the_better_exponent() -> None:
    """Whoever the method is given to, unless somebody says otherwise; the recipe keeps its own."""

    def exponents(**options: Any) -> list[Any]:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
        groups = fs.for_model(model, **{"lr": 0.1} | options).param_groups
        return [group["exponents"] for group in groups if group["method"] is fs.shampoo]

    assert exponents() == exponents(method=fs.shampoo, every=2) == [1 / 3]
    assert exponents(exponents=None) == [None]
    assert exponents(method="soap", others="shampoo", other_lr=0.1)[0] == 1 / 3
    assert exponents(method="soap", overrides={"0.weight": {"method": "shampoo", "lr": 0.1}}) == [
        1 / 3
    ]
    assert fs.Shampoo([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]["exponents"] is None


def test_shampoo_looks_ahead() -> None:
    """By beta1², whatever the beta1 of the group becomes, unless beta3 is given."""

    def looks_ahead(**options: Any) -> list[Any]:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
        optimizer = fs.for_model(model, **{"lr": 0.1} | options)
        optimizer.add_param_group({"params": [("new", nn.Parameter(torch.zeros(2, 2)))]})
        groups = optimizer.param_groups
        return [g["beta3"] for g in groups if g.get("method", fs.shampoo) is fs.shampoo]

    other = {"0.weight": {"betas": (0.6, 0.9)}}
    assert looks_ahead() == looks_ahead(betas=(0.8, 0.9)) == ["nesterov"] * 2
    assert looks_ahead(overrides=other) == ["nesterov"] * 3
    assert looks_ahead(beta3=None) == [None] * 2
    assert looks_ahead(beta3=None, overrides=other) == [None] * 3
    assert fs.Shampoo([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]["beta3"] is None
    with pytest.raises(ValueError, match="betas is 0.9"):
        looks_ahead(betas=0.9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        *[({"method": name}, 0.02) for name in sorted(OF_ADAMS_LENGTH)],
        *[({"method": name}, 1e-3) for name in sorted(RECIPES.keys() - OF_ADAMS_LENGTH)],
        ({"method": functools.partial(fs.soap, every=5)}, 0.02),
        ({"method": functools.partial(fs.shampoo, grafting="sgd")}, 1e-3),
        ({"method": "shampoo", "grafting": None}, 1e-3),
        ({"method": "shampoo", "grafting": "rms"}, 0.02),
        ({"method": "soap", "others": "lion"}, 1e-4),
        ({"method": "soap", "others": "soap"}, 0.02),
        ({"method": "soap", "others": functools.partial(fs.adamw, beta1=0.8)}, 0.02),
        ({"method": "soap", "other_lr": 0.1}, 0.1),
        ({"method": "soap", "other_options": {"lr": 0.1}}, 0.1),
    ],
)
def test_the_rest_has_the_rate_if_steps_are_as_long(options: Any, expected: float) -> None:
    """AdamW's 1e-3 beside a larger rate undid most of what a method gained."""
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6))
    groups = fs.for_model(model, **{"lr": 0.02, **options}).param_groups
    rates = {group["role"]: group["lr"] for group in groups}
    assert rates.keys() == {"matrix", "embedding", "head", "vector"}
    assert rates.pop("matrix") == 0.02
    assert set(rates.values()) == {expected}


def test_the_rest_is_torchs_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6)).double()
    twin = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6)).double()
    twin.load_state_dict(model.state_dict())
    optimizer = fs.for_model(
        model, "soap", lr=0.01, other_lr=0.02, other_options={"betas": (0.8, 0.9)}
    )
    plain = torch.optim.AdamW(
        [
            {"params": [twin[0].weight, twin[2].weight], "weight_decay": 0.01},
            {"params": [twin[1].bias, twin[2].bias], "weight_decay": 0.0},
        ],
        lr=0.02,
        betas=(0.8, 0.9),
    )
    for t in range(4):
        for p, q in zip(model.parameters(), twin.parameters()):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(t), dtype=D)
            p.grad, q.grad = g, g.clone()
        optimizer.step()
        plain.step()
    for name, p in model.named_parameters():
        q = dict(twin.named_parameters())[name]
        assert torch.allclose(p, q, atol=1e-12) is (name != "1.weight")


HOLDING: dict[str, dict[str, Any]] = {
    **{f"{name} beside": {"others": name, "other_lr": 0.01} for name in sorted(ELEMENTWISE)},
    **{f"{name} for all": {"method": name} for name in sorted(ELEMENTWISE)},
    "in overrides": {"overrides": {"3.weight": {"method": "lion"}}},
    "partial": {"others": functools.partial(fs.adamw, beta1=0.8)},
}


@pytest.mark.parametrize("options", HOLDING.values(), ids=HOLDING)
def test_no_part_of_a_model_takes_in_what_is_not_finite(options: dict[str, Any]) -> None:
    """The first gradient of every parameter is, one after the other, not a number."""
    model = nn.Sequential(nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 7))
    optimizer = fs.for_model(model, lr=0.01, **{"method": "soap", **options})
    for bad in model.parameters():
        before = bad.detach().clone()
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        assert bad.grad is not None
        bad.grad.view(-1)[0] = torch.nan
        optimizer.step()
        assert torch.equal(bad, before)
    assert all(p.isfinite().all() for p in model.parameters())
    for p in model.parameters():
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert not torch.equal(p, before)


def test_who_says_something_of_the_guard_is_heard() -> None:
    def mine(learning_rate: float, guard: Any = None) -> fs.GradientTransformation:
        return fs.adamw(learning_rate)

    unguarded = functools.partial(fs.adamw, guard=False)
    cases: list[tuple[dict[str, Any], set[Any]]] = [
        ({"method": "soap", "other_options": {"guard": False}}, {False}),
        ({"method": "adamw", "guard": False}, {False, True}),
        ({"method": "soap", "overrides": {"1.*": {"guard": False}}}, {False, True}),
        ({"method": "soap", "others": unguarded, "other_lr": 0.1}, {False}),
        ({"method": "soap", "others": mine, "other_lr": 0.1}, {None}),
    ]
    for options, expected in cases:
        optimizer = fs.for_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), lr=0.1, **options)
        groups = [g for g in optimizer.param_groups if g["method"] is not fs.soap]
        assert {g["guard"] for g in groups} == expected, options


def test_who_fails_again_and_again_is_told_what_to_give() -> None:
    """The guard of AdamW's part has no max_failures that one could give."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan if p is model[0].bias else 1.0)
    optimizer = fs.for_model(model, "soap", lr=0.01)
    for _ in range(29):
        optimizer.step()
    with pytest.raises(fs.FailureLimitError, match=r"0.bias: .*guard=False \(to .*other_options"):
        optimizer.step()
    optimizer = fs.for_model(model, "soap", lr=0.01, other_options={"guard": False})
    for _ in range(30):
        optimizer.step()


def test_options_and_overrides_reach_their_groups() -> None:
    model = ZOO["text"][0]()
    optimizer = fs.for_model(
        model,
        "shampoo",
        lr=0.03,
        weight_decay=0.1,
        max_size=16,
        others="lion",
        other_lr=1e-4,
        method_roles=("matrix", "head"),
        overrides={
            "blocks.0.attention.*.weight": {"role": "heads", "parts": 2},
            "blocks.1.perceptron.?.weight": {"lr": 0.5, "method": "muon", "weight_decay": 0.2},
            "norm.*": {"weight_decay": 0.3},
        },
    )
    by_name = {n: g for g in optimizer.param_groups for n in g["param_names"]}
    matrix, other = (
        by_name["blocks.1.attention.out.weight"],
        by_name["blocks.1.perceptron.0.weight"],
    )
    assert (matrix["lr"], matrix["weight_decay"], matrix["max_size"]) == (0.03, 0.1, 16)
    assert by_name["readout.weight"]["method"] is fs.shampoo
    assert by_name["blocks.0.attention.out.weight"]["role"] == "heads"
    assert by_name["blocks.0.attention.out.weight"]["method"] is fs.lion
    assert (other["method"], other["lr"], other["weight_decay"]) == (fs.muon, 0.5, 0.2)
    assert by_name["norm.weight"]["weight_decay"] == 0.3
    assert by_name["embedding.weight"]["lr"] == by_name["norm.weight"]["lr"] == 1e-4


def test_one_recipe_for_both_has_two_rates() -> None:
    optimizer = fs.for_model(Experts(), "adamw", lr=0.1, other_lr=0.01, weight_decay=0.2)
    found = {g["role"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    rest = {"head": (0.01, 0.01), "vector": (0.01, 0.0)}
    assert found == {"matrix": (0.1, 0.2), "experts": (0.1, 0.2), **rest}


def test_a_recipe_of_ones_own_is_told_of_matrices_if_it_takes_merge() -> None:
    def mine(learning_rate: float, merge: Any = "small") -> fs.GradientTransformation:
        return fs.chain(fs.blocked(fs.sign(), merge=merge), fs.scale(-learning_rate))

    def blind(learning_rate: float) -> fs.GradientTransformation:
        return fs.chain(fs.sign(), fs.scale(-learning_rate))

    optimizer = fs.for_model(Experts(), mine, lr=0.1)
    assert any(g.get("merge") == Stacked() for g in optimizer.param_groups)
    with pytest.warns(UserWarning, match="blind takes no `merge`, so that 'up' is one tensor"):
        fs.for_model(Experts(), blind, lr=0.1)


def test_state_goes_by_name_and_is_saved_and_loaded() -> None:
    def made() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        model = Experts()
        return model, fs.for_model(model, "soap", lr=0.01, every=2), points(model)

    model, optimizer, loss = made()
    for _ in range(3):
        one_step(model, optimizer, loss)
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    other, fresh, other_loss = made()
    other.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    for _ in range(3):
        one_step(model, optimizer, loss)
        one_step(other, fresh, other_loss)
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_a_scheduler_moves_all_groups() -> None:
    model = Experts()
    optimizer = fs.for_model(model, "soap", lr=0.1, other_lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))
    one_step(model, optimizer, points(model))
    scheduler.step()
    assert {g["lr"] for g in optimizer.param_groups} == {0.05, 0.005}


def test_frozen_parameters_wait_and_step_when_they_are_unfrozen() -> None:
    model = Experts()
    model.router.requires_grad_(False)
    optimizer = fs.for_model(model, "muon", lr=0.1)
    before = model.router.weight.clone()
    one_step(model, optimizer, points(model))
    assert torch.equal(model.router.weight, before)
    row = next(r for r in fs.routing_table(optimizer).rows if r.name == "router.weight")
    assert (row.frozen, row.state_bytes) == (True, 0)
    model.router.requires_grad_(True)
    one_step(model, optimizer, points(model))
    assert not torch.equal(model.router.weight, before)


def test_the_table_says_what_the_state_holds() -> None:
    model = Experts()
    optimizer = fs.for_model(model, "shampoo", lr=0.01, max_size=4)
    table = fs.routing_table(optimizer)
    one_step(model, optimizer, points(model))
    sizes: dict[str, int] = {}
    for state in optimizer.chain_states():
        sizes |= fs.state.summary(state, file=io.StringIO()).parameters
    assert {row.name: row.state_bytes for row in table.rows} == {
        name: size for name, size in sizes.items() if not name.startswith("(")
    }
    rows = {row.name: row for row in table.rows}
    assert (rows["up"].role, rows["up"].blocks, rows["up"].shape) == ("experts", 18, (3, 10, 6))
    assert (rows["out.weight"].method, rows["out.weight"].blocks) == ("adamw", 0)
    text = str(table)
    assert re.search(r"3×10×6 +experts +shampoo +0.01 +18 ", text)
    assert text.splitlines()[-1].startswith("7 parameters, ")
    plain = fs.Shampoo([nn.Parameter(torch.zeros(2, 2))])
    assert fs.routing_table(plain).rows[0][:4] == ("param_0", (2, 2), "", "shampoo")

    def mine(learning_rate: float, **more: Any) -> fs.GradientTransformation:
        return fs.shampoo(learning_rate, **more)

    keywords = fs.Optimizer([torch.nn.Parameter(torch.ones(8, 8))], mine, lr=0.1, max_size=2)
    assert fs.routing_table(keywords).rows[0][3:6] == ("mine", 0.1, 16)
    with pytest.raises(TypeError, match="a SGD is no funshampoo.Optimizer"):
        fs.routing_table(torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]


def meta(*modules: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(make() for make in modules))


def test_dear_choices_are_warned_of() -> None:
    """On meta tensors: nothing is allocated to find out."""
    table = functools.partial(nn.Embedding, 50_257, 768)
    matrix = functools.partial(nn.Linear, 768, 768)
    with pytest.warns(UserWarning, match=r"'0.weight', embedding of shape .50257, 768., gets soap"):
        fs.for_model(meta(table, matrix), "soap", lr=0.1, method_roles=("embedding", "matrix"))
    two = meta(table, table, matrix)
    with pytest.warns(UserWarning, match=r"'0.weight' and 1 more, embedding of shape"):
        fs.for_model(two, "soap", lr=0.1, method_roles=("embedding", "matrix"))
    with pytest.warns(UserWarning, match=r"'0.weight', embedding .* gets muon"):
        fs.for_model(
            meta(table, matrix), "muon", lr=0.1, overrides={"0.weight": {"method": "muon"}}
        )
    wide = functools.partial(nn.Linear, 64, 8192, bias=False)
    with pytest.warns(UserWarning, match=r"shampoo keeps .* for '0.weight' .* \(max_size\)"):
        fs.for_model(meta(wide, matrix), "shampoo", lr=0.1, max_size=None)
    fs.for_model(meta(table, matrix, matrix), "soap", lr=0.1)  # and no other is
    fs.for_model(meta(table, matrix), "lion", lr=0.1, method_roles=("embedding", "matrix"))
    with pytest.warns(UserWarning, match="no parameter has one of the roles"):
        fs.for_model(nn.LayerNorm(4), "soap", lr=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "sopa"}, ValueError, "method is 'sopa'; did you mean 'soap'"),
        ({"others": "adam"}, ValueError, "others is 'adam'"),
        ({"method": fs.scale(1.0)}, TypeError, "give the name of a recipe, or a function"),
        ({"momentun": 0.9}, TypeError, "no hyperparameter 'momentun'; did you mean 'momentum'"),
        ({"guard": False}, TypeError, r"shampoo has no .*: other_options={'guard': \.\.\.}"),
        ({"other_options": {"betsa": 1}}, TypeError, "adamw has no hyperparameter 'betsa'"),
        ({"overrides": {"up": {"wieght_decay": 1}}}, TypeError, "did you mean 'weight_decay'"),
        ({"others": "sgd"}, TypeError, "sgd has no learning rate of its own: give it as other_lr"),
        (
            {"method": "adamw", "others": "shampoo", "other_options": {"grafting": "sgd"}},
            TypeError,
            "shampoo has no learning rate of its own: give it as other_lr",
        ),
        ({"method_roles": ("matrices",)}, ValueError, "method_roles is 'matrices'"),
        ({"method_roles": "matrix"}, TypeError, "method_roles is 'matrix'; give a list"),
        ({"other_options": [1]}, TypeError, r"other_options is \[1\]; give a dict"),
        ({"other_lr": 0.1, "other_options": {"lr": 0.2}}, TypeError, "give one of them"),
        ({"role": "matrix"}, TypeError, "shampoo has no hyperparameter 'role'"),
        ({"params": []}, TypeError, "shampoo has no hyperparameter 'params'"),
        ({"scale_rates": "mup", "base": 3}, TypeError, "base is 3; give the module"),
        ({"overrides": {3: "vector"}}, TypeError, "overrides has the pattern 3"),
        ({"overrides": {"uq": "vector"}}, ValueError, "nearest name is 'up'"),
        ({"overrides": {"up": {"method": "sgd"}}}, TypeError, "'lr' in overrides"),
        ({"overrides": {"up": {"method": 3}}}, TypeError, "the method in overrides is 3"),
        ({"scale_rates": "mup"}, ValueError, "scale_rates='mup' and base go together"),
        ({"scale_rates": "sp"}, ValueError, "scale_rates is 'sp'"),
        ({"base": Experts()}, ValueError, "scale_rates='mup' and base go together"),
        ({"lr": "fast"}, TypeError, "lr is 'fast'"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fs.for_model(Experts(), **({"method": "shampoo", "lr": 0.1} | arguments))


def test_models_that_can_not_be_trained_are_refused() -> None:
    with pytest.raises(TypeError, match="'lr'"):
        fs.for_model(Experts(), "soap")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="all parameters of model are frozen"):
        fs.for_model(Experts().requires_grad_(False), "soap", lr=0.1)
    with pytest.raises(ValueError, match="model has no parameters"):
        fs.for_model(nn.ReLU(), "soap", lr=0.1)
    with pytest.raises(TypeError, match="model is a generator; give the module"):
        fs.for_model(Experts().parameters(), "soap", lr=0.1)  # type: ignore[arg-type]


def test_what_goes_to_the_method_is_said_once() -> None:
    assert set(METHOD_ROLES) | {"embedding", "head", "vector"} == set(fs.models.ROLES)


@pytest.mark.parametrize("method", sorted(LOOK_AHEAD))
def test_a_checkpoint_from_before_it_looked_ahead_goes_on_without(method: str) -> None:
    def model_and_optimizer(**options: Any) -> tuple[nn.Module, fs.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        return model, fs.for_model(model, method, lr=0.1, **options)

    def step(model: nn.Module, optimizer: fs.Optimizer) -> None:
        for i, p in enumerate(model.parameters()):
            p.grad = torch.sin(torch.arange(p.numel()) + float(i)).view(p.shape)
        optimizer.step()

    (old, before), (new, after) = model_and_optimizer(nesterov=False), model_and_optimizer()
    for _ in range(3):
        step(old, before)
    saved = before.state_dict()
    for group in saved["param_groups"]:
        group.pop("nesterov", None)
    after.load_state_dict(saved)
    new.load_state_dict(old.state_dict())
    step(old, before)
    step(new, after)
    assert all(map(torch.equal, old.parameters(), new.parameters()))
