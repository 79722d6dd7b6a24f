"""A thread that ends the job, and says for whom it waits, once a collective waits too long.

Each rank has one. It notes what the rank does in the store in which the ranks have met, once a
second, and looks whether the main thread still waits in the collective it waited in
before. torch's own timeouts (of gloo; NCCL has a watchdog of its own) say neither which rank was
missing nor where it was, and are minutes long for every group but the first.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from keras_tp.signs import Sign, lost, verdict
from keras_tp.whereabouts import waits_in, where_raised, whereabouts

_SLOWEST, _QUICKEST = 1.0, 0.1  # seconds between two beats
BEATS = 2.5  # between two looks at a rank that is to show signs of life
# What gloo says as a rank is gone, and torch as the store is.
_BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out")


class Watchdog:
    """See the module.

    Args:
        store: of the process group; a copy of its connection is used.
        rank, size: of this process in the job, and number of ranks.
        limit: seconds that a collective may wait.

    Attributes:
        rolls: how many roll calls all ranks have answered.
    """

    def __init__(self, store: Any, rank: int, size: int, limit: float):
        self.store = dist.PrefixStore(_life(), store.clone())
        self.rank, self.size, self.limit = rank, size, limit
        self.interval = min(_SLOWEST, max(_QUICKEST, limit / 6))
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a FileStore has none
            self.store.set_timeout(timedelta(seconds=20))
        self.group = dist.group.WORLD
        self.ended, self.ending, self.rolls = "", False, 0
        self._beat = 0
        self._last: Any = None
        self._since = time.monotonic()
        self._stop = threading.Event()
        self._main = threading.main_thread().ident or 0
        self._thread = threading.Thread(target=self._run, name="keras_tp watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self.tell(self.sign())
        self._thread.start()

    def stop(self, ended: str) -> None:
        """Stops watching, and has the others know how this rank has ended."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * self.interval)
        self.ended = self.ended or ended
        self.tell(self.sign())

    def signs(self) -> list[Sign | None]:
        """The sign of each rank."""
        names = [_name(rank) for rank in range(self.size)]
        return [
            Sign.from_text(self.store.get(name)) if self.store.check([name]) else None
            for name in names
        ]

    def two_signs(self) -> tuple[list[Sign | None], list[Sign | None]]:
        """Each rank's sign, and that of some beats later. Takes seconds."""
        before = self.signs()
        for _ in range(5):
            time.sleep(BEATS * self.interval / 5)
            self.tell(self.sign())  # the thread that does may be this one
        return before, self.signs()

    def said(self) -> bool:
        """Whether a rank has said why the job ends."""
        with contextlib.suppress(RuntimeError):
            return self.ending or self.store.check(["told"])
        return self.ending

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            if dist.group.WORLD is not self.group:  # it was destroyed, maybe another made
                return
            sign = self.sign()
            self.tell(sign)
            if sign.waits and sign.seconds > self.limit:
                self._end(sign)

    def sign(self) -> Sign:
        """What this rank says of itself now."""
        self._beat += 1
        waits = waits_in(self._main)
        now, state = time.monotonic(), (waits, collectives_made())
        if not waits or state != self._last:
            self._last, self._since = state, now
        # Layers are looked up where the rank waits for longer: a look holds on to their inputs.
        found = whereabouts(self._main, layers=now - self._since > 2 * self.interval)
        seconds = round(now - self._since, 1)
        return Sign(self._beat, found.doing, found.at, waits, seconds, self.ended)

    def tell(self, sign: Sign) -> None:
        """Has the others know."""
        with contextlib.suppress(RuntimeError):  # the store is gone: so is the job
            self.store.set(_name(self.rank), sign.to_text())

    def _end(self, sign: Sign) -> None:
        """Ends this process, unless it goes on meanwhile. The first rank to do so says why."""
        last, self.ending, first = self._last, True, True
        try:
            said = verdict(self.rank, sign, *self.two_signs())
        except RuntimeError as error:
            said = (
                f"rank {self.rank} has waited {sign.seconds:.0f} s in {sign.waits}, in "
                f"{sign.where}, and the store in which the ranks have met does not answer "
                f"({type(error).__name__}): its process, torchrun or rank 0, is stopped or gone."
            )
        self.sign()
        if self._last != last:
            self.ending = False
            return
        with contextlib.suppress(RuntimeError):  # as above
            first = self.store.add("told", 1) == 1
        if first:
            print(f"\nkeras_tp: {said}", file=sys.stderr, flush=True)
        _flush()
        os._exit(1)


def collectives_made() -> tuple[int, ...]:
    """How many collectives this rank has begun, by group."""
    groups = list(dist.distributed_c10d._world.pg_map)
    return tuple(
        group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        for group in groups
    )


_WATCHDOG: Watchdog | None = None


def start_watching(limit: float, anew: bool = False) -> None:
    """Starts the watchdog of this process, once for each process group that it is in.

    Args:
        limit: seconds that a collective may wait.
        anew: whether that counts for one that was started before.
    """
    global _WATCHDOG
    there = watchdog()
    if there is not None and anew:
        there.limit = limit
    if there is not None or dist.get_world_size() == 1:
        return
    if dist.get_backend() == "fake":  # virtual ranks, which nobody waits for
        return
    _WATCHDOG = Watchdog(
        dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size(), limit
    )
    _WATCHDOG.start()
    _explain_errors()


def stop_watching() -> None:
    """Stops it, as the program ends."""
    global _WATCHDOG
    if _WATCHDOG is not None and _WATCHDOG.group is dist.group.WORLD:
        _WATCHDOG.stop("its program came to its end")
    _WATCHDOG = None


def watchdog() -> Watchdog | None:
    """That of this process, if it is in a job of several ranks."""
    if _WATCHDOG is None or _WATCHDOG.group is not dist.group.WORLD:
        return None
    return _WATCHDOG


@functools.cache
def _explain_errors() -> None:
    """Has an error that ends a program be known to the others, and one that they caused say so."""
    original = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        dog = watchdog()
        if dog is not None and _is_broken(error) and dog.said():
            return  # this rank was just cut off by one that has said why
        original(kind, error, trace)
        if dog is not None:
            _explain(dog, error, trace)

    sys.excepthook = excepthook


def _is_broken(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _BROKEN)


def _explain(dog: Watchdog, error: BaseException, trace: TracebackType | None) -> None:
    found = where_raised(trace)
    how = "it lost its connection" if _is_broken(error) else f"{type(error).__name__}: "
    if not _is_broken(error):
        how += " ".join(str(error).split())[:200]
    dog.ended = f"{how}, in {found.doing} ({found.at})" if found.doing else f"{how} ({found.at})"
    if not _is_broken(error):
        dog.tell(dog.sign())
        return
    with contextlib.suppress(RuntimeError):
        others = lost(dog.rank, *dog.two_signs())
        dog.tell(dog.sign())
        if others and not dog.said():
            print(f"\nkeras_tp: {others}", file=sys.stderr, flush=True)


def _flush() -> None:
    # In a thread: the main one may hold the lock of the stream it prints to.
    thread = threading.Thread(target=sys.stdout.flush, daemon=True)
    thread.start()
    thread.join(timeout=1.0)


def _life() -> str:
    return f"keras_tp{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _name(rank: int) -> str:
    return f"sign{rank}"
