"""Training that goes on where it was interrupted, within an epoch, as if it had not been."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import keras

from keras_tp.checkpoints import load, newest_step, save
from keras_tp.errors import CheckpointError
from keras_tp.job import job_rank
from keras_tp.randomness import random_state, set_random_state
from keras_tp.savings import Saving
from keras_tp.seam.callbacks import set_initial_epoch
from keras_tp.seam.positions import Place, hook_positions, latest_position
from keras_tp.seam.stored import store
from keras_tp.seam.variables import local_tensor

_UNITS = ("epochs", "steps")


class ShardedCheckpoint(keras.callbacks.Callback):
    """Saves checkpoints while `fit` trains, and has it go on from the newest there is.

    Give it to every rank, with one directory, in a script that `torchrun --max-restarts 3` starts:
    a job that is killed starts anew, and `fit` continues in the epoch and with the batch
    at which the checkpoint was saved, in the order of samples and with the masks that the
    training would have had. Weights are those of a training that was not interrupted, on as many
    ranks to the bit.

    What it reads again it leaves out: the batches of the epoch that were trained on are read, not
    computed. That is exact for arrays, for `DataLoader`s and for what gives the same batches again
    in the same random state; not for a `PyDataset` that keeps an order of its own from
    epoch to epoch, nor for one that is read by several workers in random order. Other callbacks
    start anew: what `EarlyStopping` has seen is not in a checkpoint, nor is the history.

    After the last epoch there is a checkpoint too, so that a training that is done is not done
    again. One directory is for one call of `fit`.

    A checkpoint costs what `keras_tp.save_checkpoint` costs.

    Args:
        directory: where checkpoints are, as for `keras_tp.save_checkpoint`.
        every: how many epochs or steps (batches) there are from one to the next.
        unit: `"epochs"` or `"steps"`.
        keep: how many to keep, the newest.
        asynchronous: write beside the training.
        fall_back: if the newest is damaged, begin with the one before it, and warn.

    Raises:
        CheckpointError: as training begins, for a checkpoint that is damaged, of another
            model, or of none of these callbacks; for a second `fit`.
        OSError: a checkpoint that could not be written, as the next one is due or training ends.

    Example:
        >>> saved = keras_tp.callbacks.ShardedCheckpoint("runs/1", every=500, unit="steps")
        >>> model.fit(x, y, epochs=10, callbacks=[saved])
    """

    def __init__(
        self,
        directory: Any,
        every: int = 1,
        unit: str = "epochs",
        *,
        keep: int = 2,
        asynchronous: bool = True,
        fall_back: bool = False,
    ):
        super().__init__()
        problems = []
        for name, value in (("every", every), ("keep", keep)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                problems.append(f"`{name}` is {value!r}; it is a whole number from 1.")
        if unit not in _UNITS:
            problems.append(f"`unit` is {unit!r}; it is one of {', '.join(map(repr, _UNITS))}.")
        if problems:
            raise CheckpointError(problems, where="this ShardedCheckpoint")
        self.directory, self.every, self.unit = directory, every, unit
        self.keep, self.asynchronous, self.fall_back = keep, asynchronous, fall_back
        self._used = False
        self._saving: Saving | None = None
        self._metrics: list[Any] = []
        self._due: tuple[int, int] | None = None  # the epoch and step to go on with
        self._epoch, self._before, self._saved = 0, 0, 0
        hook_positions()

    def on_train_begin(self, logs: Any = None) -> None:
        """Loads the newest checkpoint, if there is one."""
        if self._used:
            raise CheckpointError(
                "it has been given to a `fit` already, whose end its checkpoints are. Give another "
                "one, with another directory, to each `fit`.",
                where=f"the ShardedCheckpoint of '{self.directory}'",
            )
        self._used = True
        position = latest_position(random_state, set_random_state)
        if position is None:
            raise CheckpointError(
                "it is told of a training that reads no data as `fit` does. In a loop of your own "
                "call keras_tp.save_checkpoint and load_checkpoint.",
                where=f"the ShardedCheckpoint of '{self.directory}'",
            )
        self._position = position
        if newest_step(self.directory, self.model) is not None:
            self._resume()

    def _resume(self) -> None:
        found, begun = load(self.directory, self.model, None, self.fall_back)
        try:
            epoch, place = found.extra["epoch"], Place(**found.extra["place"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                "it was not saved by a ShardedCheckpoint. Give this one a directory of its own.",
                where=f"'{found.path}'",
            ) from error
        self._before, self._saved = found.step - place.steps, found.step
        self._due, self._epoch = (epoch, place.steps), epoch
        self._position.go_to(place, begun, random_state())
        set_initial_epoch(self.model, epoch)
        if place.steps:  # `fit` sets them to nothing as it begins an epoch
            self._metrics = [(v, local_tensor(v).clone()) for v in self.model.metrics_variables]
        if job_rank() == 0 and self.params.get("verbose"):
            print(f"keras_tp: goes on from '{found.path}', epoch {epoch}, step {place.steps}")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Puts back the metrics' state, in the epoch in which training goes on."""
        self._epoch = epoch
        if self._due is None:
            return
        set_initial_epoch(self.model, None)
        for variable, value in self._metrics:
            store(variable, value)
        self._metrics = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Looks whether training goes on where it should."""
        # (The first batch may be of the next epoch, if this one was done but for its end.)
        if self._due is not None and (self._epoch, batch) < self._due:
            raise CheckpointError(
                f"`fit` goes on with batch {batch} of epoch {self._epoch}, where the checkpoint "
                f"was saved before batch {self._due[1]} of epoch {self._due[0]}.",
                where=f"the ShardedCheckpoint of '{self.directory}'",
            )
        self._due = None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves, if it is time to."""
        if self._position.epoch_is_done():
            return  # its end is to come, with what it logs
        step = self._before + self._position.steps
        if self.unit == "steps" and step // self.every > self._saved // self.every:
            self._save(step, self._epoch, epoch_done=False)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Saves, if it is time to, or the last epoch."""
        self._before += self._position.steps
        due = epoch + 1 >= self.params.get("epochs", 0)
        if self.unit == "epochs":
            due |= (epoch + 1) % self.every == 0
        else:
            due |= self._before // self.every > self._saved // self.every
        if due:
            self._save(self._before, epoch + 1, epoch_done=True)

    def on_train_end(self, logs: Any = None) -> None:
        """Waits for the last checkpoint."""
        set_initial_epoch(self.model, None)
        if self._saving is not None:
            self._saving.wait()

    def _save(self, step: int, epoch: int, *, epoch_done: bool) -> None:
        place, begun = self._position.place(epoch_done)
        extra = {"epoch": epoch, "place": asdict(place)}
        self._saved = step
        self._saving = save(
            self.directory, self.model, step, extra, self.keep, self.asynchronous, begun
        )
