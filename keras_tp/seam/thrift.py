"""Keras's random initial values on torch, to the bit, in less memory.

A shard is cut from a full value, so that the largest full value decides what a
process needs to make a model. Keras's `uniform` holds three copies of it while
it scales, `truncated_normal` more than nine.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from keras.src.backend.torch import random as torch_random
from keras.src.backend.torch.core import get_device, to_torch_dtype
from keras.src.backend.torch.random import torch_seed_generator

# Values made at a time, of four normals each. torch fills a CPU tensor with
# normals in groups of 16, from the generator's numbers in their order, so that
# parts of whole groups are what they are in the whole. On a GPU they are not.
_PART = 1 << 14


class ThriftyRandom:
    """Keras's random functions on torch, two of them thrifty; the others as they are just now."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch_random, name)

    def uniform(
        self,
        shape: Any,
        minval: Any = 0.0,
        maxval: Any = 1.0,
        dtype: Any = None,
        seed: Any = None,
    ) -> Any:
        """Scales in place."""
        plain = isinstance(minval, int | float) and isinstance(maxval, int | float)
        if not plain or len(shape) == 0 or get_device() == "meta":
            return torch_random.uniform(shape, minval, maxval, dtype, seed)
        values = torch.rand(
            size=shape,
            generator=torch_seed_generator(seed),
            dtype=to_torch_dtype(dtype),
            device=get_device(),
        )
        return values.mul_(maxval - minval).add_(minval)

    def truncated_normal(
        self,
        shape: Any,
        mean: Any = 0.0,
        stddev: Any = 1.0,
        dtype: Any = None,
        seed: Any = None,
    ) -> Any:
        """A part at a time, where that gives the same bits."""
        total = math.prod(shape)
        if not str(get_device()).startswith("cpu") or total < 2 * _PART:
            return torch_random.truncated_normal(shape, mean, stddev, dtype, seed)
        generator = torch_seed_generator(seed)
        values = torch.empty(total, dtype=to_torch_dtype(dtype), device=get_device())
        start = 0
        while start < total:
            rest = total - start
            count = _PART if rest >= 2 * _PART else rest  # no part is smaller than a group
            x = torch.normal(
                0, 1, size=(count, 4), generator=generator, dtype=values.dtype, device=values.device
            )
            # The first of four that is within two standard deviations.
            first = ((x > -2) & (x < 2)).max(-1, keepdim=True)[1]
            values[start : start + count] = x.gather(-1, first).squeeze(-1)
            start += count
        return values.mul_(stddev).add_(mean).reshape(tuple(shape))
