"""Layout maps proposed for KerasHub's models: Megatron's, found by what their code does.

Seen to fail: without the attempt in which counts of heads are divided ("gemma" gathers), and
with biases of columns left whole ("gpt2").
"""

from __future__ import annotations

from typing import Any

import pytest

import keras_tp
from hub.test_blocks import BLOCKS, CASES, build, layout_map


@pytest.mark.parametrize("name", CASES)
def test_a_block_costs_what_megatrons_costs(name: str) -> None:
    """A layer of a block that is left whole, or cut so that something is gathered."""
    model: Any = build(name)
    made = keras_tp.auto_layout_map(model, keras_tp.device_mesh({"batch": 1, "model": 2}))
    plan = made.plan
    assert plan is not None
    assert plan.collectives("forward") == {"all_reduce": 2 * BLOCKS}, str(made)
    assert plan.collectives("backward") == {"all_reduce": (2 + CASES[name][2]) * BLOCKS}, str(made)
    by_hand = layout_map(name, 2)
    for v in model.variables:
        layout, other = made[v.path], by_hand[v.path]
        assert (layout and layout.axes) == (other and other.axes), v.path
