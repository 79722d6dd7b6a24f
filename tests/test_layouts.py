"""Meshes and layouts: which shard is whose."""

from __future__ import annotations

import doctest
from typing import Any

import keras
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from keras_tp import layouts, rules, tables
from keras_tp.layouts import (
    MeshShape,
    chunk_bounds,
    layout_problems,
    local_shape,
    placements_of,
)

MESH = MeshShape(("batch", "model"), (2, 3), tuple(range(6)))


@given(total=st.integers(0, 70), parts=st.integers(1, 9))
def test_chunks_are_those_of_torch(total: int, parts: int) -> None:
    """Another rule than torch.chunk's would disagree with DTensor about who holds what.

    Seen to fail with `total // parts` for the chunk size.
    """
    pieces = [piece.tolist() for piece in torch.arange(total).chunk(parts)]
    if total == 0:
        pieces = []  # torch gives one empty piece
    pieces += [[]] * (parts - len(pieces))
    ours = [chunk_bounds(total, parts, i) for i in range(parts)]
    assert [list(range(start, start + count)) for start, count in ours] == pieces


@given(data=st.data())
def test_local_shapes_tile_the_tensor(data: st.DataObject) -> None:
    """A wrong coordinate would give two ranks the same shard and none the other."""
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
    axes = [*data.draw(st.permutations(["batch", "model"])), None]
    layout = tuple(axes[: len(shape)])
    elements = [torch.Size(local_shape(shape, layout, MESH, r)).numel() for r in range(6)]
    used = [axis for axis in layout if axis is not None]
    copies = 6 // max(1, torch.Size([MESH.axis_size(a) for a in used]).numel())
    assert sum(elements) == torch.Size(shape).numel() * copies


def test_placements_come_in_mesh_order() -> None:
    """Placements in the order of dims would shard the wrong dim on every 2-D mesh."""
    assert placements_of(("model", None, "batch"), MESH) == (Shard(2), Shard(0))
    assert placements_of((None,), MESH) == (Replicate(), Replicate())


def test_ranks_are_read_from_device_names() -> None:
    """A permuted mesh read by position would give ranks each other's shards."""
    devices = ["cpu:3", "cpu:2", "cpu:1", "cpu:0"]
    mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"], devices)
    shape = MeshShape.from_keras(mesh)
    assert shape.ranks == (3, 2, 1, 0)
    assert shape.coordinates(3) == (0, 0)
    assert shape.coordinates(1) == (1, 0)


def test_device_names_without_numbers_stand_for_positions() -> None:
    """Keras accepts any device names; planning must not."""
    mesh = keras.distribution.DeviceMesh((2,), ["model"], ["left", "right"])
    assert MeshShape.from_keras(mesh).ranks == (0, 1)


@pytest.mark.parametrize("module", [layouts, rules, tables])
def test_examples_in_docstrings(module: Any) -> None:
    """An example that has gone stale teaches the wrong thing."""
    done = doctest.testmod(module)
    assert done.attempted > 0
    assert done.failed == 0


@pytest.mark.parametrize(
    ("axes", "problem"),
    [
        ((None, "model"), None),
        ((None,), "1 entries for 2 dims"),
        ((None, "model", None), "3 entries for 2 dims"),
        (("modle", None), "names axis 'modle'; the mesh has 'batch', 'model'"),
        (("model", "model"), "uses axis 'model' on 2 dims"),
        ((("batch", "model"), None), "the entry ('batch', 'model')"),
        ((3, None), "the entry 3"),
    ],
)
def test_layout_problems(axes: tuple[object, ...], problem: str | None) -> None:
    """Each was accepted in silence, or crashed far away, before it was checked here."""
    found = layout_problems(axes, (4, 6), MESH)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]
