"""Layouts of layer outputs: what is kept for the backward pass is a shard, the numbers stay."""

from __future__ import annotations

from typing import Any

import keras
import models
import numpy as np
import parity
import pytest
import torch
from counting import Collectives
from keras import layers
from parity import layout_map
from torch.multiprocessing.reductions import StorageWeakRef

import keras_tp

# Residual streams, norms that three layers read, an uneven dim and a batch dim.
OUTPUTS = {
    r"add(_\d)?/output": ("batch", None, "model"),
    r"norm_a_\d/output": (None, None, "model"),
    r"norm_b_\d/output": ("model", "batch", None),
    r"attention_\d/output": (None, "model", "batch"),
    "tokens/output": (None, "model", None),
}
CROSSENTROPY = {"class_name": "SparseCategoricalCrossentropy", "config": {"from_logits": True}}


def with_outputs(batch: int) -> parity.Report:
    axes = {"batch": batch, "model": 2}
    layout = {**models.TRANSFORMER_LAYOUT, **OUTPUTS}
    plan = keras_tp.plan(models.transformer(), layout_map(layout, axes))
    assert sum(bool(layer.keeps) for layer in plan.layers) == 4 + 2 + 2 + 2 + 1
    data = models.transformer_data()
    return parity.compare(models.transformer, layout, axes, data, loss=CROSSENTROPY)


@pytest.mark.parametrize("batch", [1, 2])
def test_layouts_of_outputs_leave_the_numbers_alone(ranks: Any, batch: int) -> None:
    """Keras on JAX lays them out as well, to the same numbers. Seen to fail with `unpack` giving a
    tensor of zeros."""
    for report in ranks(2 * batch)(with_outputs, batch):
        assert report.worst() < 1e-10


SEEN: list[StorageWeakRef] = []


class Watch(layers.Layer):
    """Remembers the memory of what it is given, without keeping it."""

    def call(self, x: Any) -> Any:
        if not x.is_meta:
            SEEN.append(StorageWeakRef(x.untyped_storage()))
        return x * x


def memory_lives_on(layout: dict[str, Any]) -> tuple[bool, list[float]]:
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    x = keras.Input((3, 6))
    h = Watch()(layers.LayerNormalization(name="norm")(x))
    h = h * layers.LayerNormalization(name="norm_2")(h)
    model = keras.Model(x, layers.Dense(2, name="dense")(h))
    keras_tp.parallelize(model, layout_map({"dense/bias": ("model",), **layout}, {"model": 2}))
    SEEN.clear()
    batch = torch.tensor(np.random.default_rng(1).standard_normal((2, 3, 6)), dtype=torch.float32)
    out = model(batch.requires_grad_(), training=True)
    alive = not SEEN[-1].expired()
    gradients = []
    for _ in range(2):  # the graph may be walked again
        batch.grad = None
        out.sum().backward(retain_graph=True)
        gradients.append(float(batch.grad.abs().sum()))
    return alive, gradients


def memory() -> list[tuple[bool, list[float]]]:
    kept = {"norm/output": (None, None, "model")}
    return [memory_lives_on({}), memory_lives_on(kept)]


def test_the_whole_output_is_not_kept(ranks: Any) -> None:
    """What the graph holds on to is the memory that the layout is to save."""
    for (alive, plainly), (kept_alive, gradients) in ranks(2)(memory):
        assert alive
        assert not kept_alive
        assert plainly == gradients
        assert gradients[0] == gradients[1] > 0


def test_an_output_is_gathered_once_however_many_read_it(fake_ranks: Any) -> None:
    """Query, key and value each save their input."""
    fake_ranks(0, 2)
    model = models.transformer()
    layout = {**models.TRANSFORMER_LAYOUT, r"norm_a_\d/output": (None, None, "model")}
    plan = keras_tp.plan(model, layout_map(layout, {"batch": 1, "model": 2}))
    keras_tp.parallelize(model, plan=plan)
    x, _ = models.transformer_data()
    for _ in range(2):
        model(torch.tensor(x))
    with Collectives() as counted:
        out = model(torch.tensor(x), training=True)
    assert counted == plan.collectives("forward")
    with Collectives() as counted:
        out.sum().backward()
    assert counted == plan.collectives("backward")
    without = keras_tp.plan(
        models.transformer(), layout_map(models.TRANSFORMER_LAYOUT, {"batch": 1, "model": 2})
    )
    assert counted - without.collectives("backward") == {"all_gather": 2}


def test_a_layout_of_other_dims_than_the_output_is_an_error(fake_ranks: Any) -> None:
    """How many dims an output has is not known before the layer is called."""
    fake_ranks(0, 2)
    model = models.dense_stack()
    layout = {"sequential/dense/output": (None, None, "model")}
    keras_tp.parallelize(model, layout_map(layout, {"model": 2}))
    with pytest.raises(keras_tp.LayoutError, match=r"has shape \(3, 512\), its layout"):
        model(np.zeros((3, 128)))
