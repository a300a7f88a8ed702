"""What can be done with a tensor here: read it on the host, write to it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from funshampoo.core.placed import SEEN, are_alike, local_parts
from funshampoo.core.precision import FullProducts, rounded_products


def unwrapped(tensor: Tensor) -> Tensor | None:
    """The plain tensor below torch.func's wrappers, with their batch axes; None in torch.compile.

    Under a transform `bool` and `int` of a batched tensor raise, although its storage could be
    read. Under torch.compile there is no value yet.
    """
    if torch.compiler.is_dynamo_compiling():
        return None
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def is_traced() -> bool:
    """Whether torch.compile or a torch.func transform is active.

    If so, results can't be written into existing memory.
    """
    # One Python call where is_compiling() is two. The checks that a step makes for every product
    # and every column (`is_plain`, `products.is_plain_memory`) inline this code.
    return (
        torch.compiler.is_dynamo_compiling()
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def is_differentiated(*tensors: Any) -> bool:
    """Whether a derivative of the results may be needed, backward or forward.

    Only the innermost torch.func transform shows in `requires_grad`, so all levels are checked;
    while a forward one is active, anything may have a tangent.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(
        [isinstance(x, Tensor) and _requires_grad(x) for x in tensors]
    )


def _requires_grad(x: Tensor) -> bool:
    while not x.requires_grad:
        if torch.compiler.is_dynamo_compiling() or not _functorch.is_functorch_wrapped_tensor(x):
            return False
        x = _functorch.get_unwrapped(x)
    return True


def is_plain(*columns: Iterable[Tensor]) -> bool:
    """Whether foreach operators accept these.

    They do if these are not traced, batched or differentiated, and DTensors have one mesh.
    """
    if torch.compiler.is_dynamo_compiling() or _functorch.peek_interpreter_stack() is not None:
        return False
    if forward_ad._current_level >= 0:
        return False
    if SEEN["any"] and not are_alike(itertools.chain(*columns)):
        return False
    if not torch.is_grad_enabled():
        return True
    for column in columns:
        for x in column:
            if x.requires_grad:
                return False
    return True


def are_apart(tensors: Sequence[Tensor], blocks: bool = False) -> bool:
    """Whether a foreach operator may write to all of these at once: no two share an entry.

    On a GPU it is one kernel, in which tied parameters would lose an update. A CPU goes one by one.

    Args:
        blocks: whether they are blocks of leaves, for which start addresses suffice: those of one
            leaf interleave.
    """
    if all([x.is_cpu for x in tensors]):
        return True
    if not blocks:
        return lie_apart(tensors)
    places = [x.data_ptr() for x in _somewhere(tensors)]
    return len(set(places)) == len(places)


def lie_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether no two of these, except empty ones, start at one address or overlap in extent.

    Interleaved tensors without a common entry, such as columns of a matrix, count as overlapping.
    On the meta device none overlap.
    """
    own = _somewhere(tensors)
    spans = [(x.data_ptr(), x.nbytes if x.is_contiguous() else _extent(x)) for x in own]
    ends = 0
    for begin, length in sorted(spans):
        if begin < ends:
            return False
        ends = begin + length
    return True


def _somewhere(tensors: Sequence[Tensor]) -> list[Tensor]:
    own = local_parts(tensors) if SEEN["any"] else tensors  # a DTensor itself has no address
    return [x for x in own if x.numel() and not x.is_meta]


def _extent(x: Tensor) -> int:
    """Bytes from the first entry to the end of the last."""
    steps = [(n - 1) * stride for n, stride in zip(x.shape, x.stride())]
    return (1 + sum(steps)) * x.element_size()


def in_a_mode() -> bool:
    """Whether a mode of this thread intercepts operators, e.g. to make fake tensors."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


def all_true(mask: Tensor) -> bool:
    """Whether every entry is True, over all batch axes; False if it can't be read.

    The caller then has to proceed as if the answer were no.
    """
    plain = unwrapped(mask)
    return plain is not None and bool(plain.all())


def may_reuse(*operands: Any) -> bool:
    """Whether a new tensor made from these may be written to: no tracing, no batching.

    A new tensor of many megabytes costs a page fault every 4 KiB, on a CPU often more than the
    arithmetic.
    """
    if torch.compiler.is_dynamo_compiling() or forward_ad._current_level >= 0:
        return False
    tensors = [t for t in operands if isinstance(t, Tensor)]
    if not all([t.dtype == tensors[0].dtype and not t.requires_grad for t in tensors]):
        return False
    return not is_traced() or not any(map(_functorch.is_functorch_wrapped_tensor, tensors))


_AUTOCASTED = ("cpu", "cuda", "mps", "xpu")


