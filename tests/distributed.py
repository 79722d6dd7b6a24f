"""A script, run twice: as it is, and as it is under a `keras.distribution`, over the ranks.

The first rank makes the one for all, every rank the other, from one seed: all ranks are compared
with one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import parity
from keras import layers, ops
from precision import real_float64

import keras_tp
from keras_tp.seam.layers import plan_carried_out, walk_layers

# Makes a distribution; it has to be made after `enable`, from which it learns of the job.
Maker = Callable[[], Any]
# A context manager in which the distribution is current, or one that does nothing.
Scope = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`keras_tp.enable()`, undone for the next test, with whatever distribution is left."""
    keras_tp.enable()
    try:
        yield
    finally:
        keras.distribution.set_distribution(None)
        keras_tp.disable()


def data_parallel(**options: Any) -> Any:
    """Over all ranks."""
    devices = keras.distribution.list_devices()
    return keras.distribution.DataParallel(devices=devices, **options)


def model_parallel(shape: tuple[int, int], layout: Mapping[str, Any], **options: Any) -> Any:
    """Of a mesh ("batch", "model"), as a script for Keras on JAX makes it."""
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh(shape, ["batch", "model"], devices)
    layout_map = parity.layout_map(layout, mesh)
    options.setdefault("batch_dim_name", "batch")
    return keras.distribution.ModelParallel(layout_map=layout_map, **options)


def start(seed: int = 7) -> None:
    """What a script begins with: names count from one, and no distribution is current."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(seed)


def both(script: Callable[[Scope], dict[str, Any]], make: Maker) -> dict[str, float]:
    """Largest differences of what `script(scope)` gives, by name. Collective."""
    with real_float64():
        start()
        one = parity.once(lambda: script(contextlib.nullcontext))
        with enabled():
            start()
            many = script(make().scope)
    # Seeded ranks that each train the whole model for themselves have the same numbers, too.
    assert not one.pop("parallelized")
    assert many.pop("parallelized")
    assert list(one) == list(many)
    return {name: parity.difference(value, many[name]) for name, value in one.items()}


def classes(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs `(rows, 6)` and one-hot targets `(rows, 4)`."""
    random = np.random.default_rng(seed)
    return random.standard_normal((rows, 6)), np.eye(4)[random.integers(0, 4, rows)]


class Penalty(layers.Layer):
    """Adds a loss that is a mean over rows."""

    def call(self, x: Any) -> Any:
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        return x


def classifier() -> Any:
    """All that looks at more than one row, or draws random numbers, in one small model."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "gelu", activity_regularizer="l2", name="up"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.5, seed=5),
            Penalty(),
            layers.Dense(8, "tanh", name="middle"),
            layers.Dropout(0.3),
            layers.Dense(4, "softmax", kernel_regularizer="l1", name="down"),
        ],
        name="classifier",
    )


# Sharded along both axes, as KerasHub's maps are.
LAYOUT = {
    ".*up/kernel": ("batch", "model"),
    ".*up/bias": ("model",),
    ".*norm/gamma": ("batch",),
    ".*middle/kernel": ("model", "batch"),
    ".*down/kernel": ("model", None),
}


def compiled(model: Any, **options: Any) -> Any:
    """With metrics that are no means of means, and weighted ones."""
    model.compile(
        keras.optimizers.Adam(0.01),
        "categorical_crossentropy",
        metrics=[
            "accuracy",
            keras.metrics.AUC(num_thresholds=20, name="auc"),
            keras.metrics.F1Score(average="macro"),
            keras.metrics.OneHotMeanIoU(num_classes=4),
        ],
        weighted_metrics=["accuracy", keras.metrics.AUC(num_thresholds=20, name="weighted_auc")],
        **options,
    )
    return model


def state(model: Any) -> dict[str, Any]:
    """Every weight and optimizer slot, whole, and whether it is parallelized. Collective."""
    optimizer = getattr(model, "optimizer", None)
    slots = [] if optimizer is None else optimizer.variables
    return {
        **keras_tp.full_weights(model),
        **{f"optimizer {v.path}": v.numpy() for v in slots},
        "parallelized": is_parallelized(model),
    }


def is_parallelized(model: Any) -> bool:
    """Whether `model`, or a part of it, has been."""
    return any(plan_carried_out(owner.layer) is not None for owner in walk_layers(model))


def fitted(model: Any, rows: int = 10, **options: Any) -> dict[str, Any]:
    """All that two epochs of shuffled batches of four leave behind. Collective."""
    x, y = classes(rows)
    options = {"batch_size": 4, "epochs": 2, **options}
    history = model.fit(x, y, verbose=0, **options).history
    parallelized = is_parallelized(model)  # by `fit`, not by what comes after
    predicted = model.predict(x, batch_size=4, verbose=0)
    return {**history, "predicted": predicted, **state(model), "parallelized": parallelized}
