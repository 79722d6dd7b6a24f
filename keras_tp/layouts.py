"""Meshes and layouts as plain values: axis names in, placements and shard shapes out.

Nothing here knows a process group, a device or a tensor.

Words: an *axis* is a named axis of the device mesh, a *dim* a dimension of a
tensor, a *layout* one axis name or None per dim (Keras's `TensorLayout.axes`),
and *placements* torch's view of the same, one per mesh axis.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

Layout = tuple[str | None, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class MeshShape:
    """A device mesh without devices: what a plan needs to know of it.

    Attributes:
        axes: names of the mesh axes, e.g. `("batch", "model")`.
        sizes: ranks along each axis, e.g. `(1, 4)`.
        ranks: global rank of each position of the mesh, row-major.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def from_keras(cls, device_mesh: Any) -> MeshShape:
        """Reads a `keras.distribution.DeviceMesh`.

        A device named `"cpu:3"` is rank 3: Keras numbers devices over the whole
        job. Names without a number stand for their position in the mesh.
        """
        names = [str(name) for name in device_mesh.devices.flatten()]
        numbers = [re.fullmatch(r"[^:]+:(\d+)", name) for name in names]
        if all(numbers):
            ranks = tuple(int(number.group(1)) for number in numbers if number)
        else:
            ranks = tuple(range(len(names)))
        sizes = tuple(int(size) for size in device_mesh.shape)
        return cls(tuple(map(str, device_mesh.axis_names)), sizes, ranks)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)

    def axis_size(self, axis: str) -> int:
        """Number of ranks along `axis`."""
        return self.sizes[self.axes.index(axis)]

    @cached_property
    def _coordinates(self) -> dict[int, tuple[int, ...]]:
        positions = itertools.product(*(range(size) for size in self.sizes))
        return dict(zip(self.ranks, positions, strict=True))

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Where global `rank` sits: its index along each axis."""
        return self._coordinates[rank]

    def __str__(self) -> str:
        return ", ".join(f"{a}={s}" for a, s in zip(self.axes, self.sizes, strict=True))


def chunk_bounds(total: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of chunk `index` when `total` is cut into `parts`.

    The rule is `torch.chunk`'s, which DTensor shares: chunks of
    `ceil(total / parts)`, the last ones shorter or empty.

    >>> [chunk_bounds(10, 4, i) for i in range(4)]
    [(0, 3), (3, 3), (6, 3), (9, 1)]
    """
    size = -(-total // parts)
    start = min(index * size, total)
    return start, min(size, total - start)


def row_bounds(total: int, replicas: int, index: int) -> tuple[int, int]:
    """First row and number of rows of replica `index` when a batch of `total` rows is shared out.

    The cut is balanced, and so another than `chunk_bounds`: every replica gets a
    row wherever there are as many rows as replicas, and none computes more than
    one row longer than another. Where there are fewer, nothing is cut: each
    replica computes all rows.

    >>> [row_bounds(10, 4, i) for i in range(4)]
    [(0, 3), (3, 3), (6, 2), (8, 2)]
    >>> [row_bounds(3, 4, i) for i in range(4)]
    [(0, 3), (0, 3), (0, 3), (0, 3)]
    """
    if total < replicas:
        return 0, total
    count, longer = divmod(total, replicas)
    return index * count + min(index, longer), count + (index < longer)


def row_counts(total: int, replicas: int) -> tuple[int, ...]:
    """Number of rows that each replica computes of a batch of `total` rows; see `row_bounds`.

    >>> row_counts(10, 4)
    (3, 3, 2, 2)
    """
    return tuple(row_bounds(total, replicas, index)[1] for index in range(replicas))


def placements_of(layout: Layout, mesh: MeshShape) -> tuple[Placement, ...]:
    """One placement per mesh axis, in mesh order.

    >>> mesh = MeshShape(("batch", "model"), (1, 2), (0, 1))
    >>> placements_of((None, "model"), mesh)
    (Replicate(), Shard(dim=1))
    """
    return tuple(Shard(layout.index(axis)) if axis in layout else Replicate() for axis in mesh.axes)


def local_shape(shape: Shape, layout: Layout, mesh: MeshShape, rank: int) -> Shape:
    """Shape of the shard that `rank` stores of a tensor of full shape `shape`."""
    where = mesh.coordinates(rank)
    return tuple(
        total
        if axis is None
        else chunk_bounds(total, mesh.axis_size(axis), where[mesh.axes.index(axis)])[1]
        for total, axis in zip(shape, layout, strict=True)
    )


def local_shapes(shape: Shape, layout: Layout, mesh: MeshShape) -> tuple[Shape, ...]:
    """`local_shape` of every rank, in the order of the mesh.

    Ranks that stand alike along the axes that cut share one computation (and one tuple).
    """
    cuts = [(i, mesh.axes.index(axis)) for i, axis in enumerate(layout) if axis is not None]
    if all(shape[i] % mesh.sizes[axis] == 0 for i, axis in cuts):
        return (local_shape(shape, layout, mesh, mesh.ranks[0]),) * len(mesh.ranks)
    known: dict[tuple[int, ...], Shape] = {}
    shapes = []
    for rank in mesh.ranks:
        where = mesh.coordinates(rank)
        key = tuple(where[axis] for _, axis in cuts)
        if key not in known:
            known[key] = local_shape(shape, layout, mesh, rank)
        shapes.append(known[key])
    return tuple(shapes)


def layout_problems(axes: Sequence[Any], shape: Shape, mesh: MeshShape) -> list[str]:
    """What is wrong with giving a tensor of `shape` the layout `axes`; empty when nothing is.

    Each entry completes the sentence "pattern P gives PATH a layout ...".
    """
    problems = []
    if len(axes) != len(shape):
        problems.append(
            f"of {len(axes)} entries for {len(shape)} dims; give each dim an axis or None"
        )
    names = [axis for axis in axes if isinstance(axis, str)]
    for entry in axes:
        if entry is not None and not isinstance(entry, str):
            problems.append(f"with the entry {entry!r}; an entry is one axis name or None")
    for name in dict.fromkeys(names):
        if name not in mesh.axes:
            known = ", ".join(map(repr, mesh.axes))
            problems.append(f"that names axis {name!r}; the mesh has {known}")
        elif names.count(name) > 1:
            problems.append(
                f"that uses axis {name!r} on {names.count(name)} dims; an axis can cut one of them"
            )
    return problems
