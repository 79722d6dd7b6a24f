"""Counts the collectives that really run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What torch calls them, blocking and functional.
NAMES = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast_": "broadcast",
    "scatter_": "scatter",
}


class Collectives(TorchDispatchMode):
    """`with Collectives() as counts:` counts by kind; an unknown one counts under its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Any:
        super().__enter__()
        return self.counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._opname
            if name != "wait_tensor":
                self.counts[NAMES.get(name, name)] += 1
        return func(*args, **(kwargs or {}))


class Traffic(TorchDispatchMode):
    """`with Traffic() as found:` collects kind and ranks of each collective, and bytes.

    Those of the largest side: what is summed, what all ranks' parts are together. `groups` has
    the same by kind and the ranks themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, int], tuple[int, int]] = {}
        self.groups: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}

    def __enter__(self) -> Any:
        super().__enter__()
        return self.found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = NAMES.get(func._opname, func._opname)
            groups = [a for a in args if isinstance(a, torch.ScriptObject)]
            group = dist.ProcessGroup.unbox(groups[0])
            ranks, members = group.size(), tuple(dist.get_process_group_ranks(group))
            side = args[1] if kind == "reduce_scatter" else args[0]
            size = sum(leaf.nbytes for leaf in tree_leaves(side) if isinstance(leaf, torch.Tensor))
            count, before = self.found.get((kind, ranks), (0, 0))
            self.found[kind, ranks] = count + 1, before + size
            count, before = self.groups.get((kind, members), (0, 0))
            self.groups[kind, members] = count + 1, before + size
        return func(*args, **(kwargs or {}))
