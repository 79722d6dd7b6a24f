"""Functions of rows of which each rank has an even part: softmax and its cross-entropy.

Forward and backward as autograd needs them, each with as few and as small collectives as there
can be. The cross-entropy of labels is Megatron-LM's vocabulary-parallel one (Shoeybi et al.
2019, section 3), with two all-reduces instead of three.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable


class Meeting(Protocol):
    """What the ranks of an axis do together; on tensors without values, what they would do.

    Attributes:
        axis: along which they stand.
        parts: how many there are.
        rank: the position of this one.
    """

    @property
    def axis(self) -> Any: ...

    @property
    def parts(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, which autograd does not see."""

    def highest(self, x: torch.Tensor) -> torch.Tensor:
        """The maximum over the ranks, which autograd does not see."""

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `keras_tp.collectives.reduce`."""

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """See `keras_tp.collectives.copy`."""

    def split(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """See `keras_tp.collectives.split`."""

    def gather(self, x: torch.Tensor, dim: int, total: int) -> torch.Tensor:
        """See `keras_tp.collectives.gather`."""

    def whole(self, x: torch.Tensor, dim: int, total: int) -> torch.Tensor:
        """Gathers likewise the output itself, of which `x` is this rank's part."""

    def looking(self) -> AbstractContextManager[None]:
        """While open, functions are called only to see what they do."""


def mine_of(index: torch.Tensor, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which indices are of this rank's part, and where in it they are; others are 0."""
    mine = (index >= start) & (index < start + count)
    return mine, torch.where(mine, index - start, 0)


def check_range(name: str, index: torch.Tensor, fine: torch.Tensor) -> None:
    """Fails, if there are values to look at, where not all indices are fine."""
    if not index.is_meta:
        torch._assert_async(fine.all(), f"{name} was given an index that is out of range")


def _normalized(
    part: torch.Tensor, dim: int, meeting: Meeting
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The part less the maximum, and of it the exponentials and their sum over all parts."""
    shifted = part - meeting.highest(part.amax(dim, keepdim=True))
    powers = shifted.exp()
    return shifted, powers, meeting.total(powers.sum(dim, keepdim=True))


class LogSoftmax(torch.autograd.Function):
    """Forward two all-reduces of a number for each row, backward one."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, dim: int, meeting: Meeting) -> torch.Tensor:
        shifted, _, total = _normalized(part, dim, meeting)
        result = shifted - total.log()
        ctx.save_for_backward(result)
        ctx.dim, ctx.meeting = dim, meeting
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (result,) = ctx.saved_tensors
        summed = ctx.meeting.total(grad.sum(ctx.dim, keepdim=True))
        return grad - result.exp() * summed, None, None


class Softmax(torch.autograd.Function):
    """Forward two all-reduces of a number for each row, backward one."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, dim: int, meeting: Meeting) -> torch.Tensor:
        _, powers, total = _normalized(part, dim, meeting)
        result = powers / total
        ctx.save_for_backward(result)
        ctx.dim, ctx.meeting = dim, meeting
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (result,) = ctx.saved_tensors
        summed = ctx.meeting.total((grad * result).sum(ctx.dim, keepdim=True))
        return result * (grad - summed), None, None


class CrossEntropy(torch.autograd.Function):
    """Forward an all-reduce of one number for each row, and one of two; backward none."""

    @staticmethod
    def forward(
        ctx: Any,
        part: torch.Tensor,
        target: torch.Tensor,
        dim: int,
        start: int,
        ignored: int,
        meeting: Meeting,
    ) -> torch.Tensor:
        count = part.shape[dim]
        kept = target != ignored
        within = (target >= 0) & (target < count * meeting.parts)
        check_range("cross_entropy", target, within | ~kept)
        mine, at = mine_of(target, start, count)
        shifted = part - meeting.highest(part.amax(dim, keepdim=True))
        own = shifted.gather(dim, at.unsqueeze(dim)).squeeze(dim).masked_fill(~mine, 0)
        powers = shifted.exp_()
        total, own = meeting.total(torch.stack([powers.sum(dim), own])).unbind()
        ctx.save_for_backward(powers.div_(total.unsqueeze(dim)), mine, kept, at)
        ctx.dim = dim
        return (total.log() - own).masked_fill(~kept, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        chances, mine, kept, at = ctx.saved_tensors
        grad = grad.masked_fill(~kept, 0).unsqueeze(ctx.dim)
        given = chances * grad
        own = grad.masked_fill(~mine.unsqueeze(ctx.dim), 0)
        given.scatter_add_(ctx.dim, at.unsqueeze(ctx.dim), -own)
        return given, *[None] * 5
