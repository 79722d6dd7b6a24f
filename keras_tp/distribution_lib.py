"""The module that Keras expects of a backend for `keras.distribution`, for torch.

Keras has none on torch; `keras_tp.enable()` puts this one in its place. One
process is one device is one rank, as torchrun starts them: `"cpu:3"` is rank 3.

Values are global wherever anybody reads them, as with Keras on JAX, and a
layout says what a rank *stores*. What layers hand each other as shards they
decide among themselves, so that `distribute_tensor` checks a layout and returns what
it was given; a variable's layout is obeyed. Nothing here makes a DTensor.
"""

from __future__ import annotations

import os
import re
from typing import Any

import keras
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.placement_types import Placement

from keras_tp.addresses import read_job
from keras_tp.collectives import Axis
from keras_tp.errors import LayoutError
from keras_tp.job import initialize as join_launched
from keras_tp.job import job_rank, job_size, join, launched
from keras_tp.layouts import MeshShape, layout_problems, placements_of
from keras_tp.mesh import check_ranks, device_kind, torch_mesh
from keras_tp.planner import make_plan
from keras_tp.plans import Plan
from keras_tp.seam.contexts import is_symbolic
from keras_tp.shards import Shards
from keras_tp.sources import rows_from_process
from keras_tp.training import share_random_state


def list_devices(device_type: str | None = None) -> list[str]:
    """The devices of the job, one per rank, e.g. `["cpu:0", "cpu:1"]`. No communication.

    Args:
        device_type: `"cpu"` or `"gpu"`, by default what Keras computes on.

    Raises:
        LayoutError: devices that Keras does not compute on.
    """
    kind = device_kind()
    if device_type is not None and str(device_type).lower() != kind:
        raise LayoutError(
            f"no devices of type {device_type!r}: Keras computes on {kind!r} in this process. The "
            "environment variable KERAS_TORCH_DEVICE, 'cpu' or 'cuda', picks another.",
            where="keras.distribution",
        )
    return [f"{kind}:{rank}" for rank in range(job_size())]


def get_device_count(device_type: str | None = None) -> int:
    """Number of devices of the job; as for `list_devices`."""
    return len(list_devices(device_type))


