"""What is known of blocks that are alike, and that those that differ are not given it.

Seen to fail: `attributes` in keras_tp/seam/likeness.py giving nothing (all that differ), or nothing
of objects that are no layers ("an object's setting"), a class in place of `_Itself` ("a function"),
`seen` not looked at (a weight in two places), `mark` giving None (a weight that is cut); in
keras_tp/recollection.py the comparison after a call left out (a trace), and numbers, or reasons,
as they were (plans of looking at each).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import parity
import pytest
from keras import layers, ops

import keras_tp
from keras_tp import handovers

WIDTH, HIDDEN = 6, 8
LAYOUT: dict[str, tuple[Any, ...]] = {
    ".*/up/kernel": (None, "model"),
    ".*/down/kernel": ("model", None),
}


class Setting:
    def __init__(self, value: Any) -> None:
        self.value = value


class Block(layers.Layer):
    """Hands on a shard, unless what it keeps says to look at all features."""

    def __init__(self, kept: Any, **options: Any) -> None:
        super().__init__(**options)
        self.kept = kept
        self.up = layers.Dense(HIDDEN, name="up")
        self.down = layers.Dense(WIDTH, name="down")

    def build(self, shape: Any) -> None:
        self.up.build(shape)
        self.down.build((*shape[:-1], HIDDEN))

    def call(self, x: Any) -> Any:
        kept = self.kept
        whole = kept
        if isinstance(kept, Setting):
            whole = kept.value
        elif isinstance(kept, layers.Layer):
            whole = kept.rate > 0.4
        elif callable(kept):
            whole = kept()
        elif isinstance(kept, list):
            kept.append(1)
            whole = False
        # On the whole all is as without it: there are no more than 8 features.
        h = self.up(x)
        if whole and h.shape[-1] < HIDDEN:
            h = ops.flip(h, -1)
        return self.down(h)


def planned(*kept: Any) -> list[bool]:
    """Of each block, whether a plan has it hand on shards."""
    x = y = keras.Input((3, WIDTH))
    for i, value in enumerate(kept):
        y = Block(value, name=f"block_{i}")(y)
    plan = keras_tp.plan(keras.Model(x, y), parity.layout_map(LAYOUT, {"batch": 1, "model": 2}))
    paths = {plan.layers[region.layer].path for region in plan.regions}
    return [f"block_{i}" in paths for i in range(len(kept))]


CASES: dict[str, Callable[[bool], Any]] = {
    "a setting": lambda whole: whole,
    "an object's setting": Setting,
    "a layer below": lambda whole: layers.Dropout(0.5 if whole else 0.1),
    "a function": lambda whole: lambda: whole,
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_that_differ_are_not_alike(name: str) -> None:
    """What differs shows on shards alone, so that the first block's proof would do for all."""
    make = CASES[name]
    assert planned(*map(make, (False, True, False, True))) == [True, False, True, False]
    assert planned(*map(make, (True, False))) == [False, True]


def test_what_leaves_a_trace_is_called_each_time() -> None:
    """What a block adds to a list is missing where others look for it."""
    x = y = keras.Input((3, WIDTH))
    blocks = [Block([], name=f"block_{i}") for i in range(3)]
    for block in blocks:
        y = block(y)
    model = keras.Model(x, y)
    before = [len(block.kept) for block in blocks]
    keras_tp.plan(model, parity.layout_map(LAYOUT, {"batch": 1, "model": 2}))
    added = {len(b.kept) - n for b, n in zip(blocks, before, strict=True)}
    assert len(added) == 1
    assert min(added) > 0


