"""The data sharder: whose rows."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import keras_tp


def rows_of(
    mesh: Any, rank: int, batch: Any, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Any:
    monkeypatch.setenv("RANK", str(rank))
    return keras_tp.DataSharder(mesh, **options)(batch)


def test_replicas_share_out_the_rows_and_ranks_of_a_replica_agree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks of one replica with other rows would sum parts of different things."""
    mesh = keras_tp.device_mesh({"batch": 2, "model": 2})
    assert keras_tp.DataSharder(mesh).placements == (Shard(0), Replicate())
    batch = np.arange(10).reshape(5, 2)
    parts = [rows_of(mesh, rank, batch, monkeypatch) for rank in range(4)]
    assert [part[:, 0].tolist() for part in parts] == [[0, 2, 4], [0, 2, 4], [6, 8], [6, 8]]


def test_nests_keep_their_structure_and_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that comes back as other types than it went in surprises the layer that reads it."""
    mesh = keras_tp.device_mesh({"batch": 2})
    batch = ({"a": np.zeros((4, 2)), "b": torch.ones(4)}, (np.arange(4), None), "text", 3.5)
    found = rows_of(mesh, 1, batch, monkeypatch)
    assert isinstance(found[0]["a"], np.ndarray)
    assert found[0]["a"].shape == (2, 2)
    assert isinstance(found[0]["b"], torch.Tensor)
    assert found[1][0].tolist() == [2, 3]
    assert found[1][1] is None
    assert found[2:] == ("text", 3.5)


def test_uneven_batches_are_cut_evenly_and_short_ones_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replica without a row has nothing to run the model on, and others too much."""
    mesh = keras_tp.device_mesh({"batch": 4})
    parts = [rows_of(mesh, rank, np.arange(10), monkeypatch).tolist() for rank in range(4)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    parts = [rows_of(mesh, rank, np.arange(3), monkeypatch).tolist() for rank in range(4)]
    assert parts == [[0, 1, 2]] * 4


def test_another_axis_name_and_meshes_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh without data parallelism must not cut batches."""
    batch = np.arange(4)
    data = keras_tp.device_mesh({"data": 2, "model": 1})
    assert rows_of(data, 1, batch, monkeypatch, batch_axis="data").tolist() == [2, 3]
    assert rows_of(data, 1, batch, monkeypatch) is batch
    assert keras_tp.DataSharder(data).placements == (Replicate(), Replicate())


def test_axes_and_ranks_that_are_not_there_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt axis gave every rank the whole batch, in silence."""
    mesh = keras_tp.device_mesh({"batch": 2})
    with pytest.raises(keras_tp.LayoutError, match=r"batch_axis='bacth' is no axis of the mesh"):
        keras_tp.DataSharder(mesh, "bacth")
    with pytest.raises(keras_tp.LayoutError, match="rank 5 is not in the mesh"):
        rows_of(mesh, 5, np.arange(4), monkeypatch)


def test_arrays_of_different_lengths_are_an_error() -> None:
    """Cut each by its own length, inputs and targets would no longer belong together."""
    sharder = keras_tp.DataSharder(keras_tp.device_mesh({"batch": 2}))
    with pytest.raises(
        ValueError, match=r"same number of rows in every array, got \(4, 1\), \(2,\)"
    ):
        sharder((np.zeros((4, 1)), np.zeros(2)))
    with pytest.raises(keras_tp.LayoutError, match=r"expected a keras\.distribution\.DeviceMesh"):
        keras_tp.DataSharder(keras.distribution.LayoutMap(None))
