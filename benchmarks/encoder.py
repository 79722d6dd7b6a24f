"""The model that `step_time.py` times: sizes, weights and batch, in NumPy, the same for all.

A pre-LN transformer encoder on vectors, and a head of CLASSES classes on every token. Names and
shapes of weights are those of the Keras model (`keras_encoder.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

CLASSES = 1000
NORM_EPSILON = 1e-3
# Far below any gradient: where Keras and torch add it differs, and would be seen.
ADAM_EPSILON = 1e-12


@dataclass(frozen=True)
class Size:
    """Of the model and its batch.

    Attributes:
        width, hidden: of what goes from block to block, and inside of a block's MLP.
        head_layout: "whole" has every rank compute all logits, "columns" cuts the classes.
    """

    width: int
    hidden: int
    heads: int
    tokens: int
    rows: int
    blocks: int
    head_layout: str = "whole"

    @property
    def per_head(self) -> int:
        return self.width // self.heads

    @property
    def one_activation(self) -> int:
        """Bytes of what goes from block to block."""
        return 4 * self.rows * self.tokens * self.width

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights, by name."""
        width, hidden, heads, per_head = self.width, self.hidden, self.heads, self.per_head
        shapes: dict[str, tuple[int, ...]] = {}

        def norm(name: str) -> None:
            shapes.update({f"{name}/gamma": (width,), f"{name}/beta": (width,)})

        def dense(name: str, kernel: tuple[int, ...], bias: tuple[int, ...]) -> None:
            shapes.update({f"{name}/kernel": kernel, f"{name}/bias": bias})

        for i in range(self.blocks):
            norm(f"attention_norm_{i}")
            for what in ("query", "key", "value"):
                dense(f"attention_{i}/{what}", (width, heads, per_head), (heads, per_head))
            dense(f"attention_{i}/attention_output", (heads, per_head, width), (width,))
            norm(f"mlp_norm_{i}")
            dense(f"up_{i}", (width, hidden), (hidden,))
            dense(f"down_{i}", (hidden, width), (width,))
        norm("norm")
        dense("head", (width, CLASSES), (CLASSES,))
        return shapes

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and value of one weight after the other; none of them is zero or one."""
        random = np.random.default_rng(0)
        for name, shape in self.shapes.items():
            value = random.standard_normal(shape, dtype="float32")
            if name.endswith("kernel"):
                value *= (self.hidden if name.startswith("down") else self.width) ** -0.5
            else:
                value *= 0.1
                value += name.endswith("gamma")
            yield name, value

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(1)
        shape = (self.rows, self.tokens)
        x = random.standard_normal((*shape, self.width), dtype="float32")
        return x, random.integers(CLASSES, size=shape, dtype="int32")


SIZES = {
    "small": Size(256, 1024, 4, 64, 8, 4),
    "medium": Size(512, 2048, 8, 128, 8, 2),
    "large": Size(1024, 4096, 16, 128, 4, 2),
}
