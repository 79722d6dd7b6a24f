"""`keras_tp.verify`. That it sees mistakes is shown in `test_breaks.py`."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import breaks
import keras
import models
import numpy as np
import parity
import pytest
import torch
import torch.distributed as dist
from keras import layers, ops
from parity import layout_map

import keras_tp
from keras_tp.seam.variables import local_tensor


def numbers(*shape: int) -> Any:
    return np.random.default_rng(2).standard_normal(shape).astype("float32")


def restless() -> Any:
    """Everything that a call changes: statistics, seeds, torch's random numbers, metrics."""
    x = keras.Input((5, 8))
    h = layers.Dense(6, activation="relu", name="up")(x)
    h = layers.BatchNormalization(name="norm")(h)
    h = layers.Dropout(0.4, seed=3)(h)
    h = layers.LSTM(4, dropout=0.2, name="lstm")(h)
    h = layers.Dense(4, name="middle", kernel_regularizer="l2")(h)
    return keras.Model(x, [layers.Dense(6, name="a")(h), layers.Dense(2, name="b")(h)])


RESTLESS = {
    "(up|a)/kernel": (None, "model"),
    "middle/kernel": ("model", None),
    "norm/.*": ("model",),
    ".*lstm_cell/kernel": (None, "model"),
}


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Asserts that variables, metrics and all random states are as they were."""

    def state() -> list[Any]:
        variables = [*model.variables, *model.metrics_variables]
        return [
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            *(local_tensor(v).detach().tolist() for v in variables),
        ]

    before = state()
    yield
    assert before == state()


def nothing_changes(training: bool) -> tuple[float, bool, list[str], Any]:
    keras.utils.set_random_seed(3)
    many = parity.build_seeded(restless)
    keras_tp.parallelize(many, layout_map(RESTLESS, {"model": 2}))
    many.compile("adam", ["mse", "mse"], metrics=[["mae"], ["mae"]])
    rows = np.random.default_rng(1)
    x, a, b = (rows.standard_normal(s).astype("float32") for s in ((4, 5, 8), (4, 6), (4, 2)))
    many.train_on_batch(x, [a, b])
    calls = [layer.call for layer in many.layers]
    grads = [local_tensor(v).grad.clone() for v in many.trainable_variables]
    with unchanged(many):
        found = keras_tp.verify(many, (x, [a, b]), training=training)
    assert calls == [layer.call for layer in many.layers]
    for grad, v in zip(grads, many.trainable_variables, strict=True):
        assert torch.equal(grad, local_tensor(v).grad)
    return max(c.worst for c in found.layers), found.equal, [c.path for c in found.layers], found


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_it_was(ranks: Any, training: bool) -> None:
    """A check that moves statistics or draws random numbers changes what it looks at. Seen to fail
    without `restored`."""
    for worst, equal, paths, found in ranks(2)(nothing_changes, training):
        assert equal, str(found)
        assert worst < 1e-6
        assert paths == ["up", "norm", "lstm", "middle", "a"]


def of_a_transformer(size: int, batch: int, dtype: str) -> tuple[str, bool, float]:
    keras.config.set_dtype_policy(dtype)
    try:
        model = parity.build_seeded(models.transformer)
    finally:
        keras.config.set_dtype_policy("float32")
    axes = {"batch": batch, "model": size // batch}
    layout = {**models.TRANSFORMER_LAYOUT, r"down_\d+/kernel": ("model", "batch")}
    keras_tp.parallelize(model, layout_map(layout, axes))
    found = keras_tp.verify(model, models.transformer_data()[0])
    return str(found), found.equal, found.model.worst


@pytest.mark.parametrize(
    ("size", "batch", "dtype", "most"),
    [(2, 1, "float32", 1e-5), (4, 2, "float32", 1e-5), (2, 1, "mixed_bfloat16", 5e-2)],
)
def test_every_rank_gets_the_same_table(
    ranks: Any, size: int, batch: int, dtype: str, most: float
) -> None:
    """A table that one rank prints and another contradicts."""
    answers = ranks(size)(of_a_transformer, size, batch, dtype)
    assert len({text for text, _, _ in answers}) == 1
    text, equal, worst = answers[0]
    assert equal, text
    assert 0 < worst < most  # zero would mean that nothing was compared
    assert "equal to rounding on every rank" in text
    assert "attention_1/attention_output" in text


class OwnLoss(keras.Model):
    """A weight of its own and a loss of its own."""

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(shape=(shape[-1], 6), name="w")

    def call(self, x: Any) -> Any:
        y = ops.matmul(x, self.w)
        self.add_loss(ops.mean(y**2))
        return y


class Noisy(layers.Layer):
    """A weight, random numbers without a seed, and a metric."""

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(shape=(shape[-1], 6), name="w")
        self.seen = keras.metrics.Mean()

    def call(self, x: Any) -> Any:
        self.seen.update_state(ops.mean(x))
        noise = keras.random.normal((6,)) + np.random.rand() + random.random()
        return ops.matmul(x, self.w) + noise


class Index(layers.Layer):
    """Whole numbers for outputs."""

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(shape=(shape[-1], 6), name="w")

    def call(self, x: Any) -> Any:
        return ops.argmax(ops.matmul(x, self.w), -1)


def stack(*parts: Any, shape: tuple[int, ...]) -> Any:
    return keras.Sequential([keras.Input(shape), *parts])


def mixed(policy: str) -> Any:
    """What Keras recommends: low precision, and a head in float32."""
    keras.config.set_dtype_policy(policy)
    try:
        return stack(
            layers.Dense(64, "relu"), layers.Dense(10, "softmax", dtype="float32"), shape=(64,)
        )
    finally:
        keras.config.set_dtype_policy("float32")


def gradient_of_nothing() -> Any:
    """The sum of what is normalized is zero, whatever the kernel."""
    x = keras.Input((6,))
    h = layers.LayerNormalization(center=False, scale=False)(layers.Dense(6)(x))
    return keras.Model(x, ops.sum(h, -1, keepdims=True) + 1.0)


def masked_logits() -> Any:
    x = keras.Input((6,))
    return keras.Model(x, ops.where(ops.arange(6) < 5, layers.Dense(6)(x), -np.inf))


def two_inputs() -> Any:
    x, z = keras.Input((5,)), keras.Input((5,))
    return keras.Model([x, z], layers.Dense(6)(x) + layers.Dense(6)(z))


ROW, COLUMN = ("model", None), (None, "model")
PIXELS = np.random.default_rng(0).integers(0, 256, (64, 784)).astype("float32")
RIGHT: dict[str, tuple[Any, dict[str, Any], Any, bool]] = {
    "mixed_bfloat16": (lambda: mixed("mixed_bfloat16"), {".*kernel": ROW}, numbers(16, 64), False),
    "mixed_float16": (lambda: mixed("mixed_float16"), {".*kernel": ROW}, numbers(16, 64), False),
    "pixels": (
        lambda: stack(layers.Dense(256, "relu"), layers.Dense(10, "softmax"), shape=(784,)),
        {".*kernel": ROW},
        PIXELS,
        False,
    ),
    "far from zero": (
        lambda: stack(layers.Dense(64), layers.LayerNormalization(), shape=(32,)),
        {".*kernel": ROW},
        numbers(8, 32) + 1e3,
        False,
    ),
    "a gradient of nothing": (gradient_of_nothing, {".*kernel": ROW}, numbers(4, 6), False),
    "infinities": (masked_logits, {".*kernel": COLUMN}, numbers(4, 6), False),
    "own loss": (OwnLoss, {".*w": COLUMN}, numbers(4, 5), False),
    "random numbers": (
        lambda: stack(Noisy(), layers.Dense(4), shape=(5,)),
        {".*w": COLUMN},
        numbers(4, 5),
        True,
    ),
    "whole numbers": (lambda: stack(Index(), shape=(5,)), {".*w": COLUMN}, numbers(4, 5), False),
    "assigned weights": (
        lambda: stack(layers.SpectralNormalization(layers.Dense(6)), shape=(5,)),
        {".*kernel": COLUMN},
        numbers(4, 5),
        True,
    ),
    "a stateful layer": (
        lambda: keras.Sequential(
            [keras.Input((3, 5), batch_size=2), layers.LSTM(6, stateful=True)]
        ),
        {".*/kernel": COLUMN},
        numbers(2, 3, 5),
        False,
    ),
    "two inputs": (two_inputs, {".*kernel": ROW}, [numbers(4, 5), numbers(4, 5)], False),
}


def parallelized(build: Any, layout: dict[str, Any], x: Any) -> Any:
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    model = build()
    model(x)
    return keras_tp.parallelize(model, layout_map(layout, {"model": 2}))


def is_equal(name: str) -> tuple[bool, str, bool]:
    build, layout, x, training = RIGHT[name]
    model = parallelized(build, layout, x)
    added = model.losses
    with unchanged(model):
        found = keras_tp.verify(model, x, training=training)
    assert len(model.losses) == len(added)
    return found.equal, str(found), found.model.finite


@pytest.mark.parametrize("name", RIGHT)
def test_right_models_are_found_right(ranks: Any, name: str) -> None:
    """A false alarm costs a day. Each was one while differences were compared with a number for
    each dtype, or a call left something behind for the next."""
    for equal, text, finite in ranks(2)(is_equal, name):
        assert equal, text
        assert finite == (name != "infinities")
        assert ("no gradients" in text) == (name == "a stateful layer")


def mistake_beside(
    x: Any, build: Any = None, mistake: str = "bias_once_per_rank", kernel: Any = ROW
) -> list[bool]:
    """Whether all is equal, without the mistake and with it."""
    build = build or (lambda: stack(layers.Dense(6, bias_initializer="ones"), shape=(5,)))
    found = []
    for name in ("", mistake):
        with breaks.broken(name):
            model = parallelized(build, {".*kernel": kernel}, np.ones((1, x.shape[1]), "float32"))
            found.append(keras_tp.verify(model, x).equal)
    return found


def beside_what_hides_it() -> list[list[bool]]:
    x, hidden = numbers(4, 5), numbers(4, 5)
    hidden[0, 0] = np.nan

    def two_outputs() -> Any:
        x = keras.Input((5,))
        h = layers.Dense(6, bias_initializer="ones")(x)
        return keras.Model(x, [h, layers.Rescaling(1e9)(h)])

    return [
        mistake_beside(x),
        mistake_beside(hidden),
        mistake_beside(x, two_outputs),
        mistake_beside(
            numbers(64, 64),
            lambda: stack(layers.Dense(256, "relu", dtype="mixed_bfloat16"), shape=(64,)),
            "input_gradient_of_one_rank",
            COLUMN,
        ),
    ]


def test_nothing_hides_a_mistake(ranks: Any) -> None:
    """A NaN made every difference zero, one large output all others small, and a few ReLUs that
    rounding switches in bfloat16 a gradient without its sum."""
    for answers in ranks(2)(beside_what_hides_it):
        assert answers == [[True, False]] * 4


def around_a_step() -> tuple[Any, str]:
    model = parallelized(
        lambda: stack(layers.Dense(6), layers.Dense(2), shape=(5,)),
        {".*kernel": COLUMN},
        np.ones((1, 5), "float32"),
    )
    model.compile("sgd", "mse")
    x = numbers(8, 5)
    loss = model(x).sum()
    keras_tp.verify(model, x)
    loss.backward()
    gradients = [v.value.grad.abs().sum().item() for v in model.trainable_variables]
    model.predict_on_batch(x)
    model.predict_on_batch(x)
    told = ""
    try:
        keras_tp.verify(model, x + dist.get_rank())
    except ValueError as error:
        told = str(error)
    return gradients, told


def test_between_forward_and_backward_and_on_different_batches(ranks: Any) -> None:
    """Weights that were written, though with what they were, cannot be differentiated; and ranks
    with different batches have no layer to blame."""
    for gradients, told in ranks(2)(around_a_step):
        assert min(gradients) > 0
        assert "ranks are given different inputs" in told


class OnlyTheFirst(keras.Model):
    """Has a layer that this batch does not call, and one that it calls twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layers.Dense(4, name="first"), layers.Dense(4, name="second")

    def build(self, shape: Any) -> None:
        self.first.build(shape)
        self.second.build(shape)

    def call(self, x: Any, other: bool = False) -> Any:
        return self.second(x) if other else self.first(self.first(x))


