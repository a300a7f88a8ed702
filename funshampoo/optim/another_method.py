"""Checkpoints that another method wrote, or another optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from funshampoo.optim.entries import is_note
from funshampoo.optim.group import GroupRun
from funshampoo.optim.vocabulary import Vocabulary
from funshampoo.recipes import RECIPES
from funshampoo.state.misfits import listed

_REMEDY = (
    "Nothing was changed. Construct the optimizer that wrote it, or load only the parameters, and "
    "begin with a new state."
)
_LATER = {"guard", "nesterov"}  # what recipes have got since: older checkpoints lack it


@contextlib.contextmanager
def told_of_method(
    run: GroupRun,
    group: Mapping[str, Any],
    state: Mapping[Any, Mapping[str, Any]],
    kinds: type[Exception] | tuple[type[Exception], ...],
) -> Iterator[None]:
    """A context whose errors begin with the fact that a checkpoint is of another method, if it is.

    Not refused for that alone: another method's may fit, as lion's fits sign_descent.

    Args:
        run: into which it is loaded.
        group, state: its group, and what was saved of all parameters.
        kinds: the errors that may come of it.
    """
    try:
        yield
    except kinds as error:
        check_not_foreign(state, error)
        ours = run.vocabulary()
        lacking, others = _differing(ours, run.group, group)
        if not (lacking or others):
            raise
        differs = [
            f"{verb} {listed(n, 3)}" for verb, n in (("lack", lacking), ("have", others)) if n
        ]
        raise ValueError(
            f"the checkpoint is of another method than {ours.method_name}: its groups "
            f"{', and '.join(differs)}. {_REMEDY}\n{error}"
        ) from error


def _differing(
    ours: Vocabulary, here: Mapping[str, Any], saved: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """(hyperparameters of our method that a saved group lacks, those of others that it has).

    What the group here has too is no sign of another: if it has a method of its own, it also has
    what all groups have by default.
    """
    lacking = ours.defaults({}).keys() - saved.keys() - _LATER
    if ours.takes_any:  # those of others may be an option of ours that was not given here
        return sorted(lacking), []
    known = {name for recipe in RECIPES.values() for name in Vocabulary(recipe).defaults({})}
    return sorted(lacking), sorted((saved.keys() & known) - here.keys())


def check_not_foreign(
    state: Mapping[Any, Mapping[str, Any]], error: Exception | None = None
) -> None:
    """Check that a state is not another optimizer's: all of it would be taken for notes.

    Ours has a label, too.

    Args:
        error: what came of it.

    Raises:
        ValueError: it is.
    """
    names = sorted({str(name) for entries in state.values() for name in entries})
    if names and all(map(is_note, names)):
        raise ValueError(
            f"the checkpoint is of another optimizer, which keeps {listed(names, 3)} for a "
            f"parameter. {_REMEDY}" + (f"\n{error}" if error else "")
        ) from error
