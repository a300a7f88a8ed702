"""Checkpoints of N ranks go on on M, bit for bit."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import funshampoo as fs
from funshampoo.state import Checkpoint, load_state_dict, merged, state_dict
from funshampoo.state.parts import Part
from tests.distributed.problems import SMALL, optimizer, train, tree
from tests.distributed.ranks import Ranks
from tests.sooner import these
from tests.trees import assert_equal, assert_unchanged, snapshot

DCP = ("dcp", "bare dcp")
OPTIONS = {"max_size": 8, "stagger": True}
FIRST, SECOND = range(1, 8), range(8, 14)  # in the middle of a round of refreshes


def gradient(t: int) -> Any:
    return tree(t, SMALL)


@functools.cache
def single_run() -> tuple[Any, dict[str, torch.Tensor]]:
    params, state = train(optimizer(**OPTIONS), tree(0, SMALL), range(1, SECOND.stop), gradient)
    return params, state_dict(state)


def assert_goes_on(found: list[Any]) -> None:
    """Parameters and all of the state are those of a run that was never interrupted."""
    params, whole = single_run()
    for got, _ in found:
        assert_equal(got, params)
    together = merged([saved for _, saved in found])
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], x) for name, x in whole.items())


def chain_for(size: int) -> fs.GradientTransformation:
    """Without sharding on one rank: what was shared out loads into a plain chain and back."""
    return optimizer({} if size > 1 else None, **OPTIONS)


def write(rank: int, folder: str, kind: str) -> None:
    params, state = train(chain_for(dist.get_world_size()), tree(0, SMALL), FIRST, gradient)
    saved = state_dict(state)
    if kind in DCP:
        content = Checkpoint(state) if kind == "dcp" else saved
        quiet_dcp(dcp.save, {"optimizer": content, "params": params}, folder)
        return
    if rank == 0:
        torch.save(params, f"{folder}/params.pt")
    if kind == "torch":
        torch.save(saved, f"{folder}/{rank}.pt")
    else:
        from safetensors.torch import save_file

        save_file({name: x.contiguous() for name, x in saved.items()}, f"{folder}/{rank}.st")


def read(rank: int, folder: str, kind: str) -> Any:
    tx = chain_for(dist.get_world_size())
    params = tree(7, SMALL)  # to be replaced
    state = tx.init(params)
    if kind in DCP:
        # Every rank reads its own part of all files; bare, into the tensors of its fresh state.
        checkpoint = Checkpoint(state)
        content = checkpoint if kind == "dcp" else state_dict(state)
        quiet_dcp(dcp.load, {"optimizer": content, "params": params}, folder)
        state = checkpoint.state
    else:
        params = torch.load(f"{folder}/params.pt", weights_only=True)
        state = load_state_dict(state, merged(parts_in(folder, kind))).state
    params, state = train(tx, params, SECOND, gradient, state)
    return params, state_dict(state)


def parts_in(folder: str, kind: str) -> list[dict[str, torch.Tensor]]:
    if kind == "torch":
        return [torch.load(path, weights_only=True) for path in Path(folder).glob("[0-9]*.pt")]
    from safetensors.torch import load_file

    return [load_file(path) for path in Path(folder).glob("*.st")]


def quiet_dcp(function: Any, content: Any, folder: str) -> None:
    with warnings.catch_warnings():  # of torch's own deprecations
        warnings.simplefilter("ignore")
        function(content, checkpoint_id=folder)


@pytest.mark.parametrize("kind", these(["torch", *DCP, "safetensors"], sooner=["torch", "dcp"]))
def test_three_ranks_save_and_one_two_or_four_go_on(
    ranks: Ranks, tmp_path: Path, kind: str
) -> None:
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    ranks(3, write, str(tmp_path), kind)
    for size in (1, 2, 4):
        assert_goes_on(ranks(size, read, str(tmp_path), kind))


@pytest.mark.parametrize("kind", ["torch", *DCP])
def test_one_rank_saves_and_three_go_on(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    ranks(1, write, str(tmp_path), kind)
    assert_goes_on(ranks(3, read, str(tmp_path), kind))


def read_and_write(rank: int, old: str, new: str) -> None:
    checkpoint = Checkpoint(chain_for(dist.get_world_size()).init(tree(7, SMALL)))
    params = tree(7, SMALL)
    quiet_dcp(dcp.load, {"optimizer": checkpoint, "params": params}, old)
    quiet_dcp(dcp.save, {"optimizer": checkpoint, "params": params}, new)


def test_two_ranks_then_one_then_three(ranks: Ranks, tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    ranks(2, write, str(two), "dcp")
    ranks(1, read_and_write, str(two), str(one))
    assert_goes_on(ranks(3, read, str(one), "dcp"))


def dcp_refused(rank: int, folder: str) -> str:
    state = chain_for(dist.get_world_size()).init(tree(0, SMALL))
    before = snapshot(state)
    checkpoint = Checkpoint(state)
    try:
        quiet_dcp(dcp.load, {"optimizer": checkpoint}, folder)
    except (dcp.api.CheckpointException, ValueError) as error:
        assert checkpoint.state is state
        assert_unchanged(before, state)
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_truncated_part_is_an_error_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, write, str(tmp_path), "dcp")
    files = sorted(tmp_path.glob("*.distcp"))
    os.truncate(files[1], files[1].stat().st_size // 2)
    for size in (1, 3):
        for message in ranks(size, dcp_refused, str(tmp_path)):
            assert "CheckpointException" in message


def own_part(rank: int, folder: str, kind: str, whose: int) -> Any:
    """A rank that has its own part only, or somebody else's."""
    state = chain_for(dist.get_world_size()).init(tree(7, SMALL))
    saved = torch.load(f"{folder}/{(rank + whose) % 3}.pt", weights_only=True)
    try:
        return state_dict(load_state_dict(state, saved).state)
    except ValueError as error:
        return str(error)


