"""Which optimizers may update shards."""

from __future__ import annotations

import keras
import pytest

from keras_tp.optimizers import ELEMENTWISE, optimizer_problems


@pytest.mark.parametrize("cls", ELEMENTWISE)
def test_elementwise_optimizers_pass(cls: type) -> None:
    """Keras makes its own subclasses for torch, which must not count as a user's."""
    assert optimizer_problems(cls(0.1)) == []


def test_loss_scaling_is_refused_and_cannot_be_vouched_for() -> None:
    """An overflow on one rank's shards would skip the step there and nowhere else."""
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1))
    scaled.elementwise = True
    (problem,) = optimizer_problems(scaled)
    assert "use 'mixed_bfloat16'" in problem


@pytest.mark.parametrize(
    "cls", [keras.optimizers.Lamb, keras.optimizers.Adafactor, keras.optimizers.Muon]
)
def test_optimizers_that_read_whole_tensors_are_refused(cls: type) -> None:
    """LAMB's trust ratio of a shard is another number than that of the weight."""
    assert "not known to update every element alone" in optimizer_problems(cls(0.1))[0]


@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm"])
def test_clipping_by_norm_is_refused(option: str) -> None:
    """DeepSpeed #5411, TransformerEngine #715: a rank that clips by the norm of its shards clips
    by the wrong norm."""
    assert option in optimizer_problems(keras.optimizers.SGD(0.1, **{option: 1.0}))[0]
    assert optimizer_problems(keras.optimizers.SGD(0.1, clipvalue=1.0)) == []


class Doubling(keras.optimizers.SGD):
    """A user's own."""


def test_own_optimizers_must_be_vouched_for() -> None:
    """A subclass of SGD may compute anything; its author knows."""
    own = Doubling(0.1)
    assert "Doubling" in optimizer_problems(own)[0]
    own.elementwise = True
    assert optimizer_problems(own) == []
