"""Weights gathered ahead of their use, on real ranks, against one process in float64."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import parity
from counting import Collectives
from keras import layers
from precision import real_float64

import keras_tp
from keras_tp.joins import Join

CLOSE = 1e-10


def stack() -> Any:
    return keras.Sequential([keras.Input((6,)), *(layers.Dense(6, "tanh") for _ in range(5))])


def numbers(rows: int = 5) -> Any:
    random = np.random.default_rng(0)
    return random.standard_normal((rows, 6)), random.standard_normal((rows, 6))


def trained() -> Any:
    made = []
    real = Join.__init__

    def noted(*args: Any) -> None:
        made.append(1)
        real(*args)

    Join.__init__ = noted
    r = parity.compare(
        stack, {".*kernel": ("batch", None), ".*bias": ("batch",)}, {"batch": 2}, numbers(), steps=5
    )
    Join.__init__ = real
    return r.worst(), len(made)


def test_training(ranks: Any) -> None:
    r = ranks(2)(trained)
    print(r)
    assert max(a for a, b in r) < CLOSE