def test_the_part_of_a_rank_loads_there_and_nowhere_else(ranks: Ranks, tmp_path: Path) -> None:
    ranks(3, write, str(tmp_path), "torch")
    parts = parts_in(str(tmp_path), "torch")
    said = [Part.read(part["funshampoo/part"]) for part in parts]
    assert sorted(part[:2] for part in said) == [(0, 3), (1, 3), (2, 3)]
    together, expected = merged(ranks(3, own_part, str(tmp_path), "torch", 0)), merged(parts)
    assert all(torch.equal(together[name], x) for name, x in expected.items())
    for rank, message in enumerate(ranks(3, own_part, str(tmp_path), "torch", 1)):
        assert f"the part of rank {(rank + 1) % 3} of 3: save every rank's" in message
    for message in ranks(2, own_part, str(tmp_path), "torch", 0):
        assert "of 3: save every rank's" in message


def poisoned(rank: int, folder: str) -> str:
    whole = merged(parts_in(folder, "torch"))
    name = next(name for name in whole if name.endswith("ema/average"))
    whole[name] = whole[name] * torch.nan
    state = chain_for(dist.get_world_size()).init(tree(7, SMALL))
    mine = name in state_dict(state)
    try:
        load_state_dict(state, whole)
    except ValueError as error:
        return f"{mine} '{name}' is not finite" if f"'{name}' is not finite" in str(error) else ""
    return ""


def test_a_value_of_one_rank_is_refused_by_all(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, write, str(tmp_path), "torch")
    messages = ranks(2, poisoned, str(tmp_path))
    assert sorted(message.split()[0] for message in messages) == ["False", "True"]


def test_each_rank_writes_its_own_part_alone(ranks: Ranks, tmp_path: Path) -> None:
    """Also through torch.distributed.checkpoint: together as much as one rank has."""
    (tmp_path / "files").mkdir()
    ranks(3, write, str(tmp_path / "files"), "torch")
    parts = parts_in(str(tmp_path / "files"), "torch")
    sizes = [sum(x.nbytes for x in part.values()) for part in parts]
    _, whole = single_run()
    shared = sum(x.nbytes for name, x in whole.items() if "/block" not in name)
    total = sum(x.nbytes for x in whole.values())
    assert sum(sizes) == total + 2 * shared  # the counters are everybody's
    assert max(sizes) < 0.5 * total

    ranks(3, write, str(tmp_path / "dcp"), "dcp")
    metadata = dcp.FileSystemReader(tmp_path / "dcp").read_metadata()
    assert metadata.storage_data is not None
    writers: dict[str, list[str]] = {}
    for index, info in metadata.storage_data.items():
        writers.setdefault(index.fqn, []).append(info.relative_path)
    dtype_of = {name: str(x.dtype).removeprefix("torch.") for name, x in whole.items()}
    full = {name: f"optimizer.{dtype}.{name}" for name, dtype in dtype_of.items()}
    assert {full[name] for name in whole if name != "funshampoo/part"} <= writers.keys()
    assert all(len(files) == 1 for files in writers.values())  # each tensor once
    owners = [{name for name in part if "/block" in name} for part in parts]
    files = [{writers[full[name]][0] for name in mine} for mine in owners]
    assert all(len(mine) == 1 for mine in files)  # and all of a rank's in one file
    assert len(set.union(*files)) == 3


