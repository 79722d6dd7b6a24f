"""What ranks tell each other besides: values of the first rank, and whether they agree.

Nothing of it is seen by autograd.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from keras_tp.collectives import Axis


def broadcast(x: torch.Tensor) -> torch.Tensor:
    """The first rank's `x`, in memory of its own, on every rank of the job. Collective.

    Travels as bytes, so that any dtype can.
    """
    x = x.detach().clone(memory_format=torch.contiguous_format)
    if x.numel():
        dist.broadcast(x.reshape(-1).view(torch.uint8), src=0)
    return x


def broadcast_into(x: torch.Tensor) -> None:
    """Writes the first rank's `x` into every rank's. Collective.

    Args:
        x: contiguous. Nothing else may live in its memory.
    """
    if x.numel():
        dist.broadcast(x.detach().reshape(-1).view(torch.uint8), src=0)


def broadcast_object(value: Any) -> Any:
    """The first rank's `value`, on every rank of the job. Collective.

    Travels pickled; for small things that are no tensors. Unlike torch's
    `broadcast_object_list` it starts from this rank's own value, so that it
    works on the virtual ranks of a fake group, whose broadcasts change nothing.
    """
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    device = control_device()
    length = torch.tensor([data.numel()], device=device)
    dist.broadcast(length, src=0)
    if dist.get_rank() > 0:
        data = torch.cat([data, data.new_zeros(int(length))])[: int(length)]
    data = data.to(device)
    dist.broadcast(data, src=0)
    return pickle.loads(data.cpu().numpy().tobytes())


def all_equal(digest: bytes) -> bool:
    """Whether every rank of the job gives the same `digest`. Collective."""
    number = int.from_bytes(digest[:7], "big")
    ends = torch.tensor([number, -number], device=control_device())
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return ends.tolist() == [number, -number]


def anywhere(holds: bool) -> bool:
    """Whether `holds` is true on any rank of the job (a small all-reduce)."""
    found = torch.tensor(int(holds), device=control_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def control_device() -> torch.device:
    """Where tensors must be that tell ranks about each other, given the group's backend."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def gather_numbers(numbers: Sequence[int], axis: Axis | None = None) -> list[list[int]]:
    """Each rank's `numbers`, in the order of the axis, or of the job's ranks (one all-gather).

    Args:
        numbers: as many on every rank, each of 63 bits.
    """
    mine = torch.tensor(numbers, dtype=torch.int64, device=control_device())
    group = dist.group.WORLD if axis is None else axis.group
    everywhere = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everywhere, mine, group=group)
    found = torch.stack(everywhere).tolist()
    return found if axis is None else [found[rank] for rank in axis.order]
