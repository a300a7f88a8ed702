"""Parameter groups: their own numbers, their own recipes, added late, edited between steps."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import funshampoo as fs
from funshampoo.optim.vocabulary import OF_ALL_GROUPS
from funshampoo.recipes import RECIPES
from tests.optim.runs import (
    ADAMW,
    BARE,
    EVERYTHING,
    REFERENCE,
    SGD,
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

FIRST, SECOND = ["p5", "p4", "p3"], ["p2", "p1", "p0"]


def part(tree: Any, names: list[str]) -> dict[str, Any]:
    return {name: tree[name] for name in names}


def two_groups(params: Any, second: dict[str, Any]) -> list[dict[str, Any]]:
    halves = [part(params, FIRST), part(params, SECOND)]
    return [{"params": halves[0].items()}, {"params": halves[1].items(), **second}]


def separately(first: Method, second: Method, steps: int) -> dict[str, torch.Tensor]:
    """Each half of the parameters by a functional loop of its own."""
    params, grads = parameters(), grads_of(steps)
    found: dict[str, torch.Tensor] = {}
    for method, names in ((first, FIRST), (second, SECOND)):
        tx = method.transformation()
        found |= functional([(tx, part(g, names)) for g in grads], part(params, names))[0]
    return part(found, list(params))


@pytest.mark.parametrize(
    ("method", "own"),
    [
        (SHAMPOO, {"lr": 0.01, "betas": (0.5, 0.9), "momentum": 0.9, "max_size": 2, "every": 2}),
        (ADAMW, {"lr": 0.01, "weight_decay": 0.0}),
        (SGD, {"lr": 0.01, "momentum": 0.0, "dampening": 0.0}),
        (REFERENCE, {"lr": 0.01, "betas": (0.5, 0.9)}),
        (BARE, {"lr": 0.01}),
    ],
    ids=["shampoo", "adamw", "sgd", "from_reference", "bare"],
)
def test_a_group_has_hyperparameters_of_its_own(method: Method, own: dict[str, Any]) -> None:
    params = parameters()
    run(method.optimizer(two_groups(params, own)), params, grads_of(7))
    changed = method._replace(options={**method.options, **own})
    assert_same(params, separately(method, changed, 7))


@pytest.mark.parametrize("second", [ADAMW, SGD, BARE, REFERENCE], ids=name_of)
def test_a_group_has_a_recipe_of_its_own(second: Method) -> None:
    params = parameters()
    own = {"method": second.method, **second.options}
    optimizer = SHAMPOO.optimizer(two_groups(params, own), weight_decay=0.3)
    run(optimizer, params, grads_of(7))
    first = SHAMPOO._replace(options={**SHAMPOO.options, "weight_decay": 0.3})
    assert_same(params, separately(first, second, 7))


def test_a_group_with_its_own_recipe_has_that_recipes_defaults() -> None:
    params = parameters()
    groups = two_groups(params, {"method": fs.adamw, "lr": 0.05})
    run(fs.Optimizer(groups, fs.sgd, lr=0.1, weight_decay=0.5), params, grads_of(5))
    sgd = Method("", fs.sgd, {"lr": 0.1, "weight_decay": 0.5})
    adamw = Method("", fs.adamw, {"lr": 0.05})  # with its own weight decay, 0.01
    assert_same(params, separately(sgd, adamw, 5))


EDITS: list[tuple[Method, dict[str, Any]]] = [
    (SHAMPOO, {"lr": 0.01}),
    (SHAMPOO, {"lr": 1}),
    (SHAMPOO, {"lr": 0.0}),
    (SHAMPOO, {"betas": (0.5, 0.8)}),
    (SHAMPOO, {"betas": [0.5, 0.8]}),
    (SHAMPOO, {"epsilon": 1e-2}),
    (SHAMPOO, {"every": 1}),
    (SHAMPOO, {"weight_decay": 0.2}),
    (EVERYTHING, {"weight_decay": 0.0}),
    (EVERYTHING, {"momentum": 0.5}),
    (EVERYTHING, {"nesterov": False}),
    (SGD, {"momentum": 0.5, "weight_decay": 0.2}),
    (ADAMW, {"betas": (0.5, 0.8), "epsilon": 1e-2, "weight_decay": 0.0}),
    (REFERENCE, {"betas": (0.5, 0.8), "epsilon": 1e-2, "weight_decay": 0.1}),
    (BARE, {"lr": 0.01}),
]


@pytest.mark.parametrize(
    ("method", "edit"), EDITS, ids=[f"{m.name}-{'-'.join(map(str, e))}" for m, e in EDITS]
)
def test_an_edit_takes_effect_at_the_next_step(method: Method, edit: dict[str, Any]) -> None:
    """Measured elsewhere: values read at construction; betas or decay could not be scheduled."""
    params, grads = parameters(), grads_of(9)
    before, after = method.transformation(), method.transformation(**edit)
    txs = 4 * [before] + 3 * [after] + 2 * [before]
    expected, _ = functional(list(zip(txs, grads)), params)
    optimizer = method.optimizer(params.items())
    old = {name: optimizer.param_groups[0][name] for name in edit}
    run(optimizer, params, grads[:4])
    unedited = copies(params)
    optimizer.param_groups[0].update(edit)
    run(optimizer, params, grads[4:5])
    if edit == {"lr": 0.0}:
        assert not moved(params, unedited)
    run(optimizer, params, grads[5:7])
    optimizer.param_groups[0].update(old)
    run(optimizer, params, grads[7:])
    assert_same(params, expected)
    unchanged, _ = functional([(before, g) for g in grads], parameters())
    assert moved(params, unchanged)  # the edit does something


@pytest.mark.parametrize("method", [SHAMPOO, REFERENCE], ids=name_of)
def test_a_list_of_betas_edited_in_place_takes_effect(method: Method) -> None:
    params, grads = parameters(), grads_of(6)
    optimizer = method.optimizer(params.items(), betas=[0.9, 0.99])
    run(optimizer, params, grads[:3])
    optimizer.param_groups[0]["betas"][0] = 0.3
    run(optimizer, params, grads[3:])
    before, after = (method.transformation(betas=(b, 0.99)) for b in (0.9, 0.3))
    expected, _ = functional(list(zip(3 * [before] + 3 * [after], grads)), parameters())
    assert_same(params, expected)


def test_a_config_edited_in_place_takes_effect() -> None:
    params, grads = parameters(), grads_of(6)
    config = {"type": "AdamPreconditionerConfig", "epsilon": 1e-8}
    optimizer = REFERENCE.optimizer(params.items(), grafting_config=config)
    run(optimizer, params, grads[:3])
    optimizer.param_groups[0]["grafting_config"]["epsilon"] = 1.0
    run(optimizer, params, grads[3:])
    before, after = (
        REFERENCE.transformation(grafting_config={**config, "epsilon": e}) for e in (1e-8, 1.0)
    )
    expected, _ = functional(list(zip(3 * [before] + 3 * [after], grads)), parameters())
    assert_same(params, expected)


def test_momentum_switched_on_and_off_between_steps() -> None:
    """It starts from nothing, twice; everything else goes on."""
    params, grads = parameters(), grads_of(12)
    optimizer = SHAMPOO.optimizer(params.items())
    now, state = copies(params), None
    for i, momentum in enumerate([0.0, 0.9, 0.0, 0.9]):
        mine = grads[3 * i : 3 * i + 3]
        tx = SHAMPOO.transformation(momentum=momentum)
        now, state = functional([(tx, g) for g in mine], now, state)
        optimizer.param_groups[0]["momentum"] = momentum
        run(optimizer, params, mine)
        names = {entry.rsplit("/", 2)[-2] for entry in optimizer.state[params["p5"]]}
        assert ("trace" in names) == (momentum > 0)
        assert_same(params, now)


@pytest.mark.parametrize(
    "edit",
    [{"max_size": 2}, {"max_size": None}, {"merge": "none"}],
    ids=["smaller", "whole", "merge"],
)
def test_other_blocks_in_mid_run_are_an_error_that_changes_nothing(edit: dict[str, Any]) -> None:
    params, grads = parameters(), grads_of(8)
    optimizer = SHAMPOO.optimizer(params.items())
    run(optimizer, params, grads[:4])
    before, state = copies(params), copies(flat(optimizer))
    old = {name: optimizer.param_groups[0][name] for name in edit}
    optimizer.param_groups[0].update(edit)
    for _ in range(2):  # the second attempt as well
        with pytest.raises(ValueError, match=r"can't follow.*max_size"):
            run(optimizer, params, grads[4:5])
    assert not moved(params, before)
    optimizer.param_groups[0].update(old)
    assert_same(flat(optimizer), state)
    run(optimizer, params, grads[4:])
    tx = SHAMPOO.transformation()
    assert_same(params, functional([(tx, g) for g in grads], parameters())[0])


def flat(optimizer: fs.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for i, entries in enumerate(optimizer.state.values()):
        found |= {f"{i}/{name}": x for name, x in entries.items()}
    return found


@pytest.mark.parametrize("method", [EVERYTHING, REFERENCE, ADAMW, BARE], ids=name_of)
@pytest.mark.parametrize("steps", [0, 4])
def test_a_group_added_late_starts_fresh(method: Method, steps: int) -> None:
    """Measured elsewhere: state made at construction, so that added parameters had none."""
    params, grads = parameters(), grads_of(9)
    optimizer = method.optimizer(list(part(params, FIRST).items()))
    run(optimizer, part(params, FIRST), grads[:steps])
    optimizer.add_param_group({"params": part(params, SECOND).items(), "lr": 0.01})
    run(optimizer, params, grads[steps:])
    tx, late = method.transformation(), method.transformation(lr=0.01)
    first, _ = functional([(tx, part(g, FIRST)) for g in grads], part(parameters(), FIRST))
    start = part(parameters(), SECOND)
    second, _ = functional([(late, part(g, SECOND)) for g in grads[steps:]], start)
    assert_same(params, part(first | second, list(params)))
    assert len(optimizer.param_groups) == 2


def test_a_refused_group_is_not_added() -> None:
    params, grads = parameters(), grads_of(3)
    optimizer = SHAMPOO.optimizer(part(params, FIRST).items())
    for wrong, error in (
        ({"betas": (0.9, 2.0)}, ValueError),
        ({"betas": (0.9,)}, ValueError),
        ({"lr": torch.ones(2)}, ValueError),
        ({"lr": "0.1"}, TypeError),
        ({"method": fs.sgd, "nesterov": True}, ValueError),
        ({"method": "adamw"}, TypeError),
    ):
        with pytest.raises(error):
            optimizer.add_param_group({"params": part(params, SECOND).items(), **wrong})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": part(params, SECOND).items()})
    before = copies(params)
    run(optimizer, params, grads)
    assert moved(params, before) == params.keys()


UNKNOWN: list[tuple[Any, dict[str, Any], str]] = [
    (fs.adamw, {"eps": 1e-8}, "did you mean 'epsilon'"),
    (fs.adamw, {"learning_rate": 0.1}, "did you mean 'lr'"),
    (fs.adamw, {"lr": 0.1, "beta1": 0.9}, "did you mean 'betas'"),
    (fs.adamw, {"weight_deacy": 0.1}, "did you mean 'weight_decay'"),
    (fs.adamw, {"amsgrad": True}, "no hyperparameter 'amsgrad'"),
    (fs.adamw, {"momentum": 0.9}, "It takes betas, distribute, epsilon, guard, lr, mask, "),
    (fs.sgd, {"lr": 0.1, "learning_rate": 0.1}, "did you mean 'lr'"),
    (fs.shampoo, {"lr": 0.1, "mx_size": 3}, "did you mean 'max_size'"),
    (fs.from_reference, {"eps": 1e-8}, "did you mean 'epsilon'"),
    (fs.soap, {"precondition_frequency": 10}, "did you mean 'every'"),
    (fs.shampoo, {"max_preconditioner_dim": 256}, "did you mean 'max_size'"),
    (fs.from_reference, {"precondition_frequenzy": 3}, "'precondition_frequenzy'"),
    (functools.partial(fs.adamw, weight_decay=0.0), {"eps": 1e-8}, "did you mean 'epsilon'"),
    (fs.chain(fs.scale_by_adam()), {"lr": 0.1, "betas": (0.9, 0.9)}, "takes lr"),
    (fs.adamw, {"cuda_graphs": True}, "did you mean 'cuda_graph'"),
    (fs.adamw, {"tf_32": True}, "did you mean 'tf32'"),
]


@pytest.mark.parametrize(
    ("method", "given", "message"), UNKNOWN, ids=[str(list(given)[-1]) for _, given, _ in UNKNOWN]
)
def test_an_unknown_name_is_an_error_with_its_remedy(
    method: Any, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        fs.Optimizer([Parameter(torch.zeros(2))], method, **given)


@pytest.mark.parametrize(
    ("name", "meant"), [("weight_deacy", "weight_decay"), ("eps", "epsilon"), ("rho", None)]
)
def test_an_unknown_entry_of_a_group_is_kept(name: str, meant: str | None) -> None:
    """As torch.optim keeps SAM's rho; one that looks misspelt is warned of."""
    group = {"params": [Parameter(torch.zeros(2))], name: 0.5}
    if meant is None:
        optimizer = fs.Optimizer([group], fs.adamw)
    else:
        with pytest.warns(UserWarning, match=f"'{name}', which adamw.*did you mean '{meant}'"):
            optimizer = fs.Optimizer([group], fs.adamw)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0][name] == 0.5
    optimizer.param_groups[0][name] = 0.25
    optimizer.step()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][name] == 0.5


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("weight_deacy", "did you mean 'weight_decay'"),
        ("learning_rate", "did you mean 'lr'"),
        ("LR", "did you mean 'lr'"),
        ("beta1", "did you mean 'betas'"),
        ("compile", "as an argument of the optimizer"),
    ],
)
@pytest.mark.parametrize("how", ["edited", "loaded", "appended"])
def test_an_entry_that_comes_later_and_looks_misspelt(how: str, name: str, told: str) -> None:
    """It does nothing, as in torch.optim; the next step says so, and no other."""
    optimizer = fs.Optimizer([Parameter(torch.ones(2))], fs.adamw, lr=0.1)
    optimizer.step()
    group = optimizer.param_groups[0]
    if how == "loaded":
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0][name] = 0.5
        optimizer.load_state_dict(saved)
    elif how == "appended":
        optimizer.param_groups.append({"params": [Parameter(torch.ones(2))], name: 0.5})
    else:
        group[name] = 0.5
    with pytest.warns(UserWarning, match=f"'{name}', which adamw does not read.*{told}") as found:
        optimizer.step()
    assert len(found) == 1
    optimizer.step()
    optimizer.param_groups[-1].pop(name)
    optimizer.step()
    optimizer.param_groups[-1][name] = 0.25
    optimizer.step()


