"""Imports point one way, as docs/design.md has it: a room knows those below it, at import time."""

from __future__ import annotations

import ast
from pathlib import Path

import funshampoo

PACKAGE = Path(funshampoo.__file__).parent

# Rooms of one row may know each other.
ROWS = [
    {"core", "state.stages", "state.meaning"},  # named tuples, which import nothing else
    {"linalg", "state", "operators"},
    {"combinators", "refresh"},
    {"transforms", "blocks"},
    {"distributed", "recipes"},
    {"migrate", "optim", "plan"},
    {"models"},
]
HEIGHTS = {room: height for height, rooms in enumerate(ROWS) for room in rooms}


def height(module: str) -> int | None:
    """Of `funshampoo.state.stages` as of `funshampoo.state`; None outside of the rooms."""
    _, *path = module.split(".")
    named = [HEIGHTS.get(".".join(path[:n])) for n in (2, 1)]
    return next((found for found in named if found is not None), None)


def imported(path: Path) -> list[str]:
    """What a file imports of the package when it is imported, not when a function is called."""
    found = []
    nodes = list(ast.parse(path.read_text()).body)
    for node in nodes:  # which grows meanwhile
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from funshampoo.state import stages` names a module; `Kept` below it is none.
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.If | ast.Try) and "TYPE_CHECKING" not in ast.dump(node):
            nodes += node.body
    return [name for name in found if name.startswith("funshampoo.")]


def test_every_room_has_a_place() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == {room for room in HEIGHTS if "." not in room} | {"testing"}


def test_no_room_imports_from_above() -> None:
    seen, wrong = 0, []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(["funshampoo", *path.relative_to(PACKAGE).with_suffix("").parts])
        own = height(module)
        for name in imported(path) if own is not None else []:
            other = height(name)
            seen += other is not None
            if other is not None and own is not None and other > own:
                wrong.append(f"{module} imports {name}")
    assert seen > 500
    assert wrong == []


def test_an_import_from_above_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "low.py"
    file.write_text("def f():\n    import funshampoo.optim\n\nfrom funshampoo import blocks\n")
    assert imported(file) == ["funshampoo.blocks"]
    assert height("funshampoo.blocks") > height("funshampoo.state.stages") == 0
