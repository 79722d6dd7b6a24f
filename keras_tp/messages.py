"""What ranks tell each other besides: values of the first rank, and whether they agree.

Nothing of it is seen by autograd.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
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


_SMALL, _TOGETHER, _ALIGNED = 2**20, 2**23, 16  # bytes


def broadcast_each(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The first rank's value of each, in turn, on every rank of the job.

    Collective: one broadcast for each of more than 1 MiB, and one for up to 8 MiB of smaller
    ones, which thus take what few would. What is given is to be copied, or kept all together.
    """
    waiting: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        x = tensor.detach()
        elsewhere = waiting and waiting[0].device != x.device
        if x.nbytes > _SMALL or elsewhere or size + x.nbytes > _TOGETHER:
            yield from _broadcast_together(waiting)
            waiting, size = [], 0
        if x.nbytes > _SMALL:
            yield broadcast(x)
            continue
        waiting.append(x)
        size += x.nbytes
    yield from _broadcast_together(waiting)


def _broadcast_together(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    if not tensors:
        return []
    ends = [*accumulate(-(-x.nbytes // _ALIGNED) * _ALIGNED for x in tensors)]
    memory = torch.zeros(ends[-1], dtype=torch.uint8, device=tensors[0].device)
    parts = [
        memory[start : start + x.nbytes].view(x.dtype).view(x.shape)
        for x, start in zip(tensors, [0, *ends], strict=False)
    ]
    for part, x in zip(parts, tensors, strict=True):
        part.copy_(x)
    if memory.numel():
        dist.broadcast(memory, src=0)
    return parts


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
