"""Dropout while a planned model is called without values, as hooked by `seam.rows` and `.dropout`.

Where rows are shared out, or layers hand on shards, numbers are drawn for whole tensors and a
mask of booleans is what backward keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from keras_tp.seam.contexts import current_parts, current_replicas

Draw = Callable[..., torch.Tensor]


class DryParts:
    """See `keras_tp.seam.contexts.Parts`."""

    def __init__(self, parts: int, rank: int, dims: Sequence[int | None]):
        self.parts, self.rank = parts, rank
        self.dims = list(dims)

    def next_dim(self) -> int | None:
        return self.dims.pop(0) if self.dims else None

    def skip(self, count: int) -> None:
        del self.dims[:count]


class DryDrops:
    """See `keras_tp.seam.rehearsals.Watch`."""

    def dropout(
        self, draw: Draw, inputs: torch.Tensor, rate: Any, noise_shape: Any = None, seed: Any = None
    ) -> torch.Tensor:
        replicas: Any = current_replicas()
        by_row = replicas is not None and inputs.shape[:1] == (replicas.rows,)
        if not by_row or rate in (0.0, 1.0):
            return _of_a_part(draw, inputs, rate, noise_shape, seed)
        if noise_shape is not None and noise_shape[0] in (None, replicas.rows):
            noise_shape = [replicas.total, *noise_shape[1:]]
        ones = _ones(inputs, [replicas.total, *inputs.shape[1:]])
        kept = replicas.take(_of_a_part(draw, ones, rate, noise_shape, seed)) != 0
        return torch.where(kept, inputs / (1.0 - rate), 0)


def _of_a_part(
    draw: Draw, inputs: torch.Tensor, rate: Any, noise_shape: Any, seed: Any
) -> torch.Tensor:
    parts = current_parts()
    dim = None if parts is None else parts.next_dim()
    if parts is None or dim is None or rate in (0.0, 1.0):
        return draw(inputs, rate, noise_shape, seed)
    size = inputs.shape[dim]
    whole = [*inputs.shape[:dim], size * parts.parts, *inputs.shape[dim + 1 :]]
    drawn = draw(_ones(inputs, whole), rate, None, seed).narrow(dim, size * parts.rank, size)
    return torch.where(drawn != 0, inputs / (1.0 - rate), 0)


def _ones(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return torch.ones((), dtype=like.dtype, device="meta").expand(shape)
