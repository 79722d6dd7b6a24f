"""An all-gather that is under way while something else is computed."""

from __future__ import annotations

import torch
import torch.distributed as dist

from keras_tp.collectives import Axis, as_travels, padded, placed


class Join:
    """`keras_tp.collectives.join`, begun now and ended by `result`. Collective, asynchronous.

    Args:
        x, dim, sizes, axis: as for `join`.
    """

    def __init__(self, x: torch.Tensor, dim: int, sizes: tuple[int, ...], axis: Axis):
        x = padded(x, dim, max(sizes))
        self.shape, self.dtype, self.dim, self.sizes, self.axis = x.shape, x.dtype, dim, sizes, axis
        mine = as_travels(x)
        self.parts = [torch.empty_like(mine) for _ in range(axis.size)]
        self.work = dist.all_gather(self.parts, mine, group=axis.group, async_op=True)

    def result(self) -> torch.Tensor:
        """What `join` gives. Waits for the other ranks."""
        self.work.wait()
        return placed(self.parts, self.shape, self.dtype, self.dim, self.sizes, self.axis)

    def forget(self) -> None:
        """Nobody wants the result.

        On CPUs it goes on without being waited for, and lets go of its memory by itself: where an
        error ends the call, other ranks may never come. On GPUs the memory's next owner must wait,
        on the device.
        """
        if self.parts[0].is_cuda:
            self.work.wait()