def load_incomplete(rank: int, folder: str) -> str:
    tx, params = optimizer({}, **OPTIONS), tree(0, SMALL)
    state = tx.init(params)
    before = snapshot(state)
    try:
        load_state_dict(state, merged(parts_in(folder, "torch")))
    except ValueError as error:
        assert_unchanged(before, state)
        return str(error)
    return ""


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_file_is_an_error_on_all_ranks(ranks: Ranks, tmp_path: Path, lost: int) -> None:
    """Also on the ranks that need nothing of it: else they would train on without the others."""
    ranks(3, write, str(tmp_path), "torch")
    os.remove(tmp_path / f"{lost}.pt")
    for size in (1, 2, 3, 4):
        for message in ranks(size, load_incomplete, str(tmp_path)):
            assert f"of the parts of 3 ranks, that of rank {lost} is missing" in message


def other_blocks(rank: int, folder: str, max_size: int) -> str:
    tx, params = optimizer({}, max_size=max_size, stagger=True), tree(0, SMALL)
    try:
        load_state_dict(tx.init(params), merged(parts_in(folder, "torch")))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("max_size", [4, 16])
def test_another_block_size_is_an_error(ranks: Ranks, tmp_path: Path, max_size: int) -> None:
    ranks(3, write, str(tmp_path), "torch")
    for message in ranks(2, other_blocks, str(tmp_path), max_size):
        assert "Blocks of other shapes or names come from another max_size" in message


def parts_of_other_steps(rank: int) -> Any:
    steps = range(1, 5 + rank)  # rank 1 goes on alone for a step: not sharded, so nobody waits
    _, state = train(optimizer(**OPTIONS), tree(0, SMALL), steps, gradient)
    return state_dict(state)


def test_parts_of_different_steps_do_not_merge(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match="not saved at the same step"):
        merged(ranks(2, parts_of_other_steps))


def zero(rank: int, steps: range, parts: Any) -> Any:
    """Leaf by leaf."""
    tx = fs.chain(fs.sharded(fs.scale_by_adam()), fs.scale_by_learning_rate(0.1))
    params = tree(0, SMALL)
    state = tx.init(params)
    if parts:
        params = parts[0][0]
        state = load_state_dict(state, merged([saved for _, saved in parts])).state
    params, state = train(tx, params, steps, gradient, state)
    return params, state_dict(state)


def refused_leaves(rank: int, parts: Any) -> str:
    try:
        zero(rank, range(5, 9), parts)
    except ValueError as error:
        return str(error)
    return ""


def test_leaf_by_leaf(ranks: Ranks) -> None:
    whole = ranks(1, zero, range(1, 9), None)
    parts = ranks(3, zero, range(1, 5), None)
    for size in (1, 2, 4):
        found = ranks(size, zero, range(5, 9), parts)
        assert_equal(found[0][0], whole[0][0])
        together = merged([saved for _, saved in found])
        assert together.keys() == whole[0][1].keys()
        assert all(torch.equal(together[name], x) for name, x in whole[0][1].items())
    for message in ranks(2, refused_leaves, parts[:2]):
        assert "that of rank 2 is missing" in message


def partitioned(rank: int, steps: range, parts: Any) -> Any:
    """Matrices in blocks, the rest leaf by leaf, each shared out by itself."""
    labels = {name: "blocks" if name == "w" else "leaves" for name in SMALL}
    leaves = fs.chain(fs.sharded(fs.scale_by_adam()), fs.scale_by_learning_rate(0.1))
    tx = fs.partition({"blocks": optimizer({}, **OPTIONS), "leaves": leaves}, labels)
    params = tree(0, SMALL)
    state = tx.init(params)
    if parts:
        params = parts[0][0]
        state = load_state_dict(state, merged([saved for _, saved in parts])).state
    params, state = train(tx, params, steps, gradient, state)
    return params, state_dict(state)


def test_blocks_and_leaves_side_by_side(ranks: Ranks) -> None:
    ((expected, _),) = ranks(1, partitioned, range(1, 9), None)
    parts = ranks(2, partitioned, range(1, 5), None)
    for got, _ in ranks(3, partitioned, range(5, 9), parts):
        assert_equal(got, expected)
