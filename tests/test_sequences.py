"""Norms, dropout and residuals on shards of the sequence: the numbers of one process, or today's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import models
import numpy as np
import parity
import pytest
import torch
from counting import Collectives
from keras import layers, ops

import keras_tp

TOKENS, WIDTH, OUT = 8, 16, 6
ON_TWO, ON_FOUR = {"batch": 1, "model": 2}, {"batch": 2, "model": 2}


def encoder() -> Any:
    """Two pre-LN blocks of attention and an MLP, with dropout and residuals, and a dense head."""
    x = keras.Input((TOKENS, WIDTH))
    h = x
    for i in range(2):
        y = layers.LayerNormalization(name=f"norm_a_{i}")(h)
        y = layers.MultiHeadAttention(4, 4, dropout=0.2, seed=i, name=f"attention_{i}")(y, y)
        h = layers.Add()([h, layers.Dropout(0.2, seed=10 + i)(y)])
        y = layers.LayerNormalization(name=f"norm_b_{i}")(h)
        y = layers.Dense(4 * WIDTH, activation="gelu", name=f"up_{i}")(y)
        y = layers.Dense(WIDTH, name=f"down_{i}")(y)
        h = layers.Add()([h, layers.Dropout(0.2, seed=20 + i)(y)])
    h = layers.LayerNormalization(name="norm")(h)
    return keras.Model(x, layers.Dense(OUT, name="head")(h), name="encoder")


def vectors(tokens: int = TOKENS) -> tuple[Any, Any]:
    random = np.random.default_rng(3)
    return random.standard_normal((4, tokens, WIDTH)), random.standard_normal((4, tokens, OUT))


ENCODER = {p: e for p, e in models.TRANSFORMER_LAYOUT.items() if "tokens" not in p}
SCE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
Case = tuple[Callable[[], Any], dict[str, Any], Callable[[], Any], Any]
CASES: dict[str, Case] = {
    "encoder": (encoder, ENCODER, vectors, "mse"),
    "transformer": (
        models.transformer,
        models.TRANSFORMER_LAYOUT,
        models.transformer_data,
        SCE,
    ),
}


def trained(name: str, mesh: Any) -> tuple[parity.Report, str, list[Counter[str]]]:
    """How training differs from one process; the plan; collectives planned and made each way."""
    build, layout, data, loss = CASES[name]
    with parity.real_float64():
        case = parity.Case(build, data(), None, loss)
        one = parity.train(parity.build_seeded(build), case)
        model = parity.build_seeded(build)
        made = parity.layout_map(layout, mesh)
        plan = keras_tp.plan(model, made, sequence_parallel=True)
        report = parity.compare_with(one, case, model, plan)
        x = torch.tensor(case.data[0])
        if x.is_floating_point():
            x.requires_grad_()
        with Collectives() as forward:
            out = model(x, training=True)
        with Collectives() as backward:
            out.sum().backward()
    planned = [plan.collectives("forward"), plan.collectives("backward")]
    return report, str(plan), [*planned, forward, backward]


@pytest.mark.parametrize("name", CASES)
def test_four(ranks: Any, name: str) -> None:
    for report, plan, counts in ranks(4)(trained, name, ON_FOUR):
        print(report, counts)
        assert report.worst() < 1e-10, report


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(ranks: Any, name: str) -> None:
    for report, plan, counts in ranks(2)(trained, name, ON_TWO):
        assert report.worst() < 1e-10, report
        assert counts[:2] == counts[2:]
