"""The masks that Keras puts on tensors."""

from __future__ import annotations

from typing import Any

import torch


def keras_mask(tensor: Any) -> Any:
    """The mask that Keras has put on a tensor, or None."""
    return getattr(tensor, "_keras_mask", None)


def masked(tensor: torch.Tensor, mask: Any) -> torch.Tensor:
    """`tensor`, on which Keras finds a mask, if there is one."""
    if mask is not None:
        tensor._keras_mask = mask  # type: ignore[attr-defined]
    return tensor
