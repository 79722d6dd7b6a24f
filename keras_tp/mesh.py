"""The job's ranks: process group, Keras device meshes and the torch meshes behind them."""

from __future__ import annotations

import atexit
import functools
import math
import operator
import os
from collections.abc import Iterable
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

    Raises:
        LayoutError: more ranks than GPUs on this host, and no backend given.
    """
    if dist.is_initialized():
        return
    how: dict[str, Any] = {}
    if not launched():
        how.update(store=dist.HashStore(), rank=0, world_size=1)
    elif restarted_here():
        how.update(store=_store_of_this_life(), rank=job_rank(), world_size=job_size())
    join(backend, timeout, int(os.environ.get("LOCAL_RANK", 0)), **how)


def launched() -> bool:
    """Whether `torchrun`, or what sets the same environment, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarted_here() -> bool:
    """Whether `torchrun` started this process in place of one that failed, all on one host.

    It keeps the store in which ranks tell each other their addresses, with those of ranks that
    are gone (pytorch issue 135712): one that comes early tries to meet the dead. On several
    hosts, whose counts of restarts may differ, its own way out is to be set where it is started:
    `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`.
    """
    told = os.environ.get
    return (
        told("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and told("GROUP_WORLD_SIZE") == "1"
        and told("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    )


def _store_of_this_life() -> dist.Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, job_size(), is_master=False)
    return dist.PrefixStore(f"life{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def join(backend: str | None, timeout: timedelta | None, local_rank: int, **how: Any) -> None:
    """Joins the process group and picks a GPU; see `initialize`.

    Args:
        backend: as for `initialize`.
        timeout: as for `initialize`.
        local_rank: which of the ranks on this host this process is.
        how: where the ranks meet, for `init_process_group`; else the environment says it.
    """
    on_cuda = device_type() == "cuda"
    if on_cuda:
        gpus = torch.cuda.device_count()
        if local_rank >= gpus and backend is None:
            raise LayoutError(
                f"rank {how.get('rank', job_rank())} is number {local_rank} on a host of {gpus} "
                "GPUs, counting from 0. Start as many ranks as GPUs, or let them share with "
                "backend='gloo'.",
                where="this job",
            )
        torch.cuda.set_device(local_rank % gpus)
    if timeout is not None:
        how["timeout"] = timeout
    dist.init_process_group(backend or ("nccl" if on_cuda else "gloo"), **how)
    _leave_at_exit()


def job_rank() -> int:
    """This process's rank in the job, before and after `initialize`."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def job_size() -> int:
    """Number of ranks in the job, before and after `initialize`."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


@functools.cache
def _leave_at_exit() -> None:
    atexit.register(_leave)


def _leave() -> None:
    # The worker threads of a gloo group must end before the interpreter does: one
    # that still lets go of a tensor then finds no interpreter, and aborts a job
    # that was done. They end with the last reference to their group, and the
    # meshes here are to hold the only ones.
    _MESHES.clear()
    _ASIDE.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def device_type() -> str:
    """`"cuda"` or `"cpu"`: where Keras puts tensors."""
    return keras.ops.convert_to_tensor(0).device.type


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
        _leave_at_exit()
    meshes = _MESHES[world]
    if shape not in meshes:
        ranks = torch.tensor(shape.ranks).reshape(shape.sizes)
        meshes[shape] = DeviceMesh(device_type(), ranks, mesh_dim_names=shape.axes)
    return meshes[shape]


# One more group of all ranks, for what is told besides while the others are busy.
_ASIDE: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def group_aside() -> dist.ProcessGroup:
    """A gloo group of all ranks of the job, which a thread beside the training may use alone.

    Collective on first use.
    """
    world = dist.group.WORLD
    assert world is not None
    if world not in _ASIDE:
        _ASIDE.clear()
        _ASIDE[world] = dist.new_group(backend="gloo")
        _leave_at_exit()
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
