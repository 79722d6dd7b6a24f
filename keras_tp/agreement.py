"""What the ranks must agree on, checked where a disagreement would hang or go unnoticed.

Plans are compared before anything is sharded. Batches are compared as they come
in: every rank computes a part of the same batch, and a rank with another one
would contribute parts of something else, in silence.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import torch
import torch.distributed as dist

from keras_tp.collectives import Axis
from keras_tp.errors import LayoutError
from keras_tp.messages import all_equal, gather_numbers
from keras_tp.plans import Plan
from keras_tp.rows import Rows
from keras_tp.seam.contexts import current_replicas, is_symbolic
from keras_tp.version import __version__


def check_plans(plan: Plan, optimizer: Any, others: list[str]) -> None:
    """Raises LayoutError on every rank if one has another plan or optimizer. Collective.

    Args:
        plan: what is to be done.
        optimizer: the model's, or None.
        others: what else must be the same: the layout that each variable was made
            with, if with one, and what the ranks will compare later.
    """
    versions = f"Keras {keras.__version__}, torch {torch.__version__}, keras_tp {__version__}"
    lines = [
        versions,
        f"mesh {plan.mesh}",
        *map(str, plan.variables),
        *map(str, plan.layers),
        *others,
    ]
    built = getattr(optimizer, "built", False)
    lines.append(f"{type(optimizer).__name__}, {'with' if built else 'without'} slots")
    different = first_difference(lines)
    if different is not None:
        first, rank, other = different
        if first == versions or other == versions:
            raise LayoutError(
                f"rank 0 runs {first} where rank {rank} runs {other}. Install the same everywhere.",
                where="this job: its ranks disagree",
            )
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
        leaves = [leaf for leaf in keras.tree.flatten(batch) if _is_array(leaf)]
        # Rows that replicas have read were compared as they were read (`AgreedParts`).
        whole = [leaf for leaf in leaves if not isinstance(leaf, Rows)]
        purpose = f"{self.what} {'to train with' if torch.is_grad_enabled() else 'to look at'}"
        different = first_difference([purpose, *map(fingerprint, whole)])
        if different is not None:
            first, rank, other = different
            raise ValueError(
                f"ranks are given different {self.what}: rank 0 has {first} where rank {rank} has "
                f"{other}. Every rank must be fed the same, whole batches: seed the generator of "
                "made-up data before it is made (keras.utils.set_random_seed), read files in one "
                "order, draw no random numbers on one rank alone, and do not share out the rows."
            )


class AgreedParts:
    """Raises ValueError on every rank if replicas or their ranks read what does not fit together.

    Made for the 1st, 2nd, 4th, 8th, ... batch, as `AgreedBatches` is.

    Args:
        axis: the batch axis.
    """

    def __init__(self, axis: Axis):
        self.axis = axis
        self.seen = 0

    def check(
        self, batch: Any, lines: Sequence[str] = (), remedy: str = "", cut: bool = True
    ) -> None:
        """Collective, every so often: a small all-reduce and a small all-gather over the job.

        Args:
            batch: any nest of arrays; those of all ranks of one replica must be equal.
            lines: what must be the same on every rank.
            remedy: what to do where it is not.
            cut: False if the batch is not shared out, and so the same on every rank.
        """
        self.seen += 1
        if self.seen & (self.seen - 1):
            return
        different = first_difference(list(lines)) if lines else None
        if different is not None:
            first, rank, other = different
            raise ValueError(
                f"ranks read different data: rank 0 has {first} where rank {rank} has {other}. "
                f"{remedy}"
            )
        leaves = [fingerprint(leaf) for leaf in keras.tree.flatten(batch) if _is_array(leaf)]
        replica = self.axis.rank if cut else 0
        told = gather_numbers([replica, zlib.crc32("\n".join(leaves).encode())])
        firsts: dict[int, tuple[int, int]] = {}
        for rank, (replica, checksum) in enumerate(told):
            first_rank, expected = firsts.setdefault(replica, (rank, checksum))
            if checksum != expected:
                raise ValueError(
                    f"ranks {first_rank} and {rank} compute the same rows of a batch (replica "
                    f"{replica}) and read different ones: their data sets differ, or draw random "
                    "numbers that are seeded by the clock or the process."
                )


class AgreedInputs:
    """A model's `call`, before which the inputs are checked.

    But not within another model's, of which each replica computes its rows.
    """

    def __init__(self, model: Any):
        self.original = model.call
        self.batches = AgreedBatches("inputs")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if current_replicas() is None:
            self.batches.check(args, kwargs)
        return self.original(*args, **kwargs)


def first_difference(lines: list[str]) -> tuple[str, int, str] | None:
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
