"""Training loops of one's own, with an optimizer of torch's.

What such an optimizer is given, `model.parameters()`, are this rank's shards. One
that updates every element alone is right on them. One that looks at a whole weight
or gradient gives other numbers, and nobody would see it: it is refused. The norm by
which `torch.nn.utils.clip_grad_norm_` clips is made that of all shards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from keras_tp.errors import LayoutError
from keras_tp.shards import Shards

ELEMENTWISE: tuple[type, ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)


# What this rank stores of each variable that is cut, with the variable's path.
_STORED: Any = WeakTensorKeyDictionary()


def watch_loops(stored: Iterable[tuple[str, torch.Tensor, Shards]]) -> None:
    """Has loops of one's own be right on shards, or be told.

    A torch optimizer that would not be right raises LayoutError as it steps, and
    `clip_grad_norm_` and `get_total_norm` of torch give the norm of full gradients:
    collective then, one all-reduce of one number.

    Args:
        stored: of each variable that is cut the path, what this rank stores, and how it lies.
    """
    for path, shard, shards in stored:
        _STORED[shard] = path, shards
    _watch()


@functools.cache
def _watch() -> None:
    register_optimizer_step_pre_hook(_check)
    # (`clip_grad_norm_` looks it up as it is called, whenever it was imported itself.)
    total_norm = _over_shards(clip_grad._get_total_norm)
    clip_grad._get_total_norm = total_norm
    torch.nn.utils.get_total_norm = total_norm


def _over_shards(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def total_norm(
        tensors: Any,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        shards = {id(t.grad): s for t, (_, s) in _STORED.items() if t.grad is not None}
        if not any(id(t) in shards for t in given):
            return original(given, norm_type, error_if_nonfinite, foreach)
        power = float(norm_type)
        if power <= 0:
            raise LayoutError(
                f"norm_type={norm_type} of gradients of which this rank has shards is not known.",
                where="this norm",
            )

        def norm(some: list[torch.Tensor]) -> torch.Tensor:
            some = [t for t in some if t.numel()]
            return original(some, power, False, foreach).double() if some else zero

        zero = torch.zeros((), dtype=torch.float64, device=given[0].device)
        whole = norm([t for t in given if id(t) not in shards])
        if math.isinf(power):
            cut = norm([t for t in given if id(t) in shards])
            dist.all_reduce(cut, op=dist.ReduceOp.MAX)
            total = torch.maximum(whole, cut)
        else:
            counted = [t for t in given if id(t) in shards and shards[id(t)].counts]
            cut = norm(counted) ** power
            dist.all_reduce(cut)
            total = (whole**power + cut) ** (1 / power)
        total = total.to(given[0].dtype)
        return original([total], 2.0, True, foreach) if error_if_nonfinite else total

    return total_norm


def _check(optimizer: Any, args: Any, kwargs: Any) -> None:
    if _updates_elementwise(optimizer):
        return
    tensors = (tensor for group in optimizer.param_groups for tensor in group["params"])
    paths = [_STORED[tensor][0] for tensor in tensors if tensor in _STORED]
    if paths:
        known = ", ".join(cls.__name__ for cls in ELEMENTWISE)
        raise LayoutError(
            f"{type(optimizer).__name__} is not known to update every element alone, and this rank "
            f"stores shards of {len(paths)} of the weights it is given ('{paths[0]}', ...): they "
            f"could get other numbers. Known: {known}. If yours does, say so with "
            "`optimizer.elementwise = True`.",
            where="this torch optimizer",
        )


def _updates_elementwise(optimizer: Any) -> bool:
    if getattr(optimizer, "elementwise", False):
        return True
    # A subclass of one may compute anything.
    return isinstance(optimizer, ELEMENTWISE) and type(optimizer).__module__.startswith("torch.")
