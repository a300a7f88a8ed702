"""The examples run as a newcomer runs them: by command, in a process of their own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

SCRIPT = Path(__file__).parents[1] / "examples" / "train.py"
TITLES = {"shampoo": "Shampoo", "adamw": "AdamW", "sgd": "Nesterov SGD"}


def run_script(*arguments: str | Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def numbers_in(folder: Path, task: str) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((folder / f"{task}.json").read_text())
    return numbers


@pytest.mark.parametrize("task", ["digits", "text"])
def test_quick_run_writes_table_plot_and_numbers(task: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    done = run_script("--quick", "--task", task, "--output", folder)
    assert done.returncode == 0, done.stderr

    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{task}:")
    first_words = [line.split("  ")[0] for line in lines]
    assert first_words[2:6] == ["optimizer", *TITLES.values()]
    assert (folder / f"{task}.png").read_bytes().startswith(b"\x89PNG")

    results = numbers_in(folder, task)["results"]
    assert list(results) == list(TITLES)
    for optimizer, summaries in results.items():
        assert [s["rate"] for s in summaries] == [0.01, 0.1]
        losses = [[p["train_loss"] for p in s["runs"][0]["points"]] for s in summaries]
        assert all(loss is not None and math.isfinite(loss) for curve in losses for loss in curve)
        best = min(losses, key=lambda curve: curve[-1])
        assert best[-1] < 0.9 * best[0], optimizer


@pytest.mark.parametrize("loop", ["functional", "wrapper"])
def test_the_stack_of_the_record_trains_the_text_task(loop: str, tmp_path: Path) -> None:
    options = ["--quick", "--task", "text", "--learning-rates", "0.1", "--optimizers", "record"]
    done = run_script(*options, "--loop", loop, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    (summary,) = numbers_in(tmp_path, "text")["results"]["record"]
    points = summary["runs"][0]["points"]
    losses = [p["train_loss"] for p in points]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.8 * losses[0]
    # what is evaluated are the averaged weights
    assert points[-1]["test_loss"] < 0.8 * losses[0]


def test_same_command_gives_the_same_numbers(tmp_path: Path) -> None:
    options = ["--quick", "--steps", "12", "--learning-rates", "0.03", "--optimizers", "shampoo"]
    curves = []
    for name in ("first", "second"):
        done = run_script(*options, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
        run = numbers_in(tmp_path / name, "digits")["results"]["shampoo"][0]["runs"][0]
        curves.append(run["points"])
    assert curves[0] == curves[1]
    assert [point["step"] for point in curves[0]] == [5, 10, 12]


def test_the_wrapper_and_several_ranks_train_the_same_network(tmp_path: Path) -> None:
    """Both loops, alone and under torchrun with two processes: the same losses, up to rounding."""
    options = ["--quick", "--steps", "12", "--learning-rates", "0.03"]
    curves = {}
    for loop in ("functional", "wrapper"):
        for ranks in (1, 2):
            folder = tmp_path / f"{loop}{ranks}"
            done = run_script(*options, "--loop", loop, "--output", folder, ranks=ranks)
            assert done.returncode == 0, done.stderr
            results = numbers_in(folder, "digits")["results"]
            curves[loop, ranks] = [
                point["test_loss"]
                for optimizer in TITLES
                for point in results[optimizer][0]["runs"][0]["points"]
            ]
    alone = curves["functional", 1]
    assert curves["wrapper", 1] == alone
    for loop in ("functional", "wrapper"):
        assert curves[loop, 2] == pytest.approx(alone, rel=1e-2)


def test_shampoo_reaches_the_goal_on_the_digits_in_the_fewest_steps(tmp_path: Path) -> None:
    """The claim of the README: each at its best rate, median over five seeds."""
    done = run_script("--learning-rates", "0.01", "0.03", "0.1", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    results = numbers_in(tmp_path, "digits")["results"]
    steps = {
        optimizer: min(s["steps_to_goal"] or math.inf for s in summaries)
        for optimizer, summaries in results.items()
    }
    assert all(len(s["runs"]) == 5 for s in results["shampoo"])
    assert steps["shampoo"] < min(steps["adamw"], steps["sgd"]) < math.inf, steps
