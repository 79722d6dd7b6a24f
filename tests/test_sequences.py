"""Norms, dropout and residuals on shards of the sequence: the numbers of one process, or today's.

Seen to fail: in keras_tp/sequence_calls.py `copied` that gives weights as they are, `drawing_parts`
of None, `gather` for `gather_weight` and the other way round, `copies` for `AsIs`, calls that are
not `passed_over`; in keras_tp/token_runs.py biases that are not `summed` (the encoder); what a
gate has made not shared (its counts); in keras_tp/shard_runs.py numbers not compared ("a count"),
nor the one that `full` is given ("one over it"); in keras_tp/rehearsal.py losses not looked at
("a loss"). In tests/hub/test_blocks.py it is done to a model of KerasHub's.
"""

from __future__ import annotations

import warnings
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

BLOCKS, TOKENS, WIDTH, OUT = 2, 8, 16, 6
ON_TWO, ON_FOUR = {"batch": 1, "model": 2}, {"batch": 2, "model": 2}
LAYOUT = {p: e for p, e in models.TRANSFORMER_LAYOUT.items() if "tokens" not in p}


def encoder(tokens: int | None = TOKENS) -> Any:
    """Pre-LN blocks of attention and an MLP, with dropout and residuals, and a dense head."""
    x = keras.Input((tokens, WIDTH))
    h = x
    for i in range(BLOCKS):
        y = layers.LayerNormalization(name=f"norm_a_{i}")(h)
        y = layers.MultiHeadAttention(4, 4, dropout=0.2, seed=i, name=f"attention_{i}")(y, y)
        h = layers.Add()([h, layers.Dropout(0.2, seed=10 + i)(y)])
        y = layers.LayerNormalization(name=f"norm_b_{i}")(h)
        y = layers.Dense(4 * WIDTH, activation="gelu", name=f"up_{i}")(y)
        y = layers.Dense(WIDTH, name=f"down_{i}")(y)
        h = layers.Add()([h, layers.Dropout(0.2, seed=20 + i)(y)])
    h = layers.LayerNormalization(name="norm")(h)
    return keras.Model(x, layers.Dense(OUT, name="head")(h), name="encoder")


def data(tokens: int = TOKENS) -> tuple[Any, Any]:
    random = np.random.default_rng(3)
    return random.standard_normal((4, tokens, WIDTH)), random.standard_normal((4, tokens, OUT))


def planned(model: Any, mesh: Any, layout: Any = LAYOUT) -> keras_tp.Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_tp.LayoutWarning)  # patterns of other models
        return parity.planned(model, parity.layout_map(layout, mesh), sequence_parallel=True)


Counts = tuple[Counter[str], Counter[str]]


def trained(
    build: Callable[[], Any], data: Any, mesh: Any, layout: Any = LAYOUT, loss: Any = "mse"
) -> tuple[parity.Report, keras_tp.Plan, Counts]:
    """How training differs from one process, the plan, and the collectives of a step."""
    with parity.real_float64():
        case = parity.Case(build, data, None, loss, steps=2)
        one = parity.once(lambda: parity.train(parity.build_seeded(build), case))
        model = parity.build_seeded(build)
        plan = planned(model, mesh, layout)
        report = parity.compare_with(one, case, model, plan)
        x = torch.tensor(data[0])
        if x.is_floating_point():
            x.requires_grad_()
        with Collectives() as forward:
            out = model(x, training=True)
        with Collectives() as backward:
            out.sum().backward()
    return report, plan, (forward, backward)


def trained_encoder(mesh: Any) -> tuple[parity.Report, keras_tp.Plan, Counts]:
    return trained(encoder, data(), mesh)


def test_a_block_costs_what_megatrons_costs(ranks: Any) -> None:
    """An all_reduce that stays besides its scatter; q, k and v that gather one tensor three times;
    masks of whole tensors on parts of them; norms that learn of one rank's tokens."""
    for report, plan, (forward, backward) in ranks(2)(trained_encoder, ON_TWO):
        assert report.worst() < 1e-10, report
        assert forward == plan.collectives("forward"), str(plan)
        assert backward == plan.collectives("backward"), str(plan)
        # One all_gather more for the head's input and one for its output; backward one for that
        # of the model, and the gradients of norms and biases together.
        both = {"all_gather": 2 * BLOCKS + 2, "reduce_scatter": 2 * BLOCKS}
        assert forward == both
        assert backward == {
            "all_gather": 2 * BLOCKS + 1,
            "reduce_scatter": 2 * BLOCKS + 1,
            "all_reduce": 1,
        }
        assert plan.sequence is not None
        assert not plan.sequence.whole
        said = " ".join(plan.notes)
        assert f"the gradients of {6 * BLOCKS + 2} weights" in said


