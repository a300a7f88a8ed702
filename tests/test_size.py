"""Functions that fit on a screen, files of one idea: what CONTRIBUTING.md asks for, counted."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE_LINES = 60  # of a function, without its signature, docstring, comments and blank lines
FILE_LINES = 350

LONG_FUNCTIONS: dict[str, str] = {}  # {"folder/file.py function": why it reads better whole}
LONG_FILES: dict[str, str] = {}  # {"folder/file.py": why it is one idea}

_NO_CODE = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


def lines_of_code(source: str, tree: ast.AST) -> set[int]:
    """The numbers of the lines that are neither blank, nor comments, nor in a docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    spans = [(t.start[0], t.end[0]) for t in tokens if t.type not in _NO_CODE]
    found = {line for first, last in spans for line in range(first, last + 1)}
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            found -= set(range(body[0].lineno, body[0].end_lineno + 1))
    return found


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def functions(source: str, longer_than: int = 0) -> Iterator[tuple[str, int]]:
    """(name, lines of code in the body) of every function, inner ones too, which count twice.

    Args:
        longer_than: leave out those whose bodies have no more lines than that, of any kind.
    """
    tree = ast.parse(source)
    code = None
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = range(node.body[0].lineno, (node.end_lineno or 0) + 1)
            if len(body) > longer_than:
                code = code or lines_of_code(source, tree)
                yield node.name, len(code.intersection(body))


def long_functions(folder: str) -> set[str]:
    return {
        f"{path.relative_to(ROOT).as_posix()} {name}"
        for path in (ROOT / folder).rglob("*.py")
        for name, lines in functions(path.read_text("utf-8"), CODE_LINES)
        if lines > CODE_LINES
    }


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "funshampoo", "notebooks", "tests"])
def test_functions_fit_on_a_screen(folder: str) -> None:
    allowed = {name for name in LONG_FUNCTIONS if name.startswith(f"{folder}/")}
    assert long_functions(folder) == allowed, "cut the function; or the exception is needed no more"


def test_files_are_short() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "funshampoo").rglob("*.py")
        if len(path.read_text("utf-8").splitlines()) > FILE_LINES
    }
    assert found == LONG_FILES.keys(), "split the file by idea; or the exception is needed no more"


def test_what_is_counted() -> None:
    source = '''
def outer(
    a,
    b,
):
    """Two
    lines."""
    # a comment

    text = """one
    string"""

    def inner():
        "No code."
        return (
            a
        )

    return inner, text
'''
    assert dict(functions(source)) == {"outer": 7, "inner": 3}
