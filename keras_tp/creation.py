"""New variables under a distribution: each rank keeps its shard of the first one's value."""

from __future__ import annotations

from typing import Any

import keras
import torch.distributed as dist

from keras_tp.distribution_lib import initialize
from keras_tp.distributions import claimed_layout, given_layout, whole_layout
from keras_tp.layouts import MeshShape, placements_of
from keras_tp.mesh import check_ranks
from keras_tp.messages import broadcast, broadcast_into
from keras_tp.seam.distribution import Role, layout_of, set_distribution_of, set_layout
from keras_tp.seam.layers import hook_layers
from keras_tp.seam.stored import set_tensor
from keras_tp.seam.updates import hook_optimizers
from keras_tp.seam.variables import become_sharded, local_tensor, set_awaiting_plan
from keras_tp.shards import Shards


def prepare(distribution: Any) -> None:
    """Joins the job before the first variable is made under `distribution`. Collective then.

    Raises:
        LayoutError: the mesh's ranks are not those of the job.
    """
    join(distribution.device_mesh)


def join(device_mesh: Any) -> MeshShape:
    """The shape of `device_mesh`, once its ranks are found to be those of the job, and joined."""
    mesh = MeshShape.from_keras(device_mesh)
    check_ranks(mesh)
    if not dist.is_initialized():
        initialize()
    return mesh


def place(variable: Any, role: Role, own: bool) -> None:
    """Has this rank keep its shard of the first rank's value of a new variable.

    Collective: one broadcast, in place if the value is in memory of its own, so
    that no second full copy comes to be. None for what metrics and optimizers
    keep, which starts from constants, and may be made by one rank alone.

    Args:
        variable: has its value, whole.
        role: what it is for.
        own: whether nothing else lives in the value's memory.

    Raises:
        LayoutError: a layout that does not fit it.
    """
    layout = _layout_for(variable, role)
    mesh = join(layout.device_mesh)
    set_layout(variable, layout)
    set_distribution_of(variable, keras.distribution.distribution())
    if role is Role.RECORD:
        return
    full = local_tensor(variable).detach()
    if own and full.is_contiguous():
        broadcast_into(full)
    else:
        full = broadcast(full)
    shards = Shards(mesh, placements_of(layout.axes, mesh), tuple(variable.shape))
    if shards.cuts:
        hook_layers()
        hook_optimizers()
        become_sharded(variable, shards, shards.local(full))
        set_awaiting_plan(variable, True)
    else:
        set_tensor(variable, full)


def _layout_for(variable: Any, role: Role) -> Any:
    distribution = keras.distribution.distribution()
    given, shape = layout_of(variable), tuple(variable.shape)
    mesh = None if distribution is None else distribution.device_mesh
    if role is not Role.WEIGHT:
        # An optimizer's slot is handed the layout of its variable.
        return whole_layout(mesh if given is None else given.device_mesh, shape)
    if given is not None:
        return given_layout(given, mesh, variable.path, shape)
    return claimed_layout(distribution, variable.path, shape)
