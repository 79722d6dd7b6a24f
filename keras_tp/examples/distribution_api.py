"""Runs a script written for `keras.distribution` on torch and proves that its numbers are right.

    torchrun --standalone --nproc-per-node 2 -m keras_tp.examples.distribution_api

One model is trained three times: as plain Keras by every process for itself,
under `DataParallel`, and under `ModelParallel` on a mesh of both kinds. Training
needs `keras_tp.enable()` and then Keras's own names alone, as on JAX. Losses and
weights must be equal to float32 rounding, on every rank.

The model has what looks at a whole batch (`BatchNormalization`, metrics) and what
draws random numbers (`Dropout`, shuffling), where replicas that keep to
themselves would give other numbers. Half of the epochs read NumPy arrays, which
every rank has whole, half a `DataLoader`, of which it reads the rows it needs.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import keras_tp  # before keras: picks the torch backend

# isort: split
import keras
import numpy as np
import torch.distributed as dist
from keras import distribution, layers
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader, Dataset

from keras_tp.tables import plain_table, render

ROWS, FEATURES, CLASSES = 500, 32, 8
BATCH = 64  # rows of all replicas together; the last batch of an epoch has 52
EPOCHS = 2  # on arrays, and as many on a DataLoader

# Ranks add in another order than one process does. So a loss was seen to differ by 2.0e-07 of
# itself on 2 to 4 ranks, a weight by 4.6e-07 of the largest one beside it; with gradients that
# are means over replicas, not sums, by 0.9 and 0.5.
BOUND = 1e-5


class Samples(Dataset):
    """Points around the centres of `CLASSES` classes; counts how many it was asked for."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        centres = random.normal(size=(CLASSES, FEATURES))
        self.y = random.integers(CLASSES, size=ROWS).astype("int32")
        self.x = (centres[self.y] + 2 * random.normal(size=(ROWS, FEATURES))).astype("float32")
        self.read = 0

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        self.read += 1
        return self.x[index], self.y[index]