KEPT_BY_CLIENTS = [
    *("initial_lr", "max_lr", "min_lr", "swa_lr", "warmup_lr", "lr_scale", "lr_mult", "wd_mult"),
    *("max_momentum", "base_momentum", "weight_decay_end", "initial_weight_decay", "rho", "step"),
    *("name", "group_name", "layer_decay", "layer_id", "use_muon", "is_decoupled_lr", "foreach"),
]


@pytest.mark.parametrize("method", RECIPES.values(), ids=RECIPES)
def test_what_clients_add_later_is_theirs(method: Any) -> None:
    optimizer = fs.Optimizer([Parameter(torch.ones(2, 2))], method, lr=0.1)
    optimizer.param_groups[0] |= dict.fromkeys([*KEPT_BY_CLIENTS, 0, ("a", 1)], 0.5)
    optimizer.step()


def test_what_is_said_of_all_groups_is_no_groups_own() -> None:
    """In a group it would be kept, and do nothing."""
    keywords = inspect.signature(fs.Optimizer).parameters.values()
    assert {p.name for p in keywords if p.kind is p.KEYWORD_ONLY} == set(OF_ALL_GROUPS)
    for name in OF_ALL_GROUPS:
        group = {"params": [Parameter(torch.zeros(2, 2))], name: True}
        with pytest.warns(UserWarning, match=f"'{name}', which adamw.*as an argument of the optim"):
            fs.Optimizer([group], fs.adamw)
        net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        for options in ({"other_options": {name: True}}, {"overrides": {"*": {name: True}}}):
            with pytest.raises(TypeError, match=f"no hyperparameter '{name}': .*an argument of"):
                fs.for_model(net, "soap", lr=0.1, **options)


