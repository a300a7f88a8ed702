"""What a tensor allows here and now: to be read on the host, to be written to."""

from __future__ import annotations

from typing import Any

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


def may_reuse(*operands: Any) -> bool:
    """Whether a tensor just made from these may be written to: nobody traces or batches them.

    A new tensor of many megabytes costs a page fault every 4 KiB, on a CPU often more than the
    arithmetic does.
    """
    if torch.compiler.is_compiling():
        return False
    tensors = [t for t in operands if isinstance(t, Tensor)]
    if not all([t.dtype == tensors[0].dtype and not t.requires_grad for t in tensors]):
        return False
    return not is_traced() or not any(map(_functorch.is_functorch_wrapped_tensor, tensors))
