"""What training needs beyond the layers: optimizer slots and random numbers."""

from __future__ import annotations

from typing import Any

from keras_tp.messages import broadcast_each, broadcast_object
from keras_tp.randomness import random_state, set_random_state
from keras_tp.seam.optimizers import adopt_slots, optimizer_variables
from keras_tp.seam.variables import ShardedVariable, local_tensor, replicate_variable


def adopt_optimizer(model: Any) -> None:
    """Shards the slots an optimizer already has like their variables. Collective.

    Slots made later are shards from the start (`seam.optimizers.hook_optimizers`).
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return
    adopt_slots(optimizer, again=True)
    found = (variable for variable, _ in optimizer_variables(optimizer))
    whole = [variable for variable in found if not isinstance(variable, ShardedVariable)]
    values = broadcast_each(map(local_tensor, whole))
    for variable, value in zip(whole, values, strict=True):
        replicate_variable(variable, value)


def share_random_state() -> None:
    """Gives every rank the first one's random state. Collective.

    Python's, NumPy's, torch's and the one behind unseeded `keras.random`. Ranks
    that hold the same activations must draw the same dropout masks from torch,
    and `fit(shuffle=True)` the same order. The first rank goes on as it would in
    one process.
    """
    set_random_state(broadcast_object(random_state()))
