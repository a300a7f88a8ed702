"""No step takes a part of a named tuple, as state[1:] is one: torch 2.8 can't trace it."""

from __future__ import annotations

from typing import Any

import pytest

import funshampoo as fs
from tests.table import Case, every_case
from tests.trees import gradients, problem, train


@every_case
def test_no_step_takes_a_part_of_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(node: Any, i: Any) -> Any:
        assert not isinstance(i, slice), f"of a {type(node).__name__}: unpack it instead"
        return tuple.__getitem__(node, i)

    tx, mine = case.make(), 0
    for kind in tuple.__subclasses__():
        if kind.__module__.startswith("funshampoo.") and hasattr(kind, "_fields"):
            monkeypatch.setattr(kind, "__getitem__", entry)
            mine += 1
    assert mine > 50
    train(tx, problem(), gradients(2), fs.apply_updates)
