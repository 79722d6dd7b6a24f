"""What torch functions compute across a dim of which each rank has an even part.

A maximum, a sum or one entry of each row are small: they are computed on the parts, and the
ranks then tell each other so much (`keras_tp.likelihoods`). What has no rule here is gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from keras_tp.layouts import chunk_bounds
from keras_tp.likelihoods import CrossEntropy, LogSoftmax, Meeting, Softmax, check_range, mine_of


@dataclass(frozen=True)
class Part:
    """This rank's part of a result along a dim."""

    tensor: torch.Tensor
    dim: int


@dataclass
class Crossing:
    """A function that is given one sharded tensor.

    Attributes:
        name: the function's name.
        args, kwargs: what it is given; the tensor is in the first place.
        part: this rank's part of the tensor.
        dim: along which it is one.
        meeting: the ranks.
        on_part: computes the function on the part.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    part: torch.Tensor
    dim: int
    meeting: Meeting
    on_part: Callable[[], Any]

    @property
    def full(self) -> int:
        """Full size of the dim."""
        return self.part.shape[self.dim] * self.meeting.parts

    @property
    def start(self) -> int:
        """Where in it this rank's part begins."""
        return chunk_bounds(self.full, self.meeting.parts, self.meeting.rank)[0]

    def get(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument, by position or by one of its names."""
        if position < len(self.args):
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    def along(self, position: int, default: Any = None) -> bool:
        """Whether the function works along the cut dim, and no other; asked of one dim."""
        where = self.get(position, "dim", "axis", default=default)
        return type(where) is int and where % self.part.dim() == self.dim


# Gives what the function gives, a `Part` where that is one; None where it has no rule.
Cross = Callable[[Crossing], Any]


def _sum(call: Crossing) -> Any:
    where = call.get(1, "dim", "axis")
    dims = range(call.part.dim()) if where is None or where in ([], ()) else where
    dims = [d % call.part.dim() for d in ([dims] if type(dims) is int else dims)]
    if call.dim not in dims:
        return None
    total = call.meeting.reduce(call.on_part())
    return total / call.meeting.parts if call.name == "mean" else total


def _highest(call: Crossing) -> Any:
    # (With a gradient, which equals share, it is gathered.)
    wanted = call.part.requires_grad and torch.is_grad_enabled()
    if wanted or call.get(1, "dim", "axis") is None or not call.along(1):
        return None
    if call.name == "amin":
        return -call.meeting.highest(-call.on_part())
    return call.meeting.highest(call.on_part())


def _argmax(call: Crossing) -> Any:
    if not call.along(1):
        return None
    at = call.on_part()
    kept = at if call.get(2, "keepdim", default=False) else at.unsqueeze(call.dim)
    value = call.part.detach().gather(call.dim, kept)
    # float64 holds indices and values of all smaller dtypes exactly, so that they go together.
    if value.dtype == torch.int64:
        return None
    told = torch.stack([value.double(), (kept + call.start).double()])
    told = call.meeting.gather(told, call.dim + 1, call.meeting.parts)
    values, indices = told.unbind()
    first = values.argmax(call.dim, keepdim=True)  # of equals the first, as of those within a part
    found = indices.gather(call.dim, first).long()
    return found.reshape(at.shape)


def _top(call: Crossing) -> Any:
    count = call.get(1, "k")
    largest, in_order = call.get(3, "largest", default=True), call.get(4, "sorted", default=True)
    if not call.along(2, default=-1) or not largest or not in_order:
        return None
    own = min(count, call.part.shape[call.dim])
    values, indices = call.part.topk(own, call.dim)
    every = own * call.meeting.parts
    values = call.meeting.gather(values, call.dim, every)
    indices = call.meeting.gather(indices + call.start, call.dim, every)
    values, at = values.topk(count, call.dim)
    return torch.return_types.topk((values, indices.gather(call.dim, at)))


def _picked(call: Crossing) -> Any:
    swapped = call.name == "gather"
    index = call.get(2, "index") if swapped else call.get(1, "indices")
    where = call.get(1 if swapped else 2, "dim")
    if not isinstance(index, torch.Tensor) or type(where) is not int:
        return None
    if where % call.part.dim() != call.dim or index.dim() != call.part.dim():
        return None
    if index.shape[call.dim] * 2 > call.part.shape[call.dim]:
        return None  # then to gather is not more
    check_range(call.name, index, (index >= 0) & (index < call.full))
    mine, at = mine_of(index, call.start, call.part.shape[call.dim])
    if call.name == "gather":
        picked = call.part.gather(call.dim, at)
    else:
        picked = call.part.take_along_dim(at, call.dim)
    return call.meeting.reduce(picked.masked_fill(~mine, 0))


def _log_sum_exp(call: Crossing) -> Any:
    where = call.get(1, "dim", "axis")
    if isinstance(where, tuple | list) and len(where) == 1:
        (where,) = where
    if type(where) is not int or where % call.part.dim() != call.dim:
        return None
    top = call.meeting.highest(call.part.detach().amax(call.dim, keepdim=True))
    summed = call.meeting.reduce((call.part - top).exp().sum(call.dim, keepdim=True))
    found = summed.log() + top
    return found if call.get(2, "keepdim", default=False) else found.squeeze(call.dim)


def _softmax(call: Crossing) -> Any:
    if not call.along(1):
        return None
    dtype = call.kwargs.get("dtype")
    part = call.part if dtype is None else call.part.to(dtype)
    compute = LogSoftmax if call.name == "log_softmax" else Softmax
    return Part(compute.apply(part, call.dim, call.meeting), call.dim)


def _cross_entropy(call: Crossing) -> Any:
    target, weight = call.get(1, "target"), call.get(2, "weight")
    reduction = call.get(6, "reduction", default="mean")
    of_labels = not (target.is_floating_point() or call.get(7, "label_smoothing", default=0.0))
    if not of_labels or weight is not None or reduction != "none" or call.dim != _classes(call):
        return None
    ignored = call.get(4, "ignore_index", default=-100)
    return CrossEntropy.apply(call.part, target, call.dim, call.start, ignored, call.meeting)


def _classes(call: Crossing) -> int:
    return 0 if call.part.dim() == 1 else 1


def _negative_likelihood(call: Crossing) -> Any:
    target, weight = call.get(1, "target"), call.get(2, "weight")
    reduction = call.get(6, "reduction", default="mean")
    if weight is not None or reduction != "none" or call.dim != _classes(call):
        return None
    ignored = call.get(4, "ignore_index", default=-100)
    kept = target != ignored
    check_range("nll_loss", target, ((target >= 0) & (target < call.full)) | ~kept)
    mine, at = mine_of(target, call.start, call.part.shape[call.dim])
    own = call.part.gather(call.dim, at.unsqueeze(call.dim)).squeeze(call.dim)
    return -call.meeting.reduce(own.masked_fill(~(mine & kept), 0))


CROSSINGS: dict[str, Cross] = {
    **dict.fromkeys(("sum", "mean"), _sum),
    **dict.fromkeys(("amax", "amin"), _highest),
    "argmax": _argmax,
    "topk": _top,
    **dict.fromkeys(("gather", "take_along_dim"), _picked),
    "logsumexp": _log_sum_exp,
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    "cross_entropy": _cross_entropy,
    "nll_loss": _negative_likelihood,
}
