"""What training needs beyond the layers: optimizer slots and random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import Replicate

from keras_tp.layouts import MeshShape
from keras_tp.messages import broadcast_object
from keras_tp.seam.optimizers import adopt_slots, optimizer_variables
from keras_tp.seam.variables import (
    ShardedVariable,
    global_seed,
    replicate_variable,
    set_global_seed,
)
from keras_tp.shards import Shards


def adopt_optimizer(model: Any, mesh: MeshShape) -> None:
    """Shards the slots an optimizer already has like their variables. Collective.

    Slots made later are shards from the start (`seam.optimizers.hook_optimizers`).
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return
    adopt_slots(optimizer, again=True)
    for variable, _ in optimizer_variables(optimizer):
        if not isinstance(variable, ShardedVariable):
            everywhere = (Replicate(),) * len(mesh.axes)
            replicate_variable(variable, Shards(mesh, everywhere, tuple(variable.shape)))


def share_random_state() -> None:
    """Gives every rank the first one's random state. Collective.

    Python's, NumPy's, torch's and the one behind unseeded `keras.random`. Ranks
    that hold the same activations must draw the same dropout masks from torch,
    and `fit(shuffle=True)` the same order. The first rank goes on as it would in
    one process.
    """
    on_cuda = torch.cuda.is_available()
    python, numpy, cpu, cuda, keras = broadcast_object(
        (
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state() if on_cuda else None,
            global_seed(),
        )
    )
    set_global_seed(keras)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if on_cuda and cuda is not None:
        torch.cuda.set_rng_state(cuda)
