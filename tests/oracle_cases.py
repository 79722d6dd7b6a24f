"""What is trained both by keras_tp on torch and by Keras on JAX: models, layout maps, data, steps.

Imports no backend: the ranks and the JAX process both run this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import models
import numpy as np
from keras import layers

STEPS = 3
MESHES = {"model=2": {"batch": 1, "model": 2}, "batch=2, model=2": {"batch": 2, "model": 2}}

Data = tuple[Any, Any]


def momentum() -> Any:
    return keras.optimizers.SGD(0.05, momentum=0.9)


@dataclass(frozen=True)
class Case:
    """JAX wants every sharded dim to be a multiple of its axis, and batches of the batch axis."""

    build: Callable[[], Any]
    layout: Mapping[str, tuple[Any, ...]]
    data: Callable[[], Data]
    optimizer: Callable[[], Any] = momentum
    loss: Callable[[], Any] = field(default=keras.losses.MeanSquaredError)

    def layout_map(self, mesh: str) -> Any:
        """The same object for both: devices cpu:0, cpu:1, ... are JAX's devices, and our ranks."""
        sizes = MESHES[mesh]
        devices = [f"cpu:{rank}" for rank in range(math.prod(sizes.values()))]
        made = keras.distribution.LayoutMap(
            keras.distribution.DeviceMesh(tuple(sizes.values()), list(sizes), devices)
        )
        for pattern, axes in self.layout.items():
            made[pattern] = axes
        return made


def built(case: Case) -> Any:
    """The case's model, with the same weights on every backend. In a cleared session."""
    model = case.build()
    random = np.random.default_rng(7)
    for weight in model.weights:
        # No zeros and no ones, which hide mistakes; but a variance is positive.
        centre = 1.0 if weight.path.endswith(("gamma", "moving_variance")) else 0.0
        weight.assign(centre + 0.2 * random.standard_normal(weight.shape))
    return model


def trained(model: Any, case: Case) -> dict[str, Any]:
    """Trains `STEPS` batches; outputs, losses, full weights and optimizer slots, in order."""
    model.compile(case.optimizer(), case.loss())
    x, y = case.data()
    result = {"output before": model.predict_on_batch(x)}
    result["losses"] = np.array([model.train_on_batch(x, y) for _ in range(STEPS)])
    result["output after"] = model.predict_on_batch(x)
    result |= {f"weight {w.path}": np.array(w.numpy()) for w in model.weights}
    result |= {f"slot {s.path}": np.array(s.numpy()) for s in model.optimizer.variables}
    return result


def floats(*shape: int) -> Any:
    return np.random.default_rng(3).standard_normal(shape)


def regression(x: tuple[int, ...], y: tuple[int, ...]) -> Callable[[], Data]:
    return lambda: (floats(*x), floats(*y)[::-1].copy())


def sequential(shape: tuple[int, ...], *parts: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: keras.Sequential([keras.Input(shape), *(part() for part in parts)], name="model")


def rows() -> Any:
    return sequential(
        (8,),
        lambda: layers.Dense(12, "tanh", name="first"),
        lambda: layers.Dense(8, "gelu", name="second"),
        lambda: layers.Dense(6, name="third"),
    )()


def grouped_attention() -> Any:
    x = keras.Input((6, 8))
    h = layers.GroupQueryAttention(4, 4, 1, name="attention")(x, x, use_causal_mask=True)
    return keras.Model(x, layers.Dense(6, name="head")(h), name="model")


MLP = sequential(
    (6, 8),
    lambda: layers.Dense(16, "gelu", name="up"),
    lambda: layers.LayerNormalization(name="norm"),
    lambda: layers.Dense(8, name="down"),
)

CASES = {
    "transformer": Case(
        models.transformer,
        models.TRANSFORMER_LAYOUT,
        models.transformer_data,
        lambda: keras.optimizers.Adam(1e-2),
        lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ),
    "dense rows": Case(
        rows,
        {".*kernel": ("model", None), "model/second/bias": ("model",)},
        regression((6, 8), (6, 6)),
    ),
    "convolution and batch norm": Case(
        sequential(
            (6, 6, 3),
            lambda: layers.Conv2D(8, 3, name="conv"),
            lambda: layers.BatchNormalization(name="norm"),
            lambda: layers.Activation("relu"),
            lambda: layers.Flatten(),
            lambda: layers.Dense(4, name="head"),
        ),
        {
            "model/conv/kernel": (None, None, None, "model"),
            "model/conv/bias": ("model",),
            "model/norm/(gamma|beta|moving_.*)": ("model",),
        },
        regression((4, 6, 6, 3), (4, 4)),
    ),
    "lstm": Case(
        sequential((5, 6), lambda: layers.LSTM(8, name="lstm"), lambda: layers.Dense(4)),
        {".*lstm_cell/(kernel|recurrent_kernel)": (None, "model"), ".*lstm_cell/bias": ("model",)},
        regression((4, 5, 6), (4, 4)),
    ),
    "grouped attention": Case(
        grouped_attention,
        {
            ".*query/kernel": (None, "model", None),
            ".*query/bias": ("model", None),
            # One head cannot be shared out.
            ".*key/kernel": ("model", None, None),
            ".*value/kernel": (None, None, "model"),
            ".*attention_output/kernel": ("model", None, None),
        },
        regression((4, 6, 8), (4, 6, 6)),
    ),
    "experts": Case(
        sequential(
            (4, 6),
            lambda: layers.EinsumDense("aec,ecd->aed", (4, 8), "gelu", "ed", name="up"),
            lambda: layers.EinsumDense("aed,edc->aec", (4, 6), bias_axes="ec", name="down"),
        ),
        {".*/kernel": ("model", None, None), "model/up/bias": ("model", None)},
        regression((4, 4, 6), (4, 4, 6)),
    ),
    "batch axis on weights": Case(
        MLP,
        {".*/kernel": ("batch", "model"), ".*/up/bias": ("batch",), ".*/norm/gamma": ("model",)},
        regression((4, 6, 8), (4, 6, 8)),
    ),
    "layer output": Case(
        MLP,
        {
            ".*up/kernel": (None, "model"),
            ".*up/output": ("batch", None, "model"),
            ".*down/output": ("model", None, "batch"),
        },
        regression((4, 6, 8), (4, 6, 8)),
    ),
}
