"""float32 products in float32, whatever precision the process has set.

torch.set_float32_matmul_precision("high"), meant for models, makes a GPU round the operands of
float32 products to 10 bits (TF32), and "medium" makes a CPU that can round them to 7 (bfloat16).
Either applies to the whole process; no context limits it to a thread. So the setting itself is
changed for as long as any thread computes products that must not be rounded, and then restored.

Two interfaces write it: that function, with one value for all devices, and since torch 2.9
torch.backends.*.fp32_precision, one for each backend and operation, where "none" follows the
backend's, and "none" there follows the global one. Products use the second; the first raises if the
two contradict. Both are restored.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from funshampoo.core.forked import whole_at_a_fork

_Place = tuple[str, str]

_HAS_PLACES = hasattr(torch._C, "_get_fp32_precision_getter")  # torch 2.9
_read: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
_write: Any = getattr(torch._C, "_set_fp32_precision_setter", None)

_EVERYTHING: _Place = ("generic", "all")
_ON_CUDA, _ON_CPU = _PRODUCTS = (("cuda", "matmul"), ("mkldnn", "matmul"))
_FULL = ("none", "ieee")


class FullProducts:
    """While any thread is in this context, no product is rounded. Reentrant.

    Other threads see the change for that long. If another precision is set meanwhile, it stays.

    Args:
        own: whether it belongs to a thread in `rounded_products`, whose rounding then resumes.
    """

    _lock = whole_at_a_fork(threading.Lock())

    def __init__(self, own: bool = False) -> None:
        self._own = own
        self._inside = 0
        self._before: Setting | None = None
        self._turn = 0  # odd while any thread is inside

    def needed(self) -> bool:
        """Whether products may be rounded outside it.

        A setting that is full because another thread is inside is about to be restored: hence the
        turn, which has to be even, and the same before and after reading the setting.
        """
        turn = self._turn
        return turn % 2 == 1 or products_are_rounded() or self._turn != turn

    def __enter__(self) -> None:
        with self._lock:
            self._turn += not self._inside
            self._inside += 1
            try:
                if products_are_rounded():
                    now = Setting()
                    now.fill()
                    # Another thread's rounding is not for this one to restore.
                    self._before = now if self._own or not _ROUNDING else _ROUNDING[0]
            except BaseException:
                self._leave()
                raise

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._leave()

    def _leave(self) -> None:
        self._inside -= 1
        if self._inside:
            return
        before, self._before = self._before, None
        if before is not None and not products_are_rounded():
            before.put_back()
        self._turn += 1


_ROUNDING: list[Setting] = []
"""The settings before each of the active `rounded_products` contexts, the oldest first."""


@contextlib.contextmanager
def rounded_products() -> Iterator[None]:
    """Context in which a GPU rounds the operands of float32 products to TF32's 10 bits.

    The setting is process-wide, as above, and restored at the end unless another one has been
    set meanwhile. On a CPU products stay in full precision.
    """
    before, rounds = Setting(), False
    _ROUNDING.append(before)
    try:
        before.round_on_cuda()
        rounds = True
        yield
    finally:
        _ROUNDING.remove(before)
        if not rounds or torch.get_float32_matmul_precision() == "high":
            before.put_back()


def products_are_rounded() -> bool:
    """Whether any device rounds the operands of float32 products."""
    if not _HAS_PLACES:
        return torch.get_float32_matmul_precision() != "highest"
    return _read(*_ON_CUDA) not in _FULL or _read(*_ON_CPU) not in _FULL


class Setting:
    """The current precision of products."""

    def __init__(self) -> None:
        self._places = {place: _own(place) for place in _PRODUCTS} if _HAS_PLACES else {}
        self._overall: str | None = None

    def fill(self) -> None:
        """Set full precision."""
        overall = self._agreed()
        if overall != "highest":
            self._overall = overall
            torch.set_float32_matmul_precision("highest")

    def round_on_cuda(self) -> None:
        """Set TF32 on GPUs through both interfaces: products raise if the two contradict."""
        self._overall = self._agreed()
        torch.set_float32_matmul_precision("high")
        if _ON_CPU in self._places:
            _write(*_ON_CPU, "ieee")

    def _agreed(self) -> str:
        """Set the newer interface to full, then read the older: it could raise if they differ."""
        for place in self._places:
            _write(*place, "ieee")
        return torch.get_float32_matmul_precision()

    def put_back(self) -> None:
        """Restore this setting in both interfaces."""
        if self._overall is not None:
            torch.set_float32_matmul_precision(self._overall)
        for place, value in self._places.items():
            _write(*place, value)


def _own(place: _Place) -> str:
    """The value written there, including "none", which reading would resolve.

    Found by briefly setting what it would follow to full precision.
    """
    value: str = _read(*place)
    above = _above(place)
    if above is None or value in _FULL or _read(*above) != value:
        return value
    followed = _own(above)
    _write(*above, "ieee")
    try:
        return value if _read(*place) == value else "none"
    finally:
        _write(*above, followed)


def _above(place: _Place) -> _Place | None:
    backend, operation = place
    if place == _EVERYTHING:
        return None
    return _EVERYTHING if operation == "all" else (backend, "all")
