"""Waiting for what other threads do in their own time."""

from __future__ import annotations

import time
from collections.abc import Callable


def soon(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether `holds` comes true: gloo's threads let go of what they sent a moment later."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
