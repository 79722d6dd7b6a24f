"""Dropout of a shard: drawn for the whole tensor, of which each rank takes its part."""

from __future__ import annotations

import functools
from typing import Any

import keras
import torch
from keras.src.backend.torch import random as backend_random
from keras.src.backend.torch.core import get_device

from keras_tp.seam.contexts import current_parts


def hook_dropout() -> None:
    """Has Keras drop from shards what one process drops from the whole. Idempotent.

    Every rank draws for the whole tensor: the masks are those of one process and
    another on each rank, at the price of drawing as many numbers as one process does.
    """
    original = backend_random.dropout
    if getattr(original, "_keras_tp_parts", False):
        return

    @functools.wraps(original)
    def dropout(inputs: Any, rate: Any, noise_shape: Any = None, seed: Any = None) -> Any:
        parts = None if get_device() == "meta" else current_parts()
        dim = None if parts is None else parts.next_dim()
        if parts is None or dim is None or rate in (0.0, 1.0):
            return original(inputs, rate, noise_shape, seed)
        inputs = keras.ops.convert_to_tensor(inputs)
        size = inputs.shape[dim]
        whole = [*inputs.shape[:dim], size * parts.parts, *inputs.shape[dim + 1 :]]
        ones = torch.ones((), dtype=inputs.dtype, device=inputs.device).expand(whole)
        drawn = original(ones, rate, None, seed).narrow(dim, size * parts.rank, size)
        return torch.where(drawn != 0, inputs / (1.0 - rate), 0)

    dropout._keras_tp_parts = True  # type: ignore[attr-defined]
    backend_random.dropout = dropout
