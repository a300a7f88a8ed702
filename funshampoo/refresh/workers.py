"""Threads with one kernel thread each, for LAPACK calls on many matrices of moderate size.

torch.linalg.eigh processes the matrices of a stack one after the other and lets MKL split each
among all threads of the process, which gains nothing for sides up to a few hundred. LAPACK runs
without the GIL, so Python threads can work on different matrices.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from funshampoo.core.forked import whole_at_a_fork
from funshampoo.core.modes import in_a_mode

_SETTING = whole_at_a_fork(threading.Lock())


class Workers:
    """A `ThreadPoolExecutor` whose threads have one kernel thread each, and exist from the start.

    Args:
        count: number of threads.

    Raises:
        RuntimeError: they can't be started.
    """

    def __init__(self, count: int) -> None:
        ready = threading.Barrier(count + 1)

        def begin() -> None:
            try:
                _take_one_kernel_thread()
                ready.wait()
            except BaseException:  # those at the barrier would wait for this one for ever
                ready.abort()
                raise

        self._pool = ThreadPoolExecutor(count, "funshampoo", begin)
        try:
            for _ in range(count):
                self._pool.submit(int)
            ready.wait()  # from here on their temporary setting applies to no other thread
        except BaseException as error:  # also Ctrl-C: a thread at the barrier would prevent an exit
            ready.abort()
            self.close()
            if not isinstance(error, RuntimeError):
                raise
            raise RuntimeError(
                f"{count} threads for refreshes can't be started: the process may have reached a "
                "limit of its user or container. With torch.set_num_threads(1) none is needed."
            ) from error

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        """Run `function()` in a thread, under the caller's grad mode and inference mode."""
        inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def task() -> Any:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                return function()

        try:
            return self._pool.submit(task)
        except RuntimeError:  # closed, or at interpreter exit: no thread is left to run it
            future: Future[Any] = Future()
            future.set_result(task())
            return future

    def close(self) -> None:
        """Cancel queued tasks and wait for running ones."""
        self._pool.shutdown(cancel_futures=True)


def _take_one_kernel_thread() -> None:
    """Give this thread one kernel thread; all others, including future ones, keep their number.

    torch.set_num_threads sets the calling thread's number, and the one that new threads start with.
    A waiting helper thread restores the latter. A thread that starts and runs its first operator in
    that instant, once in the life of a process, may get 1.
    """
    with _SETTING:  # not two at a time: the second would save the first one's 1 as the default
        everybodys = torch.get_num_threads()
        begin = threading.Event()

        def put_back() -> None:
            begin.wait()
            torch.set_num_threads(everybodys)

        helper = threading.Thread(target=put_back, daemon=True)
        helper.start()
        torch.set_num_threads(1)
        begin.set()
        helper.join()


_POOLS: dict[tuple[int, int], Workers] = {}
_MAKING: dict[int, threading.Lock] = {}


def workers(count: int) -> Workers:
    """The process's `count` threads, started on first use.

    A forked child has none of its parent's threads, and its locks may be held by a thread that no
    longer exists, so it makes its own.
    """
    process = os.getpid()
    with _MAKING.setdefault(process, threading.Lock()):
        pool = _POOLS.get((process, count))
        if pool is None:
            pool = _POOLS[process, count] = Workers(count)
        return pool


def can_run_in_a_thread(*tensors: Any) -> bool:
    """Whether work on these has the same meaning in another thread.

    It does for plain CPU tensors that need no gradient, while no torch.compile, torch.func,
    autocast or other mode is active, all of which belong to a thread.
    """
    if torch.compiler.is_dynamo_compiling() or _functorch.maybe_current_level() is not None:
        return False
    if in_a_mode() or torch.is_autocast_enabled("cpu"):
        return False
    found = [x for x in tensors if isinstance(x, Tensor)]
    plain = all([type(x) is Tensor and x.device.type == "cpu" for x in found])
    wanted = torch.is_grad_enabled() and any([x.requires_grad for x in found])
    return plain and not wanted
