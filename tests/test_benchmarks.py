"""The benchmarks run, write what they say they write, and count what torch counts."""

from __future__ import annotations

import json
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


def test_a_quick_run_writes_table_numbers_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    printed = run_quickly("roots", tmp_path)

    results = json.loads((tmp_path / "cpu-1-thread.json").read_text())
    assert list(results["sections"]) == ["roots"]
    cells = results["sections"]["roots"]["cells"]
    rows = [row for cell in cells.values() for row in cell["rows"]]
    assert len(rows) == 10
    assert all(row["time"]["ms"] > 0 and row["time"]["runs"] >= 3 for row in rows)
    assert all(row["error"] < 0.01 and row["converged"] == 1 for row in rows)

    written = (tmp_path / "cpu-1-thread.md").read_text()
    lines = [line for line in written.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| stack | solver | ms | error | converged |")
    assert len(lines) == 2 + len(rows)
    assert lines[2].startswith("| 8 of 64×64 | eigh | ")
    assert all(line in printed for line in lines)
    assert (tmp_path / "cpu-1-thread.png").read_bytes().startswith(b"\x89PNG")


def test_a_section_that_is_run_again_leaves_the_others(tmp_path: Path) -> None:
    cell = {"when": "", "others": 0.0, "rows": []}
    other = {"title": "Memory", "about": "", "where": "", "quick": True, "columns": []}
    other |= {"cells": {"MLP": cell}}
    path = tmp_path / "cpu-1-thread.json"
    path.write_text(json.dumps({"device": "cpu-1-thread", "sections": {"memory": other}}))
    run_quickly("roots", tmp_path)
    assert list(json.loads(path.read_text())["sections"]) == ["memory", "roots"]


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
    Q, expected = cholesky_qr(Y), torch.linalg.qr(Y).Q
    assert (Q.mT @ Q - torch.eye(64)).abs().max() < 1e-5
    cosines = (Q * expected).sum(-2).abs()
    assert (cosines - 1).abs().max() < 1e-3
