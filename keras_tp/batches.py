"""What a nest of arrays is as a batch: its rows, its kind, its `Rows`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import torch

from keras_tp.collectives import Axis
from keras_tp.rows import Rows


def as_tensors(batch: Any) -> tuple[Any, int]:
    """The batch with a tensor for each array, and its number of rows.

    Args:
        batch: arrays and tensors in any nest of dicts, tuples and lists; None stays None.

    Raises:
        ValueError: a leaf that is no array or has no rows, arrays of different
            lengths, or none at all: such a batch cannot be shared out.
    """
    tensors = keras.tree.map_structure(_as_tensor, batch)
    leaves = [leaf for leaf in keras.tree.flatten(tensors) if leaf is not None]
    lengths = {len(leaf) for leaf in leaves}
    if len(lengths) != 1:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves) or "none"
        raise ValueError(f"a batch needs the same number of rows in every array, got {shapes}")
    return tensors, lengths.pop()


def _as_tensor(leaf: Any) -> torch.Tensor | None:
    if leaf is None:
        return None
    if not isinstance(leaf, torch.Tensor):
        if isinstance(leaf, str | bytes | bool | int | float) or not hasattr(leaf, "__array__"):
            raise ValueError(
                f"a batch whose rows are shared out has a {type(leaf).__name__} in it. Give "
                "arrays or tensors, with one row for each sample, in dicts, tuples and lists."
            )
        leaf = keras.ops.convert_to_tensor(np.asarray(leaf))
    if leaf.ndim == 0 or leaf.layout != torch.strided:
        raise ValueError(
            f"a batch whose rows are shared out has a {leaf.layout} tensor of shape "
            f"{tuple(leaf.shape)} in it. Give dense ones, with one row for each sample."
        )
    return leaf


def kinds_of(batch: Any) -> list[str]:
    """Dtype and shape of one row of every tensor of a batch."""
    return [
        f"rows of {str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape[1:])}"
        for leaf in keras.tree.flatten(batch)
        if leaf is not None
    ]


def as_rows(batch: Any, counts: Sequence[int], axis: Axis) -> Any:
    """`Rows` for every tensor of this replica's part of a batch. No communication."""
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else Rows.of(leaf, counts, axis), batch
    )
