"""The comparisons are able to fail: each way to be wrong is put in, and seen.

`breaks.py` has the mistakes, of which several are other packages' own. Here the
comparison that every parity test makes must find each, and so must
`keras_tp.verify` where a layer or a weight is wrong and not the step after it.
"""

from __future__ import annotations

import warnings
from typing import Any

import breaks
import keras
import parity
import pytest
from layer_cases import CASES
from test_layers import plain

import keras_tp

COLUMN, ROW, LINE = (None, "model"), ("model", None), ("model",)

# The mistake, the model it shows in, the layout, and what `verify` names.
BREAKS: list[tuple[str, str, dict[str, Any], str]] = [
    ("bias_once_per_rank", "Dense, softmax", {".*kernel": ROW}, "sequential/dense"),
    ("input_gradient_of_one_rank", "Dense", {".*kernel": COLUMN}, "sequential/dense"),
    ("input_gradient_padded_with_zeros", "Dense", {".*kernel": ROW}, "sequential/dense"),
    ("gradient_counted_once_per_rank", "Dense", {".*kernel": ROW}, "sequential/dense"),
    ("vocabulary_without_a_mask", "Embedding, mask_zero", {".*dings": ROW}, "sequential/embedding"),
    ("activation_on_shards", "Dense, softmax", {".*kernel": COLUMN}, "sequential/dense"),
    (
        "contracted_dim_cut_elsewhere",
        "MultiHeadAttention",
        {".*output/kernel": (None, "model", None)},
        "multi_head_attention/attention_output",
    ),
    (
        "late_gradients_of_the_first_alone",
        "MultiHeadAttention",
        {
            ".*(query|key|value)/kernel": (None, "model", None),
            ".*output/kernel": ("model", None, None),
        },
        "multi_head_attention",
    ),
    ("ranks_in_the_groups_order", "Dense", {".*kernel": COLUMN}, "sequential/dense"),
    (
        "ranks_in_the_groups_order",
        "Conv1D",
        {".*kernel": (None, None, "model")},
        "sequential/conv1d",
    ),
    ("bias_gradient_halved", "Dense", {".*kernel": ROW}, "sequential/dense"),
    ("stale_without_gradients", "Conv1D", {".*bias": LINE}, "sequential/conv1d"),
    ("replicas_that_start_different", "Dense", {".*kernel": COLUMN}, "a weight"),
    ("dropout_of_each_rank", "Dropout, GaussianNoise, ...", {".*kernel": COLUMN}, ""),
    ("constraint_of_the_shard", "Dense, regularized", {".*kernel": ROW}, ""),
    ("penalty_of_the_shard", "Dense, regularized", {".*kernel": ROW}, "sequential"),
    ("shards_read_as_weights", "Embedding, mask_zero", {".*dings": ROW}, ""),
    ("one_rank_steps_further", "Dense", {".*kernel": COLUMN}, ""),
]


def wrong(mistake: str, name: str, layout: dict[str, Any]) -> tuple[float, float, str]:
    """The difference without and with the mistake, and what `verify` says to it."""
    mesh = keras.distribution.DeviceMesh((2,), ["model"], ["cpu:1", "cpu:0"])

    def compared() -> float:
        model = parity.build_seeded(case.build)
        plan = parity.planned(model, parity.layout_map(layout, mesh))
        return parity.compare_with(one, case, model, plan).worst()

    with parity.real_float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_tp.LayoutWarning)
        case, one, _ = plain(name)
        right = compared()
        with breaks.broken(mistake):
            worst = compared()
            model = parity.build_seeded(case.build)
            keras_tp.parallelize(model, parity.layout_map(layout, mesh))
            found = keras_tp.verify(model, CASES[name].inputs)
        if found.unequal_weights:
            return right, worst, "a weight"
        return right, worst, found.first_difference.path if found.first_difference else ""


@pytest.mark.parametrize(
    ("mistake", "name", "layout", "named"), BREAKS, ids=[f"{b[0]}-{b[1]}" for b in BREAKS]
)
def test_every_mistake_is_seen(
    ranks: Any, mistake: str, name: str, layout: dict[str, Any], named: str
) -> None:
    """A comparison that cannot fail proves nothing."""
    answers = ranks(2)(wrong, mistake, name, layout)
    assert max(right for right, _, _ in answers) < 1e-10
    assert max(worst for _, worst, _ in answers) > 1e-3
    for _, _, found in answers:
        assert found == named