def test_what_other_libraries_note_in_a_group_is_kept() -> None:
    groups = [{"params": [Parameter(torch.zeros(2))], "name": "head", "lr_scale": 0.5}]
    optimizer = fs.Optimizer(groups, fs.from_reference, epsilon=1e-4)
    optimizer.param_groups[0]["mine"] = 3
    optimizer.step()
    saved = optimizer.state_dict()["param_groups"][0]
    assert (saved["name"], saved["lr_scale"], saved["mine"]) == ("head", 0.5, 3)


@pytest.mark.parametrize("method", [fs.shampoo, fs.sgd])
def test_a_missing_rate_is_an_error(method: Any) -> None:
    p, q = Parameter(torch.zeros(2)), Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="lr is missing"):
        fs.Optimizer([p], method)
    with pytest.raises(TypeError, match="lr is missing"):
        fs.Optimizer([{"params": [p], "lr": 0.1}, {"params": [q]}], method)
    given = fs.Optimizer([{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.2}], method)
    assert [group["lr"] for group in given.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize("tx", [fs.adamw(0.1), fs.shampoo(0.1), fs.scale_by_learning_rate(0.1)])
def test_a_rate_given_twice_is_an_error(tx: fs.GradientTransformation) -> None:
    """Two factors of minus lr would ascend."""
    with pytest.raises(TypeError, match="scales by a learning rate already"):
        fs.Optimizer(parameters().items(), tx, lr=0.1)


@pytest.mark.parametrize(
    "tx",
    [
        fs.shampoo(0.05, every=2),
        fs.scale_by_learning_rate(lambda count: 0.1 / (1 + count)),
        fs.chain(fs.trace(0.9), ("rate", fs.scale_by_learning_rate(0.1))),
        fs.blocked(fs.scale_by_learning_rate(0.1)),
    ],
)
def test_a_transformation_with_its_own_rate_needs_none(tx: fs.GradientTransformation) -> None:
    """Whatever it is called, and wherever it stands."""
    params, grads = parameters(), grads_of(5)
    run(fs.Optimizer(params.items(), tx), params, grads)
    assert_same(params, functional([(tx, g) for g in grads], parameters())[0])


def _bare(decay: float = 0.9) -> fs.GradientTransformation:
    return fs.trace(decay)


@pytest.mark.parametrize("method", [fs.scale_by_adam(), fs.chain, _bare, fs.chain(fs.scale(-0.1))])
def test_a_step_that_nobody_turns_downhill_is_an_error(method: Any) -> None:
    params = parameters()
    before = copies(params)
    optimizer = fs.Optimizer(params.items(), method)
    with pytest.raises(TypeError, match="takes no learning rate.*lr=None"):
        run(optimizer, params, grads_of(1))
    assert not moved(params, before)


def test_a_rate_of_none_leaves_the_scale_to_the_method() -> None:
    params, grads = parameters(), grads_of(3)
    tx = fs.chain(fs.trace(0.9), fs.scale(-0.1))
    run(fs.Optimizer(params.items(), tx, lr=None), params, grads)
    assert_same(params, functional([(tx, g) for g in grads], parameters())[0])


@pytest.mark.parametrize("compile", [False, {"backend": "eager"}])
def test_a_recipe_without_a_rate_is_scaled_by_the_wrappers(compile: Any) -> None:
    params, grads = parameters(), grads_of(3)
    optimizer = fs.Optimizer(params.items(), _bare, lr=1.0, decay=0.5, compile=compile)
    for g, lr in zip(grads, (0.1, 0.2, 0.3)):
        optimizer.param_groups[0]["lr"] = lr
        run(optimizer, params, [g])
    txs = [fs.chain(_bare(0.5), fs.scale_by_learning_rate(lr)) for lr in (0.1, 0.2, 0.3)]
    assert_same(params, functional(list(zip(txs, grads)), parameters())[0])


def test_injected_hyperparameters_would_shadow_the_group() -> None:
    with pytest.raises(TypeError, match="give the recipe itself"):
        fs.Optimizer(parameters().values(), fs.inject_hyperparams(fs.sgd), lr=0.1)


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    params, grads = parameters(), grads_of(3)
    optimizer = fs.Optimizer(params.items(), fs.adamw, lr=numpy.float32(0.5))
    run(optimizer, params, grads)
    expected, _ = functional([(fs.adamw(0.5), g) for g in grads], parameters())
    assert_same(params, expected)
    assert type(optimizer.state_dict()["param_groups"][0]["lr"]) is float


@pytest.mark.parametrize("edit", [{"lr": -0.1}, {"betas": (0.9, 1.5)}, {"betas": 0.9}])
def test_a_group_out_of_range_stops_the_step_before_any_group_moves(edit: dict[str, Any]) -> None:
    params = parameters()
    optimizer = SHAMPOO.optimizer(two_groups(params, {}))
    before = copies(params)
    optimizer.param_groups[1].update(edit)
    with pytest.raises(ValueError, match=f"{'lr' if 'lr' in edit else 'beta'}"):
        run(optimizer, params, grads_of(1))
    assert not moved(params, before)


def test_two_parameters_of_one_name_are_an_error() -> None:
    named = [("w", Parameter(torch.zeros(2))), ("w", Parameter(torch.ones(2)))]
    with pytest.raises(ValueError, match="two parameters of the group are named 'w'"):
        fs.Optimizer(named, fs.sgd, lr=0.1)


def test_a_group_edited_to_another_method_follows() -> None:
    """What both methods remember goes on; the rest starts from nothing."""
    params, grads = parameters(), grads_of(6)
    slow, fast = (fs.chain(fs.scale_by_adam(0.9, b)) for b in (0.99, 0.5))
    optimizer = fs.Optimizer(params.items(), slow, lr=0.1)
    run(optimizer, params, grads[:3])
    optimizer.param_groups[0]["method"] = fast
    run(optimizer, params, grads[3:])
    rated = [fs.chain(m, fs.scale_by_learning_rate(0.1)) for m in (slow, fast)]
    txs = 3 * rated[:1] + 3 * rated[1:]
    assert_same(params, functional(list(zip(txs, grads)), parameters())[0])


def test_maximize_is_a_bool() -> None:
    """As text, "no" would ascend."""
    params = parameters()
    optimizer = ADAMW.optimizer(params.items())
    optimizer.param_groups[0]["maximize"] = "no"
    before = copies(params)
    with pytest.raises(TypeError, match="maximize is 'no'"):
        run(optimizer, params, grads_of(1))
    assert not moved(params, before)


NUMBERS: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"lr": math.nan}, ValueError),
    ({"lr": math.inf}, ValueError),
    ({"lr": -1.0}, ValueError),
    ({"lr": True}, TypeError),
    ({"lr": 1j}, TypeError),
    ({"weight_decay": -1.0}, ValueError),
    ({"betas": (2.0, 0.9)}, ValueError),
    ({"betas": (0.9, math.nan)}, ValueError),
]
METHODS_OF_NUMBERS = [fs.shampoo, fs.adamw, fs.soap]


