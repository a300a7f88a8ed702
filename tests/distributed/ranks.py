"""Real processes that talk by gloo over the loopback, and always end.

Four processes are started once and serve all tests of a session; each test takes as many of them as
it needs. What runs there is a module-level function of a test module: f(rank, *arguments).
"""

from __future__ import annotations

import datetime
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


def _serve(rank: int, channel: Connection) -> None:
    while True:
        try:
            function, arguments, size, store = pickle.loads(channel.recv_bytes())
        except EOFError:  # the tests are over
            return
        try:
            connect(rank, size, store)
            result = function(rank, *arguments), None
        except Exception:
            result = None, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        # As bytes: a tensor would be sent as a file descriptor, of which there are not many.
        channel.send_bytes(pickle.dumps(result))


class Ranks:
    """Up to four processes; `ranks(n, function, ...)` returns what each of n returned.

    Args:
        timeout: seconds until a call gives up and ends the processes.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self.servers: list[Any] = []
        self.timeout = timeout
        self._channels: list[Connection] = []
        self._folder = tempfile.TemporaryDirectory()
        self._runs = 0

    def __call__(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        self._start(size)
        self._runs += 1
        store = str(Path(self._folder.name) / f"store{self._runs}")
        for channel in self._channels[:size]:
            channel.send_bytes(pickle.dumps((function, arguments, size, store)))
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
        if problems:
            self.stop()
            pytest.fail("\n".join(problems))
        return results

    def _start(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
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
        self._folder.cleanup()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.close()
