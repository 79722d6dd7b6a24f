"""Which optimizers may update shards."""

from __future__ import annotations

import keras
import pytest

from keras_tp.optimizers import ELEMENTWISE, optimizer_problems


@pytest.mark.parametrize("cls", ELEMENTWISE)
def test_elementwise_optimizers_pass(cls: type) -> None:
    assert optimizer_problems(cls(0.1)) == []


@pytest.mark.parametrize("cls", [keras.optimizers.Lamb, keras.optimizers.Adafactor])
def test_optimizers_that_read_whole_tensors_are_refused(cls: type) -> None:
    """LAMB's trust ratio of a shard is another number than that of the weight."""
    assert "not known to update every element alone" in optimizer_problems(cls(0.1))[0]


@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm"])
def test_clipping_by_norm_is_refused(option: str) -> None:
    """DeepSpeed #5411: a rank that clips by the norm of its shards clips by the wrong norm."""
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