def trained_transformer(mesh: Any) -> tuple[parity.Report, keras_tp.Plan, Counts]:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    layout = models.TRANSFORMER_LAYOUT
    return trained(models.transformer, models.transformer_data(), mesh, layout, loss)


def test_beside_replicas(ranks: Any) -> None:
    """Sums over replicas and over tokens that are one instead of both; a causal mask of as many
    tokens as a rank has; lookups in a table of which a rank has part; masks of other rows."""
    for report, plan, _ in ranks(4)(trained_transformer, ON_FOUR):
        assert report.worst() < 1e-10, report
        assert plan.sequence is not None
        scattered = [plan.layers[i].path for i in plan.sequence.scattered]
        assert [p for p in scattered if p in ("tokens", "down_0")] == ["tokens", "down_0"]
    for report, plan, _ in ranks(4)(trained_encoder, ON_FOUR):
        assert report.worst() < 1e-10, report
        assert plan.sequence is not None


class Between(layers.Layer):
    """What `between` does to activations, and weights for it."""

    def __init__(
        self, between: Callable[[Any, Any], Any], *shapes: tuple[int, ...], below: Any = None
    ) -> None:
        super().__init__(name="between")
        self.between = between
        self.shapes = shapes
        self.below = below

    def build(self, shape: Any) -> None:
        if self.below is not None:
            self.below.build(shape)
        self.own = [self.add_weight(shape=s, initializer="ones") for s in self.shapes]

    def call(self, x: Any) -> Any:
        return self.between(self, x)


class Mask(layers.Layer):
    """Gives a mean over tokens a mask of its own, made from the length of what it is given."""

    def call(self, x: Any) -> Any:
        seen = ops.arange(x.shape[1])
        mask = ops.cast(seen[:, None] >= seen[None, :], x.dtype)
        return x + ops.einsum("ts,bsw->btw", mask, x)


def noted(layer: Any, x: Any) -> Any:
    layer.add_loss(ops.sum(layer.own[0] ** 2))
    return x * layer.own[0]


def full(x: Any) -> Any:
    tokens = x.shape[1]
    return torch.full((tokens, 1), 1.0 / tokens, dtype=x.dtype, device=x.device)


# What stands between two MLPs with norms and residuals, and why it is given all tokens, if it is.
BETWEEN: dict[str, tuple[Callable[[], Any], str]] = {
    "gelu": (lambda: Between(lambda y, x: ops.gelu(x)), ""),
    "a residual of its own": (
        lambda: Between(lambda y, x: x + y.below(x), below=layers.LayerNormalization()),
        "",
    ),
    "a scale of features": (lambda: Between(lambda y, x: x * y.own[0], (WIDTH,)), ""),
    "a penalty": (lambda: layers.Activation("relu", activity_regularizer="l2"), ""),
    "a kernel": (
        lambda: Between(lambda y, x: x + y.below(x), below=layers.Dense(WIDTH)),
        "the gradient of its kernel, (16, 16), would have to be summed",
    ),
    "a scale of tokens": (
        lambda: Between(lambda y, x: x * y.own[0], (TOKENS, 1)),
        "the gradient of its variable, (8, 1), would have to be summed",
    ),
    "a mean": (lambda: Between(lambda y, x: x - ops.mean(x, 1, True)), "mean over the sharded"),
    "a running sum": (lambda: Between(lambda y, x: ops.cumsum(x, 1)), "cumsum along the sharded"),
    "tokens moved": (lambda: Between(lambda y, x: ops.roll(x, 1, 1)), "roll along the sharded"),
    "a count": (lambda: Between(lambda y, x: x / x.shape[1]), "div is given other numbers"),
    "one over it": (lambda: Between(lambda y, x: x * full(x)), "full is given other numbers"),
    "a mask of its own": (Mask, "arange is given other numbers"),
    "a loss": (lambda: Between(noted, (WIDTH,)), "gradient is not its own"),
    "statistics": (layers.BatchNormalization, "mean over the sharded dim"),
    "dropout of tokens": (lambda: layers.SpatialDropout1D(0.4, seed=3), "a noise shape"),
    "noise": (lambda: layers.GaussianNoise(0.1, seed=3), "normal is given other numbers"),
}
MLP = {p: e for p, e in LAYOUT.items() if "up" in p or "down" in p}


def build(name: str) -> Any:
    make, _ = BETWEEN[name]
    x = keras.Input((TOKENS, WIDTH))
    h = x
    norm = layers.LayerNormalization(name="norm")
    for i in range(2):
        y = norm(h)  # the same twice
        y = layers.Dense(2 * WIDTH, activation="gelu", name=f"up_{i}")(y)
        h = layers.Add()([h, layers.Dense(WIDTH, name=f"down_{i}")(y)])
        h = h if i else make()(h)
    # Operations of a functional graph, not layers: a token, and a whole residual.
    return keras.Model(x, layers.Dense(OUT)(h * 2 + x)[:, ::1])


