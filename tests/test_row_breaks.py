"""Mistakes of replicas are seen: by the comparison with one process, or by the first batch.

As `test_breaks.py`, for what replicas that share out rows can do wrong.
"""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import layer_cases
import parity
import pytest
from precision import real_float64
from test_replicas import around

import keras_tp
from keras_tp import collectives, replicas, shards, wrapper


def gradients_averaged() -> Any:
    """What data parallelism does elsewhere, where each replica has a loss of its own."""
    right = replicas.summed

    def halved(*args: Any) -> Any:
        weight = right(*args)
        return weight / 2 + weight.detach() / 2

    return mock.patch.object(replicas, "summed", halved)


def gradients_of_own_rows() -> Any:
    """Replicas that drift apart."""
    return mock.patch.object(replicas, "summed", lambda weight, *_: weight)


def gathered_gradients_of_own_rows() -> Any:
    """A weight that is cut along the batch axis, whose gradient is cut and not summed."""
    return mock.patch.object(shards, "gather_weight", collectives.gather)


def statistics_of_own_rows() -> Any:
    """BatchNormalization as it is under torch's DistributedDataParallel."""
    return mock.patch.object(wrapper, "share_statistics", return_value=None)


def penalties_of_own_rows() -> Any:
    """A regularizer of activations that sees half a batch."""
    return mock.patch.object(replicas, "average_losses", return_value=None)


# The mistake, the layout, and whether the first batch shows it.
BREAKS: list[tuple[Any, dict[str, Any], bool]] = [
    (gradients_averaged, {}, False),
    (gradients_of_own_rows, {}, False),
    (gathered_gradients_of_own_rows, {".*dense/kernel": ("batch", None)}, False),
    (statistics_of_own_rows, {}, True),
    (penalties_of_own_rows, {}, True),
]


def wrong(number: int) -> tuple[float, float, list[str], bool]:
    """The differences without and with the mistake, what is said, and whether `verify` saw it."""
    mistake, layout, _ = BREAKS[number]
    data = layer_cases.floats(6, 8), layer_cases.floats(6, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        right = parity.compare(around, layout, {"batch": 2}, data).worst()
        assert not [w for w in caught if w.category is keras_tp.LayoutWarning]
        with mistake():
            try:
                worst = parity.compare(around, layout, {"batch": 2}, data).worst()
            except keras_tp.LayoutError:  # replicas that have drifted apart, and a penalty
                worst = float("inf")  # that is added outside of a layer's call
            with real_float64():
                model = parity.build_seeded(around)
                keras_tp.parallelize(model, parity.layout_map(layout, {"batch": 2}))
                try:
                    seen = not keras_tp.verify(model, data[0], training=True).model.equal
                except keras_tp.LayoutError:
                    seen = True
    said = [str(w.message) for w in caught if w.category is keras_tp.LayoutWarning]
    return right, worst, said, seen


@pytest.mark.parametrize(
    "number", range(len(BREAKS)), ids=lambda number: BREAKS[number][0].__name__
)
def test_every_mistake_of_replicas_is_seen(ranks: Any, number: int) -> None:
    """What shows in outputs, losses or states is found on the first batch, and is an error or has
    its layer given all rows; what shows in gradients alone is seen by `verify`."""
    _, _, on_first_batch = BREAKS[number]
    for right, worst, said, seen in ranks(2)(wrong, number):
        assert right < 1e-10
        assert worst > 1e-3 or any("mix the rows" in text for text in said)
        assert seen or on_first_batch
