"""How optimizers are told apart: by elements, by whole tensors, or not at all."""

from __future__ import annotations

from typing import Any

import keras
import models
import pytest

import keras_tp
from keras_tp.optimizers import (
    ELEMENTWISE,
    inner_optimizers,
    optimizer_problems,
    price_of,
    updates_elementwise,
)


@pytest.mark.parametrize("cls", ELEMENTWISE)
def test_elementwise_optimizers_cost_nothing(cls: type) -> None:
    """Keras makes its own subclasses for torch, which must not count as a user's."""
    made = cls(0.1)
    assert updates_elementwise(made)
    assert price_of(made) == ""
    assert optimizer_problems(made) == []


@pytest.mark.parametrize(
    "cls", [keras.optimizers.Lamb, keras.optimizers.Adafactor, keras.optimizers.Muon]
)
def test_optimizers_that_read_whole_tensors_have_their_price(cls: type) -> None:
    """LAMB's trust ratio of a shard is another number than that of the weight."""
    made = cls(0.1)
    assert not updates_elementwise(made)
    assert f"optimizer {cls.__name__} updates whole tensors" in price_of(made)
    assert "elementwise = True" not in price_of(made)  # nobody should say so of these
    assert optimizer_problems(made) == []


def test_the_plan_of_a_compiled_model_says_the_price() -> None:
    """Slower than it was, and nobody told."""
    model = models.dense_stack()
    layout_map = keras.distribution.LayoutMap(keras_tp.device_mesh({"model": 2}))
    layout_map[".*dense/kernel"] = (None, "model")
    notes = []
    for optimizer in (keras.optimizers.Adam(), keras.optimizers.Lamb()):
        model.compile(optimizer)
        notes.append([n for n in keras_tp.plan(model, layout_map).notes if "optimizer" in n])
    assert notes[0] == []
    assert "optimizer Lamb updates whole tensors" in notes[1][0]


def test_wrappers_are_what_they_wrap() -> None:
    """A wrapper's class says nothing of the updates that are made."""
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.Lamb(0.1))
    assert [type(o) for o in inner_optimizers(scaled)] == [keras.optimizers.Lamb]
    assert "optimizer Lamb" in price_of(scaled)
    assert price_of(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))) == ""


class Doubling(keras.optimizers.SGD):
    """Somebody's own update."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.assign_sub(variable, 2 * learning_rate * gradient)


class Normed(keras.optimizers.SGD):
    """Looks at gradients where shards of them arrive."""

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        return super().apply([g / keras.ops.norm(g) for g in grads], trainable_variables)


def test_own_optimizers_may_be_vouched_for() -> None:
    """A subclass of SGD may compute anything; its author knows."""
    own = Doubling(0.1)
    assert optimizer_problems(own) == []
    assert "elementwise = True" in price_of(own)
    own.elementwise = True
    assert price_of(own) == ""


def test_own_apply_is_refused() -> None:
    """A norm of shards, for want of whole gradients, and no error."""
    own = Normed(0.1)
    assert (
        "optimizer Normed defines apply, which would be given shards" in optimizer_problems(own)[0]
    )
    wrapped = keras.optimizers.LossScaleOptimizer(own)
    assert optimizer_problems(wrapped) == optimizer_problems(own)
    own.elementwise = True
    assert optimizer_problems(own) == []
