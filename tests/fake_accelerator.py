"""Steps on an accelerator that is not there: `python -m tests.fake_accelerator [name ...]`.

Its tensors are FakeTensors: they say where a result lies, refuse operands of two devices, and have
no values, so that a step which waits for the device to read one is an error. A process of its own,
since the device, once registered, is there for all that come later.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import backend_registration

import funshampoo as fs
from funshampoo.combinators import failures
from funshampoo.core.tree import map_leaves
from tests.table import CASES, Case
from tests.trees import problem

# These look at what they found to know what there is to do, as their docstrings say; or at a
# counter on the CPU, which is no real one here either.
READ = {
    "inject_hyperparams:adaptive",
    "multi_steps",
    "multi_steps:shampoo",
    "root_inverse:adaptive",
    "root_inverse:adaptive_unblocked",
    "root_inverse:newton",
    "root_inverse:staggered_adaptive",
    "shampoo:adaptive",
}
# cuda_graphed refuses these
COUNTED_ON_THE_HOST = {"multi_steps", "multi_steps:shampoo", "sharded", "shampoo:sharded"}
COUNTED_ON_THE_HOST |= {"muon:sharded"}
DEVICE = "imagined"
TENSOR = torch.tensor


def like(tree: Any) -> Any:
    return map_leaves(lambda x: torch.randn(x.shape, device=DEVICE), tree)


def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """torch.tensor, which would ask for memory of the device."""
    found = TENSOR(data, **options)
    if device is None:
        return found
    return torch.empty(found.shape, dtype=found.dtype, device=device)


def steps(case: Case) -> None:
    """Four, in place and not, on none of which the limit of failures is looked at."""
    unread = mock.patch.object(failures, "unwrapped", return_value=None)
    with mock.patch("torch.tensor", tensor), unread, FakeTensorMode():
        tx, params = case.make(), like(problem())
        state = tx.init(params)
        for step in range(1, 3):
            _, state = tx.update(like(params), state, params, step=step)
            state = fs.update_in_place(tx, like(params), state, params, step=step)
        if case.name not in COUNTED_ON_THE_HOST:
            fs.update_in_place(tx, like(params), counting_there(state), params, step=3)


def counting_there(state: Any) -> Any:
    """As `cuda_graphed` steps it: all that counts is where a graph can change it."""
    return map_leaves(
        lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) and x.is_cpu else x, state
    )


def problems(cases: list[Case]) -> Iterator[str]:
    for case in cases:
        try:
            steps(case)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            if case.name not in READ:
                yield f"{case.name} reads the device: {error}"
        except Exception as error:
            yield f"{case.name}: {type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            if case.name in READ:
                yield f"{case.name} does not read the device any more: take it out of the list"


if __name__ == "__main__":
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    wanted = [case for case in CASES if not sys.argv[1:] or case.name in sys.argv[1:]]
    found = list(problems(wanted))
    print(f"{len(wanted)} cases", *found, sep="\n")
    sys.exit(1 if found or not wanted else 0)
