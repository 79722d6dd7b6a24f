"""Threads of gloo, and how Linux has them take turns.

Gloo sends in one thread, under a lock, and receives in another, which tries that lock and, where
it is taken, asks at once again whether there is anything to receive (`Pair::handleEvents`, in
gloo's transport/tcp/pair.cc). If the kernel lets the receiving thread interrupt the sending one
on its core, it goes round and round until its time is up, 4 ms for a message that takes 0.3.
Batch threads (sched(7)) interrupt nobody, so that who holds the lock goes on and lets it go.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

NAMES = "gloo_tcp_loop", "pt_gloo_runloop"
_THREADS = Path("/proc/self/task")


def threads_of_gloo() -> list[int]:
    """Numbers of those of all groups of this process that there are by now. Linux tells them."""
    found = []
    for thread in _THREADS.glob("*"):
        with contextlib.suppress(OSError):  # it may be gone by now
            if (thread / "comm").read_text().strip() in NAMES:
                found.append(int(thread.name))
    return found


def take_turns() -> None:
    """Makes batch threads of gloo's.

    Their priority stays as it is, and so do threads that somebody has scheduled in another way
    than the usual. On Linux; elsewhere nothing.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    for thread in threads_of_gloo():
        # Gone, or the system allows none to be changed: all is as before, and only slower.
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(thread) == os.SCHED_OTHER:
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
