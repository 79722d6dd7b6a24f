"""Where batches come from, and how their rows are shared out over replicas."""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras
from torch.utils.data import DataLoader, IterableDataset

from keras_tp.agreement import AgreedParts
from keras_tp.batches import as_rows, as_tensors, kinds_of
from keras_tp.collectives import Axis
from keras_tp.loaders import SharedLoader, check_sampler, share_loader
from keras_tp.messages import gather_numbers
from keras_tp.seam.data import feeding, hook_data


@contextlib.contextmanager
def sharing_rows(axis: Axis | None, already_shared: bool = False) -> Iterator[None]:
    """While open, what `fit`, `evaluate` and `predict` are given is shared out along `axis`.

    And Keras's refusal of everything but `tf.data` in a job of several processes
    is gone.

    Args:
        axis: the batch axis; None if the model's rows are not shared out.
        already_shared: whether each replica's data are its own rows only
            (`already_shared_out`), not those of all replicas (`share_out`).
    """
    hook_data()
    if already_shared and axis is not None:
        along = axis
        taken = feeding(lambda x: x, lambda batches, n: already_shared_out(batches, along, n))
    else:
        taken = feeding(lambda x: share_out(x, axis))
    with taken:
        yield


def feed_rows(model: Any, axis: Axis) -> None:
    """Has `model.fit`, `evaluate` and `predict` read what replicas can read of their rows alone."""
    for name in ("fit", "evaluate", "predict"):
        original = getattr(model, name, None)
        if original is not None:  # a mere layer has none
            setattr(model, name, _sharing(original, axis))


def _sharing(original: Any, axis: Axis) -> Any:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        distribution = keras.distribution.distribution()
        with sharing_rows(axis, not getattr(distribution, "auto_shard_dataset", True)):
            return original(*args, **kwargs)

    return call


def share_out(x: Any, axis: Axis | None) -> Any:
    """What reads only this replica's rows of `x`, where that can be done; otherwise `x`.

    A `torch.utils.data.DataLoader` over a map-style data set becomes one that
    draws the same batches of samples on every rank, reads those of this replica
    (`row_bounds`) and yields nests of `Rows`. All else about it stays as it is:
    data set, sampler, `collate_fn`, workers, length. Batches of fewer samples
    than replicas are read by all, and are plain tensors. Of the 1st, 2nd, 4th,
    8th, ... batch the ranks compare which samples they draw and what they make
    of them (a small all-reduce and a small all-gather over the job). Samples
    that draw random numbers (augmentations) draw other ones on every replica and
    than in one process; what shuffles and drops out does not notice.

    Arrays, `PyDataset`s, generators, `tf.data`, loaders of iterable data sets and
    loaders without automatic batching (`batch_size=None`) are not changed: every
    rank reads the whole batch, the same as the others, and computes its rows of it.

    Args:
        x: what `fit`, `evaluate` or `predict` are given as `x`.
        axis: the batch axis; None or of one rank, nothing is shared out.

    Raises:
        LayoutError: a loader whose sampler is torch's `DistributedSampler`.
        ValueError: while reading, on every rank, if ranks draw different samples,
            or samples of different shapes; a `collate_fn` that does not make one
            row of each sample.
    """
    if not isinstance(x, DataLoader) or isinstance(x, SharedLoader):
        return x
    check_sampler(x)
    if axis is None or axis.size == 1:
        return x
    if isinstance(x.dataset, IterableDataset) or x.batch_sampler is None:
        return x
    return share_loader(x, axis)


def already_shared_out(batches: Iterable[Any], axis: Axis, length: int | None = None) -> Any:
    """Whole batches, as nests of `Rows`, of batches that are one replica's rows each.

    Replicas may bring different numbers of rows, each at least one; the ranks of
    one replica bring the same. What they bring is compared with every batch (one
    small all-gather over the job), so that data that end, or fail, on one replica
    are an error on all ranks.

    Args:
        batches: nests of arrays; as often iterable as the result is to be.
        axis: the batch axis.
        length: number of batches, if known: data of different lengths are then
            an error at once.

    Raises:
        ValueError: while iterating, on every rank, if a replica's data end before
            another's or its rows are of another shape or dtype; if the ranks of
            one replica bring different rows; if a batch is not made of arrays.
    """
    return batches if axis.size == 1 else _Parts(batches, axis, length)