def initialize(
    job_addresses: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the ranks of the job, and gives all of them the first one's random state. Collective.

    The ranks are those torchrun started, if it did. Otherwise these arguments
    say which, for which Keras looks into the `KERAS_DISTRIBUTION_*` environment
    variables. Without either, this process becomes a job of one.

    Args:
        job_addresses: `"host:port"` of every process, with commas between, or
            of the first alone, where the others meet it.
        num_processes: number of ranks.
        process_id: this process's rank.

    Raises:
        LayoutError: numbers that contradict each other or the job; some missing.
    """
    job = read_job(job_addresses, num_processes, process_id)
    if dist.is_initialized() or launched():
        job.check(job_rank(), job_size())
        join_launched()
    elif job.size in (None, 1) and job.rank in (None, 0):
        join_launched()
    else:
        address, size, rank = job.complete()
        local_rank = int(os.environ.get("LOCAL_RANK", job.local_rank))
        join(None, None, local_rank, address, rank, size)
    share_random_state()


def num_processes() -> int:
    """Number of ranks in the job, before and after `initialize`."""
    return job_size()


def process_id() -> int:
    """This process's rank in the job, before and after `initialize`."""
    return job_rank()


def distribute_tensor(tensor: Any, layout: Any) -> Any:
    """`tensor` as it is, once `layout` is found to fit it. No communication.

    Whoever reads a value reads all of it, and activations are stored whole, so
    that a layout of one changes nothing. As on JAX a layout may have fewer
    entries than the tensor has dims.

    Args:
        tensor: a tensor, an array, or a nest of them; symbolic ones pass unchecked.
        layout: a `keras.distribution.TensorLayout`, or torch's placements.

    Raises:
        LayoutError: a layout of more entries than dims, without a mesh, or with
            a mesh that is not that of the job.
    """
    if is_symbolic():
        return tensor
    for leaf in keras.tree.flatten(tensor):
        if not isinstance(leaf, keras.KerasTensor):
            _check_tensor(tuple(keras.ops.shape(leaf)), layout)
    return tensor


def distribute_variable(value: Any, layout: Any) -> torch.Tensor:
    """This rank's shard of the first rank's `value`, a plain tensor. Collective.

    Args:
        value: tensor or array, of the same shape on every rank.
        layout: a `keras.distribution.TensorLayout` with one entry per dim.

    Raises:
        LayoutError: a layout that does not fit the value or the job.
    """
    full = keras.ops.convert_to_tensor(value)
    shape = tuple(full.shape)
    mesh = _mesh_of(layout)
    problems = layout_problems(layout.axes, shape, mesh)
    if problems:
        raise _misfit(shape, layout, problems)
    _join(mesh)
    return Shards(mesh, placements_of(layout.axes, mesh), shape).distribute(full)


def distribute_data_input(per_process_batch: Any, layout: Any, batch_dim_name: str) -> Any:
    """The whole batch, as `keras_tp.rows.Rows`, of which each replica has a part. Collective.

    Args:
        per_process_batch: this replica's rows, the same on all of its ranks: a
            nest of arrays.
        layout: the `TensorLayout` of the batch.
        batch_dim_name: the mesh axis along which replicas lie.
    """
    mesh = _mesh_of(layout)
    if batch_dim_name not in mesh.axes or mesh.axis_size(batch_dim_name) == 1:
        return per_process_batch
    _join(mesh)
    return rows_from_process(per_process_batch, Axis.of(torch_mesh(mesh), batch_dim_name))


def parallelize_torch_module(module: Any, device_mesh: Any, parallelize_plan: Any) -> Any:
    """torch's `parallelize_module`, on a Keras or a torch mesh. Collective.

    For torch modules, whose weights become DTensors; not for Keras models.

    Args:
        module: a `torch.nn.Module`, sharded in place.
        device_mesh: one axis of more than one rank; of a torch mesh of several,
            give `mesh["model"]`.
        parallelize_plan: a `ParallelStyle`, or a dict of them by module name.

    Raises:
        LayoutError: several axes of more than one rank; a mesh that is not that of the job.
    """
    if isinstance(device_mesh, keras.distribution.DeviceMesh):
        device_mesh = _to_backend_mesh(device_mesh)
    if device_mesh.ndim > 1:
        names = device_mesh.mesh_dim_names
        long = [name for name in names or () if device_mesh[name].size() > 1]
        if names is None or len(long) > 1:
            raise LayoutError(
                f"torch parallelizes a module along one axis, this mesh has {device_mesh.ndim}. "
                "Give one axis of the torch mesh: device_mesh.backend_mesh['model'].",
                where=f"this mesh ({device_mesh})",
            )
        device_mesh = device_mesh[long[0] if long else names[-1]]
    return parallelize_module(module, device_mesh, parallelize_plan)


def create_tp_plan_from_layout_map(model: Any, layout_map: Any) -> Plan:
    """The plan of `keras_tp.plan(model, layout_map)`. No communication."""
    return make_plan(model, layout_map)


def is_dtensor_available() -> bool:
    """Whether this torch has DTensors; without them nothing of `keras_tp` works."""
    return dist.is_available()


def _to_backend_mesh(device_mesh: Any) -> DeviceMesh:
    """The torch mesh of a Keras mesh, the same one for the same ranks and axes.

    Collective the first time: every rank asks for the same meshes in the same order.

    Raises:
        LayoutError: the mesh's ranks are not those of the job.
    """
    mesh = MeshShape.from_keras(device_mesh)
    _join(mesh)
    return torch_mesh(mesh)


def _to_backend_layout(tensor_layout: Any) -> tuple[Placement, ...]:
    """torch's placements, one per mesh axis. No communication.

    Raises:
        LayoutError: no mesh, axes that the mesh lacks, an axis on two dims.
    """
    mesh = _mesh_of(tensor_layout)
    axes = tuple(tensor_layout.axes)
    problems = layout_problems(axes, (0,) * len(axes), mesh)
    if problems:
        raise LayoutError([f"a layout {axes} {problem}." for problem in problems], where="a layout")
    return placements_of(axes, mesh)


def _to_backend_device(device_name: Any) -> torch.device:
    """The torch device that a rank computes on, by Keras's name for it, e.g. `"gpu:1"`.

    Of another rank's GPU it is the number on a host with as many as this one.

    Raises:
        LayoutError: a device that is none of `list_devices()`.
    """
    if isinstance(device_name, torch.device):
        return device_name
    kind = device_kind()
    match = re.fullmatch(r"(\w+)(?::(\d+))?", str(device_name).lower())
    found = match is not None and match.group(1).replace("cuda", "gpu") == kind
    rank = int(match.group(2) or 0) if match and found else -1
    if not 0 <= rank < job_size():
        raise LayoutError(
            f"device {str(device_name)!r} is not found: the job has {', '.join(list_devices())}.",
            where="keras.distribution",
        )
    if kind == "cpu":
        return torch.device("cpu")
    if rank == job_rank():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cuda", rank % torch.cuda.device_count())


def _mesh_of(layout: Any) -> MeshShape:
    if not isinstance(layout, keras.distribution.TensorLayout):
        found = type(layout).__name__
        raise LayoutError(f"expected a keras.distribution.TensorLayout, got {found}.")
    if layout.device_mesh is None:
        raise LayoutError(
            f"a layout {layout.axes} has no device mesh. Make it with one: "
            "keras.distribution.TensorLayout(axes, device_mesh).",
            where="a layout",
        )
    return MeshShape.from_keras(layout.device_mesh)


def _check_tensor(shape: tuple[int, ...], layout: Any) -> None:
    if isinstance(layout, tuple) and all(isinstance(entry, Placement) for entry in layout):
        problems = [
            f"that cuts dim {entry.dim}"
            for entry in layout
            if isinstance(entry, Shard) and not -len(shape) <= entry.dim < len(shape)
        ]
    else:
        mesh = _mesh_of(layout)
        check_ranks(mesh)
        padding = (None,) * (len(shape) - len(layout.axes))
        problems = layout_problems((*layout.axes, *padding), shape, mesh)
    if problems:
        raise _misfit(shape, layout, problems)


def _misfit(shape: tuple[int, ...], layout: Any, problems: list[str]) -> LayoutError:
    axes = getattr(layout, "axes", layout)
    return LayoutError(
        [f"a tensor {shape} is given a layout {axes} {problem}." for problem in problems],
        where="a layout",
    )


def _join(mesh: MeshShape) -> None:
    check_ranks(mesh)
    if not dist.is_initialized():
        initialize()
