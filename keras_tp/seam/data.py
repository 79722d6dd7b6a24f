"""Keras's data path: what `fit`, `evaluate` and `predict` are given, before it is read."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import keras
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters.data_adapter import DataAdapter


@dataclass(frozen=True)
class Feed:
    """What becomes of data on their way into `fit`, `evaluate` and `predict`.

    Attributes:
        source: what `x` is replaced by.
        batches: what the batches made of it, and their number if known, are replaced by.
    """

    source: Callable[[Any], Any]
    batches: Callable[[Iterable[Any], int | None], Iterable[Any]] | None


_FEED: ContextVar[Feed | None] = ContextVar("keras_tp_feed", default=None)


@contextlib.contextmanager
def feeding(
    source: Callable[[Any], Any],
    batches: Callable[[Iterable[Any], int | None], Iterable[Any]] | None = None,
) -> Iterator[None]:
    """While open, data go by `source` and `batches` (see `Feed`) if `hook_data` has been called."""
    token = _FEED.set(Feed(source, batches))
    try:
        yield
    finally:
        _FEED.reset(token)


def hook_data() -> None:
    """Has data go by the open `feeding`; without one nothing changes. Idempotent."""
    if not hasattr(data_adapters.get_data_adapter, "_keras_tp"):
        data_adapters.get_data_adapter = _fed(data_adapters.get_data_adapter)


def unhook_data() -> None:
    """Undoes `hook_data`."""
    if hasattr(data_adapters.get_data_adapter, "_keras_tp"):
        data_adapters.get_data_adapter = data_adapters.get_data_adapter.__wrapped__


def _fed(original: Any) -> Any:
    @functools.wraps(original)
    def get_data_adapter(x: Any, *args: Any, **kwargs: Any) -> Any:
        feed = _FEED.get()
        if feed is None:
            return original(x, *args, **kwargs)
        with _without_distribution():
            adapter = original(feed.source(x), *args, **kwargs)
        return adapter if feed.batches is None else FedAdapter(adapter, feed.batches)

    get_data_adapter._keras_tp = True  # type: ignore[attr-defined]
    return get_data_adapter


@contextlib.contextmanager
def _without_distribution() -> Iterator[None]:
    # With a distribution of several processes Keras refuses all but tf.data, and
    # cuts that by a rule of its own.
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)


class FedAdapter(DataAdapter):
    """A data adapter whose batches, as torch tensors, are replaced."""

    def __init__(
        self,
        original: Any,
        batches: Callable[[Iterable[Any], int | None], Iterable[Any]],
    ):
        self.original, self.batches = original, batches

    def get_torch_dataloader(self) -> Iterable[Any]:
        """Tensors of the original's batches, replaced."""
        return self.batches(self.original.get_torch_dataloader(), self.num_batches)

    @property
    def num_batches(self) -> int | None:
        """Number of batches, if known."""
        return self.original.num_batches

    @property
    def batch_size(self) -> int | None:
        """Number of rows of the original's batches, if known."""
        return self.original.batch_size

    @property
    def has_partial_batch(self) -> bool | None:
        """Whether the last batch is shorter."""
        return self.original.has_partial_batch

    @property
    def partial_batch_size(self) -> int | None:
        """Number of rows of the last batch, if it is shorter."""
        return self.original.partial_batch_size

    def on_epoch_begin(self) -> None:
        self.original.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self.original.on_epoch_end()
