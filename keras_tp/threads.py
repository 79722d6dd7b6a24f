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


def take_turns() -> None:
    """Makes batch threads of gloo's, of all groups of this process that there are by now.

    Their priority stays as it is, and so do threads that somebody else has scheduled in another
    way than the usual. On Linux; elsewhere nothing.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    for thread in _THREADS.glob("*"):
        # It may be gone by now, or the system may allow none to be changed: it is only slower.
        with contextlib.suppress(OSError):
            number = int(thread.name)
            usual = os.sched_getscheduler(number) == os.SCHED_OTHER
            if usual and (thread / "comm").read_text().strip() in NAMES:
                os.sched_setscheduler(number, os.SCHED_BATCH, os.sched_param(0))
