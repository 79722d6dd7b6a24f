"""One tensor's shards: how to cut the full value and how to put it together again."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from keras_tp.collectives import Axis, Joining, gather
from keras_tp.layouts import MeshShape, Shape, chunk_bounds
from keras_tp.mesh import torch_mesh
from keras_tp.messages import broadcast
from keras_tp.row_collectives import gather_weight


class Shards:
    """How one tensor of full `shape` lies on `mesh`, seen from this rank.

    Args:
        mesh: the mesh; the process groups of `torch_mesh(mesh)` carry the communication.
        placements: one `Shard` or `Replicate` per mesh axis.
        shape: full shape.
    """

    def __init__(self, mesh: MeshShape, placements: tuple[Placement, ...], shape: Shape):
        self.mesh = mesh
        self.placements = placements
        self.shape = shape
        # Axes along which this rank holds less than everything, with the dim.
        self.cuts = tuple(
            (Axis.of(torch_mesh(mesh), name), placement.dim)
            for name, placement in zip(mesh.axes, placements, strict=True)
            if isinstance(placement, Shard) and mesh.axis_size(name) > 1
        )
        local = list(shape)
        for axis, dim in self.cuts:
            local[dim] = chunk_bounds(shape[dim], axis.size, axis.rank)[1]
        self.local_shape = tuple(local)

    def local(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's shard of `full`, in memory of its own. No communication, no gradient."""
        return self.part(full).clone(memory_format=torch.contiguous_format)

    def part(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's shard of `full`, a view of it. No communication, no gradient."""
        shard = full.detach()
        for axis, dim in self.cuts:
            shard = shard.narrow(dim, *chunk_bounds(self.shape[dim], axis.size, axis.rank))
        return shard

    def full(
        self,
        local: torch.Tensor,
        keep: Collection[str] = (),
        replicas: str | None = None,
        joining: Joining | None = None,
    ) -> torch.Tensor:
        """The full value, or what is full except along the axes named in `keep`.

        Collective: one all-gather per sharded axis not kept. The gradient is
        the slice that belongs to this rank; along the axis `replicas`, whose ranks
        each compute other rows, the slice of the sum (one reduce-scatter). `joining` is
        asked for each all-gather in turn.
        """
        for axis, dim in self.cuts:
            if axis.name == replicas:
                local = gather_weight(local, dim, self.shape[dim], axis, joining)
            elif axis.name not in keep:
                local = gather(local, dim, self.shape[dim], axis, joining)
        return local

    def dtensor(self, local: torch.Tensor) -> DTensor:
        """The full value as a DTensor that shares `local`'s memory. No communication."""
        strides = torch.empty(self.shape, device="meta").stride()
        mesh = torch_mesh(self.mesh)
        return DTensor.from_local(
            local,
            mesh,
            self.placements,
            run_check=False,
            shape=torch.Size(self.shape),
            stride=strides,
        )

    def cut_along(self, axis: str) -> bool:
        """Whether ranks along the axis store different parts."""
        return any(cut.name == axis for cut, _ in self.cuts)

    def cut_only_along(self, axes: Collection[str]) -> bool:
        """Whether ranks store the same part along every other axis."""
        return all(cut.name in axes for cut, _ in self.cuts)

    def distribute(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's shard of the first rank's `full`.

        Collective: one broadcast. (A scatter would move less, but cuts no uneven
        shards, nor along two axes at once, and models start once.)
        """
        full = broadcast(full)
        return self.local(full) if self.cuts else full

    def position(self, rank: int) -> tuple[int, ...]:
        """Which shard `rank` stores: its index along each axis that cuts."""
        where = dict(zip(self.mesh.axes, self.mesh.coordinates(rank), strict=True))
        return tuple(where[axis.name] for axis, _ in self.cuts)

    @cached_property
    def counts(self) -> bool:
        """Whether this rank is the first of those that store the same shard."""
        cut = {axis.name for axis, _ in self.cuts}
        here = self.mesh.coordinates(dist.get_rank())
        return not any(
            index for name, index in zip(self.mesh.axes, here, strict=True) if name not in cut
        )

    def add_up(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over all ranks of the job, in place. Collective: one all-reduce."""
        dist.all_reduce(x)
        return x

    def assembled(self, local: torch.Tensor) -> torch.Tensor:
        """The full value, put together from what every rank of the job stores.

        Collective. For checks: it goes by the mesh's coordinates, not by the
        axes' groups and their order as `full` does, whose mistakes it is to find.
        """
        sizes, bounds = [], []
        for rank in range(self.mesh.size):
            cut = [(0, size) for size in self.shape]
            for (axis, dim), index in zip(self.cuts, self.position(rank), strict=True):
                cut[dim] = chunk_bounds(self.shape[dim], axis.size, index)
            bounds.append(cut)
            sizes.append(math.prod(count for _, count in cut) * local.itemsize)
        mine = local.new_zeros(max(sizes), dtype=torch.uint8)
        stored = local.contiguous().reshape(-1).view(torch.uint8)
        mine[: stored.numel()] = stored
        parts = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(parts, mine)
        full = local.new_empty(self.shape)
        for part, cut, size in zip(parts, bounds, sizes, strict=True):
            place = full[tuple(slice(start, start + count) for start, count in cut)]
            place.copy_(part[:size].view(local.dtype).reshape(place.shape))
        return full
