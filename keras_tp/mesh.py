"""The job's ranks: process group, Keras device meshes and the torch meshes behind them."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import Any

import keras
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from keras_tp.errors import LayoutError
from keras_tp.layouts import MeshShape


def initialize(backend: str | None = None, *, timeout: timedelta | None = None) -> None:
    """Joins the ranks of the job into a process group.

    Under `torchrun` the group spans the ranks it started; without it this
    process becomes a job of one rank. A second call, or one after
    `torch.distributed.init_process_group`, does nothing.

    Call it first in a script that runs on GPUs: it also picks this rank's GPU
    (`LOCAL_RANK`), and Keras creates weights on the GPU that is current.

    Args:
        backend: `"gloo"` or `"nccl"`; by default nccl if Keras computes on CUDA
            (see `KERAS_TORCH_DEVICE`), gloo otherwise.
        timeout: how long a collective may wait for a rank that does not come;
            torch's default is 30 minutes for gloo, 10 for nccl.
    """
    if dist.is_initialized():
        return
    on_cuda = device_type() == "cuda"
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        options.update(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend or ("nccl" if on_cuda else "gloo"), **options)
    atexit.register(_leave)


def _leave() -> None:
    # The worker threads of a gloo group must end before the interpreter does: one
    # that still lets go of a tensor then finds no interpreter, and aborts a job
    # that was done. They end with the last reference to their group, and the
    # meshes here are to hold the only ones.
    _MESHES.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def device_type() -> str:
    """`"cuda"` or `"cpu"`: where Keras puts tensors."""
    return keras.ops.convert_to_tensor(0).device.type


def device_mesh(shape: dict[str, int]) -> keras.distribution.DeviceMesh:
    """A Keras device mesh over the ranks of the job.

    Only a description: it needs no process group, so that `keras_tp.plan` can
    be asked about any number of ranks. `keras_tp.parallelize` checks that the
    job has as many.

    >>> mesh = device_mesh({"batch": 1, "model": 4})
    >>> keras.distribution.LayoutMap(mesh)

    Args:
        shape: axis name to number of ranks, slowest varying first.

    Returns:
        A mesh whose devices are called `"cpu:0"`, `"cpu:1"`, ... (`"gpu:0"`,
        ... on CUDA), the number being the rank.
    """
    problems = [
        f"axis {name!r} has size {size!r}; a size is a whole number from 1."
        for name, size in shape.items()
        if not isinstance(size, int) or isinstance(size, bool) or size < 1
    ]
    if not shape:
        problems.append("a mesh needs at least one axis, such as {'model': 2}.")
    if problems:
        raise LayoutError(problems, where=f"device_mesh({shape})")
    kind = "gpu" if device_type() == "cuda" else "cpu"
    total = 1
    for size in shape.values():
        total *= size
    return keras.distribution.DeviceMesh(
        tuple(shape.values()), list(shape), [f"{kind}:{rank}" for rank in range(total)]
    )


# Torch meshes by what they are, never by the id of a Keras object: ids are
# reused once an object is collected, and a rank that finds a stale mesh while
# another makes a new one leaves the job waiting. Meshes do not outlive the
# process group they were made under.
_MESHES: dict[dist.ProcessGroup, dict[MeshShape, DeviceMesh]] = {}


def torch_mesh(shape: MeshShape) -> DeviceMesh:
    """The torch mesh of this shape, made on first use.

    Collective on first use: every rank of the job must ask for the same meshes
    in the same order. The job has the ranks of the mesh (`check_ranks`).
    """
    world = dist.group.WORLD
    assert world is not None
    meshes = _MESHES.setdefault(world, {})
    if shape not in meshes:
        ranks = torch.tensor(shape.ranks).reshape(shape.sizes)
        meshes[shape] = DeviceMesh(device_type(), ranks, mesh_dim_names=shape.axes)
    return meshes[shape]


def check_ranks(shape: MeshShape) -> None:
    """Raises LayoutError unless the ranks of the mesh are those of the job."""
    ranks = dist.get_world_size() if dist.is_initialized() else int(os.getenv("WORLD_SIZE", "1"))
    if shape.size != ranks:
        raise LayoutError(
            f"the mesh has {shape.size} ranks ({shape}) but the job has {ranks}. Start it with "
            f"`torchrun --nproc-per-node {shape.size}`, or make a mesh of {ranks}.",
            where="this mesh",
        )
    if sorted(shape.ranks) != list(range(ranks)):
        raise LayoutError(
            f"the mesh's devices stand for ranks {list(shape.ranks)}, not for 0 to {ranks - 1}. "
            "keras_tp.device_mesh names them.",
            where="this mesh",
        )
