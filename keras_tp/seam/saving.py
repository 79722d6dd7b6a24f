"""Keras's files: where models and weights are written and read, and where it asks before.

Every way to save, `model.save`, `save_weights`, the functions of `keras.saving`
and those that scripts have imported by name, goes by three functions that their
modules look up as they are called: `saving_lib.save_model` and `save_weights_only`,
and `legacy_h5_format.save_model_to_hdf5`. Weights are read by
`saving_lib.load_weights_only`, and `Model.export` writes what runs without Keras.
`io_utils.ask_to_proceed_with_overwrite` asks on the terminal, and is not told of which
model; its caller's argument is `model`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, Protocol

import keras
from keras.src.legacy.saving import legacy_h5_format
from keras.src.saving import saving_lib
from keras.src.utils import file_utils, io_utils

from keras_tp.seam.contexts import current_leader

Write = Callable[[Any], None]


class Work(Protocol):
    """What is done where Keras writes a file."""

    def takes_over(self, model: Any) -> bool:
        """Whether writing `model` is not this process's own affair."""

    def save(self, model: Any, path: Any, write: Write, parents: bool) -> None:
        """`write(path)` writes the file, or folder; `parents` says whether it makes those above."""

    def load(self, model: Any, path: Any, load: Callable[[], None]) -> None:
        """`load()` loads the weights in `path` into `model`, on this rank."""

    def export(self, model: Any) -> None:
        """Called in place of `model.export`."""

    def ask(self, model: Any, path: Any, ask: Callable[[], bool]) -> bool:
        """`ask()` asks whether to write over what is there, and gives the answer."""


def hook_saving(work: Work) -> None:
    """Has Keras have `work` write the files of models that it takes over. Idempotent."""
    if hasattr(saving_lib.save_model, "_keras_tp"):
        return
    saving_lib.save_model = _saving(
        saving_lib.save_model, work, lambda given: not given.get("zipped", True)
    )
    saving_lib.save_weights_only = _saving(saving_lib.save_weights_only, work, lambda given: False)
    legacy_h5_format.save_model_to_hdf5 = _saving(
        legacy_h5_format.save_model_to_hdf5, work, lambda given: True
    )
    saving_lib.load_weights_only = _loading(saving_lib.load_weights_only, work)
    keras.Model.export = _exporting(keras.Model.export, work)
    io_utils.ask_to_proceed_with_overwrite = _asking(io_utils.ask_to_proceed_with_overwrite, work)


def is_local(path: Any) -> bool:
    """Whether `path` is in a file system, and not a file object or what Keras copies elsewhere."""
    return not hasattr(path, "write") and not file_utils.is_remote_path(path)


def _saving(original: Any, work: Work, makes_parents: Callable[[dict[str, Any]], bool]) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save(model: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
        if not work.takes_over(model):
            return original(model, filepath, *args, **kwargs)
        given = signature.bind(model, filepath, *args, **kwargs).arguments

        def write(path: Any) -> None:
            original(model, path, *args, **kwargs)

        return work.save(model, filepath, write, makes_parents(given))

    save._keras_tp = True  # type: ignore[attr-defined]
    return save


def load_alone(model: Any, path: Any, **options: Any) -> None:
    """Loads weights into `model` on this rank, which asks no other: for those who are led."""
    saving_lib.load_weights_only.__wrapped__(model, path, **options)


def _exporting(original: Any, work: Work) -> Any:
    @functools.wraps(original)
    def export(self: Any, *args: Any, **kwargs: Any) -> Any:
        if work.takes_over(self):
            return work.export(self)
        return original(self, *args, **kwargs)

    return export


def _loading(original: Any, work: Work) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load(model: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
        leader = current_leader()
        if leader is None and work.takes_over(model):
            return work.load(model, filepath, lambda: original(model, filepath, *args, **kwargs))
        if leader is None or leader.model is not model:
            return original(model, filepath, *args, **kwargs)
        options = dict(signature.bind(model, filepath, *args, **kwargs).arguments)
        del options["model"], options["filepath"]
        return leader.load(filepath, options, lambda: original(model, filepath, *args, **kwargs))

    return load


def _asking(original: Any, work: Work) -> Any:
    @functools.wraps(original)
    def ask_to_proceed_with_overwrite(filepath: Any) -> bool:
        model = sys._getframe(1).f_locals.get("model")
        if model is None or not work.takes_over(model):
            return original(filepath)
        return work.ask(model, filepath, lambda: original(filepath))

    return ask_to_proceed_with_overwrite
