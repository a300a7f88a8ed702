"""Print the plan of a job: who owns which blocks, and what that costs each rank."""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from funshampoo import recipes
from funshampoo.core.contract import GradientTransformation
from funshampoo.distributed.sharded import sharded
from funshampoo.plan.planner import Plan, plan
from funshampoo.plan.shapes import MODELS
from funshampoo.plan.sharding import ShardingPlan, plan_sharded

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line (`sys.argv` by default) and print the plan."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.sharding is None) != (options.mesh is None) or (options.sharding and options.ranks):
        parser.error("give --ranks; or --sharding and --mesh, for sharded parameters")
    if options.sharding is None and options.ranks is None:
        parser.error("the following arguments are required: --ranks")
    try:
        given: dict[str, Any] = {
            "transformation": _transformation(parser, options),
            "every": getattr(options, "every", 10),
            "dtype": DTYPES[options.dtype],
        }
        found: Plan | ShardingPlan
        if options.sharding:
            job = options.model, options.sharding, options.mesh
            found = plan_sharded(*job, ranks_per_node=options.ranks_per_node, **given)
        else:
            on_the_way = DTYPES.get(options.communication_dtype)
            found = plan(options.model, options.ranks, communication_dtype=on_the_way, **given)
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.model}\n{found}")


def _transformation(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> GradientTransformation:
    """The method, sharded over ranks, with the given block options."""
    recipe: Callable[..., GradientTransformation] = getattr(recipes, options.method)
    arguments = {"max_size": "block_size", "merge": "merge", "keep": "keep", "every": "every"}
    known = inspect.signature(recipe).parameters
    given = {}
    for argument, option in arguments.items():
        if not hasattr(options, option):
            continue
        if argument not in known:
            parser.error(f"{options.method} knows no --{option.replace('_', '-')}")
        given[argument] = getattr(options, option)
    return recipe(1e-3, distribute=sharded, **given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m funshampoo.plan",
        description="Plan the distribution of a method's blocks over ranks, from shapes alone: no "
        "GPU, no process group, no memory for parameters. Times are modelled for one CPU thread; "
        "compare them with each other. For a model of your own call funshampoo.plan in Python.",
    )
    _add_job(parser)
    _add_method(parser)
    return parser


def _add_job(parser: argparse.ArgumentParser) -> None:
    """Add the model, the ranks that train it, and dtypes."""
    parser.add_argument(
        "--model", required=True, choices=MODELS, help=f"one of {', '.join(MODELS)}", metavar="NAME"
    )
    parser.add_argument(
        "--ranks", type=_count, metavar="N", help="ranks that share the blocks of whole parameters"
    )
    parser.add_argument(
        "--sharding",
        choices=("fsdp", "hsdp", "tp", "fsdp+tp"),
        help="in place of --ranks: how the parameters themselves are sharded",
    )
    parser.add_argument(
        "--mesh",
        type=_mesh,
        metavar="NxM",
        help="its ranks: N, for hsdp replicas x shards, for fsdp+tp shards x tensor",
    )
    parser.add_argument(
        "--ranks-per-node",
        type=_count,
        default=8,
        metavar="N",
        help="with --sharding, consecutive ranks that share a node; default: 8",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the parameters; default: float32"
    )
    parser.add_argument(
        "--communication-dtype",
        choices=DTYPES,
        help="in which updates are gathered; default: as computed, float32 for half precision",
    )


def _add_method(parser: argparse.ArgumentParser) -> None:
    """Add the recipe, and its arguments that change blocks or cost; omitted: its defaults."""
    parser.add_argument(
        "--method",
        choices=recipes.__all__,
        default="shampoo",
        metavar="NAME",
        help=f"one of {', '.join(recipes.__all__)}; default: shampoo",
    )
    add = functools.partial(parser.add_argument, default=argparse.SUPPRESS)
    add(
        "--block-size",
        type=_size,
        metavar="N",
        help="longest side of a block, or none to cut nothing; default: 1024",
    )
    add("--every", type=_count, metavar="N", help="steps between two refreshes; default: 10")
    add(
        "--merge",
        choices=("none", "small", "matrix"),
        help="how sides are merged before the cut; default: small",
    )
    add(
        "--keep",
        type=_count,
        metavar="N",
        help="with --merge small, the sides at which merging stops; default: 2",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _mesh(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split("x")))


def _size(text: str) -> int | None:
    return None if text == "none" else _count(text)


if __name__ == "__main__":
    main()
