"""Threads with one kernel thread each, for LAPACK calls on many matrices of moderate size.

torch.linalg.eigh takes the matrices of a stack one after the other and lets MKL divide each among
all threads of the process, which for sides up to a few hundred gains nothing. LAPACK runs without
Python's lock, so threads of Python can take different matrices.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from funshampoo.core.modes import in_a_mode

_Task = tuple["Future[Any]", Callable[[], Any]]
_SETTING = threading.Lock()


class Workers:
    """A queue of tasks, and threads that take them in order.

    The threads are daemons, so they keep no process from ending; when the interpreter exits, what
    is queued is cancelled and what is running is waited for, since the libraries that it runs in
    are about to be taken down.

    Args:
        count: of threads.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._ready = threading.Semaphore(0)
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"funshampoo-{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            self._ready.acquire()  # what they set for a moment is everybody's again
        atexit.register(self.close)

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        """Run `function()` in a thread, under the caller's grad mode and inference mode."""
        inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def task() -> Any:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                return function()

        future: Future[Any] = Future()
        if self._closed:  # at interpreter exit: there is nobody left to run it
            _carry_out(future, task)
        else:
            self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """Cancel what is queued, wait for what is running."""
        self._closed = True
        atexit.unregister(self.close)
        with contextlib.suppress(queue.Empty):
            while True:
                if task := self._tasks.get_nowait():
                    task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        try:
            _take_one_kernel_thread()
        finally:
            self._ready.release()
        while (task := self._tasks.get()) is not None:
            _carry_out(*task)
            del task  # hold no tensor while waiting for the next


def _carry_out(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:  # whatever it is: it belongs to whoever asks for the result
        future.set_exception(error)


def _take_one_kernel_thread() -> None:
    """One kernel thread for this thread; everybody else, threads to come included, as before.

    torch.set_num_threads sets the calling thread's number and one that new threads start from.
    A helper that waits beside puts the latter back. Whoever starts a thread and runs its first
    operator in that instant, once in the life of a process, may find 1 there.
    """
    with _SETTING:  # not two at a time: the second would take the first one's 1 for everybody's
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
    """The process' `count` threads; made when first asked for.

    A forked child has none of its parent's threads, and perhaps its locks as another thread left
    them: it makes its own.
    """
    process = os.getpid()
    with _MAKING.setdefault(process, threading.Lock()):
        pool = _POOLS.get((process, count))
        if pool is None:
            pool = _POOLS[process, count] = Workers(count)
        return pool


def can_run_in_a_thread(*tensors: Any) -> bool:
    """Whether work on these means the same in another thread.

    They are plain tensors on the CPU that no gradient is wanted for; and neither torch.compile,
    torch.func, autocast, nor any other mode, all of which belong to a thread, is active.
    """
    if torch.compiler.is_dynamo_compiling() or _functorch.maybe_current_level() is not None:
        return False
    if in_a_mode() or torch.is_autocast_enabled("cpu"):
        return False
    found = [x for x in tensors if isinstance(x, Tensor)]
    plain = all([type(x) is Tensor and x.device.type == "cpu" for x in found])
    wanted = torch.is_grad_enabled() and any([x.requires_grad for x in found])
    return plain and not wanted
