"""torch.distributed.checkpoint on one rank: all of a file, checked, or nothing."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.stateful import Stateful

import funshampoo as fs
from funshampoo.state import Checkpoint, check, state_dict
from tests.trees import assert_equal, assert_unchanged, gradients, problem, snapshot, train

TX = fs.shampoo(0.1, max_size=4, momentum=0.9)


def trained(dtype: torch.dtype = torch.float64) -> Any:
    return train(TX, problem(dtype=dtype), gradients(3, dtype), fs.apply_updates)[2]


def quiet(function: Any, content: Any, folder: Path) -> None:
    with warnings.catch_warnings():  # of torch's own
        warnings.simplefilter("ignore")
        function(content, checkpoint_id=folder)


def test_it_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = trained()
    before = snapshot(state)
    quiet(dcp.save, {"optimizer": Checkpoint(state), "epoch": 3}, tmp_path)
    assert_unchanged(before, state)
    fresh = TX.init(problem())
    before = snapshot(fresh)
    checkpoint = Checkpoint(fresh)
    assert isinstance(checkpoint, Stateful)
    quiet(dcp.load, {"optimizer": checkpoint, "epoch": 0}, tmp_path)
    assert_equal(checkpoint.state, state)
    assert_unchanged(before, fresh)


class Damaged(Checkpoint):
    """Saves other values than it has."""

    def __init__(self, state: Any, **damage: Any) -> None:
        super().__init__(state)
        self.damage = damage

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        found = super().state_dict()
        for entries in found.values():
            entries |= {name: x for name, x in self.damage.items() if name in entries}
        return found


def refuse(folder: Path, error: Any, match: str | None) -> None:
    fresh = TX.init(problem())
    before = snapshot(fresh)
    checkpoint = Checkpoint(fresh)
    with pytest.raises(error, match=match):
        quiet(dcp.load, {"optimizer": checkpoint}, folder)
    assert checkpoint.state is fresh
    assert_unchanged(before, fresh)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ({"funshampoo/format": torch.tensor(7)}, "has format 7; this release"),
        ({"clock/steps": torch.tensor(-1)}, "'clock/steps' is negative"),
        (
            {"w/block_0_0/blocked/trace/buffer": torch.full((4, 4), torch.nan).double()},
            "'w/block_0_0/blocked/trace/buffer' is not finite",
        ),
    ],
)
def test_what_was_read_is_checked(tmp_path: Path, damage: Any, match: str) -> None:
    quiet(dcp.save, {"optimizer": Damaged(trained(), **damage)}, tmp_path)
    refuse(tmp_path, ValueError, match)


def test_another_dtype_is_an_error(tmp_path: Path) -> None:
    """dcp converts in silence what is read under one name."""
    quiet(dcp.save, {"optimizer": Checkpoint(trained(torch.float32))}, tmp_path)
    refuse(
        tmp_path, CheckpointException, r"Missing key in checkpoint state_dict: optimizer\.float64"
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_leaves_the_state_alone(tmp_path: Path, share: float) -> None:
    quiet(dcp.save, {"optimizer": Checkpoint(trained())}, tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    os.truncate(file, int(share * file.stat().st_size))
    refuse(tmp_path, CheckpointException, None)


def test_reading_into_the_views_is_not_checked_but_can_be_afterwards(tmp_path: Path) -> None:
    """What the documentation says of the bare way."""
    bad = {name: x.clone() for name, x in state_dict(trained()).items()}
    bad["w/block_0_0/blocked/trace/buffer"][0, 0] = torch.nan
    quiet(dcp.save, {"optimizer": bad}, tmp_path)
    state = TX.init(problem())
    quiet(dcp.load, {"optimizer": state_dict(state)}, tmp_path)
    with pytest.raises(ValueError, match="'w/block_0_0/blocked/trace/buffer' is not finite"):
        check(state)