def _as_tensors(options: dict[str, Any]) -> dict[str, Any]:
    def made(value: Any) -> Any:
        return tuple(map(torch.tensor, value)) if type(value) is tuple else torch.tensor(value)

    return {name: made(value) for name, value in options.items()}


@pytest.mark.parametrize(("options", "kind"), NUMBERS, ids=str)
@pytest.mark.parametrize("method", METHODS_OF_NUMBERS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("given", ["number", "tensor"])
@pytest.mark.parametrize("where", ["argument", "group", "added", "edited"])
def test_a_tensor_is_refused_as_its_number_is(
    method: Any, where: str, given: str, options: dict[str, Any], kind: type[Exception]
) -> None:
    """On a CPU, where nobody waits for it."""
    p = torch.nn.Parameter(torch.zeros(2))
    options = _as_tensors(options) if given == "tensor" else options
    name = next(iter(options)).replace("betas", "beta")
    if where == "argument":
        with pytest.raises(kind, match=name):
            fs.Optimizer([p], method, **{"lr": 0.1, **options})
        return
    optimizer = fs.Optimizer([torch.nn.Parameter(torch.zeros(2))], method, lr=0.1)
    if where == "group":
        with pytest.raises(kind, match=name):
            fs.Optimizer([{"params": [p], **options}], method, lr=0.1)
    elif where == "added":
        with pytest.raises(kind, match=name):
            optimizer.add_param_group({"params": [p], **options})
        assert len(optimizer.param_groups) == 1
    else:
        optimizer.param_groups[0].update(options)
        with pytest.raises(kind, match=name):
            optimizer.step()


def test_the_lr_of_a_bare_chain_too() -> None:
    for lr in (torch.tensor(math.nan), torch.tensor(1j), torch.tensor(True), math.inf):
        with pytest.raises((TypeError, ValueError), match="lr is"):
            fs.Optimizer([torch.nn.Parameter(torch.zeros(2))], fs.scale_by_adam(), lr=lr)
    meta = torch.tensor(0.1, device="meta")  # as one on a GPU: not read
    fs.Optimizer([torch.nn.Parameter(torch.zeros(2))], fs.adamw, lr=meta)
