"""Every metric of Keras, with its defaults: the values of one process, batch by batch."""

from __future__ import annotations

from typing import Any

import features
import keras
import numpy as np
import pytest
import scripts
from keras import layers
from precision import real_float64

ROWS, WIDTH = 11, 8  # eight classes, of which top-k metrics take five
RANDOM = np.random.default_rng(5)
X = RANDOM.standard_normal((ROWS, 6))
NUMBERS = RANDOM.standard_normal((ROWS, WIDTH))
CLASSES = RANDOM.integers(0, WIDTH, ROWS)
TARGETS = {
    "numbers": NUMBERS,
    "positive": np.abs(NUMBERS),
    "signs": np.sign(NUMBERS),
    "chances": (NUMBERS > 0).astype("float64"),
    "one_hot": np.eye(WIDTH)[CLASSES],
    "sparse": CLASSES,
    "chance": (NUMBERS[:, :1] > 0).astype("float64"),
    "whole": RANDOM.integers(0, 4, (ROWS, 1)).astype("float64"),
}
WEIGHTS = 1 + np.arange(ROWS) % 3  # whole numbers, as IoU metrics want them


class Floor(layers.Layer):
    """Whole numbers from 0 to 3."""

    def call(self, x: Any) -> Any:
        return keras.ops.floor(4 * x)


class OfValues(keras.Model):
    """With the metrics that compare nothing, which are given values and their weights."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.of_values = [keras.metrics.Mean(name="Mean"), keras.metrics.Sum(name="Sum")]

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        for metric in self.of_values:
            metric.update_state(y_pred["numbers"], sample_weight["numbers"])
        return super().compute_metrics(x, y, y_pred, sample_weight)


def many_ways() -> Any:
    """A model whose last layer's outputs are read in many ways."""
    inputs = keras.Input((6,))
    x = layers.Dense(8, "gelu", name="up")(inputs)
    x = layers.Dropout(0.3, seed=2)(layers.BatchNormalization(name="norm")(x))
    middle = layers.Dense(7, "tanh", name="middle")(x)  # uneven on two ranks
    x = layers.Dense(WIDTH, name="down")(middle)
    ends = {
        "numbers": "linear",
        "positive": "softplus",
        "signs": "tanh",
        "chances": "sigmoid",
        "one_hot": "softmax",
        "sparse": "softmax",
    }
    outputs = {name: layers.Activation(end, name=name)(x) for name, end in ends.items()}
    # Of one column, which IoU metrics want if they are to weight rows.
    outputs["chance"] = layers.Dense(1, "sigmoid", trainable=False, name="chance")(middle)
    return OfValues(inputs, {**outputs, "whole": Floor(name="whole")(outputs["chance"])})


LAYOUT = {
    "up/kernel": (None, "model"),
    "up/bias": ("model",),
    "norm/gamma": ("batch",),
    "middle/kernel": ("batch", "model"),
    "down/kernel": ("batch", "model"),
}


def cubed(y: Any, outputs: Any) -> Any:
    return keras.ops.mean(keras.ops.abs(y - outputs) ** 3, axis=-1)


# The output that each reads, and the arguments that have no default.
METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    "AUC": ("chances", {}),
    "Accuracy": ("whole", {}),
    "BinaryAccuracy": ("chances", {}),
    "BinaryCrossentropy": ("chances", {}),
    "BinaryIoU": ("chance", {}),
    "CategoricalAccuracy": ("one_hot", {}),
    "CategoricalCrossentropy": ("one_hot", {}),
    "CategoricalHinge": ("one_hot", {}),
    "ConcordanceCorrelation": ("numbers", {}),
    "CosineSimilarity": ("numbers", {}),
    "F1Score": ("one_hot", {}),
    "FBetaScore": ("one_hot", {}),
    "FalseNegatives": ("chances", {}),
    "FalsePositives": ("chances", {}),
    "Hinge": ("signs", {}),
    "IoU": ("whole", {"num_classes": 4, "target_class_ids": [1, 2]}),
    "KLDivergence": ("one_hot", {}),
    "LogCoshError": ("numbers", {}),
    "MeanAbsoluteError": ("numbers", {}),
    "MeanAbsolutePercentageError": ("numbers", {}),
    "MeanIoU": ("whole", {"num_classes": 4}),
    "MeanMetricWrapper": ("numbers", {"fn": cubed}),
    "MeanSquaredError": ("numbers", {}),
    "MeanSquaredLogarithmicError": ("positive", {}),
    "OneHotIoU": ("one_hot", {"num_classes": WIDTH, "target_class_ids": range(WIDTH)}),
    "OneHotMeanIoU": ("one_hot", {"num_classes": WIDTH}),
    "PearsonCorrelation": ("numbers", {}),
    "Poisson": ("positive", {}),
    "Precision": ("chances", {}),
    "PrecisionAtRecall": ("chances", {"recall": 0.5}),
    "R2Score": ("numbers", {}),
    "Recall": ("chances", {}),
    "RecallAtPrecision": ("chances", {"precision": 0.5}),
    "RootMeanSquaredError": ("numbers", {}),
    "SensitivityAtSpecificity": ("chances", {"specificity": 0.5}),
    "SparseCategoricalAccuracy": ("sparse", {}),
    "SparseCategoricalCrossentropy": ("sparse", {}),
    "SparseTopKCategoricalAccuracy": ("sparse", {}),
    "SpecificityAtSensitivity": ("chances", {"sensitivity": 0.5}),
    "SquaredHinge": ("signs", {}),
    "TopKCategoricalAccuracy": ("one_hot", {}),
    "TrueNegatives": ("chances", {}),
    "TruePositives": ("chances", {}),
}
OF_VALUES = {"Mean", "Sum"}


