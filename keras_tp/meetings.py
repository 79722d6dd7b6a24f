"""What the ranks of an axis do together about an output of which each has a part."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from keras_tp.collectives import Axis, copy, gather, reduce, split


@dataclass(frozen=True)
class AxisMeeting:
    """See `keras_tp.likelihoods.Meeting`. Each is one collective, of `copy` and `split` backward.

    Attributes:
        axis: the axis.
    """

    axis: Axis

    @property
    def parts(self) -> int:
        return self.axis.size

    @property
    def rank(self) -> int:
        return self.axis.rank

    def total(self, x: torch.Tensor) -> torch.Tensor:
        return self._reduced(x, dist.ReduceOp.SUM)

    def highest(self, x: torch.Tensor) -> torch.Tensor:
        return self._reduced(x, dist.ReduceOp.MAX)

    def _reduced(self, x: torch.Tensor, how: dist.ReduceOp.RedOpType) -> torch.Tensor:
        out = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, how, group=self.axis.group)
        return out

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        return reduce(x, self.axis)

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        return copy(x, self.axis)

    def split(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return split(x, dim, self.axis)

    def gather(self, x: torch.Tensor, dim: int, total: int) -> torch.Tensor:
        return gather(x, dim, total, self.axis)

    def whole(self, x: torch.Tensor, dim: int, total: int) -> torch.Tensor:
        return gather(x, dim, total, self.axis)

    def looking(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()