def classifier() -> Any:
    """The model, compiled. Knows nothing of distributions."""
    keras.utils.set_random_seed(0)  # the same initial weights, masks and order in every run
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(128, use_bias=False, name="up")(inputs)  # the next layer takes off a bias
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Activation("relu", name="relu")(x)
    x = layers.Dropout(0.2, name="dropout")(x)
    x = layers.Dense(64, activation="relu", name="down")(x)
    model = keras.Model(inputs, layers.Dense(CLASSES, name="head")(x), name="classifier")
    model.compile(
        # Adam takes the same step for gradients of half the size, and would hide such a mistake.
        keras.optimizers.SGD(0.02, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


class Run(NamedTuple):
    """What a training gave.

    Attributes:
        loss: of each epoch, and of `evaluate` at the end.
        accuracy: likewise.
        weights: all of them, whole.
        read: how many rows this process read in an epoch of the DataLoader.
    """

    loss: list[float]
    accuracy: list[float]
    weights: list[np.ndarray]
    read: int


def train(model: Any, samples: Samples) -> Run:
    """Trains on arrays, then on a DataLoader, and evaluates."""
    arrays = model.fit(samples.x, samples.y, batch_size=BATCH, epochs=EPOCHS, verbose=0).history
    samples.read = 0
    loader = DataLoader(samples, BATCH, shuffle=True)
    loaded = model.fit(loader, epochs=EPOCHS, shuffle=False, verbose=0).history
    loss, accuracy = evaluate(model, samples)
    return Run(
        [*arrays["loss"], *loaded["loss"], loss],
        [*arrays["accuracy"], *loaded["accuracy"], accuracy],
        model.get_weights(),
        samples.read // EPOCHS,
    )


def evaluate(model: Any, samples: Samples) -> tuple[float, float]:
    """Loss and accuracy on all rows."""
    loss, accuracy = model.evaluate(samples.x, samples.y, batch_size=BATCH, verbose=0)
    return loss, accuracy


def layout_over(devices: list[str]) -> Any:
    """Columns of the first kernel and rows of the second over two devices; such pairs are replicas.

    Of an odd number of devices each is a replica.
    """
    model = 2 if len(devices) % 2 == 0 else 1
    mesh = distribution.DeviceMesh((len(devices) // model, model), ["batch", "model"], devices)
    layout_map = distribution.LayoutMap(mesh)
    layout_map["up/kernel"] = (None, "model")
    layout_map["down/kernel"] = ("model", None)
    return layout_map


@record  # torchrun's report then names the rank that failed, with its traceback
def main() -> None:
    """Trains three times and compares; exits with a message if the runs differ."""
    keras_tp.enable()
    distribution.initialize()
    devices = distribution.list_devices()
    first = dist.get_rank() == 0
    samples = Samples()

    plain = train(classifier(), samples)

    with distribution.DataParallel(devices=devices).scope():
        replicated = classifier()
        runs = {"DataParallel": train(replicated, samples)}

    layout_map = layout_over(devices)
    distribution.set_distribution(
        distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")
    )
    model = classifier()
    if first:
        print(f"The plan under ModelParallel:\n\n{keras_tp.plan(model, layout_map)}\n", flush=True)
    runs["ModelParallel"] = train(model, samples)
    outputs = model.predict(samples.x, batch_size=BATCH, verbose=0)

    # Both distributions live side by side: back to the first, as a new one of the same devices.
    distribution.set_distribution(distribution.DataParallel(devices=devices))
    again = evaluate(replicated, samples)
    distribution.set_distribution(None)

    if first:
        show(plain, runs)
        for name, run in runs.items():
            print(f"{name}: this process read {run.read} of {ROWS} rows of the DataLoader an epoch")
        print(f"predict gives every process all outputs: {outputs.shape}")
    differ = again != (runs["DataParallel"].loss[-1], runs["DataParallel"].accuracy[-1])
    for name, run in runs.items():
        loss, accuracy = worst(plain.loss, run.loss), worst(plain.accuracy, run.accuracy)
        weight, path = worst_weight(plain.weights, run.weights, [v.path for v in model.weights])
        # Of the rows one may lie so near to the border of two classes that rounding decides.
        differ |= not (loss <= BOUND and weight <= BOUND and accuracy <= 2 / ROWS)
        if first:
            print(f"{name}: losses differ by {loss:.1e} at most, weights by {weight:.1e} ({path})")
    if differ:
        sys.exit(f"the runs differ, seen by {devices[dist.get_rank()]}")
    if first:
        print(f"losses and weights are equal to float32 rounding on {', '.join(devices)}")


def worst(one: list[float], many: list[float]) -> float:
    """The largest difference, relative to the number."""
    return float(np.max(np.abs(np.subtract(many, one)) / np.abs(one)))


def worst_weight(
    one: list[np.ndarray], many: list[np.ndarray], paths: list[str]
) -> tuple[float, str]:
    """The largest difference of a weight, relative to the weight's largest value, and its path."""
    return max(
        (float(np.abs(a - b).max() / np.abs(a).max()), path)
        for a, b, path in zip(one, many, paths, strict=True)
    )


def show(plain: Run, runs: dict[str, Run]) -> None:
    """Losses side by side, with what differs most from one process, and the last run's accuracy."""
    names = [f"epoch {i + 1}, {'arrays' if i < EPOCHS else 'loader'}" for i in range(2 * EPOCHS)]
    table = plain_table("loss", "one process", *runs, "difference", "accuracy")
    rows = zip(
        [*names, "evaluate"],
        plain.loss,
        zip(*(run.loss for run in runs.values()), strict=True),
        runs["ModelParallel"].accuracy,
        strict=True,
    )
    for name, one, others, accuracy in rows:
        difference = max((other - one for other in others), key=abs)
        losses = [f"{loss:.7f}" for loss in (one, *others)]
        table.add_row(name, *losses, f"{difference:+.1e}", f"{accuracy:.3f}")
    print(render(table) + "\n")


if __name__ == "__main__":
    main()
