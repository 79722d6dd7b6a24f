"""What the ranks must agree on, checked where a disagreement would hang or go unnoticed.

Plans are compared before anything is sharded. Batches are compared as they come
in: every rank computes a part of the same batch, and a rank with another one
would contribute parts of something else, in silence.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import keras
import numpy as np
import torch
import torch.distributed as dist

from keras_tp.collectives import all_equal
from keras_tp.errors import LayoutError
from keras_tp.plans import Plan
from keras_tp.seam.variables import is_symbolic


def check_plans(plan: Plan, optimizer: Any, made: list[str]) -> None:
    """Raises LayoutError on every rank if one has another plan or optimizer. Collective.

    Args:
        plan: what is to be done.
        optimizer: the model's, or None.
        made: the layout that each variable was made with, if with one.
    """
    lines = [f"mesh {plan.mesh}", *map(str, plan.variables), *map(str, plan.layers), *made]
    built = getattr(optimizer, "built", False)
    lines.append(f"{type(optimizer).__name__}, {'with' if built else 'without'} slots")
    different = _first_difference(lines)
    if different is not None:
        first, rank, other = different
        raise LayoutError(
            f"rank 0 plans\n       {first}\n     where rank {rank} plans\n       {other}\n     "
            "Every rank must build the same model, with the same names, and use the same layout "
            "map. Layer names count up: make as many layers on one rank as on the other.",
            where="this job: its ranks disagree",
        )


class AgreedBatches:
    """Raises ValueError on every rank if one is given another batch than the first rank.

    A check costs a pass over the batch and a small all-reduce. It is made for
    the 1st, 2nd, 4th, 8th, ... batch, so that it costs nothing in the long run
    and still finds ranks that part ways later (shuffles that one rank's own
    random numbers have set off). A compiled step is not checked.

    Args:
        what: what the batch is, for the message.
    """

    def __init__(self, what: str):
        self.what = what
        self.seen = 0

    def check(self, *batch: Any) -> None:
        """Collective, every so often. `batch` is any nest; what is no array is not looked at."""
        if is_symbolic() or torch.compiler.is_compiling():
            return
        self.seen += 1
        if self.seen & (self.seen - 1):
            return
        leaves = keras.tree.flatten(batch)
        different = _first_difference([fingerprint(leaf) for leaf in leaves if _is_array(leaf)])
        if different is not None:
            first, rank, other = different
            raise ValueError(
                f"ranks are given different {self.what}: rank 0 has {first} where rank {rank} has "
                f"{other}. Every rank must be fed the same, whole batches: seed the generator of "
                "made-up data before it is made (keras.utils.set_random_seed), read files in one "
                "order, draw no random numbers on one rank alone, and do not share out the rows."
            )


class AgreedInputs:
    """A model's `call`, before which the inputs are checked."""

    def __init__(self, model: Any):
        self.original = model.call
        self.batches = AgreedBatches("inputs")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.batches.check(args, kwargs)
        return self.original(*args, **kwargs)


def _first_difference(lines: list[str]) -> tuple[str, int, str] | None:
    """The first line that is not the same on every rank: rank 0's, another rank, and its."""
    if all_equal(hashlib.sha256("\n".join(lines).encode()).digest()):
        return None
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, lines)
    rank = next(rank for rank, other in enumerate(everywhere) if other != everywhere[0])
    pairs = zip([*everywhere[0], "nothing"], [*everywhere[rank], "nothing"], strict=False)
    first, other = next((a, b) for a, b in pairs if a != b)
    return first, rank, other


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | torch.Tensor)


def fingerprint(leaf: Any) -> str:
    """Dtype, shape and a checksum of an array or tensor."""
    kind = f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    if isinstance(leaf, torch.Tensor):
        if leaf.layout != torch.strided:
            return f"{leaf.layout} {kind}"
        leaf = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{kind} of checksum {zlib.crc32(leaf.tobytes()):08x}"
