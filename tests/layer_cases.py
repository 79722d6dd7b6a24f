"""The layers of the matrix: how each is built, and what it is fed.

Sizes are small and uneven on purpose: 6, 5, 7 and 3 leave unequal and empty
shards on four ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import torch
from keras import layers, ops


@dataclass(frozen=True)
class LayerCase:
    """A model around one layer.

    Attributes:
        build: makes the model.
        inputs: a batch for it.
        alone: whether each dim of each weight is sharded alone, too; if not,
            only all weights at once.
    """

    build: Callable[[], Any]
    inputs: Any
    alone: bool = True


def floats(*shape: int) -> Any:
    return np.random.default_rng(3).standard_normal(shape)


def integers(top: int, *shape: int) -> Any:
    return np.random.default_rng(4).integers(0, top, shape).astype("int32")


class Raw(layers.Layer):
    """A custom layer that reads its weight several times and has two outputs."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], 6), name="kernel")
        self.scale = self.add_weight(shape=(6,), initializer="ones", name="scale")

    def call(self, x: Any) -> Any:
        y = ops.matmul(x, self.kernel) * self.scale
        return y + ops.sum(self.kernel, axis=0), ops.mean(y * self.scale[0], axis=-1, keepdims=True)


class Tied(layers.Layer):
    """Reads the weight of another layer: a head tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = layers.Embedding(7, 6, name="table")

    def build(self, shape: Any) -> None:
        self.table.build(shape)

    def call(self, ids: Any) -> Any:
        x = self.table(ids)
        return ops.matmul(ops.tanh(x), ops.transpose(self.table.embeddings))


class TwoWays(keras.Model):
    """Layers in lists and dicts, control flow, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [layers.Dense(6, activation="tanh", name=f"step_{i}") for i in range(2)]
        self.ends = {"head": layers.Dense(3, name="head")}

    def call(self, x: Any, training: bool = False) -> Any:
        for step in self.steps:
            x = step(x) + (step(x) if x.shape[-1] == 6 else 0.0)
        return self.ends["head"](x)


def sequential(*parts: Any, shape: tuple[int, ...], dtype: Any = None) -> Callable[[], Any]:
    """`parts` are called to make layers, or are layers' makers with a name."""
    return lambda: keras.Sequential([keras.Input(shape, dtype=dtype), *(part() for part in parts)])


def raw() -> Any:
    x = keras.Input((5,))
    return keras.Model(x, layers.Concatenate()(list(Raw(name="raw")(x))))


def attention(make: Callable[[], Any], **call: Any) -> Callable[[], Any]:
    def build() -> Any:
        x, other = keras.Input((5, 8)), keras.Input((5, 8))
        mixed = layers.Dense(8, name="mix")(other)
        layer = make()
        out = layer(x, mixed, **call)
        return keras.Model([x, other], out[0] if isinstance(out, tuple | list) else out)

    return lambda: _joined(build())


def _joined(model: Any) -> Any:
    """One input for both of an attention's."""
    x = keras.Input((5, 8))
    return keras.Model(x, model([x, ops.flip(x, axis=1)]))


def two_ways() -> Any:
    model = TwoWays()
    model(np.zeros((1, 5)))
    return model


def nested() -> Any:
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(4, name="deep")], name="inner")
    x = keras.Input((5,))
    h = layers.Dense(6, name="outer")(x)
    return keras.Model(x, inner(h) + inner(h * 2))


def einsum(equation: str, output: Any, bias: Any, shape: tuple[int, ...]) -> Callable[[], Any]:
    return sequential(lambda: layers.EinsumDense(equation, output, bias_axes=bias), shape=shape)


def regularized() -> Any:
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(
                6,
                kernel_regularizer=keras.regularizers.L2(0.1),
                bias_regularizer="l1",
                kernel_constraint=keras.constraints.MaxNorm(0.8),
                activity_regularizer="l2",
            ),
        ]
    )


def reversible() -> Any:
    ids = keras.Input((5,), dtype="int32")
    table = layers.ReversibleEmbedding(7, 6)
    x = layers.Dense(6, activation="tanh", name="middle")(table(ids))
    return keras.Model(ids, table(x, reverse=True) + table(x * 2, reverse=True))


class Penalized(layers.Layer):
    """A loss of its own, of weights and of activations."""

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(shape=(shape[-1], 6), name="w")

    def call(self, x: Any) -> Any:
        y = ops.matmul(x, self.w)
        self.add_loss(0.1 * ops.mean(ops.square(y)) + 0.1 * ops.max(ops.abs(self.w)))
        return y


