"""Whether all ranks have come, found out without waiting in a collective.

A collective that one rank alone enters, as `model.save` under `if rank == 0` would, waits until
torch's timeout. Here each rank notes in the store that it has come, and looks whether the others
still can: one that waits in a collective of something else, or whose program has ended, cannot.
"""

from __future__ import annotations

import time

from keras_tp.signs import absence, stuck
from keras_tp.watchdog import BEATS, watchdog

# Seconds in which ranks that do the same are there, and nobody asks where the others are; and for
# which one must wait in one place to be taken for stuck: no collective of a step takes so long.
_PATIENCE, _STUCK = 1.0, 5.0


def call_roll(what: str) -> str:
    """Waits until every rank has called it. Collective, without a collective.

    Args:
        what: for which the ranks gather; it need not be the same.

    Returns:
        "" once all have come. Where the missing ones cannot come any more, on those that have:
        which they are and where.
    """
    dog = watchdog()
    if dog is None:
        return ""
    names = [f"roll{dog.rolls}/{rank}" for rank in range(dog.size)]
    dog.store.set(names[dog.rank], what)
    before, pause, look = None, 0.001, time.monotonic() + _PATIENCE
    while not dog.store.check(names):
        time.sleep(pause)
        pause = min(0.05, 2 * pause)
        if time.monotonic() < look:
            continue
        after, look = dog.signs(), time.monotonic() + BEATS * dog.interval
        missing = [rank for rank, name in enumerate(names) if not dog.store.check([name])]
        if before and missing and all(stuck(before[rank], after[rank], _STUCK) for rank in missing):
            dog.store.delete_key(names[dog.rank])
            return absence(before, after, missing)
        before = after
    if dog.rolls:  # all have left the one before
        dog.store.delete_key(f"roll{dog.rolls - 1}/{dog.rank}")
    dog.rolls += 1
    return ""
