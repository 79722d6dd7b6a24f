"""Communication that autograd understands: copy, reduce, gather, split.

Each runs along one mesh axis on plain local tensors. They come in dual pairs,
the backward of one being the forward of the other, so that gradients of
gradients are right as well:

    copy   (identity)    <->  reduce (all-reduce)
    gather (all-gather)  <->  split  (slice)

The pairs are Megatron-LM's f and g and their gather/scatter relatives
(Shoeybi et al. 2019, section 3). On an axis of one rank each is the identity
and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

from keras_tp.layouts import chunk_bounds


@dataclass(frozen=True)
class Axis:
    """One mesh axis as this rank sees it.

    A value: models keep it, and process groups belong to `keras_tp.mesh` alone.

    Attributes:
        name: the axis name.
        group_name: torch's name of the group of ranks along the axis, this one among them.
        order: for each position along the axis, its rank in the group. A mesh may
            have its ranks in any order, a group has them in ascending order.
        rank: this rank's position.
    """

    name: str
    group_name: str
    order: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh, name: str) -> Axis:
        # Every variable and layer asks, and torch takes its time to slice a mesh.
        known: dict[str, Axis] = vars(mesh).setdefault("_keras_tp_axes", {})
        if name not in known:
            group, line = mesh.get_group(name), mesh[name].mesh.tolist()
            order = tuple(dist.get_group_rank(group, rank) for rank in line)
            known[name] = cls(name, group.group_name, order, line.index(dist.get_rank()))
        return known[name]

    @property
    def size(self) -> int:
        """Number of ranks along the axis."""
        return len(self.order)

    @property
    def known_as(self) -> Any:
        """What torch's functional collectives take for the group."""
        return self.group_name

    @property
    def group(self) -> dist.ProcessGroup:
        return _resolve_process_group(self.group_name)  # type: ignore[arg-type]


