"""Reading a tensor on the host, where that can be done."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch


def all_true(mask: Tensor) -> bool:
    """Whether every entry of `mask` is True, over all batch dimensions; False where that can't be read.

    Under torch.func transforms `bool` of a batched tensor raises, although its storage is there to be read: it is
    unwrapped first. Under torch.compile there is no value yet, and the caller has to go on as if the answer were no.
    """
    if torch.compiler.is_compiling():
        return False
    while _functorch.is_functorch_wrapped_tensor(mask):
        mask = _functorch.get_unwrapped(mask)
    return bool(mask.all())
