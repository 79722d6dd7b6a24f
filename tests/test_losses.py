"""Every loss of Keras, with its defaults: the value of one process, and the weights it leads to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import features
import keras
import numpy as np
import pytest
import scripts
from keras import layers
from precision import real_float64

ROWS = 5
RANDOM = np.random.default_rng(4)
X = RANDOM.standard_normal((ROWS, 6))
NUMBERS = RANDOM.standard_normal((ROWS, 4))
CLASSES = np.array([0, 3, 1, 0, 2])


@dataclass
class Kind:
    """What a loss compares: the layers that give it, and targets."""

    ends: Callable[[], list[Any]]
    targets: np.ndarray


def dense(activation: str) -> Callable[[], list[Any]]:
    return lambda: [layers.Dense(4, activation, name="down")]


def unit_vectors() -> list[Any]:
    return [layers.Dense(4, name="down"), layers.UnitNormalization()]


def pictures() -> list[Any]:
    return [layers.Dense(16, "sigmoid", name="down"), layers.Reshape((4, 4, 1))]


def steps() -> list[Any]:
    return [layers.Dense(6 * 5, name="down"), layers.Reshape((6, 5))]


KINDS = {
    "numbers": Kind(dense("linear"), NUMBERS),
    "positive numbers": Kind(dense("softplus"), np.abs(NUMBERS)),
    "-1 or 1": Kind(dense("tanh"), np.sign(NUMBERS)),
    "0 or 1": Kind(dense("sigmoid"), (NUMBERS > 0).astype("float64")),
    "one of many": Kind(dense("softmax"), np.eye(4)[CLASSES]),
    "its number": Kind(dense("softmax"), CLASSES),
    "who it is": Kind(unit_vectors, CLASSES % 2),
    "pictures": Kind(pictures, RANDOM.integers(0, 2, (ROWS, 4, 4, 1)).astype("float64")),
    # Labels from 1 on, and 0 behind the last.
    "words": Kind(steps, np.array([[1, 2, 3], [4, 4, 0], [2, 0, 0], [1, 3, 1], [3, 2, 0]])),
}
LOSSES = {
    "BinaryCrossentropy": "0 or 1",
    "BinaryFocalCrossentropy": "0 or 1",
    "CTC": "words",
    "CategoricalCrossentropy": "one of many",
    "CategoricalFocalCrossentropy": "one of many",
    "CategoricalGeneralizedCrossEntropy": "its number",
    "CategoricalHinge": "one of many",
    "Circle": "who it is",
    "CosineSimilarity": "numbers",
    "Dice": "pictures",
    "Hinge": "-1 or 1",
    "Huber": "numbers",
    "KLDivergence": "one of many",
    "LogCosh": "numbers",
    "MeanAbsoluteError": "numbers",
    "MeanAbsolutePercentageError": "numbers",
    "MeanSquaredError": "numbers",
    "MeanSquaredLogarithmicError": "positive numbers",
    "Poisson": "positive numbers",
    "SparseCategoricalCrossentropy": "its number",
    "SquaredHinge": "-1 or 1",
    "Tversky": "pictures",
}


def test_every_loss_has_its_targets() -> None:
    """A loss that comes with a newer Keras and that nobody has looked at."""
    missing = features.classes_of(keras.losses, keras.losses.Loss) - set(LOSSES)
    assert not missing, f"say in LOSSES what these compare: {sorted(missing)}"


def building(ends: Callable[[], list[Any]]) -> Callable[[], Any]:
    def build() -> Any:
        return keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(8, "gelu", name="up"),
                layers.BatchNormalization(name="norm"),
                layers.Dense(8, "tanh", name="middle"),
                *ends(),
            ]
        )

    return build


LAYOUT = {
    ".*up/kernel": (None, "model"),
    ".*up/bias": ("model",),
    ".*norm/gamma": ("batch",),
    ".*middle/kernel": ("model", "batch"),
    ".*down/kernel": ("batch", "model"),
}


def all_losses(mesh: str, fewest: int) -> dict[str, float]:
    """The largest difference that each loss shows.

    Outputs of at least `fewest` columns are computed with as shards, where that is known.
    """
    found = {}
    with real_float64(), scripts.open_from(fewest):
        for name, kind in KINDS.items():
            mine = [loss for loss in sorted(LOSSES) if LOSSES[loss] == name]
            mine = [loss for loss in mine if hasattr(keras.losses, loss)]  # in an older Keras

            def script(model: Any, kind: Kind = kind, mine: list[str] = mine) -> dict[str, Any]:
                seen = {}
                start = model.get_weights()
                for loss in mine:
                    model.set_weights(start)
                    model.compile(keras.optimizers.SGD(0.1), getattr(keras.losses, loss)())
                    values = [model.test_on_batch(X, kind.targets)]
                    values += [model.train_on_batch(X, kind.targets)]
                    values += [model.evaluate(X, kind.targets, batch_size=2, verbose=0)]
                    # What the loss has done to each weight.
                    moved = [a - b for a, b in zip(model.get_weights(), start, strict=True)]
                    assert max(np.abs(step).max() for step in moved[:2]) > 1e-6, loss
                    seen[loss] = [*values, *moved]
                return seen

            _, gaps = scripts.both(building(kind.ends), LAYOUT, mesh, script)
            found |= {loss: gaps[loss] for loss in mine}
    return found


@pytest.mark.parametrize(
    ("mesh", "fewest"), [*((mesh, 256) for mesh in features.MESHES), *scripts.OPEN]
)
def test_every_loss(ranks: Any, record_property: Any, mesh: str, fewest: int) -> None:
    """A loss that is a sum over the batch, or that compares its rows with each other (Circle, Dice,
    Tversky): of one replica's rows, and averaged, it is another number and another gradient.

    Seen to fail, for every class, with gradients that are averaged, and with those of weights
    cut along the batch axis left unsummed; where outputs stay shards, see `test_outputs`.
    """
    answers = ranks(scripts.size_of(mesh))(all_losses, mesh, fewest, timeout=180)
    feature = f"all {len(answers[0])} classes of keras.losses{', on shards' * (fewest == 1)}"
    features.note_worst(record_property, "losses", mesh, feature, answers)
