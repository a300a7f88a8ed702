"""Real processes that talk by gloo over the loopback, and always end.

Four processes are started once and serve all tests of a session; each test takes as many of them as
it needs. What runs there is a module-level function of a test module: f(rank, *arguments).
"""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

TIMEOUT = 60.0  # seconds until a test gives its ranks up
COLLECTIVE_TIMEOUT = 20.0
ATTEMPTS = 3  # to connect, which fails now and then on a busy machine


def connect(rank: int, size: int, store: str, timeout: float = COLLECTIVE_TIMEOUT) -> None:
    """Join a process group of gloo over the loopback, one thread a process."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )


def _disconnect(rank: int) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _serve(rank: int, channel: Connection) -> None:
    gc.freeze()  # torch stays
    while True:
        try:
            function, arguments = pickle.loads(channel.recv_bytes())
        except EOFError:  # the tests are over
            return
        try:
            answer = function(rank, *arguments), None
        except Exception:
            answer = None, traceback.format_exc()
        # As bytes: a tensor would be sent as a file descriptor, of which there are not many.
        channel.send_bytes(pickle.dumps(answer))


class Ranks:
    """Up to four processes; `ranks(n, function, ...)` returns what each of n returned.

    Args:
        timeout: seconds until a call gives up and ends the processes.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self.servers: list[Any] = []
        self.timeout = timeout
        self._channels: list[Connection] = []
        self._temporary = tempfile.TemporaryDirectory()
        self.folder = self._temporary.name
        self.groups = 0  # connected so far, with those that failed

    def __call__(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        self._start(size)
        self._connect(size)
        results, problems = self._ask(size, function, *arguments)
        if not problems:
            _, problems = self._ask(size, _disconnect)
        if problems:
            self.stop()
            pytest.fail("\n".join(problems))
        return results

    def _connect(self, size: int) -> None:
        """A process group of `size`; once more where the machine's loopback drops a connection."""
        for _ in range(ATTEMPTS):
            self.groups += 1
            store = str(Path(self.folder) / f"store{self.groups}")
            _, problems = self._ask(size, connect, size, store)
            if not problems:
                return
            self.stop()
            self._start(size)
        pytest.fail("\n".join(problems))

    def _ask(
        self, size: int, function: Callable[..., Any], *arguments: Any
    ) -> tuple[list[Any], list[str]]:
        """What `size` ranks return, and what went wrong."""
        for channel in self._channels[:size]:
            channel.send_bytes(pickle.dumps((function, arguments)))
        deadline = time.monotonic() + self.timeout
        results, problems = [], []
        for rank, channel in enumerate(self._channels[:size]):
            if not channel.poll(max(0.0, deadline - time.monotonic())):
                problems.append(f"rank {rank} of {size} gave no answer in {self.timeout:g} s")
                continue
            try:
                result, error = pickle.loads(channel.recv_bytes())
            except EOFError:
                result, error = None, "the process ended"
            results.append(result)
            if error:
                problems.append(f"rank {rank} of {size}: {error}")
        return results, problems

    def _start(self, size: int) -> None:
        # Forked from a process that has imported all this, and done nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "tests.distributed.ranks"])
        for rank in range(len(self.servers), size):
            ours, theirs = context.Pipe()
            server = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            server.start()
            theirs.close()
            self.servers.append(server)
            self._channels.append(ours)

    def stop(self) -> None:
        """End all processes."""
        for channel in self._channels:
            channel.close()
        for server in self.servers:
            server.join(2.0)
            if server.is_alive():
                server.kill()
                server.join()
        self.servers, self._channels = [], []

    def close(self) -> None:
        """End all processes for good."""
        self.stop()
        self._temporary.cleanup()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.close()
