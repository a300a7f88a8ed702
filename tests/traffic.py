"""What a GPU would have to launch and to move for some code, counted on the meta device."""

from __future__ import annotations

import collections
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trees import tensors

NOT_LAUNCHED = ("view", "as_strided", "detach", "transpose", "permute", "expand", "unsqueeze")
NOT_LAUNCHED += ("squeeze", "slice", "split", "unbind", "select.int", ".t.default", "alias")
NOT_LAUNCHED += ("empty", "lift_fresh")
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


class Traffic(TorchDispatchMode):
    """Operators that do something to numbers, their launches, and the bytes of what they touch.

    A foreach operator is one launch if its lists pair tensors of one shape, dtype and layout, and
    else one for every tensor, as torch has it on a GPU. What it writes to is read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: collections.Counter[str] = collections.Counter()
        self.moved: collections.Counter[str] = collections.Counter()

    @property
    def operators(self) -> int:
        return sum(self.launches.values())

    @property
    def bytes(self) -> int:
        return sum(self.moved.values())

    def beside_products(self) -> int:
        """Bytes of what multiplies no matrices."""
        return sum([n for name, n in self.moved.items() if name not in PRODUCTS])

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        name = str(function).split(".")[1]
        foreach = name.startswith("_foreach")
        written = args[0] if foreach and name.endswith("_") else []
        given = {n: x for n, x in (kwargs or {}).items() if n != "out"}  # which is the result
        touched = [x for x in tensors([list(args), given, out, written]) if x.is_meta]
        # A constant; it is made anew in a mode alone.
        made_once = name in ("zeros", "ones", "full") and out.numel() == 1
        if touched and not made_once and not any(n in str(function) for n in NOT_LAUNCHED):
            self.launches[name] += _launches(args) if foreach else 1
            self.moved[name] += sum(x.nbytes for x in touched)
        return out


def _launches(args: tuple[Any, ...]) -> int:
    lists = [x for x in args if isinstance(x, (list, tuple)) and isinstance(x[0], Tensor)]
    fast = all([len({_kind(x) for x in row}) == 1 for row in zip(*lists)])
    return 1 if fast else len(lists[0])


def _kind(x: Tensor) -> Any:
    return x.shape, x.stride(), x.dtype, x.device
