"""The results as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report import TITLES, Results, goal_of
from runs import Summary, best
from tasks import Task

COLORS = {  # of Okabe and Ito, told apart by everybody, grey, and darker ones of the same hues
    "shampoo": "#d55e00",
    "adamw": "#0072b2",
    "sgd": "#009e73",
    "soap": "#cc79a7",
    "kl_shampoo": "#882255",
    "kl_soap": "#44aa99",
    "muon": "#e69f00",
    "normuon": "#56b4e9",
    "lion": "#f0e442",
    "sign_descent": "#000000",
    "spectral_descent": "#999999",
    "eigenvalue_shampoo": "#8c3d00",
    "splus": "#004a73",
    "soap_muon": "#00664c",
    "record": "#7a4a65",
}


def save(task: Task, results: Results, path: Path) -> None:
    """Test examples and training loss at each one's best rate, and the goal against the rate."""
    figure = Figure(figsize=(13, 4), layout="constrained")  # not pyplot: no window, no state
    test, train, rates = figure.subplots(1, 3)
    for height, summaries in enumerate(results.values(), start=1):
        chosen = best(summaries)
        label = f"{TITLES[chosen.optimizer]}, {chosen.rate:g}"
        field = "accuracy" if task.measure == "accuracy" else "test_loss"
        draw_median(test, chosen, field, label)
        draw_median(train, chosen, "train_loss", label)
        draw_rates(rates, summaries, never_at=(1 + 0.05 * height) * task.steps)

    test.axhline(task.goal, color="gray", linewidth=0.8, linestyle=":")
    test.set(title="On the test examples", xlabel="step", ylabel=f"test {task.measure}")
    if task.measure == "accuracy":
        test.set_ylim(0.8, 1.0)
    train.set(title="On the training examples", xlabel="step", ylabel="loss", yscale="log")
    rates.set(
        title=f"Steps to {goal_of(task)} (✕ never)", xlabel="learning rate", xscale="log", ylim=0
    )
    test.legend(title="at its best learning rate", frameon=False)
    for axes in (test, train, rates):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_median(axes: Axes, summary: Summary, field: str, label: str) -> None:
    """The median over the seeds, and behind it all that lies between the best and the worst."""
    color = COLORS[summary.optimizer]
    steps = [point.step for point in summary.runs[0].points]
    curves = [[getattr(point, field) for point in run.points] for run in summary.runs]
    at_step = list(zip(*curves))
    axes.plot(steps, [median(values) for values in at_step], color=color, label=label)
    lowest, highest = [min(v) for v in at_step], [max(v) for v in at_step]
    axes.fill_between(steps, lowest, highest, color=color, alpha=0.15, linewidth=0)


def draw_rates(axes: Axes, summaries: Sequence[Summary], never_at: float) -> None:
    """Median steps to the goal at each learning rate; a cross at the top where it was not met."""
    color = COLORS[summaries[0].optimizer]
    met = [s for s in summaries if math.isfinite(s.steps_to_goal)]
    never = [s.rate for s in summaries if math.isinf(s.steps_to_goal)]
    axes.plot([s.rate for s in met], [s.steps_to_goal for s in met], "o-", color=color)
    axes.plot(never, [never_at] * len(never), "x", color=color)
