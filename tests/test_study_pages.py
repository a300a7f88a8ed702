"""Pages of studies say what their lines say, and the family's lines are what today's code does."""

from __future__ import annotations

import inspect
from statistics import median
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

from benchmarks import clock, defaults, ensemble, family, step_costs
from benchmarks.device import page
from benchmarks.page import filled
from benchmarks.study import Store
from funshampoo.recipes import RECIPES
from tests.test_docs import python_blocks

LINES = family.RESULTS / "family.jsonl"


@pytest.fixture
def only_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no line is not run."""

    def missing(*_: Any) -> Any:
        raise AssertionError("a line is missing: run the study")

    monkeypatch.setattr(ensemble, "train", missing)
    monkeypatch.setattr(step_costs, "costs", missing)


@pytest.mark.usefixtures("only_lines")
def test_the_tables_of_the_family_are_made_from_its_lines() -> None:
    store = Store(LINES)
    sections = {}
    for name in ensemble.TASKS:
        task, results = family.study(store, name, quick=False)
        assert all(len(result.runs) == family.SEEDS for result in results.values())
        sections[name] = family.section(task, results, store)
    text = family.PAGE.read_text()
    assert filled(text, sections) == text
    assert {line["method"] for line in store.lines} == {*family.METHODS, ""}


@pytest.mark.usefixtures("only_lines")
def test_the_table_of_the_defaults_is_made_from_its_lines() -> None:
    store = Store(defaults.RESULTS / "defaults.jsonl")
    found = defaults.study(store, defaults.entries_of(defaults.VARIANTS), quick=False)
    text = defaults.PAGE.read_text("utf-8")
    assert filled(text, {"defaults": defaults.table(found, store)}) == text


def test_the_table_against_the_clock_is_made_from_its_lines() -> None:
    store = Store(clock.RESULTS / "clock.jsonl")
    assert len(store.lines) == len(clock.METHODS) * (3 + clock.SEEDS - 1)
    text = clock.PAGE.read_text("utf-8")
    assert filled(text, {"clock": clock.table(store, list(clock.METHODS))}) == text


def test_steps_to_a_loss_between_two_looks() -> None:
    run = clock.Run("AdamW", 0.1, 0, [3.0, 2.0, 1.0], [1.0, 2.0, 4.0], 1.0)
    assert clock.when(run, 1.5) == (2.5 * clock.LOOK, 3.0)
    assert clock.when(run, 3.5) == (clock.LOOK, 1.0)
    assert clock.when(run, 0.5) is None


def test_every_recipe_has_a_row() -> None:
    closures = [inspect.getclosurevars(entry.method) for entry in family.METHODS.values()]
    rows = [closure.nonlocals.get("recipe") for closure in closures]
    assert [name for name, recipe in RECIPES.items() if recipe not in rows] == []


def test_a_page_without_a_place_for_a_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place for 'text': write <!-- text -->"):
        filled("<!-- digits --><!-- end of digits --><!-- text -->", {"digits": "", "text": ""})


@pytest.mark.slow
@pytest.mark.parametrize("name", family.METHODS)
def test_a_row_is_what_the_code_does_today(name: str) -> None:
    """Else a default has changed since: give the old value in METHODS, or run the row again.

    In the median of the seeds, and beside the grid's other rates, as the row was: a factor matrix
    of few gradients has a null space, whose basis is rounding's choice, and a vmap of another size
    rounds differently. So does another CPU than that of the lines: there, as much as other
    roundings of the images make.
    """
    then = {run.seed: run for run in Store(LINES).runs("digits", name) if run.rate == 0.01}
    task, points = ensemble.digits(), 3
    short = task._replace(order=lambda seed: task.order(seed)[: points * task.evaluate_every])
    entry = family.METHODS[name]
    members = [(rate, seed) for rate in (0.003, 0.01, 0.03, 0.1) for seed in range(family.SEEDS)]

    def losses(rounding: float = 0.0) -> list[float]:
        images, targets = short.train
        own = short._replace(train=(images * (1 + rounding), targets))
        runs = ensemble.train(own, entry.method, members, entry.averages)
        return [run.final for run in runs if run.rate == 0.01]

    def gap(some: list[float], others: list[float]) -> float:
        return median([abs(a - b) for a, b in zip(some, others)])

    now = losses()
    found = gap(
        now, [float(then[seed].losses[points - 1] or "inf") for seed in range(family.SEEDS)]
    )
    if found >= 0.01:
        assert found < min(0.05, 2 * max(gap(now, losses(1e-6)), gap(now, losses(-1e-6))))


def test_the_tables_of_a_gpu_are_made_from_its_lines() -> None:
    text = page.PAGE.read_text()
    assert filled(text, page.sections(page.lines())) == text


def test_the_code_of_the_gpu_page_trains() -> None:
    layers = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 9)
    model = torch.nn.Sequential(*layers)
    place: dict[str, Any] = {"model": model}
    for block in python_blocks("docs/gpu.md"):
        exec(block, place)
    before = layers[1].weight.detach().clone()
    for _ in range(2):
        model(torch.arange(4)).square().sum().backward()
        place["optimizer"].step()
    assert not torch.equal(layers[1].weight, before)
