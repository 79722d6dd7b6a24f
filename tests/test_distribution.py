"""Scripts written for `keras.distribution`, from end to end on real ranks."""

from __future__ import annotations

from typing import Any

import distributed
import keras
import keras_tp
import models
import numpy as np
import parity
import pytest
import torch
from distributed import LAYOUT, Scope, both, classes, classifier, compiled, fitted, state
from keras import layers
from precision import real_float64

from keras_tp.seam.variables import local_tensor

EXACT = 1e-10


def trained_by_data(rows: int, options: dict[str, Any]) -> dict[str, float]:
    def script(scope: Scope) -> dict[str, Any]:
        x, y = classes(6, seed=1)
        with scope():
            model = compiled(classifier())
            weight = np.linspace(0.5, 1.5, rows)
            weights = {"sample_weight": weight} if "class_weight" not in options else {}
            found = fitted(model, rows, validation_data=(x, y), **weights, **options)
            evaluated = model.evaluate(x, y, sample_weight=weight[:6], batch_size=4, verbose=0)
            return {**found, "evaluated": evaluated}

    return both(script, distributed.data_parallel)


@pytest.mark.parametrize(
    ("rows", "options"),
    [(13, {}), (11, {"class_weight": {0: 0.5, 1: 2.0, 2: 1.0, 3: 3.0}})],
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_data_parallel_training(ranks: Any, size: int, rows: int, options: dict[str, Any]) -> None:
    """Means of means in a loss, a metric, or the statistics of a batch whose last part is short
    (of one row, fewer than there are replicas); weights of samples that part from their rows;
    masks drawn for fewer rows; predictions in the order of the ranks."""
    for differences in ranks(size)(trained_by_data, rows, options):
        assert {"val_auc", "f1_score", "weighted_auc", "one_hot_mean_io_u"} < set(differences)
        assert sum(name.startswith("optimizer") for name in differences) == 18
        assert max(differences.values()) < EXACT, differences
