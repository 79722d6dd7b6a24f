"""Keras's attention on CPUs, without a question that torch's compiler cannot follow.

Keras asks torch whether flash attention can be had, by an object that is made in C++. There the
compiler breaks its graph, gives up the calls of layers around it, and compiles each of them
by itself until it has had enough (8 ways), so that most of a step runs as if not compiled. On CPUs
the answer is no: that kernel is CUDA's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from keras.src.backend.torch import nn


def hook_attention() -> None:
    """Answers for tensors on CPUs. Idempotent."""
    original = getattr(nn, "_can_use_flash_attention", None)
    if original is None or hasattr(original, "_keras_tp"):
        return

    @functools.wraps(original)
    def can_use(query: torch.Tensor, *args: Any, raise_error: bool = False, **kwargs: Any) -> Any:
        if query.device.type == "cpu" and not raise_error:
            return False
        return original(query, *args, raise_error=raise_error, **kwargs)

    can_use._keras_tp = True  # type: ignore[attr-defined]
    nn._can_use_flash_attention = can_use