# Of those that go by their plan the ones whose plan could be wrong in silence.
RUN = "a penalty", "a mean", "one over it", "a loss"


@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_between(name: str) -> None:
    """Whatever looks at other tokens, at how many there are, or draws in another shape is given
    all of them, and the rest goes on as it was."""
    plan = planned(build(name), ON_TWO, MLP)
    assert plan.sequence is not None, plan.notes
    whole = {plan.layers[i].path for i in plan.sequence.whole} - {"dense"}
    assert bool(whole) == bool(BETWEEN[name][1]), plan.notes
    assert BETWEEN[name][1] in " ".join(plan.notes)


def trained_between(names: list[str]) -> list[parity.Report]:
    return [trained(lambda: build(name), data(), ON_TWO, MLP)[0] for name in names]  # noqa: B023


def test_numbers_of_what_is_between(ranks: Any) -> None:
    """A proof that takes a loss, a penalty or a number made of a shard for that of the whole."""
    for reports in ranks(2)(trained_between, list(RUN)):
        for name, report in zip(RUN, reports, strict=True):
            assert report.worst() < 1e-10, (name, report)


class Decoder(layers.Layer):
    """A block that makes a causal mask for its attention, and adds up residuals itself."""

    def __init__(self) -> None:
        super().__init__(name="decoder")
        self.norm = layers.LayerNormalization(name="norm")
        self.attention = layers.MultiHeadAttention(4, 4, name="attention")

    def build(self, shape: Any) -> None:
        self.norm.build(shape)
        self.attention.build(shape, shape)

    def call(self, x: Any) -> Any:
        seen = ops.arange(x.shape[1])
        h = self.norm(x)
        return x + self.attention(h, h, attention_mask=(seen[:, None] >= seen[None, :])[None])


def decoder() -> Any:
    x = keras.Input((TOKENS, WIDTH))
    return keras.Model(x, layers.Dense(OUT, name="head")(Decoder()(x)))


def trained_decoder() -> tuple[parity.Report, keras_tp.Plan, Counts, bool]:
    found = trained(decoder, data(), ON_TWO)
    today = keras_tp.plan(parity.build_seeded(decoder), parity.layout_map(HEADS, ON_TWO))
    return *found, found[1].layers == today.layers


HEADS = {p: e for p, e in LAYOUT.items() if "up" not in p and "down" not in p}


def test_what_cannot_be_proven_is_as_today(ranks: Any) -> None:
    """Half a mask, taken for a whole one; an option that does nothing and does not say so."""
    for report, plan, (forward, _), as_today in ranks(2)(trained_decoder):
        assert report.worst() < 1e-10, report
        assert plan.sequence is None
        assert as_today
        assert forward == {"all_reduce": 1, "all_gather": 1}
        said = "sequence_parallel has no effect: arange is given other numbers on shards."
        assert any(note.startswith(said) for note in plan.notes), plan.notes


def other_calls() -> tuple[list[float], list[str], bool, Counter[str]]:
    with parity.real_float64(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", keras_tp.LayoutWarning)
        plain, many = (parity.build_seeded(lambda: encoder(None)) for _ in range(2))
        made = parity.layout_map(LAYOUT, ON_TWO)
        keras_tp.parallelize(many, made, sequence_parallel=True)
        gaps = []
        for tokens in (8, 7, 6, 7):
            x = data(tokens)[0]
            pair = [m(torch.tensor(x), training=True) for m in (plain, many)]
            gaps.append(parity.difference(*(p.detach().numpy() for p in pair)))
            gaps.append(parity.difference(*(m.predict_on_batch(x) for m in (plain, many))))
        found = keras_tp.verify(many, data()[0], training=True)
        many.compile("sgd", "mse", jit_compile=True)
        with Collectives() as forward:  # as before a step is compiled
            many(torch.tensor(data()[0]), training=True)
    said = [str(w.message) for w in caught if w.category is keras_tp.LayoutWarning]
    return gaps, said, found.equal, forward


def test_calls_that_the_plan_has_not_seen(ranks: Any) -> None:
    """Seven tokens on two ranks; arrays in place of tensors; a comparison that sees parts; what a
    compiler cannot trace."""
    for gaps, said, equal, forward in ranks(2)(other_calls):
        assert max(gaps) < 1e-12
        assert [s for s in said if "tokens are not shared out as was planned" in s], said
        assert any("7 tokens are not cut evenly into 2" in s for s in said)
        assert len(said) == 1
        assert equal
        assert forward == {"all_reduce": 2 * BLOCKS, "all_gather": 1}
