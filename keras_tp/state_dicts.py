"""What torch's own tools see of a parallelized model: DTensors, in the memory of the shards.

`state_dict()` shows them, and `load_state_dict()` takes them, or full values. What asks for the
parameters themselves (`keep_vars=True`, as `torch.export` does) is given the shards as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from keras_tp.seam.layers import Owner, variables_of, walk_layers
from keras_tp.seam.variables import local_tensor, sharding_of
from keras_tp.shards import Shards

_MARK = "keras_tp_shows_dtensors"


def show_dtensors(owners: list[Owner]) -> None:
    """Has the state dicts of these layers hold DTensors. Idempotent; no communication."""
    for owner in owners:
        if _MARK not in vars(owner.layer):
            vars(owner.layer)[_MARK] = True
            owner.layer.register_state_dict_post_hook(_show)
            owner.layer.register_load_state_dict_pre_hook(_take)


def _cut(layer: Any, prefix: str) -> dict[str, tuple[Shards, torch.Tensor]]:
    """How what is a shard is cut, and the shard, by its key in a state dict."""
    shardings = {}
    for variable in variables_of(walk_layers(layer)):
        sharding = sharding_of(variable)
        if sharding is not None:
            shardings[id(local_tensor(variable))] = sharding
    return {
        prefix + name: (shardings[id(parameter)], parameter.detach())
        for name, parameter in layer.named_parameters(remove_duplicate=False)
        if id(parameter) in shardings
    }


def _show(layer: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key, (shards, _) in _cut(layer, prefix).items():
        value = state.get(key)
        if isinstance(value, torch.Tensor) and not isinstance(value, DTensor | torch.nn.Parameter):
            state[key] = shards.dtensor(value)


def _take(layer: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    cut = _cut(layer, prefix)
    for key, value in [entry for entry in state.items() if entry[0].startswith(prefix)]:
        shards, shard = cut.get(key, (None, None))
        if isinstance(value, DTensor):
            mine = None if shards is None else shards.dtensor(shard)  # type: ignore[arg-type]
            laid_out = value.device_mesh, value.placements
            if mine is not None and laid_out == (mine.device_mesh, mine.placements):
                state[key] = value.to_local()
                continue
            state[key] = value = value.full_tensor()  # collective, for it is cut in another way
        if shards is not None and tuple(value.shape) == tuple(shards.shape):
            state[key] = shards.local(value)
