"""Writes docs/api.md, the index of public names: `python docs/api.py`. A test compares."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import funshampoo
from funshampoo import (
    authoring,
    blocks,
    linalg,
    migrate,
    models,
    recipes,
    schedules,
    state,
    testing,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"

# Of the package's own names: a title, and the rooms in which they are defined.
ROOMS = {
    "Stages": ("transforms",),
    "Around stages": ("combinators", "blocks", "distributed"),
    "The contract, and a step": ("core",),
    "For torch.optim, and for a model": ("optim", "models"),
    "Before the job": ("plan",),
}
# Of the modules in it: a title, the module, and its names.
MODULES = {
    "Recipes": (recipes, recipes.__all__),
    "Coming from elsewhere": (migrate, migrate.__all__),
    "Models": (models, models.__all__),
    "Block space": (blocks, blocks.__all__),
    "Schedules": (schedules, schedules.__all__),
    "Root solvers and bases": (linalg, linalg.__all__),
    "State, checkpoints and reports": (state, state.__all__),
    "For stages of your own": (authoring, authoring.__all__),
    "Checks for them": (testing, testing.__all__),
}
HEAD = """\
# Every public name

Made by `python docs/api.py` from the docstrings, which say the rest: shapes, dtypes, errors and
sources. What is not here may change without notice.
[stages.md](stages.md) shows how to write what you miss.
"""


def first_sentence(x: Any) -> str:
    """The first paragraph of the docstring, as a cell of a table."""
    paragraph = (inspect.getdoc(x) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).replace("|", "\\|")


def rows(module: Any, names: Iterable[str]) -> list[str]:
    """A row for each that has a docstring: an alias of a type has none."""
    found = {name: getattr(module, name) for name in sorted(names, key=str.lower)}
    return [
        f"| [{name}](../{source_of(x)}) | {first_sentence(x)} |"
        for name, x in found.items()
        if source_of(x)
    ]


def source_of(x: Any) -> str:
    """The file of the package that it is defined in, or ""."""
    if not (inspect.isclass(x) or inspect.isfunction(x) or inspect.ismodule(x)):
        return ""
    module = x if inspect.ismodule(x) else sys.modules[x.__module__]
    return Path(module.__file__ or "").relative_to(ROOT).as_posix()


def section(title: str, module: Any, names: Iterable[str]) -> str:
    """A heading that says what to import from, and a table."""
    heading = f"## {title}\n\n`from {module.__name__} import ...`\n"
    return "\n".join([heading, "| name | what it is |", "| --- | --- |", *rows(module, names), ""])


def page() -> str:
    """The whole page."""
    room = {n: getattr(funshampoo, n).__module__.split(".")[1] for n in own_names()}
    sections = [section("Recipes", *MODULES["Recipes"])]
    for title, rooms in ROOMS.items():
        sections.append(section(title, funshampoo, [n for n, r in room.items() if r in rooms]))
    sections += [section(title, *found) for title, found in MODULES.items() if title != "Recipes"]
    return "\n".join([HEAD, *sections])


def own_names() -> list[str]:
    """Of functions and classes that `import funshampoo` brings."""
    found = {n: getattr(funshampoo, n) for n in funshampoo.__all__}
    return [n for n, x in found.items() if inspect.isclass(x) or inspect.isfunction(x)]


if __name__ == "__main__":
    PAGE.write_text(page())
