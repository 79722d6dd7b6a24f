"""Training on ranks gives the numbers of one process: the reason the package exists."""

from __future__ import annotations

from typing import Any

import models
import parity
import pytest

OPTIMIZERS = {
    "sgd": {"class_name": "SGD", "config": {"learning_rate": 0.1, "momentum": 0.9}},
    "adam": {"class_name": "Adam", "config": {"learning_rate": 1e-3}},
    "adamw": {"class_name": "AdamW", "config": {"learning_rate": 1e-3, "weight_decay": 0.1}},
}
CROSSENTROPY = {
    "class_name": "SparseCategoricalCrossentropy",
    "config": {"from_logits": True},
}


def train_transformer(optimizer: str, size: int, float64: bool) -> parity.Report:
    return parity.compare(
        models.transformer,
        models.TRANSFORMER_LAYOUT,
        {"batch": 1, "model": size},
        models.transformer_data(),
        optimizer=OPTIMIZERS[optimizer],
        loss=CROSSENTROPY,
        steps=5,
        float64=float64,
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_transformer_float64(ranks: Any, size: int, optimizer: str) -> None:
    """A wrong collective, a bias added per rank, a gradient missing a sum: any of them shows."""
    for report in ranks(size)(train_transformer, optimizer, size, True):
        assert report.sharded == (0 if size == 1 else 23)
        assert report.worst() < 1e-10


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("size", [2, 4])
def test_transformer_float32(ranks: Any, size: int, optimizer: str) -> None:
    """The precision people train in, to 1e-5 of each tensor's largest value.

    All but the bias of attention keys: a softmax does not change when all its
    inputs shift, so that gradient is zero and what is computed for it rounding
    noise, which Adam then scales to full steps. Any two float32 programs differ
    there; the float64 test compares it.
    """
    for report in ranks(size)(train_transformer, optimizer, size, False):
        assert report.loss < 1e-6
        assert report.worst(but=lambda path: "key/bias" in path or "key_bias" in path) < 1e-5
