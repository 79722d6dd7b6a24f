"""Trains a byte-level Keras transformer tensor-parallel and proves that the losses are right.

    torchrun --standalone --nproc-per-node 2 -m keras_tp.examples.train_transformer

The text is Python's own: the source files of the standard library. Each rank
trains the model by itself, as one process would, and then with the others. The
loss of every step is set beside its like, and each of them and every weight at
the end must be equal to float32 rounding, on every rank.

The attention has no biases, as in most recent decoders. A softmax does not see
a key's bias, so that its gradient is rounding noise, of which Adam makes full
steps: no two float32 programs agree on that one weight.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from pathlib import Path
from typing import Any

import keras_tp  # before keras: picks the torch backend

# isort: split
import keras
import numpy as np
import torch
import torch.distributed as dist
from keras import layers
from torch.distributed.elastic.multiprocessing.errors import record

from keras_tp.tables import plain_table, render

BYTES = 256  # the vocabulary


def layout_map(ranks: int) -> Any:
    """Megatron's layout: heads, hidden units and vocabulary over the axis "model"."""
    mesh = keras_tp.device_mesh({"batch": 1, "model": ranks})
    layout = keras.distribution.LayoutMap(mesh)
    layout["tokens/embeddings"] = ("model", None)
    layout[r".*(query|key|value)/kernel"] = (None, "model", None)
    layout[r".*attention_output/kernel"] = ("model", None, None)
    layout[r"up_\d+/kernel"] = (None, "model")
    layout[r"up_\d+/bias"] = ("model",)
    layout[r"down_\d+/kernel"] = ("model", None)
    layout["head/kernel"] = (None, "model")
    return layout


def transformer(tokens: int, width: int, heads: int, blocks: int, dropout: float = 0.0) -> Any:
    """A pre-LN decoder on bytes, as anyone would write it in Keras, compiled with AdamW."""
    ids = keras.Input((tokens,), dtype="int32")
    x = layers.Embedding(BYTES, width, name="tokens")(ids)
    for i in range(blocks):
        h = layers.LayerNormalization(name=f"attention_norm_{i}")(x)
        attention = layers.MultiHeadAttention(
            heads, width // heads, dropout=dropout, use_bias=False, name=f"attention_{i}"
        )
        h = attention(h, h, use_causal_mask=True)
        x = layers.Add(name=f"attention_add_{i}")([x, h])
        h = layers.LayerNormalization(name=f"mlp_norm_{i}")(x)
        h = layers.Dense(4 * width, activation="gelu", name=f"up_{i}")(h)
        h = layers.Dense(width, name=f"down_{i}")(h)
        if dropout:
            h = layers.Dropout(dropout, name=f"dropout_{i}")(h)
        x = layers.Add(name=f"mlp_add_{i}")([x, h])
    x = layers.LayerNormalization(name="norm")(x)
    model = keras.Model(ids, layers.Dense(BYTES, name="head")(x), name="transformer")
    model.compile(
        keras.optimizers.AdamW(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def text(count: int) -> np.ndarray:
    """The first `count` bytes of the standard library's source files."""
    collected = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        collected += path.read_bytes()
        if len(collected) >= count:
            break
    return np.frombuffer(collected[:count], dtype="uint8").astype("int32")


class Losses(keras.callbacks.Callback):
    """Keeps the loss of each step, not their running mean, in which differences drown."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.reset_metrics()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.values.append(float(logs["loss"]))


def train(model: Any, x: np.ndarray, y: np.ndarray, batch: int, show: bool) -> list[float]:
    """One epoch in the given order; returns the loss of every step."""
    losses = Losses()
    model.fit(x, y, batch_size=batch, shuffle=False, callbacks=[losses], verbose=1 if show else 0)
    return losses.values


@record  # torchrun's report then names the rank that failed, with its traceback
def main() -> None:
    """Plans, parallelizes, trains both and compares; exits with a message if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)  # one core a rank

    keras_tp.initialize()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    first = rank == 0
    sizes = (options.tokens, options.width, options.heads, options.blocks)
    rows = options.steps * options.batch
    data = text(rows * options.tokens + 1)
    if len(data) <= rows * options.tokens:
        sys.exit(f"{rows * options.tokens} bytes wanted, the standard library has {len(data)}")
    x = data[:-1].reshape(rows, options.tokens)
    y = data[1:].reshape(rows, options.tokens)

    keras.utils.set_random_seed(0)
    model = transformer(*sizes)
    plain = transformer(*sizes)
    plain.set_weights(model.get_weights())

    plan = keras_tp.plan(model, layout_map(ranks))
    these = "1 rank" if ranks == 1 else f"{ranks} ranks"
    if first:
        print(f"The plan for {these}:\n\n{plan}\n", flush=True)
    keras_tp.parallelize(model, plan=plan)
    show_local_shapes(model, plan)

    if first:
        print("\nOne process, for comparison:", flush=True)
    expected = train(plain, x, y, options.batch, first)
    if first:
        print(f"\n{these}:", flush=True)
    got = train(model, x, y, options.batch, first)

    loss = max(abs(a - b) / abs(a) for a, b in zip(expected, got, strict=True))
    weight, path = worst_weight(keras_tp.full_weights(plain), keras_tp.full_weights(model))
    everywhere: list[Any] = [None] * ranks
    dist.all_gather_object(everywhere, (loss, weight, path))
    if first:
        show_losses(expected, got, these)
        for at, (loss, weight, path) in enumerate(everywhere):
            print(
                f"rank {at}: losses differ by {loss:.1e} at most, weights by {weight:.1e} ({path})"
            )
    # Where gradients are small, Adam makes more of rounding from step to step; of a mistake in a
    # gradient it makes whole steps.
    if any(loss > 1e-5 or weight > 1e-4 for loss, weight, _ in everywhere):
        sys.exit("the runs differ")
    if first:
        print("losses and weights are equal to float32 rounding on every rank")


def worst_weight(one: dict[str, np.ndarray], many: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest difference of a weight, relative to the weight's largest value, and its path."""
    return max(
        (float(np.abs(value - many[path]).max() / np.abs(value).max()), path)
        for path, value in one.items()
    )


def show_local_shapes(model: Any, plan: keras_tp.Plan) -> None:
    """What each rank really stores, of the variables that are sharded."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, keras_tp.local_shapes(model))
    table = plain_table("variable", "full", *(f"rank {i}" for i in range(len(everywhere))))
    for variable in plan.variables:
        if variable.sharded:
            shapes = [str(shapes[variable.path]) for shapes in everywhere]
            table.add_row(variable.path, str(variable.shape), *shapes)
    if dist.get_rank() == 0 and table.rows:
        print("What the ranks store of the sharded variables:\n\n" + render(table), flush=True)


def show_losses(expected: list[float], got: list[float], these: str) -> None:
    """The two runs side by side, ten steps of them."""
    table = plain_table("step", "one process", these, "difference")
    every = max(1, len(expected) // 10)
    for step in range(every - 1, len(expected), every):
        a, b = expected[step], got[step]
        table.add_row(str(step + 1), f"{a:.7f}", f"{b:.7f}", f"{b - a:+.1e}")
    print("\nLoss:\n\n" + render(table) + "\n")


if __name__ == "__main__":
    main()