def rows_from_process(batch: Any, axis: Axis) -> Any:
    """The whole batch, as a nest of `Rows`, of which `batch` is this replica's part.

    One small all-gather over the job tells the ranks each other's number of rows.

    Raises:
        ValueError: on every rank, as `already_shared_out` does.
    """
    return batch if axis.size == 1 else next(iter(_Parts([batch], axis, None)))


_READ, _ENDED, _FAILED = range(3)


class _Parts:
    """Iterates over whole batches of which each replica brings a part."""

    def __init__(self, batches: Iterable[Any], axis: Axis, length: int | None):
        self.batches, self.axis, self.length = batches, axis, length
        self.agreed = AgreedParts(axis)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the number of batches is not known")
        return self.length

    def __iter__(self) -> Iterator[Any]:
        # At once, for a DataLoader draws a random number then, even if nothing is read.
        return self._read(iter(self.batches))

    def _read(self, batches: Iterator[Any]) -> Iterator[Any]:
        number = 0
        while True:
            number += 1
            state, batch, rows, failure = _READ, None, 0, None
            try:
                batch, rows = as_tensors(next(batches))
            except StopIteration:
                state = _ENDED
            except Exception as error:  # told to the others, which would wait for this rank
                state, failure = _FAILED, error
            counts = self._agree(number, state, rows, batch, failure)
            if counts is None:
                return
            self.agreed.check(batch)
            yield as_rows(batch, counts, self.axis)

    def _agree(
        self, number: int, state: int, rows: int, batch: Any, failure: Exception | None
    ) -> tuple[int, ...] | None:
        """Number of rows of each replica, or None at the end; raises on every rank or on none."""
        kind = "; ".join(kinds_of(batch))
        length = -1 if self.length is None else self.length
        mine = [self.axis.rank, state, rows, zlib.crc32(kind.encode()), length]
        told = gather_numbers(mine)
        if failure is not None:
            raise failure
        replicas, states, counts, kinds, lengths = (
            list(column) for column in zip(*told, strict=True)
        )

        def other(column: list[int], value: int) -> int:
            return next(rank for rank, entry in enumerate(column) if entry != value)

        where = f"batch {number} of data whose rows are shared out already"
        if _FAILED in states:
            rank = states.index(_FAILED)
            raise ValueError(f"{where}: rank {rank} (replica {replicas[rank]}) failed to read it.")
        if len(set(lengths)) > 1:
            rank = other(lengths, lengths[0])
            raise ValueError(
                f"{where}: rank 0 has {_number(lengths[0])} batches, rank {rank} (replica "
                f"{replicas[rank]}) {_number(lengths[rank])}. Give every replica as many."
            )
        if len(set(states)) > 1:
            ended, goes_on = states.index(_ENDED), states.index(_READ)
            raise ValueError(
                f"{where}: replica {replicas[ended]} (rank {ended}) has none, after {number - 1}, "
                f"where replica {replicas[goes_on]} (rank {goes_on}) has. Give every replica as "
                "many batches; they may be of different sizes."
            )
        if state == _ENDED:
            return None
        if 0 in counts:
            rank = counts.index(0)
            raise ValueError(
                f"{where}: rank {rank} (replica {replicas[rank]}) has no rows in it. Give every "
                "replica one at least."
            )
        if len(set(kinds)) > 1:
            rank = other(kinds, kinds[0])
            raise ValueError(
                f"{where}: rank {rank} (replica {replicas[rank]}) has rows of other shapes or "
                f"dtypes than rank 0; here they are {kind}. Pad samples to one shape."
            )
        by_replica: dict[int, int] = {}
        for rank, (replica, count) in enumerate(zip(replicas, counts, strict=True)):
            if count != by_replica.setdefault(replica, count):
                raise ValueError(
                    f"{where}: rank {rank} has {count} rows where another rank of replica "
                    f"{replica} has {by_replica[replica]}. The ranks of one replica must be fed "
                    "the same rows."
                )
        return tuple(by_replica[replica] for replica in range(self.axis.size))


def _number(length: int) -> str:
    return "an unknown number of" if length < 0 else str(length)
