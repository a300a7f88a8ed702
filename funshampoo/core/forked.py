"""Locks in a process that forks: the child gets their state, but not the threads that hold them.

What torch starts is out of reach: once its kernel threads have run, libgomp waits in the child for
threads that are not there, with or without funshampoo, until torch.set_num_threads(1) is called
there, as a DataLoader's workers do.

What a lock guards stays as it was at the fork: if another thread was in `precision.FullProducts`,
the child's products remain in full precision, which may be slower.
"""

from __future__ import annotations

import os
from threading import Lock


def whole_at_a_fork(lock: Lock) -> Lock:
    """The lock, which nobody else holds while the process forks, so that it is free in the child.

    For locks of a module, which are held for an instant, and around no fork.
    """
    if hasattr(os, "register_at_fork"):
        free = lock.release
        os.register_at_fork(before=lock.acquire, after_in_child=free, after_in_parent=free)
    return lock