def copy(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """`x`, replicated, for use on sharded weights: its gradient is all-reduced.

    Args:
        x: any shape, the same on every rank of the axis.
    """
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum of `x` over the ranks of the axis (one all-reduce); the gradient passes through.

    Args:
        x: partial values, the same shape on every rank.
    """
    return x if axis.size == 1 else _Reduce.apply(x, axis, False)


def reduce_own(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """As `reduce`, in the memory of `x`, which nobody else reads, nor keeps for backward."""
    return x if axis.size == 1 else _Reduce.apply(x, axis, True)


# Of what `join` is.
Joining = Callable[[torch.Tensor, int, tuple[int, ...], Axis], torch.Tensor]


def gather(
    x: torch.Tensor, dim: int, total: int, axis: Axis, joining: Joining | None = None
) -> torch.Tensor:
    """The shards `x` of every rank joined along `dim` (one all-gather).

    The gradient is the slice that belongs to this rank: every rank goes on to
    compute the same, so each holds the full gradient.

    Args:
        x: this rank's chunk along `dim`, cut by `chunk_bounds`; may be empty.
        dim: negative counts from the end.
        total: size of `dim` in the result.
        joining: what gathers, in place of `join`.
    """
    return x if axis.size == 1 else _Gather.apply(x, dim % x.dim(), total, axis, joining)


def split(x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    """This rank's chunk of `x` along `dim`, a view of it; the gradient is all-gathered.

    A view, because Keras's functional models hold on to `x` until their call ends: a copy
    would come on top of it, just where memory is fullest.

    Args:
        x: replicated over the axis.
        dim: negative counts from the end.
    """
    return x if axis.size == 1 else _View.apply(x, dim % x.dim(), axis)


def cut(x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    """As `split`, but a copy: for what lives on after `x` is let go of.

    Args:
        x: replicated over the axis.
        dim: negative counts from the end.
    """
    return x if axis.size == 1 else _Split.apply(x, dim % x.dim(), axis)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Reduce.apply(grad, ctx.axis, False), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, own: bool) -> torch.Tensor:
        ctx.axis = axis
        if torch.compiler.is_compiling():
            return functional.all_reduce(x.contiguous(), "sum", axis.known_as)
        # (To autograd a view of `x` would be one, into which nobody may write.)
        out = x.contiguous().data if own else x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=axis.group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Copy.apply(grad, ctx.axis), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dim: int, total: int, axis: Axis, joining: Joining | None = None
    ) -> torch.Tensor:
        ctx.dim, ctx.axis = dim, axis
        return (joining or join)(x, dim, chunk_sizes(total, axis), axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Split.apply(grad, ctx.dim, ctx.axis), None, None, None, None


class _View(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
        ctx.dim, ctx.total, ctx.axis = dim, x.shape[dim], axis
        return x.narrow(dim, *chunk_bounds(x.shape[dim], axis.size, axis.rank))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Gather.apply(grad, ctx.dim, ctx.total, ctx.axis), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
        ctx.dim, ctx.total, ctx.axis = dim, x.shape[dim], axis
        chunk = x.narrow(dim, *chunk_bounds(x.shape[dim], axis.size, axis.rank))
        # A copy: as a weight's gradient, a view would keep the full gradient's memory
        # for as long as the optimizer needs the slice.
        return chunk.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Gather.apply(grad, ctx.dim, ctx.total, ctx.axis), None, None


# The dtypes that gloo and NCCL both know.
_TRAVEL = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8),
}


def chunk_sizes(total: int, axis: Axis) -> tuple[int, ...]:
    """Size of each position's chunk of `total`, by `chunk_bounds`."""
    return tuple(chunk_bounds(total, axis.size, rank)[1] for rank in range(axis.size))


def padded(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """`x`, contiguous, zeros after it up to `size` along `dim`: gloo and NCCL want equal sizes."""
    if x.shape[dim] < size:
        padding = list(x.shape)
        padding[dim] = size - x.shape[dim]
        x = torch.cat([x, x.new_zeros(padding)], dim)
    return x.contiguous()


def join(x: torch.Tensor, dim: int, sizes: tuple[int, ...], axis: Axis) -> torch.Tensor:
    """Every rank's `x` joined along `dim`, the ranks in order of position; one all-gather.

    The collective alone, which autograd does not see.

    Args:
        x: this rank's part, `sizes[axis.rank]` long in `dim`.
        dim: from 0.
        sizes: size of each position's part in `dim`; any may be 0.
    """
    assert x.shape[dim] == sizes[axis.rank], (x.shape, dim, sizes, axis.rank)
    x = padded(x, dim, max(sizes))
    return placed(gather_parts(as_travels(x), axis), x.shape, x.dtype, dim, sizes, axis)


def as_travels(x: torch.Tensor) -> torch.Tensor:
    """`x`, or its bytes if gloo or NCCL does not know its dtype."""
    # (Only what cannot travel otherwise goes as bytes: torch's compiler gets the views wrong.)
    return x if x.dtype in _TRAVEL else x.reshape(-1).view(torch.uint8)


def placed(
    parts: list[torch.Tensor],
    shape: torch.Size,
    dtype: torch.dtype,
    dim: int,
    sizes: tuple[int, ...],
    axis: Axis,
) -> torch.Tensor:
    """What ranks have sent, joined along `dim`, the ranks in order of position.

    Args:
        parts: what `as_travels` gave on each, in the order of ranks in the group.
        shape, dtype: of each, padded.
        dim, sizes, axis: as for `join`.
    """
    if parts[0].dtype != dtype:
        parts = [part.view(dtype).reshape(shape) for part in parts]
    found = [parts[axis.order[position]].narrow(dim, 0, n) for position, n in enumerate(sizes)]
    return torch.cat(found, dim)


def gather_parts(x: torch.Tensor, axis: Axis) -> list[torch.Tensor]:
    """Every rank's `x`, of one shape, in the order of ranks in the group; one all-gather.

    What a compiler traces are torch's functional collectives, which it puts into its graph.
    """
    if torch.compiler.is_compiling():
        flat = functional.all_gather_tensor(x.reshape(-1), 0, axis.known_as)
        return [part.reshape(x.shape) for part in flat.chunk(axis.size)]
    parts = [torch.empty_like(x) for _ in range(axis.size)]
    dist.all_gather(parts, x, group=axis.group)
    return parts
