"""Meshes of the job's ranks: Keras device meshes and the torch meshes behind them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import keras
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from keras_tp.errors import LayoutError
from keras_tp.job import device_type, job_rank, job_size, leave_at_exit, let_go_at_exit
from keras_tp.layouts import MeshShape


def device_kind() -> str:
    """Keras's word for it: `"gpu"` or `"cpu"`."""
    return "gpu" if device_type() == "cuda" else "cpu"


def device_mesh(shape: dict[str, int]) -> keras.distribution.DeviceMesh:
    """A Keras device mesh over the ranks of the job.

    Only a description: it needs no process group, so that `keras_tp.plan` can
    be asked about any number of ranks. `keras_tp.parallelize` checks that the
    job has as many.

    >>> mesh = device_mesh({"batch": 1, "model": 4})
    >>> layout_map = keras.distribution.LayoutMap(mesh)

    Args:
        shape: axis name to number of ranks, slowest varying first.

    Returns:
        A mesh whose devices are called `"cpu:0"`, `"cpu:1"`, ... (`"gpu:0"`,
        ... on CUDA), the number being the rank.

    Raises:
        LayoutError: no axes, or a size that is not a whole number from 1.
    """
    if not isinstance(shape, dict) or not shape:
        raise LayoutError(
            f"expected axis names and sizes such as {{'model': 2}}, got {shape!r}.",
            where="device_mesh",
        )
    sizes = {name: _whole_number(size) for name, size in shape.items()}
    problems = [
        f"axis {name!r} has size {shape[name]!r}; a size is a whole number from 1."
        for name, size in sizes.items()
        if size < 1
    ]
    if problems:
        raise LayoutError(problems, where=f"device_mesh({shape})")
    axes, ranks = tuple(str(name) for name in sizes), tuple(range(math.prod(sizes.values())))
    return keras_mesh(MeshShape(axes, tuple(sizes.values()), ranks))


def keras_mesh(shape: MeshShape) -> keras.distribution.DeviceMesh:
    """The Keras mesh of this shape."""
    devices = [f"{device_kind()}:{rank}" for rank in shape.ranks]
    return keras.distribution.DeviceMesh(shape.sizes, list(shape.axes), devices)


def _whole_number(size: Any) -> int:
    try:
        return 0 if isinstance(size, bool) else operator.index(size)
    except TypeError:
        return 0


# Torch meshes by what they are, never by the id of a Keras object: ids are
# reused once an object is collected, and a rank that finds a stale mesh while
# another makes a new one leaves the job waiting. A mesh does not outlive the
# process group it was made under.
_MESHES: dict[dist.ProcessGroup, dict[MeshShape, DeviceMesh]] = {}
let_go_at_exit(_MESHES.clear)


def torch_mesh(shape: MeshShape) -> DeviceMesh:
    """The torch mesh of this shape, made on first use.

    Collective on first use: every rank of the job must ask for the same meshes
    in the same order. The job has the ranks of the mesh (`check_ranks`).
    """
    world = dist.group.WORLD
    assert world is not None
    if world not in _MESHES:
        _MESHES.clear()
        _MESHES[world] = {}
        leave_at_exit()
    meshes = _MESHES[world]
    if shape not in meshes:
        ranks = torch.tensor(shape.ranks).reshape(shape.sizes)
        meshes[shape] = DeviceMesh(device_type(), ranks, mesh_dim_names=shape.axes)
    return meshes[shape]


# One more group of all ranks, for what is told besides while the others are busy.
_ASIDE: dict[dist.ProcessGroup, dist.ProcessGroup] = {}
let_go_at_exit(_ASIDE.clear)


def group_aside() -> dist.ProcessGroup:
    """A gloo group of all ranks of the job, which a thread beside the training may use alone.

    Collective on first use.
    """
    world = dist.group.WORLD
    assert world is not None
    if world not in _ASIDE:
        _ASIDE.clear()
        _ASIDE[world] = dist.new_group(backend="gloo")
        leave_at_exit()
    return _ASIDE[world]


def check_ranks(shape: MeshShape) -> None:
    """Raises LayoutError unless the ranks of the mesh are those of the job."""
    ranks = job_size()
    if shape.size != ranks:
        raise LayoutError(
            f"the mesh has {shape.size} ranks ({shape}) but the job has {ranks}. Start as many "
            f"(`torchrun --standalone --nproc-per-node {shape.size} ...` on one host), or make a "
            f"mesh of {ranks}.",
            where="this mesh",
        )
    if sorted(shape.ranks) != list(range(ranks)):
        raise LayoutError(
            f"the mesh's devices stand for ranks {list(shape.ranks)}, not for 0 to {ranks - 1}. "
            "keras_tp.device_mesh names them.",
            where="this mesh",
        )


def check_devices(tensors: Iterable[torch.Tensor]) -> None:
    """Raises LayoutError if a tensor is on another device than this rank computes on."""
    here = keras.ops.convert_to_tensor(0).device
    elsewhere = {tensor.device for tensor in tensors} - {here}
    if elsewhere:
        raise LayoutError(
            f"weights are on {', '.join(map(str, elsewhere))} where rank {job_rank()} computes on "
            f"{here}. Call keras_tp.initialize() before the model is made.",
            where="this model",
        )
