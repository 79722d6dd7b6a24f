"""Training on ranks gives the numbers of one process: the reason the package exists."""

from __future__ import annotations

from typing import Any

import models
import parity
import pytest

from keras_tp.examples import train_transformer as demo

# At a rate of 0.1 the demo's training is less certain than the tests: one process in float32 is
# further from one in float64 than they allow.
OPTIMIZERS = {
    "sgd": {"class_name": "SGD", "config": {"learning_rate": 0.01, "momentum": 0.9}},
    "adam": {"class_name": "Adam", "config": {"learning_rate": 1e-3}},
    "adamw": {"class_name": "AdamW", "config": {"learning_rate": 1e-3, "weight_decay": 0.1}},
}
CROSSENTROPY = {
    "class_name": "SparseCategoricalCrossentropy",
    "config": {"from_logits": True},
}


def demo_transformer() -> Any:
    return demo.transformer(tokens=12, width=16, heads=4, blocks=2)


DEMO_LAYOUT = {pattern: layout.axes for pattern, layout in demo.layout_map(2).items()}
BUILDS = {
    "demo": (demo_transformer, DEMO_LAYOUT),
    "biases": (models.transformer, models.TRANSFORMER_LAYOUT),
}


def train(name: str, optimizer: str, size: int, float64: bool) -> parity.Report:
    build, layout = BUILDS[name]
    return parity.compare(
        build,
        layout,
        {"batch": 1, "model": size},
        models.transformer_data(),
        optimizer=OPTIMIZERS[optimizer],
        loss=CROSSENTROPY,
        steps=5,
        float64=float64,
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("float64", "allowed"), [(True, 1e-10), (False, 1e-5)])
def test_the_demo_is_exact(
    ranks: Any, size: int, optimizer: str, float64: bool, allowed: float
) -> None:
    """A wrong collective, a bias added per rank, a gradient missing a sum: any of them shows."""
    for report in ranks(size)(train, "demo", optimizer, size, float64):
        assert report.sharded == (0 if size == 1 else 16)
        assert report.worst() < allowed


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("size", [2, 4])
def test_attention_with_biases_float64(ranks: Any, size: int, optimizer: str) -> None:
    """The biases of heads are sharded with them."""
    for report in ranks(size)(train, "biases", optimizer, size, True):
        assert report.sharded == 23
        assert report.worst() < 1e-10


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_attention_with_biases_float32(ranks: Any, optimizer: str) -> None:
    """In float32 too, all but the bias of attention keys.

    A softmax does not change when all its inputs shift, so that this gradient
    is zero and what is computed for it rounding noise, which Adam then scales
    to full steps. Any two float32 programs differ there; the float64 test
    compares it.
    """
    for report in ranks(2)(train, "biases", optimizer, 2, False):
        assert report.loss < 1e-6
        assert report.worst(but=lambda path: "key/bias" in path or "key_bias" in path) < 1e-5
