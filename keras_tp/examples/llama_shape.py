"""A model that no one machine holds, planned on a laptop: the shape of Llama 3 70B.

    keras-tp plan keras_tp.examples.llama_shape:llama_70b --mesh batch=8,model=8 --html plan.html

Plain Keras layers, in the dtype such models are kept in. What turns no weight (rotary
positions) is left out, so that it is a model of the size and the layers, not of the numbers.
"""

from __future__ import annotations

from typing import Any

import keras_tp  # noqa: F401, before keras: picks the torch backend

# isort: split
import keras
from keras import layers

LAYOUT = {
    "tokens/embeddings": ("model", None),
    r".*attention/(query|key|value)/kernel": (None, "model", None),
    r".*attention/attention_output/kernel": ("model", None, None),
    r".*/(gate|up)/kernel": (None, "model"),
    r".*/down/kernel": ("model", None),
    "head/kernel": (None, "model"),
}


class Block(layers.Layer):
    """A pre-norm transformer block: grouped attention and a gated MLP, none with biases."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int, **options: Any) -> None:
        super().__init__(**options)
        self.norm = layers.RMSNormalization(name="norm")
        self.attention = layers.GroupQueryAttention(
            width // heads, heads, groups, use_bias=False, name="attention"
        )
        self.mlp_norm = layers.RMSNormalization(name="mlp_norm")
        self.gate = layers.Dense(hidden, "silu", use_bias=False, name="gate")
        self.up = layers.Dense(hidden, use_bias=False, name="up")
        self.down = layers.Dense(width, use_bias=False, name="down")

    def build(self, shape: Any) -> None:
        for layer in (self.norm, self.mlp_norm, self.gate, self.up):
            layer.build(shape)
        self.attention.build(shape, shape)
        self.down.build((*shape[:-1], self.gate.units))

    def call(self, x: Any) -> Any:
        h = self.norm(x)
        x = x + self.attention(h, h, use_causal_mask=True)
        h = self.mlp_norm(x)
        return x + self.down(self.gate(h) * self.up(h))


def llama(
    mesh: Any,
    blocks: int,
    width: int,
    heads: int,
    groups: int,
    hidden: int,
    vocabulary: int,
    tokens: int = 8192,
) -> tuple[Any, Any]:
    """The model and its layout map: heads, hidden units and vocabulary over "model"."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("bfloat16")
    try:
        ids = keras.Input((tokens,), dtype="int32")
        x = layers.Embedding(vocabulary, width, name="tokens")(ids)
        for i in range(blocks):
            x = Block(width, heads, groups, hidden, name=f"block_{i}")(x)
        x = layers.RMSNormalization(name="norm")(x)
        x = layers.Dense(vocabulary, use_bias=False, name="head")(x)
        model = keras.Model(ids, x, name="llama")
    finally:
        keras.config.set_dtype_policy(before)
    layout_map = keras.distribution.LayoutMap(mesh)
    for pattern, layout in LAYOUT.items():
        layout_map[pattern] = layout
    return model, layout_map


def llama_8b(mesh: Any) -> tuple[Any, Any]:
    """32 blocks, 8 billion weights."""
    return llama(mesh, 32, 4096, 32, 8, 14336, 128256)


def llama_70b(mesh: Any) -> tuple[Any, Any]:
    """80 blocks, 70 billion weights."""
    return llama(mesh, 80, 8192, 64, 8, 28672, 128256)