def test_every_metric_has_its_arguments() -> None:
    """A metric that comes with a newer Keras and that nobody has looked at."""
    missing = features.classes_of(keras.metrics, keras.metrics.Metric) - set(METRICS) - OF_VALUES
    assert not missing, f"say in METRICS what these read: {sorted(missing)}"


def made(prefix: str = "") -> dict[str, list[Any]]:
    """A metric of every class, by output."""
    by_output: dict[str, list[Any]] = {}
    for name, (output, arguments) in METRICS.items():
        if hasattr(keras.metrics, name):
            metric = getattr(keras.metrics, name)(name=prefix + name, **arguments)
            by_output.setdefault(output, []).append(metric)
    return by_output


class Watching(keras.callbacks.Callback):
    """Keeps what callbacks are told after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen.append(dict(logs))


def script(model: Any) -> dict[str, Any]:
    """For every log, what it was after each batch, after the epoch, and what evaluate says."""
    model.compile(
        "adam",
        loss={"one_hot": "categorical_crossentropy"},
        metrics=made(),
        weighted_metrics=made("weighted"),
    )
    watching = Watching()
    weights = dict.fromkeys(TARGETS, WEIGHTS)
    given = {"batch_size": 4, "sample_weight": weights, "verbose": 0}  # 4, 4, 3
    history = model.fit(X, TARGETS, callbacks=[watching], **given).history
    evaluated = model.evaluate(X, TARGETS, return_dict=True, **given)
    assert len(watching.seen) == 3
    names = set(history)
    assert names == set(evaluated) == set(watching.seen[0])
    return {
        name: [np.array(seen[name]) for seen in (*watching.seen, history, evaluated)]
        for name in sorted(names)
    }


def all_metrics(mesh: str, fewest: int) -> dict[str, float]:
    """The largest difference that each metric shows, and under "" all the rest.

    Outputs of at least `fewest` columns are computed with as shards, where that is known.
    """
    with real_float64(), scripts.open_from(fewest):
        one, gaps = scripts.both(many_ways, LAYOUT, mesh, script)
    found = {}
    names = {n: [f"{end}_{n}", f"{end}_weighted{n}"] for n, (end, _) in METRICS.items()}
    for name, logs in (names | {n: [n] for n in OF_VALUES}).items():
        if not hasattr(keras.metrics, name):
            continue
        # What is zero, or one, throughout, shows nothing.
        assert all(np.ptp(np.concatenate([v.ravel() for v in one[log]])) > 0 for log in logs), name
        found[name] = max(gaps.pop(log) for log in logs)
    assert {"loss", "weights", "metrics"} <= set(gaps)
    return {**found, "": max(gaps.values())}


@pytest.mark.parametrize(
    ("mesh", "fewest"), [*((mesh, 256) for mesh in features.MESHES), *scripts.OPEN]
)
def test_every_metric(ranks: Any, record_property: Any, mesh: str, fewest: int) -> None:
    """Keras nightly multiplies count metrics by the number of replicas; a mean of the replicas'
    means, scores or areas is not that of all rows; and a callback that sees one replica's stops
    or saves when another does not.

    Seen to fail with metrics that are updated twice for each batch; where outputs stay shards,
    see `test_outputs`.
    """
    answers = ranks(scripts.size_of(mesh))(all_metrics, mesh, fewest, timeout=180)
    feature = f"all {len(answers[0]) - 1} classes of keras.metrics{', on shards' * (fewest == 1)}"
    features.note_worst(record_property, "metrics", mesh, feature, answers)