class Tied(layers.Layer):
    """Two layers around a scale, or two scales, of which one is the other."""

    def __init__(self, tied: bool, **options: Any) -> None:
        super().__init__(**options)
        self.tied = [] if tied else None  # as empty a setting as the other
        self.up = layers.Dense(HIDDEN, use_bias=False, name="up")
        self.down = layers.Dense(WIDTH, use_bias=False, name="down")

    def build(self, shape: Any) -> None:
        first = self.add_weight(shape=(), name="first")
        second = self.add_weight(shape=(), name="second")
        self.scales = (first, first if self.tied is not None else second, second)
        self.tied = None
        self.up.build(shape)
        self.down.build((*shape[:-1], HIDDEN))

    def call(self, x: Any) -> Any:
        inside, outside, _ = self.scales
        return self.down(self.up(x) * inside) * outside


def test_a_weight_in_two_places_is_not_two_weights() -> None:
    """What is used on shards and outside has no gradient that can be summed: it is one weight."""
    x = y = keras.Input((3, WIDTH))
    for i, tied in enumerate((False, True, False)):
        y = Tied(tied, name=f"block_{i}")(y)
    plan = keras_tp.plan(keras.Model(x, y), parity.layout_map(LAYOUT, {"batch": 1, "model": 2}))
    assert [plan.layers[region.layer].path for region in plan.regions] == ["block_0", "block_2"]
    assert [[plan.variables[i].path for i in region.summed] for region in plan.regions] == [
        ["block_0/first"],
        ["block_2/first"],
    ]


def test_a_weight_that_is_cut_is_not_like_one_that_is_whole() -> None:
    """A pattern that claims a layer of one block alone."""
    layout = {k: v for k, v in LAYOUT.items() if "down" not in k}
    layout["block_[02]/down/kernel"] = ("model", None)
    x = y = keras.Input((3, WIDTH))
    for i in range(3):
        y = Block(False, name=f"block_{i}")(y)
    plan = keras_tp.plan(keras.Model(x, y), parity.layout_map(layout, {"batch": 1, "model": 2}))
    assert [plan.layers[region.layer].path for region in plan.regions] == ["block_0", "block_2"]


class Deep(layers.Layer):
    """Columns that read what columns give, which the plan says by their paths."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.parts = [layers.Dense(HIDDEN, name=name) for name in ("up", "over")]
        self.down = layers.Dense(WIDTH, name="down")

    def build(self, shape: Any) -> None:
        self.parts[0].build(shape)
        for layer in (self.parts[1], self.down):
            layer.build((*shape[:-1], HIDDEN))

    def call(self, x: Any) -> Any:
        return self.down(self.parts[1](self.parts[0](x)))


def several(mixed: bool) -> Any:
    """Attention and layers in blocks, one of them called twice, some refused."""
    x = y = keras.Input((4, WIDTH))
    for i in range(4):
        y = Block(Setting(mixed and i % 2 == 1), name=f"block_{i}")(y)
        y = Deep(name=f"deep_{i}")(y)
        y = layers.MultiHeadAttention(2, 3, dropout=0.1, name=f"attention_{i}")(y, y)
    again = Block(False, name="again")
    y = again(again(y))
    return keras.Model(x, y)


@pytest.mark.parametrize("mixed", [False, True])
def test_plans_are_those_of_looking_at_each(monkeypatch: pytest.MonkeyPatch, mixed: bool) -> None:
    """Numbers, paths or reasons of the first block given to others."""
    layout = {
        **LAYOUT,
        ".*/over/kernel": (None, "model"),
        ".*(query|key|value)/kernel": (None, "model", None),
        ".*attention_output/kernel": ("model", None, None),
    }
    looks = []
    prove = handovers.prove
    monkeypatch.setattr(handovers, "prove", lambda call: looks.append(1) or prove(call))
    plans, counts = [], []
    for remembered in (True, False):
        if not remembered:
            monkeypatch.setattr(
                handovers.Recollection, "call", lambda self, layer, args, kwargs, look: look()
            )
        keras.backend.clear_session()
        layout_map = parity.layout_map(layout, {"batch": 1, "model": 2})
        plans.append(keras_tp.plan(several(mixed), layout_map))
        counts.append(len(looks))
        looks.clear()
    assert plans[0] == plans[1]
    assert plans[0].to_dict() == plans[1].to_dict()
    assert counts[0] < counts[1] - 3