def a_weight_changed_on_one_rank() -> tuple[Any, Any]:
    model = OnlyTheFirst()
    model(np.zeros((1, 4)))
    keras_tp.parallelize(model, layout_map({".*/kernel": ("model", None)}, {"model": 2}))
    x = np.ones((2, 4), "float32")
    right = keras_tp.verify(model, x)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.first.bias.value.add_(1.0)  # one that is whole
    return right, keras_tp.verify(model, x)


def test_ranks_that_drifted_apart_and_layers_not_called(ranks: Any) -> None:
    """A replicated weight that one rank changed by itself: Megatron-LM #1446's symptom."""
    for right, wrong in ranks(2)(a_weight_changed_on_one_rank):
        assert right.equal
        assert [c.calls for c in right.layers] == [2]
        assert right.not_called == ("only_the_first/second",)
        assert not wrong.equal
        assert len(wrong.unequal_weights) == 1
        assert wrong.unequal_weights[0].startswith("only_the_first/first/bias: rank 0 float32 (4,)")
        assert "not the same on every rank" in str(wrong)


def a_layer_alone() -> Any:
    layer = layers.Dense(6)
    layer.build((None, 4))
    keras_tp.parallelize(layer, layout_map({"dense/kernel": (None, "model")}, {"model": 2}))
    return keras_tp.verify(layer, np.ones((2, 4), "float32"))


def test_a_mere_layer(ranks: Any) -> None:
    """Its call stands behind the check of batches."""
    for found in ranks(2)(a_layer_alone):
        assert found.equal
        assert [c.style for c in found.layers] == ["column"]


def test_a_model_that_is_not_parallelized_is_told() -> None:
    """Equal to itself: true, and no answer to the question."""
    with pytest.raises(keras_tp.LayoutError, match="is not parallelized"):
        keras_tp.verify(models.dense_stack(), np.zeros((2, 128)))
