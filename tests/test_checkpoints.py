"""Checkpoints: each rank writes its shards, any number of ranks reads them, whole or not at all.

What is saved by one mesh is loaded on another, trained on, and compared with the run that was not
interrupted: weights, slots, statistics, seeds and scales, in float64, on every rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import parity
import pytest
import torch
from keras import layers

import keras_tp

STEPS = 2
TOLERANCE = 1e-12
# 7 columns and 5 rows: on 4 ranks shards are uneven, and the last one of the rows is empty.
COLUMNS = {".*dense/kernel": (None, "model"), ".*dense/bias": ("model",),
           ".*dense_1/kernel": ("model", None)}  # fmt: skip
ROWS = {".*dense/kernel": ("model", None), ".*dense_1/kernel": (None, "model")}
BOTH = {".*dense/kernel": ("batch", "model"), ".*dense_1/kernel": ("model", "batch")}
LAYOUTS: dict[str, tuple[dict[str, int], Any]] = {
    "columns of 2": ({"model": 2}, COLUMNS),
    "rows of 2": ({"model": 2}, ROWS),
    "2 replicas": ({"batch": 2}, {}),
    "columns of 4": ({"model": 4}, COLUMNS),
    "rows of 4": ({"model": 4}, ROWS),
    "2 replicas of 2": ({"batch": 2, "model": 2}, BOTH),
}


def build() -> Any:
    stack = [layers.Dense(7, activation="tanh"), layers.BatchNormalization(), layers.Dropout(0.3)]
    return keras.Sequential([keras.Input((5,)), *stack, layers.Dense(6)])


def data(rows: int = 12) -> tuple[Any, Any]:
    random = np.random.default_rng(4)
    return random.standard_normal((rows, 5)), random.standard_normal((rows, 6))


def made(layout: str | None, seed: int = 7) -> Any:
    """The model, compiled; parallelized by this layout, or plain with None."""
    model = parity.build_seeded(build, seed)
    if layout is not None:
        axes, entries = LAYOUTS[layout]
        keras_tp.parallelize(model, parity.layout_map(entries, axes))
    # All that an optimizer keeps: two moments, averages, a scale that grows every other step.
    inner = keras.optimizers.Adam(0.02, use_ema=True, ema_momentum=0.9)
    optimizer = keras.optimizers.LossScaleOptimizer(
        inner, initial_scale=8.0, dynamic_growth_steps=2
    )
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


def train(model: Any, first: int, steps: int = STEPS) -> None:
    """Steps on batches that are drawn from NumPy's and torch's own numbers, as `fit` draws them."""
    x, y = data()
    for _ in range(first, first + steps):
        rows = np.random.permutation(12)[:8]
        rows = rows[torch.randperm(8).numpy()]
        model.train_on_batch(x[rows], y[rows])


def state(model: Any) -> list[Any]:
    return [v.numpy() for v in (*model.variables, *model.optimizer.variables)]


def gap(one: list[Any], many: list[Any]) -> float:
    return max(parity.difference(a, b) for a, b in zip(one, many, strict=True))


def saving(layout: str | None, folder: str, asynchronous: bool = False) -> tuple[Any, Any]:
    """Saves after two steps and goes on for two more; gives both states."""
    with parity.real_float64():
        model = made(layout)
        train(model, 0)
        saved = keras_tp.save_checkpoint(
            folder, model, step=STEPS, extra={"epoch": 1, "at": "here"}, asynchronous=asynchronous
        )
        then = state(model)
        train(model, STEPS)
        saved.wait()
        return then, state(model)


def resuming(layout: str | None, folder: str) -> tuple[Any, Any]:
    """Loads into a model of other weights, and trains for two steps; gives both states."""
    with parity.real_float64():
        model = made(layout, seed=8)
        train(model, 0, 1)  # so that nothing is right by itself
        found = keras_tp.load_checkpoint(folder, model)
        assert (found.step, found.extra) == (STEPS, {"epoch": 1, "at": "here"})
        loaded = state(model)
        train(model, STEPS)
        return loaded, state(model)


def on(ranks: Any, layout: str | None, function: Any, *args: Any) -> list[Any]:
    """What `function` gives on each rank of the layout; with None in this process."""
    if layout is None:
        keras.utils.clear_session()
        return [function(layout, *args)]
    return ranks(int(np.prod(list(LAYOUTS[layout][0].values()))))(function, layout, *args)


@pytest.mark.parametrize("layout", [None, "columns of 2", "2 replicas of 2"])
def test_training_goes_on_on_other_ranks(ranks: Any, tmp_path: Path, layout: str | None) -> None:
    """Any layout to any other: two more steps, moments, scale and masks as without a break."""
    folder = str(tmp_path / "run")
    everywhere = on(ranks, layout, saving, folder, layout == "2 replicas of 2")
    then, end = everywhere[0]
    assert max(gap(end, other) for _, other in everywhere) <= TOLERANCE
    assert gap(then, end) > 1e-3  # or nothing was trained
    for other in (None, *LAYOUTS):
        for loaded, resumed in on(ranks, other, resuming, folder):
            assert gap(then, loaded) == 0.0, (layout, other)
            assert gap(end, resumed) <= TOLERANCE, (layout, other)