def full_precision() -> contextlib.AbstractContextManager[Any]:
    """Context in which float32 products stay float32: no autocast, no TF32, no bfloat16.

    A step may be called where torch.autocast is enabled for the model, or in a process that has
    called torch.set_float32_matmul_precision("high"). Either would permanently round factor
    matrices and roots to values with which no iteration can converge.

    Autocast is per thread, and is disabled for this thread. The precision of products is per
    process: it is full for all threads until the last one has left this context, and then restored;
    see `core.precision`. A thread that computes for this one has to enter the context itself if it
    may outlast this one.

    Not covered: a backward pass that runs later. Inside torch.compile it disables only autocast,
    since a graph can't change the settings by which its kernels are chosen. Enter it around the
    call of the compiled function: the graph's products then use the current setting.
    """
    return _products(every_step=False)


def product_precision() -> contextlib.AbstractContextManager[Any]:
    """`full_precision` for products of every step; inside `in_tf32` they are rounded to TF32.

    Values computed periodically from statistics, such as an inverse root, use `full_precision`: a
    rounding error there grows with the condition number, or keeps an iteration from its tolerance.
    """
    return _products(every_step=True)


def _products(every_step: bool) -> contextlib.AbstractContextManager[Any]:
    contexts: list[Any] = [
        torch.autocast(kind, enabled=False)
        for kind in _AUTOCASTED
        if torch.is_autocast_enabled(kind)
    ]
    if not torch.compiler.is_dynamo_compiling():
        if every_step and _ASKED.tf32:
            contexts.append(_rounded())
        elif _ASKED.full.needed():
            contexts.append(_ASKED.full)
    if not contexts:
        return contextlib.nullcontext()
    return contexts[0] if len(contexts) == 1 else _all_of(contexts)


def asking_for_tf32() -> contextlib.AbstractContextManager[None]:
    """The context of `in_tf32`: `product_precision` rounds, in this thread."""
    if torch.compiler.is_dynamo_compiling():  # the setting is not available there
        return contextlib.nullcontext()
    return _asking(tf32=True)


@contextlib.contextmanager
def _rounded() -> Iterator[None]:
    """Full precision requested inside is honoured, and afterwards products are rounded again."""
    with _asking(full=FullProducts(own=True)), rounded_products():
        yield


class _Asked(threading.local):
    """This thread's settings.

    Attributes:
        tf32: whether it is inside `in_tf32`.
        waits: whether it may wait for a device.
        full: counts the contexts that multiply in full precision.
    """

    tf32 = False
    waits = True
    full = FullProducts()


_ASKED = _Asked()


@contextlib.contextmanager
def _asking(**asked: Any) -> Iterator[None]:
    own = vars(_ASKED)  # this thread's
    before = {name: getattr(_ASKED, name) for name in asked}
    own.update(asked)
    try:
        yield
    finally:
        own.update(before)


def for_a_recording() -> contextlib.AbstractContextManager[None]:
    """The context in which `cuda_graphed` records a step: nothing may wait for the device."""
    return _asking(waits=False)


def may_wait() -> bool:
    """Whether a step may wait for the device: this thread is not recording."""
    return _ASKED.waits


@contextlib.contextmanager
def _all_of(contexts: Iterable[contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextlib.contextmanager
def for_keeps() -> Iterator[None]:
    """Context for tensors that later steps write to: a state's, which may be made in inference mode
    or while autograd records.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def constant(make: Callable[..., Tensor], most: int = 256) -> Callable[..., Tensor]:
    """A function that makes small tensors from static arguments, of which it caches `most`.

    Not cached under a mode or transform: later calls outside would get its kind of tensor. And a
    tensor made in inference mode could not enter autograd's graphs.
    """

    @functools.lru_cache(maxsize=most)
    def kept(*arguments: Any) -> Tensor:
        with torch.inference_mode(False):
            return make(*arguments)

    @functools.wraps(make)
    def find(*arguments: Any) -> Tensor:
        if torch.compiler.is_dynamo_compiling() or _functorch.peek_interpreter_stack() is not None:
            return make(*arguments)
        return make(*arguments) if in_a_mode() else kept(*arguments)

    return find


@constant
def row_index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """(n,) int64. Cached, since the copy from the host would wait for a GPU's stream.

    >>> row_index((0, 2), torch.device("cpu"))
    tensor([0, 2])
    """
    return torch.tensor(rows, dtype=torch.int64, device=device)


@functools.cache
def keep_freed_memory() -> None:
    """Make glibc keep what a step frees for the next one, up to 64 MiB.

    glibc returns free memory at the end of the heap to the system if it exceeds twice the largest
    block that it has mmapped and freed, and a step then pays a page fault for every 4 KiB of its
    temporaries: a fifth of a plain step on ten blocks of 256×256. Allocating and freeing a block
    that is just small enough to count raises the limit to its maximum (mallopt(3),
    M_MMAP_THRESHOLD), as activations of that size do. It is never touched, so it costs nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")
