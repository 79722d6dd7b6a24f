"""What a plan says that ranks store, against tensors that are there."""

from __future__ import annotations

from typing import Any

import keras
import models
import numpy as np
import pytest
import torch
from keras import layers, optimizers
from parity import layout_map

import keras_tp
from keras_tp.costs import Slots, slots_of, stored_by_rank, stored_bytes, whole_bytes
from keras_tp.layouts import MeshShape, local_shape, local_shapes

MADE = {
    "Adam": (lambda: optimizers.Adam(), 2),
    "Adam on a schedule": (
        lambda: optimizers.Adam(optimizers.schedules.CosineDecay(1e-3, 10)),
        2,
    ),
    "AMSGrad": (lambda: optimizers.Adam(amsgrad=True), 3),
    "moving average": (lambda: optimizers.SGD(use_ema=True), 1),
    "accumulated": (lambda: optimizers.SGD(gradient_accumulation_steps=2), 1),
    "SGD": (lambda: optimizers.SGD(), 0),
    "momentum": (lambda: optimizers.SGD(momentum=0.9), 1),
    "Lion": (lambda: optimizers.Lion(), 1),
    "RMSprop": (lambda: optimizers.RMSprop(), 1),
    "Adadelta": (lambda: optimizers.Adadelta(), 2),
    "scaled loss": (lambda: optimizers.LossScaleOptimizer(optimizers.Adam()), 2),
    "Muon": (lambda: optimizers.Muon(), None),  # one or two, by the kind of weight
    "Adafactor": (lambda: optimizers.Adafactor(), None),  # factors, in other shapes
}


def small() -> Any:
    """Weights that are trained, that are not, and of two dtypes."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, dtype="bfloat16"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(4, trainable=False),
            layers.Dense(3),
        ]
    )


def nbytes(tensors: Any) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("name", MADE)
def test_bytes_are_those_of_one_process(name: str) -> None:
    """An optimizer whose slots are guessed wrong is a job that runs out of memory after an hour."""
    make, per_variable = MADE[name]
    model = small()
    model.compile(make(), "mse")
    planned = slots_of(model)
    assert planned is not None
    assert not model.optimizer.built, "to look is not to build"
    plan = keras_tp.plan(model, layout_map({}, {"model": 1}))
    stored = stored_bytes(plan, 0, planned)
    if per_variable is not None:
        assert stored == stored_bytes(plan, 0, per_variable)
    model(np.ones((2, 6)), training=True).sum().backward()
    gradients = [v.value.grad for v in model.variables if v.value.grad is not None]
    model.optimizer.build(model.trainable_variables)
    assert slots_of(model) == planned, "built, it keeps what was planned"
    slots = [v.value for v in model.optimizer.variables if len(v.shape)]
    made = (nbytes(v.value for v in model.variables), nbytes(gradients), nbytes(slots))
    assert (stored.parameters, stored.gradients, stored.slots) == made
    assert stored.total == sum(made)
    assert whole_bytes(plan, planned) == stored


def test_shards_are_counted_rank_by_rank() -> None:
    """The last ranks of an uneven cut store less, or nothing."""
    made = {"batch": 2, "model": 3}
    plan = keras_tp.plan(models.transformer(), layout_map(models.TRANSFORMER_LAYOUT, made))
    everyone = stored_by_rank(plan, 2)
    assert len(set(everyone)) == 2
    for rank, stored in zip(plan.mesh.ranks, everyone, strict=True):
        assert stored == stored_bytes(plan, rank)
        assert stored.parameters == stored.gradients == plan.bytes_per_rank(rank)
        assert stored.slots == 2 * stored.gradients
    sharded = [v for v in plan.variables if v.sharded]
    rest = sum(4 * torch.Size(v.shape).numel() for v in plan.variables if not v.sharded)
    cut = sum(s.parameters - rest for s in everyone[:3])
    assert cut == sum(4 * torch.Size(v.shape).numel() for v in sharded)


def test_what_is_asked_wrongly_is_an_error() -> None:
    """A rank that is not there stored as much as the first."""
    plan = keras_tp.plan(models.dense_stack(), layout_map({}, {"model": 2}))
    with pytest.raises(ValueError, match=r"\(model=2\) has no rank 2"):
        stored_bytes(plan, 2)
    with pytest.raises(ValueError, match="slots of 1 variables for a plan of 8"):
        stored_bytes(plan, 0, Slots((2,)))
    assert slots_of(models.dense_stack()) is None


def test_shapes_of_all_ranks_are_those_of_each() -> None:
    """What ranks that stand alike share must be theirs: uneven, empty, in any order of ranks."""
    mesh = MeshShape(("a", "b", "c"), (2, 3, 2), (5, 3, 1, 0, 2, 4, 11, 10, 9, 8, 7, 6))
    for shape in ((6, 6), (7, 5), (1, 0), (2, 3)):
        for layout in (("a", "b"), ("b", None), (None, "c"), (None, None), ("c", "b")):
            found = local_shapes(shape, layout, mesh)
            assert found == tuple(local_shape(shape, layout, mesh, rank) for rank in mesh.ranks)
    v = keras_tp.VariablePlan("v", (7, 5), "float32", True, ("b", None), None, mesh)
    assert v.local_shapes == tuple(v.local_shape(rank) for rank in range(12))


def test_an_optimizer_that_cannot_be_copied_says_so() -> None:
    """Its slots were guessed to be Adam's."""

    class Own(optimizers.SGD):
        def __init__(self, needed: int) -> None:
            super().__init__()

    model = small()
    model.compile(Own(1), "mse")
    with pytest.raises(ValueError, match="optimizer Own cannot be copied by Keras"):
        slots_of(model)
    model.optimizer.build(model.trainable_variables)
    planned = slots_of(model)
    assert planned is not None
    assert set(planned.counts) == {0}
