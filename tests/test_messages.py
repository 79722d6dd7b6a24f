"""Values that travel together arrive one by one.

Seen to fail, in keras_tp/messages.py: `_ALIGNED` of one byte ("odd sizes"), a large one sent before
the small ones that wait, the last ones forgotten, and each sent by itself (the number of
broadcasts); in keras_tp/seam/variables.py, `value.clone()` left out ("memory of its own").
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import keras
import numpy as np
import parity
import pytest
import torch
import torch.distributed as dist
from counting import Collectives

import keras_tp
from keras_tp import messages
from keras_tp.messages import broadcast_each
from keras_tp.seam.variables import local_tensor

DTYPES = torch.float32, torch.bool, torch.float64, torch.int8, torch.bfloat16, torch.complex64


def made(rank: int) -> list[torch.Tensor]:
    """Of odd sizes and many dtypes, small and large, of none, and without an order in memory."""
    torch.manual_seed(rank)
    found = [(10 * torch.randn(3, 5)).to(dtype) for dtype in DTYPES]
    found += [
        torch.randn(()),
        torch.empty(0, 3),
        torch.randn(40, 50),
        torch.randn(4, 1).expand(4, 3),
    ]
    found += [torch.randn(6, 4).T, (torch.randn(7) > 0), torch.randn(30, 40), torch.randn(5)]
    return found


def received(together: int) -> tuple[list[bool], int]:
    keras_tp.initialize()
    sizes = {"_SMALL": 4000, "_TOGETHER": together}
    with mock.patch.multiple(messages, **sizes), Collectives() as sent:
        found = list(broadcast_each(made(dist.get_rank())))
    wanted = made(0)
    same = [
        a.dtype is b.dtype and a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(found, wanted, strict=True)
    ]
    return same, sent["broadcast"]


@pytest.mark.parametrize(("together", "least"), [(200, 6), (20000, 4)])
def test_each_arrives_as_the_first_rank_has_it(ranks: Any, together: int, least: int) -> None:
    """A weight in another one's place; a bool that shifts all numbers after it."""
    for same, count in ranks(2)(received, together):
        assert all(same), same
        assert least <= count < len(same)


def moved() -> tuple[int, bool]:
    """Broadcasts that 40 layers take; whether a variable's memory is its own."""
    model = keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(4) for _ in range(40))])
    expanded = model.layers[0].bias
    expanded._value.data = torch.zeros(1).expand(4)
    mesh = keras_tp.device_mesh({"model": 2})
    layout = parity.layout_map({".*dense_1/kernel": (None, "model")}, mesh)
    with Collectives() as sent:
        keras_tp.parallelize(model, layout)
    own = local_tensor(expanded).untyped_storage().nbytes() == 4 * 4
    np.testing.assert_array_equal(expanded.numpy(), np.zeros(4))
    return sent["broadcast"], own


def test_small_weights_travel_together(ranks: Any) -> None:
    """80 messages where one does; a bias that keeps alive what all have travelled in."""
    for count, own in ranks(2)(moved):
        assert count < 6  # weights; random states
        assert own
