"""Plans: balanced, true to the state that a job will have, and computed without a job."""

from __future__ import annotations

import functools
import importlib
import math
import re
import subprocess
import sys
from collections import ChainMap, OrderedDict, UserDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optree
import pytest
import torch
from torch import nn

import funshampoo as fs
from funshampoo.blocks.layout import layout_of, leaf_keys
from funshampoo.distributed.cost import CostModel
from funshampoo.distributed.ownership import owners_of, works_of
from funshampoo.plan.planner import Plan, plan
from funshampoo.plan.shapes import MODELS, model_shapes
from funshampoo.plan.sharding import plan_sharded
from funshampoo.state.nodes import walk
from funshampoo.state.stages import ShardedState
from tests.trees import tensors

ROOT = Path(__file__).parents[2]
PUBLISHED = {
    "resnet-50": 25_557_032,
    "vit-b-16": 86_567_656,
    "gpt2": 124_439_808,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_their_published_sizes(name: str) -> None:
    assert sum(map(math.prod, model_shapes(name).values())) == PUBLISHED[name]


def test_shapes_that_are_easily_wrong() -> None:
    resnet, llama = model_shapes("resnet-50"), model_shapes("llama3-70b")
    assert resnet["layer2.0.conv2.weight"] == (128, 128, 3, 3)
    assert resnet["layer4.0.downsample.0.weight"] == (2048, 1024, 1, 1)
    assert model_shapes("vit-b-16")["encoder.pos_embedding"] == (1, 197, 768)
    assert llama["model.layers.79.self_attn.v_proj.weight"] == (1024, 8192)


@pytest.mark.parametrize(
    ("name", "ranks", "size", "limit"),
    [
        ("resnet-50", 8, 256, 1.05),
        ("resnet-50", 8, 1024, 1.15),
        ("gpt2", 8, 256, 1.05),
        ("gpt2", 8, 1024, 1.15),
        ("llama3-70b", 1024, 1024, 1.05),
    ],
)
def test_balance(name: str, ranks: int, size: int, limit: float) -> None:
    found = plan(name, ranks, max_size=size)
    assert 1 <= found.best_balance <= found.balance <= limit
    check_sums(found, PUBLISHED[name])


def check_sums(found: Plan, elements: int) -> None:
    """Nothing is lost or counted twice."""
    assert found.elements == elements
    assert sum(rank.blocks for rank in found.ranks) == found.blocks
    assert sum(rank.elements for rank in found.ranks) == elements - found.replicated_elements
    for part in ("memory", "products", "roots", "total"):
        once = sum(s.rows * getattr(s.seconds, part) for s in found.stacks.values())
        assert sum(getattr(r.seconds, part) for r in found.ranks) == pytest.approx(once)
    in_blocks = sum(s.rows * s.state_bytes for s in found.stacks.values())
    replicated = len(found.ranks) * found.replicated_bytes
    assert sum(rank.state_bytes for rank in found.ranks) == in_blocks + replicated


def problem() -> dict[str, Any]:
    shapes: dict[str, Any] = {"w": (20, 13), "b": (20,), "layers": [(8, 3, 2, 2), (1,)]}
    return shapes | {"scalar": (), "empty": (0, 4), "half": torch.zeros(5, 8, dtype=torch.bfloat16)}


def concrete(node: Any) -> Any:
    """The same problem in real tensors."""
    if isinstance(node, torch.Tensor):
        return node
    if isinstance(node, dict):
        return {key: concrete(child) for key, child in node.items()}
    if isinstance(node, list):
        return [concrete(child) for child in node]
    return torch.zeros(node)


TRANSFORMATIONS = {
    "shampoo": lambda: fs.shampoo(0.1, max_size=8),
    "everything": lambda: fs.shampoo(
        0.1, max_size=8, momentum=0.9, weight_decay=0.1, exponents={2: {1: 0.0}}, own_steps=False
    ),
    "adam_in_blocks": lambda: fs.blocked(fs.scale_by_adam(), 8),
    "injected": lambda: fs.inject_hyperparams(fs.shampoo)(0.1, max_size=8),
    "accumulated": lambda: fs.multi_steps(fs.shampoo(0.1, max_size=8), 4),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_state_bytes_are_those_of_the_state(name: str) -> None:
    """On one rank, the plan's state is the state; on more, each rank's part of it."""
    state = TRANSFORMATIONS[name]().init(concrete(problem()))
    real = sum(x.nbytes for x in tensors(state))
    for world_size in (1, 3):
        found = plan(problem(), world_size, transformation=TRANSFORMATIONS[name]())
        shared = (world_size - 1) * found.replicated_bytes
        assert sum(rank.state_bytes for rank in found.ranks) - shared == real
        check_sums(found, sum(x.numel() for x in tensors(concrete(problem()))))


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_trees_of_tensors_are_planned_as_they_are(kind: Any) -> None:
    """Empty containers hold nothing, where they would be shapes; an OrderedDict has its order."""
    params = kind(z=torch.zeros(9, 3), a=torch.zeros(3, 9), none=[], never=(), nested=kind())
    tx = fs.shampoo(0.1, max_size=8)
    found = plan(params, 1, transformation=tx)
    assert found.parameters == 2
    assert found.elements == 54
    assert found.ranks[0].state_bytes == sum(x.nbytes for x in tensors(tx.init(params)))
    layout = layout_of(leaf_keys(tensors(params)), 8, "small", 2)
    assert list(found.stacks) == list(layout.stacks)


@pytest.mark.parametrize("leaf", [torch.ones(9, 3), (9, 3)], ids=["tensors", "shapes"])
@pytest.mark.parametrize("kind", [OrderedDict, MappingProxyType, ChainMap, UserDict])
def test_mappings_of_any_kind_at_any_depth(kind: Any, leaf: Any) -> None:
    inside = {"b": kind({"c": leaf}), "d": [leaf]}
    wanted = plan({"a": {"b": {"c": leaf}, "d": [leaf]}}, 2)
    assert plan({"a": kind(inside)}, 2) == plan(kind({"a": inside}), 2) == wanted


def test_owners_are_those_that_the_layout_of_a_job_gets() -> None:
    """Order, shapes and rows of the stacks, read back from a state, are the layout's own."""
    for shapes in (problem(), model_shapes("resnet-50")):
        params = optree.tree_map(lambda x: x.to("meta"), concrete(shapes))
        layout = layout_of(leaf_keys(tensors(params)), 64, "small", 2)
        found = plan(shapes, 3, max_size=64)
        assert list(found.stacks) == list(layout.stacks)
        assert {n: s.block for n, s in found.stacks.items()} == {
            n: s.block for n, s in layout.stacks.items()
        }
        tx = fs.shampoo(0.1, max_size=64)
        shapes_of = {name: stack.block for name, stack in layout.stacks.items()}
        expected = owners_of(layout.stacks, 3, 10, works=works_of(tx, shapes_of, tx.init(params)))
        assert {n: s.owners for n, s in found.stacks.items()} == expected


# Options that make different blocks dear.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "shampoo": [
        {"max_size": 20},
        {"max_size": 20, "vectors": "blocks"},
        {"max_size": 20, "exponents": {2: {0: 0.0}}},
        {"max_size": 20, "sides": "smaller", "statistics_every": 4},
    ],
    "soap": [{"max_size": 20}, {"sides": "smaller"}],
    "muon": [{}, {"others": fs.sharded(fs.lion(0.1))}],
    "adamw": [{"mask": {"w": True, "wide": True, "long": True, "b": False, "c": False}}],
}
JOBS = [(name, options) for name in fs.recipes.__all__ for options in OPTIONS.get(name, [{}])]


