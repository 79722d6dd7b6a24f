"""Where in which flat bucket the gradient of each parameter lies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

# Bytes; DistributedDataParallel's. The first bucket is small, to start early.
FIRST, SIZE = 1 << 20, 25 << 20


class Place(NamedTuple):
    """One parameter's part of a bucket.

    Attributes:
        bucket: index of the bucket.
        start: the first of its elements in the bucket's flat tensor.
        flag: the element that says whether the gradient is there.
        shape: the parameter's.
        stride: the one autograd wants its gradient to have; it clones one of another.
    """

    bucket: int
    start: int
    flag: int
    shape: torch.Size
    stride: tuple[int, ...]

    def within(self, flat: torch.Tensor) -> torch.Tensor:
        """The part of `flat` that is this place, `shape`, sharing memory.

        No view of `flat` in torch's eyes: a write into one gradient would count
        as a write into all of the bucket.
        """
        return flat.new_empty(0).set_(flat.untyped_storage(), self.start, self.shape, self.stride)


@dataclass
class Bucket:
    """What is sent at once: gradients of one dtype, then one flag for each of them.

    Attributes:
        dtype: of all.
        device: of all.
        members: numbers of the parameters, in the order of their places.
        numel: elements of their gradients together.
    """

    dtype: torch.dtype
    device: torch.device
    members: list[int] = field(default_factory=list)
    numel: int = 0

    def empty(self) -> torch.Tensor:
        """A flat tensor for the bucket's gradients and flags, not filled."""
        length = self.numel + len(self.members)
        return torch.empty(length, dtype=self.dtype, device=self.device)


def places(
    parameters: list[torch.Tensor], first: int, size: int
) -> tuple[list[Place], list[Bucket]]:
    """A place for each of `parameters`, and the buckets in the order in which they fill.

    Buckets are filled from the last parameter to the first, as backward goes, those of
    different dtypes side by side. A parameter is never divided.

    Args:
        parameters: of one device, in their order of use.
        first: bytes after which the first bucket of a dtype is full.
        size: bytes after which a later one is.
    """
    filling: dict[torch.dtype, Bucket] = {}
    limits: dict[torch.dtype, int] = {}
    buckets: list[Bucket] = []
    for number in reversed(range(len(parameters))):
        parameter = parameters[number]
        dtype = parameter.dtype
        if dtype not in filling:
            filling[dtype] = Bucket(dtype, parameter.device)
            buckets.append(filling[dtype])
        bucket = filling[dtype]
        bucket.members.append(number)
        bucket.numel += parameter.numel()
        if bucket.numel * parameter.itemsize >= limits.get(dtype, first):
            del filling[dtype]
            limits[dtype] = size
    buckets.sort(key=lambda bucket: -bucket.members[-1])
    found: dict[int, Place] = {}
    for index, bucket in enumerate(buckets):
        start = 0
        for flag, number in enumerate(bucket.members, bucket.numel):
            parameter = parameters[number]
            found[number] = Place(index, start, flag, parameter.shape, _dense_stride(parameter))
            start += parameter.numel()
    return [found[number] for number in range(len(parameters))], buckets


def _dense_stride(parameter: torch.Tensor) -> tuple[int, ...]:
    if parameter.is_contiguous():
        return parameter.stride()
    return torch.empty_like(parameter, device="meta").stride()