class Cell(layers.Layer):
    """A recurrent cell with raw weights."""

    state_size = 6

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(shape=(shape[-1], 6), name="w")
        self.u = self.add_weight(shape=(6, 6), name="u")

    def call(self, x: Any, states: Any) -> Any:
        h = ops.tanh(ops.matmul(x, self.w) + ops.matmul(states[0], self.u))
        return h, [h]


def activations() -> Any:
    """A Dense of every activation that Keras has by name and that needs no arguments."""
    x = keras.Input((5,))
    parts = [layers.Dense(6, name, name=f"dense_{name}")(x) for name in ACTIVATIONS]
    return keras.Model(x, layers.Concatenate()(parts))


ACTIVATIONS = [
    name
    for name in dir(keras.activations)
    if not name.startswith("_") and name not in ("deserialize", "get", "serialize", "threshold")
]


def lora(layer: Callable[[], Any], *shape: int, dtype: Any = None) -> Callable[[], Any]:
    """LoRA before parallelize, the base frozen, the second adapter no longer zero."""

    def build() -> Any:
        model = keras.Sequential([keras.Input(shape, dtype=dtype), layer()])
        adapted = model.layers[0]
        add_weight = adapted.add_weight
        # Keras makes adapters float32 whatever the layer is, and in float32 replicas
        # that sum their gradients round otherwise than one process does.
        adapted.add_weight = lambda **given: add_weight(**given | {"dtype": keras.config.floatx()})
        adapted.enable_lora(2)
        del adapted.add_weight
        return model

    return build


def int8(layer: Callable[[], Any], *shape: int, dtype: Any = None) -> Callable[[], Any]:
    """Quantized before parallelize: the kernel in whole numbers, with scales."""

    def build() -> Any:
        after = layers.Dense(2, name="after")
        model = keras.Sequential([keras.Input(shape, dtype=dtype), layer(), after])
        model.layers[0].quantize("int8")
        return model

    return build


def torch_module() -> Any:
    wrapped = layers.TorchModuleWrapper(torch.nn.Linear(5, 6, dtype=torch.float64), name="wrapped")
    model = keras.Sequential([keras.Input((5,)), wrapped, layers.Dense(4, name="dense")])
    model(ROWS)  # Keras cannot tell the wrapped module's output shape
    return model


def frozen_part() -> Any:
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6, "tanh", name="frozen"),
            layers.BatchNormalization(name="frozen_norm"),
            layers.Dense(4, name="trained"),
        ]
    )
    for layer in model.layers[:2]:
        layer.trainable = False
    return model


def normalization() -> Any:
    """Preprocessing with weights, and some without."""
    adapted = layers.Normalization(name="normalization")
    adapted.adapt(floats(20, 5))
    return keras.Sequential(
        [
            keras.Input((5,)),
            adapted,
            layers.Rescaling(0.5, offset=0.1),
            layers.Dense(6, name="dense"),
            layers.UnitNormalization(),
        ]
    )


def pictures() -> Any:
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Resizing(5, 5),
            layers.CenterCrop(4, 4),
            layers.Conv2D(3, 2, name="conv"),
            layers.Flatten(),
        ]
    )


def dropouts() -> Any:
    """Random layers on whole activations: the masks of one process."""
    return keras.Sequential(
        [
            keras.Input((6, 5)),
            layers.Dropout(0.5, seed=1),
            layers.Dense(6, name="dense"),
            layers.GaussianNoise(0.3, seed=2),
            layers.SpatialDropout1D(0.3, seed=3),
            layers.Dense(4, name="dense_1"),
            layers.AlphaDropout(0.3, seed=4),
        ]
    )


def untied() -> Any:
    ids = keras.Input((5,), dtype="int32")
    table = layers.ReversibleEmbedding(7, 6, tie_weights=False, logit_soft_cap=3.0)
    return keras.Model(ids, table(table(ids), reverse=True))


def additive() -> Any:
    x = keras.Input((4, 6))
    h = layers.Dense(6, name="mix")(x)
    return keras.Model(
        x,
        layers.AdditiveAttention(name="additive")([h, x])
        + layers.Attention(True, name="scaled")([h, x]),
    )


IDS = integers(7, 3, 5)
ROWS, STEPS, TOKENS = floats(4, 5), floats(3, 4, 5), floats(3, 5, 8)
LINE, PICTURE, VOLUME = floats(3, 7, 4), floats(2, 5, 5, 4), floats(2, 4, 4, 4, 3)


