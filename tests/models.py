"""Models that several tests use. Each is built anew, with the names of a fresh session."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers

WIDTH, HEADS, TOKENS, VOCABULARY = 16, 4, 12, 24

# Megatron's layout of the transformer: heads, hidden units and vocabulary over "model".
TRANSFORMER_LAYOUT = {
    "tokens/embeddings": ("model", None),
    r".*(query|key|value)/kernel": (None, "model", None),
    r".*(query|key|value)/bias": ("model", None),
    r".*attention_output/kernel": ("model", None, None),
    r"up_\d+/kernel": (None, "model"),
    r"up_\d+/bias": ("model",),
    r"down_\d+/kernel": ("model", None),
    "head/kernel": (None, "model"),
    "head/bias": ("model",),
}


def transformer() -> Any:
    """Two pre-LN blocks of causal attention and a GELU MLP, a token embedding, a dense head."""
    tokens = keras.Input((TOKENS,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH, name="tokens")(tokens)
    for i in range(2):
        h = layers.LayerNormalization(name=f"norm_a_{i}")(x)
        h = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, name=f"attention_{i}")(
            h, h, use_causal_mask=True
        )
        x = layers.Add()([x, h])
        h = layers.LayerNormalization(name=f"norm_b_{i}")(x)
        h = layers.Dense(4 * WIDTH, activation="gelu", name=f"up_{i}")(h)
        h = layers.Dense(WIDTH, name=f"down_{i}")(h)
        x = layers.Add()([x, layers.Dropout(0.0)(h)])
    x = layers.LayerNormalization(name="norm")(x)
    return keras.Model(tokens, layers.Dense(VOCABULARY, name="head")(x), name="transformer")


def transformer_data() -> tuple[Any, Any]:
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (4, TOKENS + 1))
    return tokens[:, :-1].astype("int32"), tokens[:, 1:].astype("int64")


def dense_stack() -> Any:
    """The Sequential of the storage table: Dense 512, 256, 128, 10 on 128 inputs."""
    return keras.Sequential(
        [
            keras.Input((128,)),
            layers.Dense(512, activation="relu"),
            layers.Dense(256, activation="relu"),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )


DENSE_LAYOUT = {".*dense.*kernel": (None, "model")}


def dense_data() -> tuple[Any, Any]:
    random = np.random.default_rng(2)
    return random.standard_normal((6, 128)), random.standard_normal((6, 10))


class Experts(layers.Layer):
    """Tokens through all experts, each weighted by a gate: two products batched over experts."""

    def __init__(self, experts: int, hidden: int, **options: Any) -> None:
        super().__init__(**options)
        self.experts = experts
        shape = (None, experts, hidden)
        self.gate = layers.Dense(experts, activation="softmax", name="gate")
        self.up = layers.EinsumDense("bteh,ehf->btef", shape, bias_axes="ef", name="up")
        self.down = layers.EinsumDense("btef,efh->bteh", (None, experts, WIDTH), name="down")

    def build(self, shape: Any) -> None:
        self.gate.build(shape)
        self.up.build((*shape[:-1], self.experts, shape[-1]))
        self.down.build((*shape[:-1], self.experts, self.up.kernel.shape[-1]))

    def call(self, x: Any) -> Any:
        each = keras.ops.repeat(keras.ops.expand_dims(x, 2), self.experts, axis=2)
        each = self.down(keras.ops.gelu(self.up(each)))
        return x + keras.ops.sum(keras.ops.expand_dims(self.gate(x), -1) * each, axis=2)
