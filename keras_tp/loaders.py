"""A torch DataLoader that reads one replica's rows of every batch."""

from __future__ import annotations

import copy
import functools
import hashlib
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from keras_tp.agreement import AgreedParts
from keras_tp.batches import as_rows, as_tensors, kinds_of
from keras_tp.collectives import Axis
from keras_tp.errors import LayoutError
from keras_tp.layouts import row_bounds, row_counts

_REMEDY = (
    "Every rank must draw the same samples in the same order, of which its replica reads its "
    "part: leave shuffling to torch's global generator, which keras_tp.parallelize gives every "
    "rank alike, or seed the generator you pass (torch.Generator().manual_seed(0)) alike on every "
    "rank, order files alike, and pad samples to one shape."
)


def share_loader(loader: DataLoader, axis: Axis) -> DataLoader:
    """Like `loader`, but reads only this replica's samples of every batch; see `share_out`.

    It is a copy of `loader`, of a subclass of its class, that has another batch
    sampler and is otherwise what it was: what has been set on the loader counts.
    """
    shared = copy.copy(loader)
    # DataLoader lets nobody set these once it is made.
    vars(shared)["batch_sampler"] = ReplicaSampler(loader.batch_sampler, axis)
    vars(shared)["_iterator"] = None  # of persistent workers, which would draw the old samples
    # In whatever order its workers are done, a rank would get other batches than the next.
    vars(shared)["in_order"] = True
    if loader.num_workers:
        shared.worker_init_fn = SeededWorker(axis.rank, loader.worker_init_fn)
    kind: Any = type(loader)
    shared.__class__ = _shared_class(kind)
    assert isinstance(shared, SharedLoader)
    shared.start_sharing(axis)
    return shared


@functools.cache
def _shared_class(kind: Any) -> Any:
    return type(f"Shared{kind.__name__}", (SharedLoader, kind), {})


def check_sampler(loader: DataLoader) -> None:
    """Raises LayoutError if the loader's sampler shares out the samples itself."""
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise LayoutError(
                f"its sampler is a {type(sampler).__name__} that gives each of "
                f"{sampler.num_replicas} ranks samples of its own, and they would be shared out "
                "twice. Make the loader with a plain sampler (shuffle=True, or none), of whose "
                "batches each replica reads its rows; or say that the rows are shared out already, "
                "with auto_shard_dataset=False of the distribution.",
                where="this DataLoader",
            )


class Iteration:
    """One pass over a shared loader: the batches drawn and not yet read, and random numbers."""

    def __init__(self, stream: RandomStream | None):
        self.drawn: deque[list[Any]] = deque()
        self.stream = stream


class ReplicaSampler:
    """Gives this replica's part of each list of indices that `original` gives.

    Lists of fewer indices than replicas are given as they are.
    """

    def __init__(self, original: Any, axis: Axis):
        self.original, self.axis = original, axis
        self.iteration = Iteration(None)

    def __len__(self) -> int:
        return len(self.original)

    def __iter__(self) -> Iterator[list[Any]]:
        return self._cut(iter(self.original), self.iteration)

    def _cut(self, batches: Iterator[Any], iteration: Iteration) -> Iterator[list[Any]]:
        for batch in batches:
            indices = list(batch)
            iteration.drawn.append(indices)
            start, count = row_bounds(len(indices), self.axis.size, self.axis.rank)
            if iteration.stream is not None:
                iteration.stream.enter()
            yield indices[start : start + count]


class SharedLoader(DataLoader):
    """What `share_loader` makes of a loader's class; yields nests of `Rows`."""

    batch_sampler: ReplicaSampler

    def start_sharing(self, axis: Axis) -> None:
        """In place of an `__init__`, which was that of the loader this is a copy of."""
        self._axis = axis
        self._agreed = AgreedParts(axis)
        self._passes = 0

    def __iter__(self) -> Any:
        stream = None
        if self.num_workers == 0:
            stream = RandomStream(self._axis.rank, self._passes, self.generator)
        self._passes += 1
        iteration = self.batch_sampler.iteration = Iteration(stream)
        # Not put off to the first batch: it draws a random number, as it does in one process.
        return self._shared(iter(super().__iter__()), iteration)

    def _shared(self, batches: Iterator[Any], iteration: Iteration) -> Iterator[Any]:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                if iteration.stream is not None:
                    iteration.stream.leave()
            yield self._rows_of(batch, iteration.drawn.popleft())

    def _rows_of(self, batch: Any, indices: list[Any]) -> Any:
        counts = row_counts(len(indices), self._axis.size)
        cut = len(indices) >= self._axis.size
        tensors, rows = as_tensors(batch)
        if rows != counts[self._axis.rank]:
            raise ValueError(
                f"the collate_fn of this DataLoader made {rows} rows of "
                f"{counts[self._axis.rank]} samples. Where rows are shared out it must make one "
                "row of each sample, along the first dim."
            )
        lines = [f"{self._batches()} batches", _drawn(indices), *kinds_of(tensors)]
        self._agreed.check(tensors, lines, _REMEDY, cut)
        return as_rows(tensors, counts, self._axis) if cut else batch

    def _batches(self) -> int | str:
        try:
            return len(self)
        except TypeError:  # a batch sampler that does not know
            return "any number of"


def _drawn(indices: list[Any]) -> str:
    shown = ", ".join(map(str, indices[:4])) + (", ..." if len(indices) > 4 else "")
    checksum = zlib.crc32(repr(indices).encode())
    return f"samples [{shown}] ({len(indices)} of checksum {checksum:08x})"


class RandomStream:
    """Random numbers for what reads samples in this process: Python's, NumPy's, torch's on CPU.

    Replicas read different samples, as many as they have rows. If those drew from
    the global generators, for an augmentation, replicas would part ways there,
    and shuffle and drop out differently from then on. They draw from a stream of
    the replica's own instead, the same on its ranks, another on every pass.
    """

    def __init__(self, replica: int, number: int, generator: torch.Generator | None):
        digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
        if generator is not None:
            digest.update(generator.get_state().cpu().numpy().tobytes())
        digest.update(f"{number} {replica}".encode())
        seed = int.from_bytes(digest.digest()[:4], "big")
        self._inside: tuple[Any, ...] = (
            random.Random(seed).getstate(),
            np.random.RandomState(seed).get_state(),
            torch.Generator().manual_seed(seed).get_state(),
        )
        self._outside: tuple[Any, ...] | None = None

    def enter(self) -> None:
        """From here on, random numbers are of this stream."""
        assert self._outside is None
        self._outside = _random_state()
        _set_random_state(self._inside)

    def leave(self) -> None:
        """Random numbers go on as if none had been drawn since `enter`."""
        if self._outside is not None:
            self._inside = _random_state()
            _set_random_state(self._outside)
            self._outside = None


def _random_state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


class SeededWorker:
    """A `worker_init_fn` by which workers of different replicas draw different random numbers.

    Their seeds come from the generator that all ranks share; the first replica's stay.
    """

    def __init__(self, replica: int, original: Callable[[int], None] | None):
        self.replica, self.original = replica, original

    def __call__(self, worker: int) -> None:
        if self.replica:
            digest = hashlib.sha256(f"{torch.initial_seed()} {self.replica}".encode()).digest()
            seed = int.from_bytes(digest[:4], "big")
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
        if self.original is not None:
            self.original(worker)
