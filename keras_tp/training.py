"""What training needs beyond the layers: optimizer slots and random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate

from keras_tp.shards import Shards
from keras_tp.variables import (
    ShardedVariable,
    global_seed,
    optimizer_variables,
    replicate_variable,
    shard_like,
)


def adopt_optimizer(model: Any, mesh: DeviceMesh) -> None:
    """Shards the slots an optimizer already has like their variables. Collective.

    Slots made later are shards from the start (`variables.hook_optimizers`).
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return
    for variable, reference in optimizer_variables(optimizer):
        if isinstance(reference, ShardedVariable):
            shard_like(variable, reference)
        else:
            whole = (Replicate(),) * mesh.ndim
            replicate_variable(variable, Shards(mesh, whole, tuple(variable.shape)))


def share_random_state() -> None:
    """Gives every rank the first one's random state. Collective.

    Python's, NumPy's, torch's and the one behind unseeded `keras.random`. Ranks
    that hold the same activations must draw the same dropout masks from torch,
    and `fit(shuffle=True)` the same order. The first rank goes on as it would in
    one process.
    """
    seed = global_seed()
    states: list[Any] = [
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        None if seed is None else seed.numpy(),
    ]
    dist.broadcast_object_list(states, src=0)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[3])
    if seed is not None and states[4] is not None:
        seed.assign(states[4])
