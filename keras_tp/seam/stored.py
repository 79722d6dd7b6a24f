"""Puts into variables what a rank is to store of them."""

from __future__ import annotations

from typing import Any

import torch

from keras_tp.seam.variables import ReplicatedVariable, ShardedVariable


def set_tensor(variable: Any, tensor: torch.Tensor) -> None:
    """Makes a whole variable live in the memory of `tensor`."""
    if tensor.data_ptr() != variable._value.data_ptr():
        variable._value.data = tensor


def store(variable: Any, local: torch.Tensor) -> None:
    """Makes `variable` store a copy of `local`: of a sharded one this rank's shard."""
    if isinstance(variable, ShardedVariable | ReplicatedVariable):
        variable._direct_assign(local)
    elif variable._value.is_contiguous():
        with torch.no_grad():
            variable._value.copy_(local)
    else:  # such as an expanded tensor, into which nothing can be written
        variable._value.data = local.to(variable._value.device, copy=True)
