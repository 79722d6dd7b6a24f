"""Feeds a mesh: each replica its rows of the batch, the ranks of one replica the same."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from keras_tp.errors import LayoutError
from keras_tp.job import job_rank
from keras_tp.layouts import MeshShape, row_bounds


class DataSharder:
    """Takes this rank's part of a batch: `Shard(0)` along the batch axis, `Replicate` along others.

    Works on arrays and tensors in any nest of dicts, tuples and lists, without
    communication and without copying; what is no array passes through.

    >>> sharder = DataSharder(keras_tp.device_mesh({"batch": 2, "model": 2}))
    >>> x, y = sharder((x, y))  # ranks 0 and 1 get the first half, 2 and 3 the second

    Args:
        mesh: a `keras.distribution.DeviceMesh`.
        batch_axis: the mesh axis along which the batch is cut. A mesh without an
            axis "batch" replicates everything.

    Attributes:
        placements: one torch placement per mesh axis.
    """

    def __init__(self, mesh: Any, batch_axis: str = "batch"):
        if not isinstance(mesh, keras.distribution.DeviceMesh):
            raise LayoutError(
                f"expected a keras.distribution.DeviceMesh, got {type(mesh).__name__}. "
                "keras_tp.device_mesh makes one.",
                where="DataSharder",
            )
        self.mesh = MeshShape.from_keras(mesh)
        if batch_axis not in self.mesh.axes and batch_axis != "batch":
            raise LayoutError(
                f"batch_axis={batch_axis!r} is no axis of the mesh ({self.mesh}).",
                where="DataSharder",
            )
        self.batch_axis = batch_axis
        self.placements: tuple[Placement, ...] = tuple(
            Shard(0) if axis == batch_axis else Replicate() for axis in self.mesh.axes
        )

    def __call__(self, batch: Any) -> Any:
        """This rank's rows of every array in `batch`, cut by `row_bounds`' rule.

        Replicas get equally many rows, the first ones one more where that does not
        come out even. A batch of fewer rows than replicas goes whole to each.

        Raises:
            ValueError: arrays of different lengths: then the rows of one replica
                would not belong together.
        """
        if self.batch_axis not in self.mesh.axes:
            return batch
        arrays = [leaf for leaf in keras.tree.flatten(batch) if has_rows(leaf)]
        lengths = {len(array) for array in arrays}
        if len(lengths) > 1:
            shapes = ", ".join(str(tuple(array.shape)) for array in arrays)
            raise ValueError(f"a batch needs the same number of rows in every array, got {shapes}")
        if job_rank() not in self.mesh.ranks:
            raise LayoutError(
                f"rank {job_rank()} is not in the mesh ({self.mesh}).", where="DataSharder"
            )
        replica = self.mesh.coordinates(job_rank())[self.mesh.axes.index(self.batch_axis)]
        replicas = self.mesh.axis_size(self.batch_axis)

        def take(leaf: Any) -> Any:
            if not has_rows(leaf):
                return leaf
            start, count = row_bounds(len(leaf), replicas, replica)
            return leaf[start : start + count]

        return keras.tree.map_structure(take, batch)


def has_rows(leaf: Any) -> bool:
    """Whether a leaf of a batch is an array or tensor of rows."""
    return isinstance(leaf, np.ndarray | torch.Tensor) and leaf.ndim > 0
