"""Callbacks of a parallelized model: every rank decides alike, files are written once.

Callbacks run on every rank, as `fit` does, and may read weights, which is
collective. What they decide must be the same everywhere, or ranks wait for each
other: so what they are told at the end of an epoch is what the first rank found,
and training stops on all ranks or on none. Keras's callbacks that write files,
and those derived from them, run on the first rank alone (`keras_tp.leading`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import torch.distributed as dist

from keras_tp.agreement import first_difference
from keras_tp.errors import LayoutError
from keras_tp.files import FileWork
from keras_tp.leading import held_together, lead
from keras_tp.messages import anywhere, broadcast_object
from keras_tp.resumption import ShardedCheckpoint as ShardedCheckpoint  # a public name of this one
from keras_tp.seam.callbacks import (
    Attendance,
    derived_from_kerass,
    hook_callbacks,
    initial_epoch,
    is_kerass,
    listens,
    quiet,
    set_initial_epoch,
)
from keras_tp.seam.contexts import current_leader
from keras_tp.seam.saving import hook_saving

# (Which there are depends on the version of Keras.)
_WRITERS = tuple(
    getattr(keras.callbacks, name)
    for name in (
        "BackupAndRestore",
        "CSVLogger",
        "ModelCheckpoint",
        "OrbaxCheckpoint",
        "RemoteMonitor",
        "TensorBoard",
    )
    if hasattr(keras.callbacks, name)
)
_BEGINNINGS = {
    "on_train_begin": "trains",
    "on_test_begin": "evaluates",
    "on_predict_begin": "predicts",
}
_ENDS = ("on_epoch_end", "on_train_end", "on_test_end")
# The attribute by which a callback ends what goes on, and which is looked at after the event.
_STOPS = {
    "on_train_batch_end": "stop_training",
    "on_epoch_end": "stop_training",
    "on_test_batch_end": "stop_evaluating",
    "on_predict_batch_end": "stop_predicting",
}


def act_together() -> None:
    """Has all ranks save and tell callbacks of models that they hold together. Idempotent.

    For other models, and in a job of one rank, Keras does as it always did.
    """
    hook_saving(FileWork())
    hook_callbacks(attendance)


def attendance(model: Any, callbacks: list[Any]) -> Attendance | None:
    """Who attends to callbacks of `model`; None if it is not held together. Collective if it is."""
    # The first rank, working alone, may not call the model, and is told so then.
    if current_leader() is not None or not held_together(model):
        return None
    return AllRanks(model, callbacks)


class AllRanks:
    """Has all ranks tell one list of callbacks alike; see `keras_tp.seam.callbacks.Attendance`.

    Collective to make: two small all-reduces. So is each beginning (one), each batch,
    if any rank has callbacks (one), each end of an epoch (two small broadcasts), and
    each event that a callback which writes files listens to.

    Args:
        model: held by all ranks together.
        callbacks: of this rank. The progress bar and the history, and callbacks that
            the user wrote, may differ between ranks.

    Raises:
        LayoutError: on every rank, if one has others of Keras's callbacks.
    """

    def __init__(self, model: Any, callbacks: list[Any]):
        self.model = model
        added = (keras.callbacks.ProgbarLogger, keras.callbacks.History)
        given = [callback for callback in callbacks if not isinstance(callback, added)]
        known = [type(callback).__name__ for callback in given if derived_from_kerass(callback)]
        different = first_difference(known)
        if different is not None:
            first, rank, other = different
            raise LayoutError(
                f"rank 0 has {first} where rank {rank} has {other}. Give every rank the same "
                "callbacks of Keras's: files are written by the first rank alone in any case.",
                where="these callbacks",
            )
        self.stop_together = anywhere(bool(given))

    def attend(self, event: str, given: dict[str, Any], tell: Callable[[list[Any]], None]) -> None:
        """Tells them, and agrees on what comes of it.

        Raises:
            LayoutError: on every rank, if one begins something else.
        """
        if event in _BEGINNINGS:
            self._begin_together(_BEGINNINGS[event])
        if event in _ENDS:
            given["logs"] = broadcast_object(given.get("logs"))
        tell([self._acting(callback, event) for callback in given["self"].callbacks])
        if event in _STOPS and self.stop_together:
            self._stop_together(_STOPS[event])
        if event == "on_train_begin" and self.stop_together:
            set_initial_epoch(self.model, broadcast_object(initial_epoch(self.model)))

    def _begin_together(self, what: str) -> None:
        different = first_difference([what])
        if different is not None:
            first, rank, other = different
            raise LayoutError(
                f"rank 0 {first} where rank {rank} {other}. Every rank must do the same, in the "
                "same order: nothing of it under `if rank == 0`.",
                where=f"what ranks do with '{self.model.name}'",
            )

    def _acting(self, callback: Any, event: str) -> Any:
        if isinstance(callback, _WRITERS) and listens(callback, event):
            return _Led(callback, self.model)
        if dist.get_rank() > 0 and derived_from_kerass(callback):
            return _Quiet(callback)
        return callback

    def _stop_together(self, attribute: str) -> None:
        # A clock, say, stops one rank before another.
        if anywhere(bool(getattr(self.model, attribute, False))):
            setattr(self.model, attribute, True)


class _Led:
    """A callback that the first rank alone tells, while the others follow."""

    def __init__(self, callback: Any, model: Any):
        self.callback, self.model = callback, model

    def __getattr__(self, event: str) -> Any:
        def tell(*args: Any, **kwargs: Any) -> None:
            if event == "set_model":  # which the others are to know as well
                keras.callbacks.Callback.set_model(self.callback, *args, **kwargs)
            own = not is_kerass(self.callback)
            lead(self.model, lambda: getattr(self.callback, event)(*args, **kwargs), watch=own)

        return tell


class _Quiet:
    """A callback of Keras's on another rank than the first, which prints nothing."""

    def __init__(self, callback: Any):
        self.callback = callback

    def __getattr__(self, event: str) -> Any:
        def tell(*args: Any, **kwargs: Any) -> None:
            with quiet():
                getattr(self.callback, event)(*args, **kwargs)

        return tell
