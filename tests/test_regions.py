"""Where layers hand each other shards, and where they must not: the same numbers either way.

Seen to fail: `_sum_gradients` in keras_tp/shard_runs.py summing nothing ("a scale"), numbers not
compared ("heads that are counted"), `check_gradients` doing nothing ("a gradient of its own"),
`next_dim` giving 1, and `skip` doing nothing (dropout), `_check_end` left out ("given out").
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

WIDTH, HIDDEN, OUT = 6, 8, 5
COLUMNS = {".*/up/kernel": (None, "model"), ".*/up/bias": ("model",)}
ROWS = {".*/down/kernel": ("model", None)}
LAYOUT: dict[str, tuple[Any, ...]] = {**COLUMNS, **ROWS}


class Between(layers.Layer):
    """A column layer, what `between` does, a row layer."""

    def __init__(self, between: Callable[[Any, Any, Any], Any], weights: Any = ()) -> None:
        super().__init__(name="between")
        self.between = between
        self.shapes = weights
        self.up = layers.Dense(HIDDEN, name="up")
        self.down = layers.Dense(OUT, name="down")
        self.num_heads = 4
        self.calls = 0

    def build(self, shape: Any) -> None:
        self.own = [
            self.add_weight(shape=s, name=f"own_{i}", initializer="ones")
            for i, s in enumerate(self.shapes)
        ]
        self.up.build(shape)
        self.down.build((*shape[:-1], HIDDEN))

    def call(self, x: Any, training: bool = False) -> Any:
        self.calls += 1
        return self.between(self, x, training)


def through(function: Callable[[Any], Any]) -> Callable[[Any, Any, Any], Any]:
    return lambda layer, x, training: layer.down(function(layer.up(x)))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * 2 + grad.mean(-1, keepdim=True)


def by_heads(layer: Any, x: Any, training: Any) -> Any:
    h = layer.up(x)
    heads = ops.reshape(h, (*h.shape[:-1], layer.num_heads, -1))
    return layer.down(ops.reshape(ops.softmax(heads, axis=-1), h.shape))


def by_heads_counted(layer: Any, x: Any, training: Any) -> Any:
    h = layer.up(x)
    heads = ops.reshape(h, (*h.shape[:-1], layer.num_heads, -1)) / layer.num_heads
    return layer.down(ops.reshape(heads, h.shape))


def scaled_twice(layer: Any, x: Any, training: Any) -> Any:
    return layer.down(layer.up(x) * layer.own[0]) * layer.own[0]


def written(layer: Any, x: Any, training: Any) -> Any:
    h = layer.up(x).clone()
    h[..., 0] = 0.0
    return layer.down(h)


def by_size(layer: Any, x: Any, training: Any) -> Any:
    h = layer.up(x)
    return layer.down(h * 3 if h.shape[-1] > 6 else h)


def given_out(layer: Any, x: Any, training: Any) -> Any:
    h = ops.relu(layer.up(x))
    return layer.down(h), h


def by_value(layer: Any, x: Any, training: Any) -> Any:
    h = layer.up(x)
    return layer.down(h * 3 if float(ops.sum(ops.stop_gradient(h))) > 0 else h)


# What comes between, weights of its own, and whether shards are handed on.
CASES: dict[str, tuple[Callable[[Any, Any, Any], Any], Any, bool]] = {
    "nothing": (through(lambda h: h), (), True),
    "gelu": (through(lambda h: ops.gelu(h) + 1), (), True),
    "softmax over tokens": (through(lambda h: ops.softmax(h, axis=1)), (), True),
    "softmax over features": (through(lambda h: ops.softmax(h, axis=-1)), (), False),
    "a mean over features": (through(lambda h: h - ops.mean(h, -1, keepdims=True)), (), False),
    "a mean over tokens": (through(lambda h: h - ops.mean(h, 1, keepdims=True)), (), True),
    "reversed": (through(lambda h: ops.flip(h, axis=-1)), (), False),
    "a running sum": (through(lambda h: ops.cumsum(h, axis=-1)), (), False),
    "halves exchanged": (
        through(lambda h: ops.concatenate([h[..., HIDDEN // 2 :], h[..., : HIDDEN // 2]], -1)),
        (),
        False,
    ),
    "heads": (by_heads, (), True),
    "heads that are counted": (by_heads_counted, (), False),
    "a scale": (lambda y, x, t: y.down(y.up(x) * y.own[0]), [()], True),
    "a scale of tokens": (lambda y, x, t: y.down(y.up(x) * y.own[0]), [(3, 1)], True),
    "a computed scale": (lambda y, x, t: y.down(y.up(x) * ops.exp(y.own[0])), [()], True),
    "a scale of features": (lambda y, x, t: y.down(y.up(x) * y.own[0]), [(HIDDEN,)], False),
    "a scale used outside": (scaled_twice, [()], False),
    "a whole activation": (
        lambda y, x, t: y.down(y.up(x) * ops.mean(x, -1, keepdims=True)),
        (),
        False,
    ),
    "a count of features": (through(lambda h: h / h.shape[-1]), (), False),
    "numbers of features": (through(lambda h: h + ops.arange(HIDDEN, dtype=h.dtype)), (), False),
    "a gradient of its own": (through(Doubled.apply), (), False),
    "written into": (written, (), False),
    "another way for another size": (by_size, (), False),
    "another way for another value": (by_value, (), False),
    "hidden states joined": (
        lambda y, x, t: ops.concatenate([y.down(y.up(x)), y.up(x)], -1),
        (),
        False,
    ),
    "hidden states given out": (given_out, (), False),
    "called again": (lambda y, x, t: y.down(ops.relu(y.up(x))) + y.down(y.up(-x)), (), True),
    "whole and shard": (
        lambda y, x, t: y.down(y.up(x)) + y.down(ops.tile(x, 2)[..., :8]),
        (),
        False,
    ),
}


def build(name: str) -> Any:
    between, weights, _ = CASES[name]
    x = keras.Input((3, WIDTH))
    outputs = keras.tree.flatten(Between(between, weights)(x))
    return keras.Model(x, layers.Dense(4)(layers.Concatenate()([*outputs, outputs[0]])))


def data() -> tuple[Any, Any]:
    random = np.random.default_rng(3)
    return random.standard_normal((4, 3, WIDTH)), random.standard_normal((4, 3, 4))


def train(name: str, size: int, mesh: Any) -> tuple[parity.Report, bool, int, int]:
    report = parity.compare(lambda: build(name), LAYOUT, mesh, data())
    model = parity.build_seeded(lambda: build(name))
    layer = next(y for y in model.layers if y.name == "between")
    before = layer.calls
    plan = keras_tp.plan(model, parity.layout_map(LAYOUT, mesh), advise=False)
    return report, bool(plan.regions), before, layer.calls


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 2) for name in CASES), ("heads", 4), ("a scale", 4)]
)
def test_what_is_between(ranks: Any, name: str, size: int) -> None:
    """Right where shards are handed on, and where they are gathered; never handed on by mistake."""
    for report, handed, before, after in ranks(size)(
        train, name, size, {"batch": 1, "model": size}
    ):
        assert handed == CASES[name][2]
        assert report.worst() < 1e-10, report
        assert before == after  # the plan has left nothing behind


@pytest.mark.parametrize("name", ["gelu", "heads", "a scale", "a mean over features"])
def test_on_rows_of_replicas(ranks: Any, name: str) -> None:
    """Replicas sum gradients of weights besides; each has its own rows."""
    for report, handed, *_ in ranks(4)(train, name, 4, {"batch": 2, "model": 2}):
        assert handed == CASES[name][2]
        assert report.worst() < 1e-10, report


def with_dropout() -> Any:
    x = keras.Input((3, WIDTH))
    attention = layers.MultiHeadAttention(4, 3, dropout=0.4, seed=3, name="attention")
    y = attention(x, x)
    y = layers.Dense(HIDDEN, name="up")(y)
    y = layers.Dropout(0.5, seed=4)(y)
    y = layers.Dense(OUT, name="down")(y)
    return keras.Model(x, layers.Dense(4)(layers.Dropout(0.3, seed=5)(y)))


DROPPED: dict[str, tuple[Any, ...]] = {
    ".*(query|key|value)/kernel": (None, "model", None),
    ".*attention_output/kernel": ("model", None, None),
    "up/kernel": (None, "model"),
    "down/kernel": ("model", None),
}


def dropped(size: int, mesh: Any) -> tuple[parity.Report, int]:
    report = parity.compare(with_dropout, DROPPED, mesh, data())
    return report, len(parity.planned(with_dropout(), parity.layout_map(DROPPED, mesh)).regions)


@pytest.mark.parametrize("mesh", [{"batch": 1, "model": 2}, {"batch": 2, "model": 2}])
def test_dropout_draws_the_masks_of_one_process(ranks: Any, mesh: Any) -> None:
    """One mask on every rank drops the same heads twice; another on each, where none is whole."""
    size = mesh["batch"] * mesh["model"]
    for report, regions in ranks(size)(dropped, size, mesh):
        assert regions == 2
        assert report.worst() < 1e-10, report


def counted(name: str) -> tuple[Counter[str], Counter[str], Any]:
    model = parity.build_seeded(lambda: build(name))
    plan = parity.planned(model, parity.layout_map(LAYOUT, {"batch": 1, "model": 2}))
    keras_tp.parallelize(model, plan=plan, check_batches=False)
    x = torch.tensor(data()[0], dtype=torch.float32, requires_grad=True)
    with Collectives() as forward:
        out = model(x, training=True)
    with Collectives() as backward:
        out.sum().backward()
    assert forward == plan.collectives("forward"), str(plan)
    assert backward == plan.collectives("backward"), str(plan)
    return forward, backward, str(plan)


@pytest.mark.parametrize("name", ["gelu", "heads", "a scale", "a mean over features"])
def test_counts_are_those_of_the_plan(ranks: Any, name: str) -> None:
    """A pair of layers costs an all_reduce each way, and one more for a weight in between."""
    for forward, backward, plan in ranks(2)(counted, name):
        if CASES[name][2]:
            assert forward == {"all_reduce": 1}, plan
            assert backward == {"all_reduce": 2 if name == "a scale" else 1}, plan
        else:
            assert forward == {"all_reduce": 1, "all_gather": 1}, plan


def whole_bias() -> tuple[parity.Report, Counter[str], Counter[str]]:
    layout = {k: v for k, v in LAYOUT.items() if "bias" not in k}
    mesh = {"batch": 1, "model": 2}
    report = parity.compare(lambda: build("gelu"), layout, mesh, data())
    model = parity.build_seeded(lambda: build("gelu"))
    plan = parity.planned(model, parity.layout_map(layout, mesh))
    keras_tp.parallelize(model, plan=plan, check_batches=False)
    x = torch.tensor(data()[0], dtype=torch.float32, requires_grad=True)
    out = model(x, training=True)
    with Collectives() as backward:
        out.sum().backward()
    return report, backward, plan.collectives("backward")


def test_a_bias_that_no_pattern_claims(ranks: Any) -> None:
    """Each rank adds its part of a whole bias, and would learn that part alone."""
    for report, backward, planned in ranks(2)(whole_bias):
        assert report.worst() < 1e-10, report
        assert backward == planned == {"all_reduce": 1, "all_gather": 1}


def reasons(name: str) -> list[str]:
    layout_map = parity.layout_map(LAYOUT, {"batch": 1, "model": 2})
    return [layer.reason for layer in keras_tp.plan(build(name), layout_map).layers]


def test_the_plan_says_why() -> None:
    """Whoever wonders about a gather finds the code that wants it."""
    assert any("softmax along the sharded dim" in r for r in reasons("softmax over features"))
    assert any("__setitem__ cannot be followed" in r for r in reasons("written into"))
    assert any("flip along the sharded dim" in r for r in reasons("reversed"))
    assert any("meets a whole tensor" in r for r in reasons("a whole activation"))
    layout_map = parity.layout_map(LAYOUT, {"batch": 1, "model": 2})
    notes = keras_tp.plan(build("another way for another value"), layout_map).notes
    assert any("could not be called without values" in note for note in notes)


def other_calls() -> list[float]:
    """A call with a mask, another number of tokens, no gradient: kinds the plan has not seen."""
    gaps = []
    with parity.real_float64():
        plain, many = (parity.build_seeded(models.transformer) for _ in range(2))
        mesh = {"batch": 1, "model": 2}
        keras_tp.parallelize(many, parity.layout_map(models.TRANSFORMER_LAYOUT, mesh))
        x, _ = models.transformer_data()
        for rows in (x, x[:1], x[:3]):
            for training in (True, False):
                pair = [m(torch.tensor(rows), training=training) for m in (plain, many)]
                gaps.append(parity.difference(*(p.detach().numpy() for p in pair)))
        attention = [
            next(y for y in m.layers if isinstance(y, layers.MultiHeadAttention))
            for m in (plain, many)
        ]
        h = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for options in (
            {"use_causal_mask": True},
            {"attention_mask": torch.ones(2, 5, 5, dtype=torch.bool).tril()},
        ):
            pair = [a(h, h, **options) for a in attention]
            gaps.append(parity.difference(*(p.detach().numpy() for p in pair)))
    return gaps


def test_calls_that_the_plan_has_not_seen(ranks: Any) -> None:
    """What was proven for one kind of call is not taken for granted in another."""
    for gaps in ranks(2)(other_calls):
        assert max(gaps) < 1e-12


def scores() -> tuple[list[float], list[str]]:
    import warnings

    with parity.real_float64(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", keras_tp.LayoutWarning)
        plain, many = (parity.build_seeded(models.transformer) for _ in range(2))
        mesh = {"batch": 1, "model": 2}
        keras_tp.parallelize(many, parity.layout_map(models.TRANSFORMER_LAYOUT, mesh))
        h = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results = []
        for m in (plain, many):
            attention = next(y for y in m.layers if isinstance(y, layers.MultiHeadAttention))
            results.append(attention(h, h, return_attention_scores=True))
    gaps = [
        parity.difference(a.detach().numpy(), b.detach().numpy())
        for a, b in zip(*results, strict=True)
    ]
    return gaps, [str(w.message) for w in caught if w.category is keras_tp.LayoutWarning]


def test_a_call_that_cannot_stay_sharded_says_so(ranks: Any) -> None:
    """Scores are given out, of all heads: this call gathers, which the plan did not say."""
    for gaps, said in ranks(2)(scores):
        assert max(gaps) < 1e-12
        assert len(said) == 1
        assert "planned to stay sharded" in said[0]


def verified() -> Any:
    model = parity.build_seeded(models.transformer)
    keras_tp.parallelize(
        model, parity.layout_map(models.TRANSFORMER_LAYOUT, {"batch": 1, "model": 2})
    )
    return keras_tp.verify(model, models.transformer_data()[0])


def test_verification_looks_at_both(ranks: Any) -> None:
    """Each layer on whole activations, and what hands on shards as it does so."""
    for found in ranks(2)(verified):
        assert found.equal, str(found)
        assert found.not_called == ()
        styles = Counter(layer.style for layer in found.layers)
        assert styles["region"] == 3
        assert styles["column"] == 9
        assert styles["row"] == 4
