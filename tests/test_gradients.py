"""Weights are shards where Keras's own step reads gradients, and full ones everywhere else.

Seen to fail, in keras_tp/seam/gradients.py: without `_ending` and the `finally` in `train_step`
("after an error"), without the look at whose step it is ("of the user's"), at `_BEGUN` ("a loss
that is scaled"), at the pass that goes on ("in backward"), at optimizers' `apply` ("an optimizer"),
or at LossScaleOptimizer's own ("a metric").
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import keras
import numpy as np
import parity
import pytest
import torch
from keras import layers

import keras_tp
from keras_tp.seam.gradients import gradients_are_read

SHAPE = (4, 6)


class Failing(torch.autograd.Function):
    """Ends a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("backward failed")


class Looking(torch.autograd.Function):
    """Reads a variable in backward."""

    seen: ClassVar[list[tuple[int, ...]]] = []
    variable: Any = None

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        Looking.seen.append(tuple((Looking.variable.value * 1).shape))
        return grad


class Decaying(keras.Model):
    """A step of the user's, which computes with weights after backward."""

    def train_step(self, data: Any) -> Any:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        self.zero_grad()
        loss = self.optimizer.scale_loss(self.compute_loss(x, y, self(x, training=True)))
        loss.backward()
        weights = self.trainable_weights
        norms = [float((v.value.detach() ** 2).sum()) for v in weights]
        self.optimizer.apply([v.value.grad for v in weights], weights)
        self.norms = norms
        return {"loss": loss}


def made(kind: Any = keras.Model, **compiled: Any) -> Any:
    def build() -> Any:
        inputs = keras.Input(SHAPE[:1])
        return kind(inputs, layers.Dense(SHAPE[1], name="d")(inputs))

    model = parity.build_seeded(build)
    mesh = keras_tp.device_mesh({"model": 2})
    keras_tp.parallelize(model, parity.layout_map({"d/kernel": (None, "model")}, mesh))
    model.compile(**{"optimizer": "sgd", "loss": "mse", **compiled})
    return model


def batch() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    return tuple(random.random((3, n), dtype="float32") for n in SHAPE)  # type: ignore[return-value]


def used_shape(model: Any) -> tuple[int, ...]:
    """Of the kernel, as whoever computes with it sees it."""
    return tuple((model.get_layer("d").kernel.value * 1).shape)


def stepped(model: Any) -> Any:
    """A step by itself, as who debugs one makes it."""
    return lambda x, y: model.train_step((torch.from_numpy(x), torch.from_numpy(y)))


def after_errors(jit_compile: bool) -> tuple[int, ...]:
    def loss(y: Any, y_pred: Any) -> Any:
        return Failing.apply((y - y_pred) ** 2)

    model = made(loss=loss, jit_compile=jit_compile)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler has some of its own
        step = model.train_on_batch if jit_compile else stepped(model)
        with pytest.raises(ArithmeticError):
            step(*batch())
    assert not gradients_are_read()
    return used_shape(model)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_weights_are_full_after_an_error(ranks: Any, jit_compile: bool) -> None:
    """Who looks at weights in an interactive session after a step failed sees one rank's."""
    assert ranks(2)(after_errors, jit_compile, timeout=200) == [SHAPE] * 2


def in_steps() -> dict[str, Any]:
    found: dict[str, Any] = {}
    decaying, plain = made(Decaying), made()
    norms = [float((w**2).sum()) for w in decaying.get_weights()]
    decaying.train_on_batch(*batch())
    found["of the user's"] = np.abs(np.subtract(decaying.norms, norms)).max()

    plain.optimizer.scale_loss(torch.ones(()))
    found["a loss that is scaled"] = used_shape(plain)

    class Reading(keras.optimizers.SGD):
        elementwise = True

        def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
            result = super().apply(grads, trainable_variables)
            found["an optimizer"] = used_shape(plain)
            return result

    Looking.variable = plain.get_layer("d").kernel
    Looking.seen = []

    def loss(y: Any, y_pred: Any) -> Any:
        found["a loss"] = used_shape(plain)
        return Looking.apply((y - y_pred) ** 2)

    plain.compile(Reading(), loss)
    plain.train_on_batch(*batch())
    found["in backward"] = Looking.seen[0]
    found["after"] = used_shape(plain)

    def metric(y: Any, y_pred: Any) -> Any:
        found["a metric"] = used_shape(plain)
        return y_pred

    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    plain.compile(scaled, "mse", metrics=[metric])
    x, y = batch()
    plain.train_on_batch(x * np.inf, y)  # its inner optimizer is not asked for this step
    assert not np.isfinite(plain.train_on_batch(x * np.inf, y)).all()
    return found


def test_only_gradients_are_read_of_shards(ranks: Any) -> None:
    """A decay of this rank's part alone; a loss of a part of a weight."""
    for found in ranks(2)(in_steps):
        assert found.pop("of the user's") < 1e-5
        assert set(found.values()) == {SHAPE}, found
