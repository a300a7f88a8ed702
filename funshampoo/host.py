"""Reading a tensor on the host, where that can be done."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch


def unwrapped(tensor: Tensor) -> Tensor | None:
    """The plain tensor below torch.func's wrappers, with their batch axes; None in torch.compile.

    Under a transform `bool` and `int` of a batched tensor raise, although its storage is there to
    be read. Under torch.compile there is no value yet.
    """
    if torch.compiler.is_compiling():
        return None
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def is_traced() -> bool:
    """Whether torch.compile or a transform of torch.func looks at what is done here.

    Then results can't be written into memory that was there before.
    """
    return torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None


def all_true(mask: Tensor) -> bool:
    """Whether every entry is True, over all batch axes; False where it can't be read.

    The caller then has to go on as if the answer were no.
    """
    plain = unwrapped(mask)
    return plain is not None and bool(plain.all())
