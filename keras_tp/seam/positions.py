"""How far `fit` has read its data, and how it goes on from there.

`fit` makes one `EpochIterator`, resets it, and iterates over it once an epoch. Each of its steps
is one `next` of `_epoch_iterator`, which counts; the batches of a step come from an iterator over
what `_get_iterator` gives, made anew with every epoch, or, if `steps_per_epoch` is given, as the
data end. `_steps_seen` counts the steps of that one. Random numbers that shuffle are drawn as it is
made, or with its first batch.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from keras.src.backend.torch.trainer import TorchEpochIterator
from keras.src.trainers.epoch_iterator import EpochIterator

_POSITION = "_keras_tp_position"
_LATEST: ContextVar[Callable[[], Any] | None] = ContextVar("keras_tp_latest", default=None)


@dataclass(frozen=True)
class Place:
    """A place in the data.

    Attributes:
        steps: how many of the epoch have been made.
        batches: how many batches have been read of the iterator over them.
        seen: how many steps have been made since that was made.
    """

    steps: int = 0
    batches: int = 0
    seen: int = 0


class Position:
    """Where `fit` is in its data.

    Args:
        iterator: its `EpochIterator`.
        remember: gives the random state.
        restore: goes back to what `remember` gave.

    Attributes:
        begun: the random state as the iterator over the data was made.
    """

    def __init__(self, iterator: Any, remember: Callable[[], Any], restore: Callable[[Any], None]):
        self.iterator = weakref.ref(iterator)
        self.remember, self.restore = remember, restore
        self.begun: Any = None
        self.steps = self.batches = 0
        self.goal: tuple[Place, Any, Any] | None = None

    def place(self, epoch_done: bool) -> tuple[Place, Any]:
        """Where it is, and `begun`, None if the iterator over the data is to be made anew."""
        seen = self.iterator()._steps_seen  # type: ignore[union-attr]
        if not epoch_done:
            return Place(self.steps, self.batches, seen), self.begun
        if self.iterator().steps_per_epoch is None:  # type: ignore[union-attr]
            return Place(), None
        return Place(0, self.batches, seen), self.begun

    def epoch_is_done(self) -> bool:
        """Whether no step is left of the epoch, as far as is known."""
        iterator: Any = self.iterator()
        length = iterator.steps_per_epoch or iterator._num_batches or math.inf
        data = iterator._num_batches or math.inf
        made = self.steps * iterator.steps_per_execution
        return made >= length or iterator._steps_seen >= data

    def go_to(self, place: Place, begun: Any, now: Any) -> None:
        """Has the next epoch begin at `place`, in the random state `now`."""
        self.goal = place, begun, now

    def start(self, source: Iterable[Any]) -> Iterator[Any]:
        """An iterator over the data, from the goal on."""
        if self.goal is not None and self.goal[1] is not None:
            self.restore(self.goal[1])
        elif self.goal is not None:
            self.restore(self.goal[2])
        self.begun, self.batches = self.remember(), 0
        batches = self._counted(iter(source))
        if self.goal is not None:
            place, begun, now = self.goal
            for _ in range(place.batches):
                if next(batches, self) is self:
                    raise ValueError(
                        f"training was interrupted after {place.batches} batches of data that now "
                        f"have {self.batches}: give `fit` the same data and `batch_size`."
                    )
            if begun is not None:
                self.restore(now)
        return batches

    def _counted(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for batch in iterator:
            self.batches += 1
            yield batch

    def arrive(self) -> None:
        """Leaves out the steps that have been made."""
        if self.goal is None:
            return
        steps, seen = self.goal[0].steps, self.goal[0].seen
        for _ in range(steps):
            next(self.iterator()._epoch_iterator)  # type: ignore[union-attr]
        self.steps = steps
        if steps:
            self.iterator()._steps_seen, self.goal = seen, None  # type: ignore[union-attr]


class _Source:
    """What is iterated over, from a position on."""

    def __init__(self, position: Position, original: Iterable[Any]):
        self.position, self.original = position, original

    def __iter__(self) -> Iterator[Any]:
        return self.position.start(self.original)


def latest_position(remember: Callable[[], Any], restore: Callable[[Any], None]) -> Position | None:
    """Follows the `EpochIterator` that was reset last: as training begins, that of `fit`."""
    found = _LATEST.get()
    iterator = None if found is None else found()
    if iterator is None:
        return None
    position = Position(iterator, remember, restore)
    setattr(iterator, _POSITION, position)
    return position


def hook_positions() -> None:
    """Has `EpochIterator`s be followed, where `latest_position` asks for it. Idempotent."""
    if hasattr(EpochIterator.reset, "_keras_tp"):
        return
    EpochIterator.reset = _resetting(EpochIterator.reset)
    EpochIterator.__iter__ = _beginning(EpochIterator.__iter__)
    EpochIterator.__next__ = _going_on(EpochIterator.__next__)
    TorchEpochIterator._get_iterator = _reading(TorchEpochIterator._get_iterator)


def _resetting(original: Any) -> Any:
    @functools.wraps(original)
    def reset(self: Any) -> None:
        original(self)
        _LATEST.set(weakref.ref(self))

    reset._keras_tp = True  # type: ignore[attr-defined]
    return reset


def _beginning(original: Any) -> Any:
    @functools.wraps(original)
    def begin(self: Any) -> Any:
        position = vars(self).get(_POSITION)
        if position is not None:
            position.steps = 0
        return original(self)

    return begin


def _going_on(original: Any) -> Any:
    @functools.wraps(original)
    def go_on(self: Any) -> Any:
        position = vars(self).get(_POSITION)
        if position is None:
            return original(self)
        position.arrive()
        given = original(self)
        position.steps += 1
        if position.goal is not None:  # at the beginning of an epoch, in the midst of the data
            self._steps_seen += position.goal[0].seen
            position.goal = None
        return given

    return go_on


def _reading(original: Any) -> Any:
    @functools.wraps(original)
    def get_iterator(self: Any) -> Any:
        position, source = vars(self).get(_POSITION), original(self)
        return source if position is None else _Source(position, source)

    return get_iterator
