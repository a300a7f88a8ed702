"""A state for torch.distributed.checkpoint: copies that it may write to, checked afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funshampoo.state.checkpoint import FORMAT, FORMAT_KEY, load_state_dict
from funshampoo.state.naming import named
from funshampoo.state.nodes import check_is_state
from funshampoo.state.parts import PART_KEY, part_of


class Checkpoint:
    """A state with torch.distributed.checkpoint's Stateful protocol.

        dcp.save({"optimizer": Checkpoint(state), ...}, checkpoint_id=folder)

        checkpoint = Checkpoint(tx.init(params))
        dcp.load({"optimizer": checkpoint, ...}, checkpoint_id=folder)
        state = checkpoint.state

    Each rank writes and reads what it owns, and the number of ranks may change. dcp finds such
    objects only among the values of the dict it is given, not deeper.

    dcp overwrites the tensors that it gets one after the other, and silently converts dtypes. So it
    gets copies, under names that begin with their dtype: a different dtype means an unknown name.
    What it has read goes through `load_state_dict`.

    Attributes:
        state: as given, until all of it has been loaded.

    >>> import torch
    >>> from funshampoo import trace
    >>> checkpoint = Checkpoint(trace(0.9).init({"w": torch.zeros(2)}))
    >>> sorted(checkpoint.state_dict()["float32"])
    ['w/buffer']
    """

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{dtype: {name: copy}}; writes to it do not reach the state."""
        check_is_state(self.state)
        found: dict[str, dict[str, Tensor]] = {}
        version = torch.tensor(FORMAT, device="cpu")
        entries = [(FORMAT_KEY, version), *[(entry.name, entry.x) for entry in named(self.state)]]
        for name, x in entries:  # no part: dcp knows who saved what
            found.setdefault(str(x.dtype).removeprefix("torch."), {})[name] = x.detach().clone()
        return found

    def load_state_dict(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load what was read into a `state_dict`, or nothing.

        Raises:
            ValueError: see `funshampoo.state.load_state_dict`. On this rank only, if the values
                belong to blocks that others don't have.
        """
        flat = {name: x for entries in saved.values() for name, x in entries.items()}
        own = {PART_KEY: part_of(self.state).entry()}  # dcp reads what this rank owns
        self.state = load_state_dict(self.state, {**flat, **own}).state
