"""A rank that is killed ends the others, and the last checkpoint goes on without it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import funshampoo as fs
from funshampoo.core.wholes import placed_as
from funshampoo.state import load_state_dict, merged, state_dict
from tests.distributed.problems import SMALL, optimizer, train, tree
from tests.distributed.ranks import Ranks, connect
from tests.distributed.test_parts import placed, whole
from tests.trees import assert_equal

pytestmark = pytest.mark.slow  # three more processes

SIZE, STEPS, KILLED_AFTER = 3, 40, 12
OPTIONS = {"max_size": 8}
COLLECTIVE_TIMEOUT = 10.0


def gradient(t: int) -> Any:
    return tree(t, SMALL)


def write_whole(content: Any, path: Path) -> None:
    """A file by this name is complete, whenever the process may die."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(content, unfinished)
    os.replace(unfinished, path)


def job(rank: int, folder: str, parts: bool) -> None:
    """Train, and save every five steps. Says what it is doing, and how it ended, in files.

    Args:
        parts: each rank has a third of the rows of every parameter.
    """
    here = Path(folder)
    connect(rank, SIZE, str(here / "store"), COLLECTIVE_TIMEOUT)
    tx, params = optimizer({}, **OPTIONS), tree(0, SMALL)
    if parts:
        params = placed(params, "rows of 3")
    state = tx.init(params)
    try:
        for t in range(1, STEPS + 1):
            g = gradient(t)
            if parts:
                g = {name: placed_as(params[name], x) for name, x in g.items()}
            updates, state = tx.update(g, state, params, donate=True)
            params = fs.apply_updates(params, updates)
            if t % 5 == 0:
                saved = {"state": state_dict(state), "params": whole(params) if parts else params}
                write_whole(saved, here / f"step{t}-rank{rank}of{SIZE}.pt")
            (here / f"progress{rank}").write_text(str(t))
            if t >= KILLED_AFTER and rank == 1:
                time.sleep(60)  # to be killed while the others are waiting for it
    except RuntimeError as error:
        (here / f"error{rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(3)


def resume(rank: int, folder: str, step: int) -> Any:
    paths = [Path(folder) / f"step{step}-rank{r}of{SIZE}.pt" for r in range(SIZE)]
    parts = [torch.load(path, weights_only=True) for path in paths]
    tx, params = optimizer({}, **OPTIONS), parts[0]["params"]
    loaded = load_state_dict(tx.init(params), merged([part["state"] for part in parts]))
    return train(tx, params, range(step + 1, STEPS + 1), gradient, loaded.state)[0]


def wait_for(path: Path, text: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text() == text):
        assert time.monotonic() < deadline, f"{path.name} did not get to {text}"
        time.sleep(0.02)


@pytest.mark.parametrize("parts", [False, True])
def test_a_killed_rank_ends_the_others_and_training_resumes(
    ranks: Ranks, tmp_path: Path, parts: bool
) -> None:
    context = multiprocessing.get_context("spawn")
    jobs = [
        context.Process(target=job, args=(r, str(tmp_path), parts), daemon=True)
        for r in range(SIZE)
    ]
    try:
        for process in jobs:
            process.start()
        for rank in range(SIZE):
            wait_for(tmp_path / f"progress{rank}", str(KILLED_AFTER))
        killed = jobs[1].pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        since = time.monotonic()
        for process in jobs:
            process.join(COLLECTIVE_TIMEOUT + 10.0)
        assert time.monotonic() - since < COLLECTIVE_TIMEOUT + 5.0
        assert [process.exitcode for process in jobs] == [3, -signal.SIGKILL, 3]
    finally:
        for process in jobs:
            if process.is_alive():
                process.kill()
            process.join()
    for rank in (0, 2):
        error = (tmp_path / f"error{rank}").read_text()
        assert error.startswith(("LostRanksError", "RuntimeError", "Dist"))
        assert (tmp_path / f"progress{rank}").read_text() == str(KILLED_AFTER)

    complete = [
        step
        for step in range(5, STEPS + 1, 5)
        if all((tmp_path / f"step{step}-rank{r}of{SIZE}.pt").exists() for r in range(SIZE))
    ]
    assert complete == [5, 10]
    expected, _ = train(optimizer(**OPTIONS), tree(0, SMALL), range(1, STEPS + 1), gradient)
    for got in ranks(2, resume, str(tmp_path), complete[-1]):
        assert_equal(got, expected)
