"""`fit` that is interrupted anywhere and begun again: as if it had not been, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import parity
import pytest
import torch
from test_checkpoints import data, gap, made, on, state

import keras_tp

EPOCHS, BATCH = 3, 5  # of 12 samples: batches of 5, 5 and 2


class InterruptedError(Exception):
    """What ends a job in these tests."""


class Interrupts(keras.callbacks.Callback):
    """Ends training after so many batches, or epochs."""

    def __init__(self, batches: int):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if self.left == 0:
            raise InterruptedError


class Losses(keras.callbacks.Callback):
    """The losses that are logged, by epoch and batch."""

    def __init__(self, seen: dict[tuple[int, int], float]):
        super().__init__()
        self.seen = seen

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen[self.epoch, batch] = float(logs["loss"])

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen[epoch, -1] = float(logs["loss"])


def arrays() -> dict[str, Any]:
    x, y = data()
    return {"x": x, "y": y, "batch_size": BATCH, "shuffle": True, "validation_data": (x, y)}


def in_batches() -> dict[str, Any]:
    return {**arrays(), "shuffle": "batch"}


def loader() -> dict[str, Any]:
    samples = torch.utils.data.TensorDataset(*map(torch.from_numpy, data()))
    return {
        "x": torch.utils.data.DataLoader(samples, batch_size=BATCH, shuffle=True),
        "shuffle": False,
    }


def parts() -> dict[str, Any]:
    """Epochs of two batches, of three that there are."""
    x, y = data()
    return {"x": x, "y": y, "batch_size": BATCH, "shuffle": True, "steps_per_epoch": 2}


def generator() -> dict[str, Any]:
    def batches() -> Iterator[Any]:
        x, y = data()
        while True:
            rows = np.random.permutation(12)[:BATCH]
            yield x[rows], y[rows]

    return {"x": batches(), "steps_per_epoch": 3, "shuffle": False}


def trained(
    layout: str | None, given: dict[str, Any], folder: str | None, losses: dict[Any, float],
    *callbacks: Any, every: int = 1, unit: str = "steps",
) -> list[Any]:  # fmt: skip
    """What the whole training, or the rest of it, leaves behind."""
    model = made(layout, seed=3)
    keras.utils.set_random_seed(11)
    saved = []
    if folder is not None:
        saved = [keras_tp.callbacks.ShardedCheckpoint(folder, every, unit)]
    told = [*saved, Losses(losses), *callbacks]
    model.fit(**given, epochs=EPOCHS, verbose=0, callbacks=told)
    return state(model)


def interrupted(
    layout: str | None, folder: str, feed: str, points: list[int], every: int, unit: str
) -> list[float]:
    """Interrupts training once after another; how far its end is from the undisturbed one's."""
    make = globals()[feed]
    whole: dict[Any, float] = {}
    pieces: dict[Any, float] = {}
    options: Any = {"every": every, "unit": unit}
    with parity.real_float64():
        one = trained(layout, make(), None, whole)
        for point in points:
            with pytest.raises(InterruptedError):
                trained(layout, make(), folder, pieces, Interrupts(point), **options)
        np.random.seed(0)  # whatever state a new process begins in
        torch.manual_seed(0)
        two = trained(layout, make(), folder, pieces, **options)
        again = trained(layout, make(), folder, {}, **options)  # all is done
    assert whole.keys() == pieces.keys()
    told = max(abs(whole[at] - pieces[at]) for at in whole)
    return [gap(one, two), gap(one, again), told]


CASES = {
    "arrays, every step": ("arrays", [1, 1, 2, 3], 1, "steps"),
    "arrays, every other step": ("arrays", [4, 3], 2, "steps"),
    "arrays, every epoch": ("arrays", [2, 5], 1, "epochs"),
    "shuffle='batch'": ("in_batches", [2, 3], 1, "steps"),
    "DataLoader": ("loader", [2, 4], 1, "steps"),
    "steps_per_epoch": ("parts", [1, 2, 1], 1, "steps"),
    "steps_per_epoch, every epoch": ("parts", [3], 1, "epochs"),
    "generator": ("generator", [2, 3], 1, "steps"),
}


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_if_nothing_had_been(tmp_path: Path, case: str) -> None:
    """Samples, masks, moments, and losses as they are logged, wherever it is interrupted.

    Seen to fail with batches that are not left out, with the random state of the epoch's beginning,
    or of the break, not restored, without the metrics, and without the steps since data began."""
    assert interrupted(None, str(tmp_path / "run"), *CASES[case]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("layout", ["columns of 2", "2 replicas"])
def test_ranks_go_on_as_if_nothing_had_been(ranks: Any, tmp_path: Path, layout: str) -> None:
    """Two ranks that go on with other samples; replicas that each skip by their own count. Seen to
    fail with ranks that spoke while the thread of the last checkpoint did."""
    for feed in ("arrays", "loader"):
        folder = str(tmp_path / feed)
        for gaps in on(ranks, layout, interrupted, folder, feed, [2, 2], 1, "steps"):
            assert gaps == [0.0, 0.0, 0.0], feed


def test_what_cannot_go_on_is_told(tmp_path: Path) -> None:
    """A second `fit` that trained nothing (seen to fail so); data that are other than before."""
    with parity.real_float64():
        folder = str(tmp_path / "run")
        with pytest.raises(InterruptedError):
            trained(None, arrays(), folder, {}, Interrupts(3))
        fewer = {**arrays(), "batch_size": 12}
        with pytest.raises(ValueError, match="after 2 batches of data that now have 1: give `fit`"):
            trained(None, fewer, folder, {})
        model = made(None)
        saved = keras_tp.callbacks.ShardedCheckpoint(tmp_path / "other")
        model.fit(**arrays(), epochs=1, verbose=0, callbacks=[saved])
        with pytest.raises(keras_tp.CheckpointError, match="has been given to a `fit` already"):
            model.fit(**arrays(), epochs=1, verbose=0, callbacks=[saved])
        keras_tp.save_checkpoint(tmp_path / "third", model, step=1)
        with pytest.raises(keras_tp.CheckpointError, match="not saved by a ShardedCheckpoint"):
            trained(None, arrays(), str(tmp_path / "third"), {})
    with pytest.raises(keras_tp.CheckpointError, match="3 problems in this ShardedCheckpoint"):
        keras_tp.callbacks.ShardedCheckpoint(folder, every=0, unit="hours", keep=None)  # type: ignore[arg-type]
