"""Training loops of one's own, with an optimizer of torch's.

What such an optimizer is given, `model.parameters()`, are this rank's shards. One
that updates every element alone is right on them. One that looks at a whole weight
or gradient gives other numbers, and nobody would see it: it is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from keras_tp.errors import LayoutError

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


def watch_torch_optimizers(shards: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Has a torch optimizer that would not be right on `shards` raise LayoutError as it steps.

    Args:
        shards: what this rank stores of each variable that is cut, with the path.
    """
    for path, shard in shards:
        shard.shard_of = path  # type: ignore[attr-defined]
    _watch()


@functools.cache
def _watch() -> None:
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: Any, args: Any, kwargs: Any) -> None:
    if _updates_elementwise(optimizer):
        return
    tensors = (tensor for group in optimizer.param_groups for tensor in group["params"])
    paths = [tensor.shard_of for tensor in tensors if hasattr(tensor, "shard_of")]
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