def one(layer: Callable[[], Any], inputs: Any) -> LayerCase:
    """A layer by itself."""
    return LayerCase(sequential(layer, shape=inputs.shape[1:], dtype=inputs.dtype.name), inputs)


def attend(layer: Callable[[], Any], **call: Any) -> LayerCase:
    """An attention layer, its keys and values of another sequence than its queries."""
    return LayerCase(attention(layer, **call), TOKENS)


def self_attention() -> Any:
    x = keras.Input((5, 8))
    return keras.Model(x, layers.MultiHeadAttention(2, 4)(x, x))


def einsum_case(equation: str, output: Any, bias: Any, inputs: Any) -> LayerCase:
    return LayerCase(einsum(equation, output, bias, inputs.shape[1:]), inputs)


CASES: dict[str, LayerCase] = {
    "Dense": one(lambda: layers.Dense(6, "relu"), ROWS),
    "Dense, softmax": one(lambda: layers.Dense(6, "softmax"), floats(4, 3, 5)),
    "Dense, 33 units": one(lambda: layers.Dense(33), ROWS),
    "Dense, 3 units": one(lambda: layers.Dense(3, "softmax"), ROWS),
    "Dense, 10 inputs": one(lambda: layers.Dense(1, use_bias=False), floats(4, 10)),
    "Dense, every activation": LayerCase(activations, ROWS, alone=False),
    "Dense, regularized": LayerCase(regularized, ROWS),
    "Dense, LoRA": LayerCase(lora(lambda: layers.Dense(6), 5), ROWS),
    "Dense, int8": LayerCase(int8(lambda: layers.Dense(6), 5), ROWS),
    "EinsumDense ab,bc->ac": einsum_case("ab,bc->ac", 6, "c", ROWS),
    "EinsumDense abc,cd->abd": einsum_case("abc,cd->abd", (None, 6), "d", STEPS),
    "EinsumDense abc,cde->abde": einsum_case("abc,cde->abde", (None, 2, 6), "de", STEPS),
    "EinsumDense abcd,cde->abe": einsum_case("abcd,cde->abe", (None, 6), "e", floats(3, 5, 2, 4)),
    "EinsumDense aec,ecd->aed": einsum_case("aec,ecd->aed", (4, 6), "ed", STEPS),
    "EinsumDense ab...,bc->ac...": einsum_case("ab...,bc->ac...", (6,), None, floats(4, 5, 3)),
    "EinsumDense ...x,xy->...y": einsum_case("...x,xy->...y", 6, "y", STEPS),
    "EinsumDense abc,cd->abd, bias b": einsum_case("abc,cd->abd", (4, 6), "b", STEPS),
    "EinsumDense, no bias": einsum_case("abc,cd->abd", (None, 6), None, STEPS),
    "EinsumDense, LoRA": LayerCase(
        lora(lambda: layers.EinsumDense("abc,cd->abd", (None, 6), bias_axes="d"), 4, 5), STEPS
    ),
    "EinsumDense, int8": LayerCase(
        int8(lambda: layers.EinsumDense("abc,cd->abd", (None, 6), bias_axes="d"), 4, 5), STEPS
    ),
    "Embedding, mask_zero": LayerCase(
        sequential(
            lambda: layers.Embedding(7, 6, mask_zero=True),
            lambda: layers.LSTM(4),
            shape=(5,),
            dtype="int32",
        ),
        IDS,
    ),
    "Embedding, LoRA": LayerCase(lora(lambda: layers.Embedding(7, 6), 5, dtype="int32"), IDS),
    "Embedding, int8": LayerCase(int8(lambda: layers.Embedding(7, 6), 5, dtype="int32"), IDS),
    "ReversibleEmbedding, used twice": LayerCase(reversible, IDS),
    "ReversibleEmbedding, untied": LayerCase(untied, IDS),
    "Embedding, tied by hand": LayerCase(sequential(Tied, shape=(5,), dtype="int32"), IDS),
    "MultiHeadAttention": LayerCase(self_attention, TOKENS),
    "MultiHeadAttention, cross": attend(lambda: layers.MultiHeadAttention(4, 6, value_dim=4)),
    "MultiHeadAttention, causal": attend(
        lambda: layers.MultiHeadAttention(2, 3, use_bias=False), use_causal_mask=True
    ),
    "MultiHeadAttention, no flash": attend(
        lambda: layers.MultiHeadAttention(2, 3, flash_attention=False)
    ),
    "MultiHeadAttention, scores": attend(
        lambda: layers.MultiHeadAttention(3, 4),
        use_causal_mask=True,
        return_attention_scores=True,
    ),
    "MultiHeadAttention, dropout": attend(
        lambda: layers.MultiHeadAttention(2, 3, dropout=0.4, seed=5)
    ),
    "GroupQueryAttention": attend(lambda: layers.GroupQueryAttention(4, 4, 2)),
    "GroupQueryAttention, one KV head": attend(lambda: layers.GroupQueryAttention(4, 4, 1)),
    "Attention, AdditiveAttention": LayerCase(additive, floats(3, 4, 6)),
    "Conv1D": one(lambda: layers.Conv1D(6, 3, activation="relu"), LINE),
    "Conv2D": one(lambda: layers.Conv2D(6, 3), PICTURE),
    "Conv2D, groups": one(lambda: layers.Conv2D(6, 2, groups=2), PICTURE),
    "Conv3D": one(lambda: layers.Conv3D(3, 2), VOLUME),
    "DepthwiseConv1D": one(lambda: layers.DepthwiseConv1D(3), LINE),
    "DepthwiseConv2D": one(lambda: layers.DepthwiseConv2D(3), PICTURE),
    "SeparableConv1D": one(lambda: layers.SeparableConv1D(6, 3), LINE),
    "SeparableConv2D": one(lambda: layers.SeparableConv2D(3, 2), PICTURE),
    "Conv1DTranspose": one(lambda: layers.Conv1DTranspose(6, 3), LINE),
    "Conv2DTranspose": one(lambda: layers.Conv2DTranspose(6, 3), PICTURE),
    "Conv3DTranspose": one(lambda: layers.Conv3DTranspose(3, 2), VOLUME),
    "BatchNormalization": one(layers.BatchNormalization, floats(4, 6)),
    "BatchNormalization, frozen": LayerCase(frozen_part, ROWS),
    "LayerNormalization": one(layers.LayerNormalization, floats(4, 6)),
    "LayerNormalization, two dims": one(
        lambda: layers.LayerNormalization(axis=(1, 2)), floats(3, 4, 6)
    ),
    "RMSNormalization": one(layers.RMSNormalization, floats(4, 6)),
    "GroupNormalization": one(lambda: layers.GroupNormalization(2), floats(4, 3, 6)),
    "SpectralNormalization": one(
        lambda: layers.SpectralNormalization(layers.Dense(6, name="dense")), ROWS
    ),
    "SimpleRNN": one(lambda: layers.SimpleRNN(6), STEPS),
    "LSTM": one(lambda: layers.LSTM(6), STEPS),
    "LSTM, dropout": one(lambda: layers.LSTM(4, dropout=0.3, recurrent_dropout=0.3, seed=6), STEPS),
    "GRU": one(lambda: layers.GRU(6, return_sequences=True), STEPS),
    "Bidirectional LSTM": one(lambda: layers.Bidirectional(layers.LSTM(3)), STEPS),
    "RNN, stacked cells": one(lambda: layers.RNN([layers.LSTMCell(3), layers.GRUCell(4)]), STEPS),
    "RNN, own cell": one(lambda: layers.RNN(Cell()), STEPS),
    "ConvLSTM1D": one(lambda: layers.ConvLSTM1D(3, 2), floats(2, 3, 5, 4)),
    "ConvLSTM2D": one(lambda: layers.ConvLSTM2D(3, 2), floats(2, 3, 4, 4, 2)),
    "TimeDistributed": one(lambda: layers.TimeDistributed(layers.Dense(6, name="dense")), STEPS),
    "PReLU": one(layers.PReLU, floats(4, 6)),
    "PReLU, shared dims": one(lambda: layers.PReLU(shared_axes=[1]), floats(4, 3, 6)),
    "Normalization, Rescaling, UnitNormalization": LayerCase(normalization, ROWS),
    "Resizing, CenterCrop": LayerCase(pictures, floats(2, 6, 6, 2)),
    "Dropout, GaussianNoise, ...": LayerCase(dropouts, floats(4, 6, 5)),
    "own layer: two outputs, reads thrice": LayerCase(raw, ROWS),
    "own layer: add_loss": one(Penalized, ROWS),
    "own model: lists, dicts, branches": LayerCase(two_ways, ROWS),
    "models in models": LayerCase(nested, ROWS),
    "TorchModuleWrapper": LayerCase(torch_module, ROWS),
}
