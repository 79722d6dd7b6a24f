"""Communication for ranks that compute different rows of one batch, understood by autograd.

As `keras_tp.collectives`, of which these are relatives, in dual pairs as there:

    sum_over      (all-reduce)  <->  itself (a reduce, then a copy)
    gather_weight (all-gather)  <->  reduce-scatter
    gather_rows   (all-gather)  <->  split_rows (slice)
    scatter       (reduce-scatter)  <->  gather_weight

Rows are what differs: a weight, or a total over all rows, is used on each rank's own
rows, so that each rank's gradient of it is a part, to be summed. What is whole on
every rank alike, such as the joined rows, has its full gradient on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from keras_tp.collectives import Axis, Joining, chunk_sizes, copy, join, padded, reduce


def sum_over(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum of `x` over the ranks of the axis (one all-reduce); the gradient is summed as well.

    For what all rows share, such as a batch's mean: each rank adds what its own
    rows give, then uses the total on its own rows, and so holds only a part of the
    total's gradient. (`reduce` is for totals that every rank uses in the same way.)

    Args:
        x: partial values, the same shape on every rank.
    """
    return copy(reduce(x, axis), axis)


def gather_weight(
    x: torch.Tensor, dim: int, total: int, axis: Axis, joining: Joining | None = None
) -> torch.Tensor:
    """The shards `x` of every rank joined along `dim` (one all-gather), for use on own rows.

    As `gather`, but each rank's gradient of the result is a part, of its own rows:
    the gradients are summed, and each rank gets its chunk of the sum (one
    reduce-scatter). What fully sharded data parallelism does (Rajbhandari et al.
    2020, ZeRO, stage 3).

    Args:
        x: this rank's chunk along `dim`, cut by `chunk_bounds`; may be empty.
        dim: negative counts from the end.
        total: size of `dim` in the result.
        joining: what gathers, in place of `join`.
    """
    return x if axis.size == 1 else _GatherWeight.apply(x, dim % x.dim(), total, axis, joining)


def scatter(x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    """This rank's chunk along `dim` of the sum of `x` over the ranks (one reduce-scatter).

    The gradient is all-gathered. For sums of which each rank goes on with other tokens
    (Korthikanti et al. 2022, section 4.2.2).

    Args:
        x: partial values, the same shape on every rank.
        dim: negative counts from the end.
    """
    return x if axis.size == 1 else _SumWeight.apply(x, dim % x.dim(), axis)


def gather_rows(x: torch.Tensor, sizes: tuple[int, ...], axis: Axis) -> torch.Tensor:
    """The rows `x` of every rank joined along dim 0 (one all-gather); the gradient is sliced.

    Args:
        x: this rank's rows, `sizes[axis.rank]` of them.
        sizes: number of rows of each position along the axis; any may be 0.

    Returns:
        `sum(sizes)` rows, in the order of positions.
    """
    return x if axis.size == 1 else _GatherRows.apply(x, sizes, axis)


def split_rows(x: torch.Tensor, sizes: tuple[int, ...], axis: Axis) -> torch.Tensor:
    """This rank's rows of `x`, a local copy; the gradient is all-gathered.

    Args:
        x: `sum(sizes)` rows, replicated over the axis.
        sizes: number of rows of each position along the axis; any may be 0.
    """
    return x if axis.size == 1 else _SplitRows.apply(x, sizes, axis)


class _GatherWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dim: int, total: int, axis: Axis, joining: Joining | None = None
    ) -> torch.Tensor:
        ctx.dim, ctx.axis = dim, axis
        return (joining or join)(x, dim, chunk_sizes(total, axis), axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _SumWeight.apply(grad, ctx.dim, ctx.axis), None, None, None, None


class _SumWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
        ctx.dim, ctx.total, ctx.axis = dim, x.shape[dim], axis
        return _reduce_scatter(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _GatherWeight.apply(grad, ctx.dim, ctx.total, ctx.axis), None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sizes: tuple[int, ...], axis: Axis) -> torch.Tensor:
        ctx.sizes, ctx.axis = sizes, axis
        return join(x, 0, sizes, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _SplitRows.apply(grad, ctx.sizes, ctx.axis), None, None


class _SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sizes: tuple[int, ...], axis: Axis) -> torch.Tensor:
        ctx.sizes, ctx.axis = sizes, axis
        assert x.shape[0] == sum(sizes), (x.shape, sizes)
        rows = x.narrow(0, sum(sizes[: axis.rank]), sizes[axis.rank])
        return rows.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _GatherRows.apply(grad, ctx.sizes, ctx.axis), None, None


def _reduce_scatter(x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    # This rank's chunk along `dim` of the sum of every rank's `x`.
    sizes = chunk_sizes(x.shape[dim], axis)
    chunks = [padded(chunk, dim, sizes[0]) for chunk in x.split(sizes, dim)]
    chunks = [chunks[axis.order.index(i)] for i in range(axis.size)]
    if torch.compiler.is_compiling():
        flat = torch.cat([chunk.reshape(-1) for chunk in chunks])
        out = functional.reduce_scatter_tensor(flat, "sum", 0, axis.known_as)
        out = out.reshape(chunks[0].shape)
    else:
        out = torch.empty_like(chunks[0])
        dist.reduce_scatter(out, chunks, group=axis.group)
    return out.narrow(dim, 0, sizes[axis.rank]).contiguous()
