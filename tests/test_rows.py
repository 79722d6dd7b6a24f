"""Rows: a batch of which a rank holds some, and the cut."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import keras
import numpy as np
import pytest
import torch
from counting import Collectives
from hypothesis import given
from hypothesis import strategies as st

import keras_tp
from keras_tp.collectives import Axis
from keras_tp.layouts import MeshShape, row_bounds, row_counts
from keras_tp.mesh import torch_mesh
from keras_tp.rows import Rows

COUNTS = (3, 2)


@given(total=st.integers(0, 70), replicas=st.integers(1, 9))
def test_every_row_is_one_replicas(total: int, replicas: int) -> None:
    """A row that two replicas compute counts twice, one that none does is lost.

    Seen to fail with the longer parts last, and with `chunk_bounds`' cut.
    """
    bounds = [row_bounds(total, replicas, i) for i in range(replicas)]
    if total < replicas:
        assert bounds == [(0, total)] * replicas
        return
    rows = [row for start, count in bounds for row in range(start, start + count)]
    assert rows == list(range(total))
    counts = row_counts(total, replicas)
    assert counts == tuple(count for _, count in bounds)
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    assert sorted(counts, reverse=True) == list(counts)


def batch_axis() -> Axis:
    mesh = keras_tp.device_mesh({"batch": 2})
    return Axis.of(torch_mesh(MeshShape.from_keras(mesh)), "batch")


def made(dtype: torch.dtype = torch.float32) -> tuple[Rows, torch.Tensor]:
    """Rows on this rank, and the whole tensor that they are to be."""
    axis = batch_axis()
    whole = torch.arange(20).reshape(5, 4).sub(3).to(dtype)
    start = sum(COUNTS[: axis.rank])
    return Rows.of(whole[start : start + COUNTS[axis.rank]].clone(), COUNTS, axis), whole


def shapes() -> dict[str, int]:
    rows, whole = made()
    with Collectives() as counts:
        assert rows.shape == (5, 4)
        assert rows.shape[0] == rows.size(0) == len(rows) == 5
        assert (rows.ndim, rows.dim(), rows.numel()) == (2, 2, 20)
        assert (rows.dtype, rows.device, rows.layout) == (whole.dtype, whole.device, whole.layout)
        assert not rows.requires_grad
        assert rows.is_floating_point()
        assert keras.ops.is_tensor(rows)
        assert keras.backend.standardize_dtype(rows.dtype) == "float32"
        assert keras.ops.shape(rows) == (5, 4)
        here = COUNTS[rows.counts.index(len(rows.local_rows))]
        text = f"<Rows: {here} of 5, shape=(5, 4), dtype=float32>"
        assert repr(rows) == str(rows) == f"{rows}" == f"{rows:>3}" == text
        assert keras.ops.convert_to_tensor(rows) is rows
        assert rows.float() is rows
        assert {*dir(rows)} >= {"shape", "mean"}
        (again, none) = keras.tree.map_structure(lambda leaf: leaf, (rows, None))
        assert again is rows
        assert none is None
        for converted in (
            keras.ops.cast(rows, "bfloat16"),
            keras.ops.convert_to_tensor(rows, "int64"),
            rows.double().to("cpu").detach().contiguous(),
            rows.half().data,
            rows.bool(),
        ):
            assert isinstance(converted, Rows)
            assert converted.shape == (5, 4)
            assert type(converted.local_rows) is torch.Tensor
            assert converted.local_rows.dtype == converted.dtype
            assert len(converted.local_rows) == len(rows.local_rows)
    return dict(counts)


def test_shapes_and_conversions_are_known_without_communication(ranks: Any) -> None:
    """A rank that prints a shape, or casts its inputs, would gather and wait for the others.

    Seen to fail without `_CONVERSIONS`, and without `__format__`.
    """
    assert ranks(2)(shapes) == [{}, {}]


def computed() -> dict[str, int]:
    rows, whole = made()
    labels = rows.long()
    with Collectives() as counts:
        assert torch.equal(rows + 1, whole + 1)
        assert torch.equal(1 - rows, 1 - whole)
        assert type(rows[1:]) is torch.Tensor
        assert torch.equal(torch.cat([whole, rows]), torch.cat([whole, whole]))
        assert np.array_equal(rows.numpy(), whole.numpy())
        assert np.array_equal(np.asarray(rows), whole.numpy())
        assert np.array_equal(keras.ops.convert_to_numpy(rows), whole.numpy())
        assert rows.tolist() == whole.tolist()
        assert rows.sum().item() == float(rows.sum()) == whole.sum().item()
        assert [row.tolist() for row in rows] == whole.tolist()
        assert torch.equal(keras.ops.mean(rows, axis=0), whole.mean(0))
        assert torch.equal(keras.ops.concatenate([rows, rows]), torch.cat([whole, whole]))
        # Of what is converted, the gathered rows are converted.
        assert torch.equal(labels + 0, whole.long())
        assert torch.equal(keras.ops.cast(rows, "float64") * 1, whole.double())
        loss = keras.losses.MeanSquaredError()(rows, keras.ops.zeros((5, 4)))
        assert torch.equal(loss, whole.square().mean())
        metric = keras.metrics.MeanAbsoluteError()
        metric.update_state(rows, keras.ops.zeros((5, 4)))
        assert float(metric.result()) == float(whole.abs().mean())
    return dict(counts)


def test_what_computes_gathers_once(ranks: Any) -> None:
    """Each loss and metric that casts the targets would gather them anew, or compute on a part.

    Seen to fail with `_source` None for what is converted (three all-gathers), and
    with the parts joined in the wrong order.
    """
    assert ranks(2)(computed) == [{"all_gather": 1}] * 2


def dtypes() -> None:
    for dtype in (
        *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
        *(torch.int8, torch.uint8, torch.bool, torch.complex64),
    ):
        rows, whole = made(dtype)
        assert rows.dtype == dtype
        assert torch.equal(rows.whole(), whole)
        assert torch.equal(copy.deepcopy(rows), whole)
        assert torch.equal(pickle.loads(pickle.dumps(rows)), whole)
    axis = batch_axis()
    uneven = Rows.of(torch.full((5 if axis.rank else 1, 0), 1.0), (1, 5), axis)
    assert uneven.whole().shape == (6, 0)
    assert Rows.of(torch.full((5 if axis.rank else 1,), 7), (1, 5), axis).tolist() == [7] * 6
    meta = made()[0].to("meta")
    with Collectives() as counts:
        assert isinstance(meta, Rows)
        assert (meta + 1).shape == (5, 4)
    assert not counts


def test_any_dtype_travels(ranks: Any) -> None:
    """gloo knows neither bool nor int16, which masks and images come as.

    Seen to fail with every dtype sent as it is.
    """
    ranks(2)(dtypes)


def written() -> None:
    rows, whole = made()
    before = rows.double()
    local = rows.local_rows.clone()
    view = rows[1:]
    view.mul_(2)
    whole[1:] *= 2
    assert torch.equal(rows + 0, whole)
    start = sum(COUNTS[: batch_axis().rank])
    assert torch.equal(rows.local_rows, whole[start : start + len(local)])
    assert torch.equal(rows.half().local_rows, rows.local_rows.half())
    assert torch.equal(before.local_rows, local.double())  # as copied before
    rows[0] = 5.0
    whole[0] = 5.0
    assert torch.equal(rows + 0, whole)
    copied = rows.clone()
    assert type(copied) is torch.Tensor
    copied.zero_()
    assert torch.equal(rows + 0, whole)
    other = rows
    other += 1
    assert type(other) is torch.Tensor
    assert torch.equal(rows + 0, whole + 1)


def test_what_is_written_is_written_into_all_rows(ranks: Any) -> None:
    """Inputs changed in place in a training step would go into the model as they were.

    Seen to fail with `local_rows` always the rows as they came.
    """
    ranks(2)(written)


def gradients() -> None:
    rows, whole = made()
    for use in (
        lambda: rows.requires_grad_(),
        lambda: setattr(rows, "requires_grad", True),
        lambda: rows.register_hook(print),
    ):
        with pytest.raises(ValueError, match=r"takes no gradient.* over 2 replicas\. x\.clone\(\)"):
            use()
    plain = rows.clone().requires_grad_()
    (plain * rows).sum().backward()
    assert plain.grad is not None
    assert torch.equal(plain.grad, whole)


def test_gradients_of_rows_are_refused(ranks: Any) -> None:
    """A gradient asked of a tensor that the model never sees would be None, later, elsewhere."""
    ranks(2)(gradients)


class Summed(keras.Model):
    """Looks at the local rows of its input in its call."""

    def call(self, x: Any) -> Any:
        assert isinstance(x, Rows)
        assert x.dtype == torch.bfloat16
        return x.local_rows


def called() -> dict[str, int]:
    rows, whole = made()
    model = Summed(dtype="bfloat16")
    with Collectives() as counts:
        local = model(rows)
    start = sum(COUNTS[: batch_axis().rank])
    assert torch.equal(local, whole.bfloat16()[start : start + len(local)])
    return dict(counts)


def test_a_model_is_given_rows_in_its_compute_dtype(ranks: Any) -> None:
    """What Keras does with inputs before a model's call would gather what is to stay apart.

    Seen to fail without `to` among the conversions.
    """
    assert ranks(2)(called) == [{}, {}]


def placed() -> list[list[float]]:
    names = ["cpu:3", "cpu:1", "cpu:2", "cpu:0"]  # the batch axis joins 3 and 2, and 1 and 0
    mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"], names)
    axis = Axis.of(torch_mesh(MeshShape.from_keras(mesh)), "batch")
    local = torch.full((1 + axis.rank, 1), float(axis.rank))
    return Rows.of(local, (1, 2), axis).tolist()


def test_rows_are_in_the_order_of_the_batch_axis(ranks: Any) -> None:
    """A mesh may have its ranks in any order, a group has them in ascending order.

    Seen to fail with the group's order in place of the axis's.
    """
    assert ranks(4)(placed) == [[[0.0], [1.0], [1.0]]] * 4
