"""The benchmarks run, write what they say they write, and count what torch counts."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import funshampoo as fs

pytest.importorskip("tqdm")

ROOT = Path(__file__).parents[1]


def run_quickly(section: str, folder: Path) -> str:
    options = ["--quick", "--threads", "1", "--only", section, "--output", folder]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow  # a whole program
def test_a_quick_run_writes_table_numbers_and_picture(tmp_path: Path) -> None:
    """Of one section, and leaves the others."""
    pytest.importorskip("matplotlib")
    cell = {"when": "", "others": 0.0, "rows": []}
    other = {"title": "Memory", "about": "", "where": "", "quick": True, "columns": []}
    other |= {"cells": {"MLP": cell}}
    path = tmp_path / "cpu-1-thread.json"
    path.write_text(json.dumps({"device": "cpu-1-thread", "sections": {"memory": other}}))
    printed = run_quickly("roots", tmp_path)

    results = json.loads(path.read_text())
    assert list(results["sections"]) == ["memory", "roots"]
    cells = results["sections"]["roots"]["cells"]
    rows = [row for cell in cells.values() for row in cell["rows"]]
    assert len(rows) == 10
    assert all(row["time"]["ms"] > 0 and row["time"]["runs"] >= 3 for row in rows)
    assert all(row["error"] < 0.01 and row["converged"] == 1 for row in rows)

    written = (tmp_path / "cpu-1-thread.md").read_text()
    lines = [line for line in written.splitlines() if line.startswith("|")]
    lines = lines[lines.index(next(x for x in lines if x.startswith("| stack"))) :]
    assert lines[0].startswith("| stack | solver | ms | error | converged |")
    assert len(lines) == 2 + len(rows)
    assert lines[2].startswith("| 8 of 64×64 | eigh | ")
    assert all(line in printed for line in lines)
    assert (tmp_path / "cpu-1-thread.png").read_bytes().startswith(b"\x89PNG")


def test_interleaving_takes_turns_and_leaves_the_warm_up_out() -> None:
    from benchmarks.timing import Contender, interleave

    turns: list[str] = []

    def kind(t: int) -> str:
        return "refresh" if t % 4 == 0 else "plain"

    runs = interleave(
        [
            Contender("a", lambda: turns.append("a"), lambda: turns.append("before a")),
            Contender("b", lambda: turns.append("b"), kind=kind, kinds=("plain", "refresh")),
        ],
        device=torch.device("cpu"),
        seconds=0.0,
        least={"plain": 2, "refresh": 2},
        warmup=2,
    )
    assert turns[:6] == ["before a", "a", "b", "before a", "a", "b"]
    assert [run.step for run in runs if run.contender == "b"] == list(range(3, 9))
    assert [run.step for run in runs if run.kind == "refresh"] == [4, 8]


@pytest.mark.parametrize("shape", [(64, 96), (32, 16, 6)])
def test_the_floors_flops_are_those_that_torch_counts(shape: tuple[int, ...]) -> None:
    """Sides are even: of others the products are padded, which no model should ask for."""
    from benchmarks.floor import layout_for, needs_of

    shapes = {"a": shape, "b": shape}
    params = {name: torch.randn(shape) for name in shapes}
    tx = fs.shampoo(0.1, max_size=32)
    state = tx.init(params)
    with FlopCounterMode(display=False) as counter:
        tx.update(params, state, params, refresh=False)  # torch does not count baddbmm_
    modelled = needs_of(layout_for(shapes, 32))
    flops = sum(need.flops for needs in modelled.values() for need in needs)
    assert flops == counter.get_total_flops() > 0


def test_the_clocked_chain_steps_as_the_recipe() -> None:
    """The floor's chain is put together from the recipe's parts: it must not fall behind it."""
    from benchmarks.floor import STAGES, Clock, clocked_shampoo
    from benchmarks.methods import BETAS, LR

    params = {"w": torch.randn(24, 40), "b": torch.randn(5)}
    clock = Clock(torch.device("cpu"))
    recipe = fs.shampoo(LR, beta1=BETAS[0], beta2=BETAS[1], max_size=16, vectors="blocks")
    updates = []
    for tx in (recipe, clocked_shampoo(16, clock)):
        state = tx.init(params)
        for _ in range(2):
            update, state = tx.update(params, state, params)
        updates.append(update)
    assert all(torch.equal(updates[0][name], updates[1][name]) for name in params)
    assert set(clock.spent) == set(STAGES)


@pytest.mark.slow  # a whole program; a group's lines are tested below
def test_a_rehearsal_for_a_gpu_prints_a_line_a_measurement(tmp_path: Path) -> None:
    options = ["--rehearse", "--groups", "products", "--out", tmp_path / "new" / "lines.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.device", *options],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "lines.jsonl").read_text() == done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0]["group"] == "machine"
    assert lines[0]["torch"] == torch.__version__
    assert lines[-1]["group"] == "all"
    assert not any("error" in line or "skipped" in line for line in lines)
    measured = [line for line in lines if "of" in line]
    assert {line["cell"] for line in measured} >= {"16 of 32", "4 of 64"}
    assert all(line["tflops"] > 0 and line["ms_low"] <= line["ms_high"] for line in measured)


def test_a_cell_that_raises_or_has_no_time_leaves_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from benchmarks.device.group import Cell, Setting, run_group

    def broken() -> Iterator[dict[str, object]]:
        yield {"x": 1.0}
        raise ValueError("no")

    def fine() -> list[dict[str, object]]:
        return [{"x": float("nan")}]

    setting = Setting(torch.device("cpu"), True, time.monotonic() + 60)
    cells = [Cell("a", broken), Cell("b", fine, least=90), Cell("c", fine)]
    run_group("g", cells, setting)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["cell"] for line in lines] == ["a", "a", "a", "b", "c", "c"]
    assert [lines[i][key] for i, key in ((0, "x"), (1, "error"), (4, "x"))] == [
        1.0,
        "ValueError: no",
        "nan",
    ]
    assert "skipped" in lines[3]


def test_factors_have_the_spectra_that_were_found() -> None:
    from benchmarks.factors import spectra, stack

    found = stack(64, 10, torch.device("cpu"))
    known = spectra()
    assert found.names[:8] == list(known)
    assert torch.equal(found.A[0], found.A[8])
    assert torch.equal(found.A, found.A.mT)
    values = torch.linalg.eigvalsh(found.A.double())
    assert torch.allclose(values, found.values, rtol=0, atol=1e-6)
    assert torch.allclose(values[:, -1], torch.ones(10).double(), atol=1e-6)
    full = stack(256, 8, torch.device("cpu"))
    assert torch.allclose(full.values[0], known[full.names[0]])  # it was of this side


def test_cholesky_qr_gives_the_basis_of_qr() -> None:
    from benchmarks.device.solvers import case_of, cholesky_qr

    case = case_of(64, 8, torch.device("cpu"))
    Y = case.damped @ case.old
    Q, expected = cholesky_qr(Y, case.old), torch.linalg.qr(Y).Q
    assert (Q.mT @ Q - torch.eye(64)).abs().max() < 1e-5
    cosines = (Q * expected).sum(-2).abs()
    assert (cosines - 1).abs().max() < 5e-3  # the smallest are lifted by 1e-6 of the largest
    assert (cosines - 1).abs()[:, :8].max() < 1e-5


@pytest.mark.slow  # whole programs; what they are made of is tested below
@pytest.mark.parametrize("study", ["family", "defaults"])
def test_a_quick_study_prints_a_table_and_goes_on_where_it_was(study: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    lines = tmp_path / f"{study}-quick.jsonl"

    def again() -> str:
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{study}", "--quick", "--out", tmp_path],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first, whole = again(), lines.read_text()
    assert "never" in first  # four steps
    found = [json.loads(line) for line in whole.splitlines()]
    runs = [line for line in found if "seed" in line]
    assert {run["task"] for run in runs} == {"digits", "text"}
    assert all(run["losses"][-1] > 0 for run in runs)
    costs = [line for line in found if "ms" in line]
    assert all(line["ms"] > 0 for line in costs)
    assert all(line["bytes"] > 0 for line in costs if line["method"])

    kept = whole.splitlines()[: len(found) // 2]
    lines.write_text("".join(line + "\n" for line in kept))
    again()
    now = lines.read_text().splitlines()
    assert now[: len(kept)] == kept
    resumed = [json.loads(line) for line in now]
    key = ("task", "method", "rate", "seed")
    assert sorted(str([x[k] for k in key]) for x in resumed if "seed" in x) == sorted(
        str([x[k] for k in key]) for x in runs
    )
    if study == "family":
        assert (tmp_path / "family.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("best", "found", "at_edge"), [(0.02, 0.03, False), (2.0, 3.0, False)])
def test_a_sweep_goes_on_beyond_an_edge(
    best: float, found: float, at_edge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import ensemble, study

    asked: list[tuple[float, int]] = []

    def train(task: object, method: object, members: list[tuple[float, int]], *_: object) -> list:
        asked.extend(members)
        return [
            ensemble.Run(rate, seed, None, [abs(math.log(rate / best))], 0.5)
            for rate, seed in members
        ]

    monkeypatch.setattr(ensemble, "train", train)
    task = ensemble.characters(steps=1)
    entry = study.Entry(lambda rate, task: fs.adamw(rate))
    store = study.Store(tmp_path / "runs.jsonl")
    result = study.sweep(store, task, "a", entry, tuning=2, seeds=3)
    assert result.rate == found
    assert result.at_edge is at_edge
    assert [run.seed for run in result.runs] == [0, 1, 2]
    assert len(asked) == len(set(asked))
    tuned = sorted({rate for rate, _ in asked})
    assert tuned[0] < found < tuned[-1]
    assert {seed for rate, seed in asked if rate != found} == {0, 1}

    path, done = tmp_path / "runs.jsonl", list(asked)
    assert study.sweep(study.Store(path), task, "a", entry, tuning=2, seeds=3) == result
    assert asked == done  # all is there
    kept = path.read_text().splitlines(keepends=True)[:-2]
    path.write_text("".join(kept))
    assert study.sweep(study.Store(path), task, "a", entry, tuning=2, seeds=3) == result
    assert sorted(asked[len(done) :]) == sorted(done[-2:])  # it goes on where it was


def test_a_sweep_that_never_turns_says_that_it_is_at_an_edge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import ensemble, study

    def train(task: object, method: object, members: list[tuple[float, int]], *_: object) -> list:
        return [ensemble.Run(rate, seed, None, [1 / rate], 0.5) for rate, seed in members]

    monkeypatch.setattr(ensemble, "train", train)
    task = ensemble.characters(steps=1)
    store = study.Store(tmp_path / "runs.jsonl")
    entry = study.Entry(lambda rate, task: fs.adamw(rate))
    assert study.sweep(store, task, "a", entry, tuning=1, seeds=1).at_edge


def test_a_member_of_an_ensemble_trains_as_if_alone() -> None:
    from torch.func import grad

    from benchmarks import ensemble
    from benchmarks.family import METHODS

    task = ensemble.characters(steps=6, width=16, batch=2)._replace(evaluate_every=6)
    entry = METHODS["Shampoo, 1/4, hidden"]
    members = [(0.01, 0), (0.03, 1), (1e30, 1)]  # the last diverges, and the others go on
    runs = ensemble.train(task, entry.method, members)
    loss = ensemble.loss_of(task, task.build())
    for (rate, seed), run in zip(members[:2], runs):
        params, tx = task.start(seed), entry.method(rate, task)
        state = tx.init(params)
        for rows in task.order(seed):
            x, y = (part[rows] for part in task.train)
            updates, state = tx.update(grad(loss)(params, x, y), state, params)
            params = fs.apply_updates(params, updates)
        assert run.final == pytest.approx(loss(params, *task.test).item(), abs=2e-3)
    assert runs[0].final != runs[1].final
    assert runs[2].losses == [None]
    assert math.isinf(runs[2].final)


def test_every_recipe_is_timed_and_refreshed_when_it_says_so() -> None:
    """But for those that are a sum of two tensors; what a step does is told by what it takes."""
    from benchmarks.methods import EVERY, FAMILY
    from funshampoo.recipes import RECIPES

    ours = {m.name.split()[0].strip(","): m for m in FAMILY if m.name.startswith("funshampoo.")}
    left_out = {"adamw", "sgd", "sign_descent"}
    assert {name.removeprefix("funshampoo.") for name in ours} == set(RECIPES) - left_out
    params = {"w": torch.nn.Parameter(torch.randn(6, 5))}
    for method in ours.values():
        contender = method.contender(params, 4, [[torch.randn(6, 5)]])
        before = params["w"].detach().clone()
        for step in range(1, EVERY + 2):
            contender.prepare()
            contender.step()
            assert contender.kind(step) == "plain" or method.refreshes is not None
        kinds = {contender.kind(t) for t in range(2, EVERY + 2)}
        assert kinds == set(contender.kinds), method.name
        assert not params["w"].equal(before), method.name