@pytest.mark.parametrize(("method", "options"), JOBS, ids=str)
def test_a_plan_is_what_the_ranks_of_a_job_have(
    method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every recipe: who owns what, and every byte of state."""
    module = importlib.import_module("funshampoo.distributed.ranks")
    shapes = {"w": (60, 24), "wide": (24, 90), "long": (96,), "b": (20,), "c": (20,)}
    params = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tx = getattr(fs, method)(0.1, distribute=fs.sharded, **options)
    planned = plan(shapes, 3, transformation=tx)
    assert planned.replicated_elements == 0
    check_sums(planned, sum(map(math.prod, shapes.values())))
    for rank in range(3):
        monkeypatch.setattr(module, "rank_and_size", lambda group, rank=rank: (rank, 3))
        tx = getattr(fs, method)(0.1, distribute=fs.sharded, **options)
        state = tx.init(params)
        owned: dict[str, Any] = {}
        for _, node in walk(state):
            if isinstance(node, ShardedState):
                owned |= node.owned
        expected = {
            name: {f"{s.owners.index(rank)}:{s.owners.index(rank) + s.owners.count(rank)}": ()}
            for name, s in planned.stacks.items()
            if rank in s.owners and name not in params
        }
        whole = {n: s.owners[0] == rank for n, s in planned.stacks.items() if n in params}
        expected |= {n: {"owned" if mine else "elsewhere": ()} for n, mine in whole.items()}
        assert owned == expected
        assert sum(x.nbytes for x in tensors(state)) == planned.ranks[rank].state_bytes


def test_matrices_of_muon_cost_what_their_products_cost() -> None:
    """5 steps of X Xᵀ, A A and B X; nothing is refreshed, and vectors are elements alone."""
    cost = CostModel()
    found = plan({"w": (30, 20), "b": (30,)}, 2, transformation=fs.muon(0.1, distribute=fs.sharded))
    flops = 5 * (2 * 20 * 20 * 30 + 2 * 20**3 + 2 * 20 * 20 * 30)
    assert found.stacks["30x20"].seconds == (600 * cost.per_element, cost.per_flop * flops, 0.0)
    assert found.stacks["b"].seconds == (30 * cost.per_element, 0.0, 0.0)


REFRESHES: dict[str, tuple[Any, float]] = {
    "eigh": (fs.shampoo, 1.0),
    "qr": (fs.soap, 0.8),
    "by_rank": (fs.eigenvalue_shampoo, 0.85),
    "coupled_newton": (functools.partial(fs.shampoo, solver=fs.linalg.coupled_newton()), 9.0),
    "newton_schulz": (functools.partial(fs.shampoo, solver=fs.linalg.newton_schulz()), 5.0),
    "function": (functools.partial(fs.shampoo, solver=lambda *args: fs.linalg.eigh()(*args)), 1.0),
}


@pytest.mark.parametrize("name", REFRESHES)
def test_a_refresh_costs_what_its_solver_or_basis_states(name: str) -> None:
    """And it weighs so in the balance; everything else of the model is as it was."""
    recipe, relative = REFRESHES[name]
    shapes, cost = {"w": (96, 32), "small": (24, 24), "b": (64,)}, CostModel()
    for tx in (recipe(0.1), recipe(0.1, distribute=functools.partial(fs.sharded, every=10))):
        found = plan(shapes, 2, transformation=tx).stacks
        for stack in (found["96x32"], found["24x24"]):
            assert stack.seconds.roots == relative * cost.roots(stack.block) / 10
            assert stack.seconds.memory == cost.memory(stack.block)
    state = tx.init({n: torch.zeros(shape) for n, shape in shapes.items()})
    works = works_of(tx, {"96x32": (96, 32), "64": (64,)}, state)
    assert [works[n].refresh_cost for n in ("96x32", "64")] == [relative, relative]
    assert works["64"].sides == ()


def test_what_the_parts_of_a_partition_gather() -> None:
    """Two collectives, each of shards as long as its largest."""
    tx = fs.muon(0.1, distribute=fs.sharded)
    found = plan({"a": (8, 8), "b": (4, 4), "c": (10,), "d": (3,)}, 2, transformation=tx)
    assert found.gathered_bytes == 2 * 64 * 4 + 2 * 10 * 4


def test_stacks_of_one_shape_in_two_scopes() -> None:
    parts = {"a": fs.blocked(fs.trace(0.9)), "b": fs.blocked(fs.scale_by_adam())}
    tx = fs.partition(parts, {"w": "a", "v": "b"})
    found = plan({"w": (8, 8), "v": (8, 8)}, 2, transformation=tx)
    assert {n: s.state_bytes for n, s in found.stacks.items()} == {
        "8x8": 4 * 64,
        "8x8 (2)": 2 * 4 * 64 + 2 * 4,
    }


def test_sides_without_a_factor_cost_nothing() -> None:
    """A vector is its elements; a matrix with one side left alone has the other's root."""
    shapes = {"w": (16, 8), "b": (32,)}
    cost = CostModel()
    tx = fs.shampoo(0.1, exponents={2: {0: 0.0}})
    found = plan(shapes, 2, transformation=tx).stacks
    assert found["32"].seconds == (32 * cost.per_element, 0.0, 0.0)
    assert found["16x8"].seconds.roots == cost.root(8) / 10
    assert found["32"].state_bytes == 4 * 32 * 2 + 4 * 3 + 8 * 2  # moments, weights, the guard's
    blocks = plan(shapes, 2, transformation=fs.shampoo(0.1, vectors="blocks")).stacks
    assert blocks["32"].seconds.roots == cost.root(32) / 10
    adam = plan(shapes, 2, transformation=fs.blocked(fs.scale_by_adam())).stacks
    assert adam["16x8"].seconds == (16 * 8 * cost.per_element, 0.0, 0.0)


def test_modules_shapes_and_tensors_give_the_same_plan() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    module[1].bias.requires_grad_(False)
    tensor_tree = {n: p for n, p in module.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in tensor_tree.items()}
    plans = [plan(model, 3, max_size=8) for model in (module, tensor_tree, shapes)]
    assert plans[0] == plans[1] == plans[2]
    assert plans[0].parameters == 3  # a frozen parameter has no update
    module[1].weight = module[0].weight  # tied: one parameter
    assert plan(module, 3, max_size=8).parameters == 2


def test_what_is_gathered() -> None:
    """Equal shards, as long as the largest, in the dtype of communication."""
    shapes = {"a": (8, 8), "b": (4, 4)}
    for dtype, communicated, itemsize in [
        (torch.float32, None, 4),
        (torch.float32, torch.bfloat16, 2),
        (torch.bfloat16, None, 4),  # half precision is computed in float32
        (torch.float64, None, 8),
    ]:
        found = plan(shapes, 2, dtype=dtype, communication_dtype=communicated)
        assert [rank.elements for rank in found.ranks] == [64, 16]
        assert found.gathered_bytes == 2 * 64 * itemsize
        assert found.parameter_bytes == (64 + 16) * dtype.itemsize


def test_a_rank_holds_the_whole_model_and_all_updates() -> None:
    rows = [line for line in str(plan({"a": (32, 32)}, 4)).splitlines() if "KiB" in line]
    for title in ("parameters", "gradients"):
        assert any(line.startswith(title) and line.count("4 KiB") == 3 for line in rows), title
    assert any(line.startswith("gathered updates") and line.count("16 KiB") == 3 for line in rows)


def test_what_is_in_no_block_is_everybodys() -> None:
    tx = fs.chain(fs.masked(fs.blocked(fs.ema(0.9), 4), {"a": True, "b": False}), fs.trace(0.9))
    found = plan({"a": (8, 4), "b": (5,)}, 2, transformation=tx)
    assert (found.blocks, found.replicated_elements) == (2, 5)
    assert found.replicated_bytes == 4 * (8 * 4 + 5)  # the momentum outside
    assert "In no block: 5 elements, which all ranks do" in str(found)


def test_one_block_too_large_is_named() -> None:
    """More ranks than blocks: no assignment can help, and the plan says so."""
    found = plan({"large": (64, 64), "small": (8,)}, 4)
    assert found.balance == found.best_balance > 3.9
    assert "smaller blocks (max_size)" in str(found)
    assert plan({}, 2).balance == 1


def test_another_cost_model_is_used() -> None:
    shapes = {"thin": (512, 2), "square": (32, 32), "more": (32, 32)}
    free = CostModel(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    by_elements = plan(shapes, 3, cost=free)
    assert [rank.seconds.total for rank in by_elements.ranks] == [1024.0] * 3
    assert plan(shapes, 3).balance > 2.5


def test_plans_are_readable() -> None:
    text = str(plan("resnet-50", 8))
    assert "25,557,032 elements, in 176 blocks" in text
    assert "and 13 more" in text
    assert max(map(len, text.splitlines())) <= 120


def test_columns_are_as_wide_as_what_is_in_them() -> None:
    """Long names of leaves and methods, times from microseconds to days."""
    long = "transformer.layers.10.attention.projection.weight"
    tx = fs.adamw(0.1, distribute=fs.sharded)
    names = plan({long: (640, 64), "b": (4,)}, 2, transformation=tx)
    days = plan({"w": (100_000, 100_000), "b": (4,)}, 2, max_size=None, every=1)
    sharded = plan_sharded({long: (4096, 4096)}, "fsdp", (2,))
    layers = {"a_layer_with_a_long_name": nn.Linear(1024, 1024), "out": nn.Linear(1024, 2)}
    model = nn.Sequential(OrderedDict(layers))
    routed = fs.routing_table(fs.for_model(model, "eigenvalue_shampoo", lr=0.01))
    for found in (names, days, sharded, routed):
        text = str(found)
        tables = [part.splitlines() for part in text.split("\n\n")]
        assert "e+" not in text
        for lines in tables[1:] if found is not routed else [tables[0][:-1]]:
            # Columns are told apart, and what is in the last one ends below each other.
            assert {len(re.split("  +", line.strip())) for line in lines} == {
                len(re.split("  +", lines[0]))
            }
            assert len(set(map(len, lines))) == 1
    assert re.search(r"time per step +\S+ ms +\S+ s +[\d,]+ s", str(days))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("gpt3", 8), {}, ValueError, "model is 'gpt3'.*gpt2"),
        (({"w": (2, 2)}, 0), {}, ValueError, "world_size"),
        (({"w": (2, 2)}, 2), {"every": 0}, ValueError, "every"),
        (({"w": (2, 2)}, 2), {"max_size": 0}, ValueError, "max_size"),
        (({"w": [{"x": 2.0}]}, 2), {}, TypeError, r"model\['w'\]\[0\]\['x'\]"),
        (({"w": torch.zeros(2, dtype=torch.int64)}, 2), {}, TypeError, "'w'"),
        (
            ({"w": (2, 2)}, 2),
            {"transformation": fs.adamw(0.1)},
            ValueError,
            "0 blocked.*distribute=funshampoo.sharded",
        ),
        (
            ({"w": (2, 2)}, 2),
            {"transformation": fs.shampoo(0.1), "max_size": 8},
            ValueError,
            "transformation has blocks of its own",
        ),
    ],
)
def test_bad_input(arguments: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        plan(*arguments, **options)


def test_bad_weights() -> None:
    with pytest.raises(ValueError, match="root_cubic"):
        CostModel(root_cubic=-1.0)


@pytest.mark.parametrize("method", fs.recipes.__all__)
def test_the_program_plans_every_recipe(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    from funshampoo.plan.__main__ import main

    main(["--model", "gpt2", "--ranks", "4", "--method", method])
    tx = getattr(fs, method)(1e-3, distribute=fs.sharded)
    found = plan("gpt2", 4, transformation=tx)
    assert capsys.readouterr().out == f"gpt2\n{found}\n"
    assert found.replicated_elements == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt3", "--ranks", "8"], "argument --model: invalid choice: 'gpt3'"),
        (["--model", "gpt2", "--ranks", "0"], "argument --ranks: '0' is not a whole number"),
        (["--model", "gpt2", "--ranks", "8", "--block-size", "1.5"], "argument --block-size"),
        (["--model", "gpt2", "--ranks", "8", "--method", "adam"], "argument --method"),
        (
            ["--model", "gpt2", "--ranks", "8", "--method", "muon", "--block-size", "8"],
            "muon knows no --block-size",
        ),
    ],
)
def test_the_program_names_a_bad_option(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from funshampoo.plan.__main__ import main

    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_another_process_finds_the_same_owners_and_plan_is_a_function_and_a_program() -> None:
    """Whatever has been imported, and under another hash seed."""
    script = (
        "import runpy, sys;"
        "sys.argv[1:] = '--model gpt2 --ranks 8 --block-size 512 --every 5'.split();"
        "runpy.run_module('funshampoo.plan', run_name='__main__');"
        "import funshampoo, importlib;"
        "importlib.import_module('funshampoo.plan.__main__');"
        "print(funshampoo.plan('resnet-50', 8).stacks)"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    program = f"gpt2\n{plan('gpt2', 8, max_size=512, every=5)}\n"
    assert (done.stdout, done.stderr) == (f"{program}{plan('resnet-50', 8).stacks}\n", "")
