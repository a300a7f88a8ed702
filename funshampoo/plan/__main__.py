"""Print the plan of a job: who owns which blocks, and what that costs each rank."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from funshampoo.plan.planner import Plan, plan
from funshampoo.plan.shapes import MODELS
from funshampoo.plan.sharding import ShardingPlan, plan_sharded
from funshampoo.recipes.shampoo import shampoo

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
        found = _sharded(options) if options.sharding else _whole(options)
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.model}\n{found}")


def _whole(options: argparse.Namespace) -> Plan:
    return plan(
        options.model,
        options.ranks,
        max_size=options.block_size,
        merge=options.merge,
        keep=options.keep,
        every=options.every,
        dtype=DTYPES[options.dtype],
        communication_dtype=DTYPES.get(options.communication_dtype),
    )


def _sharded(options: argparse.Namespace) -> ShardingPlan:
    return plan_sharded(
        options.model,
        options.sharding,
        options.mesh,
        transformation=shampoo(
            1e-3,
            max_size=options.block_size,
            merge=options.merge,
            keep=options.keep,
            every=options.every,
        ),
        every=options.every,
        dtype=DTYPES[options.dtype],
        ranks_per_node=options.ranks_per_node,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m funshampoo.plan",
        description="Plan the distribution of Shampoo's blocks over ranks, from shapes alone: no "
        "GPU, no process group, no memory for parameters. Times are modelled for one CPU thread; "
        "compare them with each other. For a model of your own call funshampoo.plan in Python.",
    )
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
        "--block-size",
        type=_size,
        default=1024,
        metavar="N",
        help="longest side of a block, or none to cut nothing; default: 1024",
    )
    parser.add_argument(
        "--every",
        type=_count,
        default=10,
        metavar="N",
        help="steps between two refreshes of the roots; default: 10",
    )
    parser.add_argument(
        "--merge",
        choices=("none", "small", "matrix"),
        default="small",
        help="how sides are merged before the cut; default: small",
    )
    parser.add_argument(
        "--keep",
        type=_count,
        default=2,
        metavar="N",
        help="with --merge small, the sides at which merging stops; default: 2",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the parameters; default: float32"
    )
    parser.add_argument(
        "--communication-dtype",
        choices=DTYPES,
        help="in which updates are gathered; default: as computed, float32 for half precision",
    )
    return parser


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
