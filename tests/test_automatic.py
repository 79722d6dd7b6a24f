"""Layout maps that are proposed: what is cut, what is left, and what it costs.

Each has been seen to fail once, with the mistake that it names put into the package.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import keras
import models
import numpy as np
import parity
import pytest
import torch
import torch.distributed as dist
from counting import Collectives
from keras import layers

import keras_tp
from keras_tp import regions, searches
from keras_tp.examples.llama_shape import llama
from keras_tp.families import patterns_for
from keras_tp.seam.devices import without_values

TOKENS, WIDTH = 6, 16


def proposed(model: Any, size: int = 2) -> keras_tp.Proposal:
    return keras_tp.auto_layout_map(model, keras_tp.device_mesh({"batch": 1, "model": size}))


def styles(made: keras_tp.Proposal) -> dict[str, str]:
    """What is cut, by the path of the layer."""
    assert made.plan is not None
    return {layer.path: layer.style for layer in made.plan.layers if layer.styles}


def reduced(made: keras_tp.Proposal) -> tuple[Counter[str], Counter[str]]:
    assert made.plan is not None
    return made.plan.collectives("forward"), made.plan.collectives("backward")


def sequence() -> Any:
    return keras.Input((TOKENS, WIDTH))


def test_a_functional_transformer_costs_what_megatrons_costs() -> None:
    """A gather within a block is right and slow; a bias left whole has its gradient gathered."""
    model = models.transformer()
    made = proposed(model)
    assert reduced(made) == ({"all_reduce": 4}, {"all_reduce": 4})
    found = dict(models.TRANSFORMER_LAYOUT)
    for small in ("tokens/embeddings", "head/kernel", "head/bias"):
        del found[small]
    wanted = parity.layout_map(found, {"batch": 1, "model": 2})
    for v in model.variables:
        layout, other = made[v.path], wanted[v.path]
        assert (layout and layout.axes) == (other and other.axes), v.path
    assert r"up_\d+/kernel" in made
    assert keras_tp.plan(model, made) == made.plan


def test_no_more_is_stored_than_by_replicas_and_all_is_said() -> None:
    """A variable that is neither cut nor explained is one nobody looked at."""
    model = models.transformer()
    made = proposed(model, size=4)
    plan = made.plan
    assert plan is not None
    assert all(
        math.prod(v.local_shape(rank)) <= math.prod(v.shape)
        for v in plan.variables
        for rank in range(4)
    )
    cut = {v.path for v in plan.variables if v.sharded}
    floats = {v.path for v in model.variables if "float" in v.dtype}
    assert cut | made.left.keys() == floats
    assert not cut & made.left.keys()
    assert all(made.left.values())
    assert made.left["norm/gamma"] == "no rule computes LayerNormalization on shards"
    assert "added once" in made.left["down_0/bias"]


def test_one_head_for_each_rank() -> None:
    """A shard of one head lies in memory as the whole does not, so that other code was seen."""
    made = proposed(models.transformer(), size=models.HEADS)
    assert reduced(made) == ({"all_reduce": 4}, {"all_reduce": 4}), str(made)


def test_subclassed_blocks_without_values() -> None:
    """A proposal that reads weights, or names of layers, is none for a model that fits nowhere."""
    with without_values():
        model, _ = llama(keras_tp.device_mesh({"model": 2}), 3, 64, 8, 4, 96, 512, 16)
    made = proposed(model, size=4)
    assert reduced(made) == ({"all_reduce": 6}, {"all_reduce": 6})
    assert set(made) == {
        r"block_\d+/attention/(query|key|value)/kernel".replace("(query|key|value)", name)
        for name in ("query", "key", "value")
    } | {
        r"block_\d+/attention/attention_output/kernel",
        r"block_\d+/gate/kernel",
        r"block_\d+/up/kernel",
        r"block_\d+/down/kernel",
    }
    assert model.variables[0].value.is_meta


def test_large_vocabularies_are_worth_cutting() -> None:
    """A table of gigabytes on each rank; or a gather of the logits of a small head.

    (In a step the large head's are not gathered.)
    """
    with without_values():
        model, _ = llama(keras_tp.device_mesh({"model": 2}), 1, 4096, 8, 4, 64, 65536, 16)
    made = proposed(model)
    assert made["tokens/embeddings"].axes == ("model", None)
    assert made["head/kernel"].axes == (None, "model")
    assert reduced(made)[0] == {"all_reduce": 3}
    with without_values():
        model, _ = llama(keras_tp.device_mesh({"model": 2}), 1, 256, 8, 4, 64, 65536, 16)
    assert proposed(model)["head/kernel"].axes == (None, "model")
    with without_values():
        model, _ = llama(keras_tp.device_mesh({"model": 2}), 1, 256, 8, 4, 64, 250, 16)
    made = proposed(model)
    assert made["tokens/embeddings"] is None
    assert made["head/kernel"] is None
    assert "send 3.0 MiB for 4096 positions" in made.left["head/kernel"]


def test_columns_and_rows_take_turns() -> None:
    """Two columns in a row, the first of which gathers; the layer left over costs nothing."""
    made = proposed(models.dense_stack())
    names = ["sequential/dense", *(f"sequential/dense_{i}" for i in (1, 2, 3))]
    assert styles(made) == dict(zip(names, ["column", "row"] * 2, strict=True))
    assert reduced(made) == ({"all_reduce": 2}, {"all_reduce": 2})
    three = keras.Sequential([keras.Input((8,)), *(layers.Dense(8) for _ in range(3))])
    made = proposed(three)
    assert list(styles(made).values()) == ["column", "row"]
    assert "3 of" not in made.left["sequential_1/dense_6/kernel"]
    assert "send" in made.left["sequential_1/dense_6/kernel"]


def test_a_softmax_in_between_ends_no_more_than_it_must() -> None:
    """A layer that cannot be a column keeps the next from being one."""
    x = keras.Input((8,))
    y = layers.Dense(8, activation="softmax", name="a")(x)
    y = layers.Dense(8, activation="relu", name="b")(y)
    made = proposed(keras.Model(x, layers.Dense(8, name="c")(y)))
    assert styles(made) == {"b": "column", "c": "row"}
    assert made.left["a/kernel"].endswith("softmax along the sharded dim")


class Pair(layers.Layer):
    """A column and a row, if the activation between them treats hidden units alone."""

    def __init__(self, activation: str, **options: Any) -> None:
        super().__init__(**options)
        self.up = layers.Dense(24, activation, name="up")
        self.down = layers.Dense(WIDTH, name="down")

    def build(self, shape: Any) -> None:
        self.up.build(shape)
        self.down.build((*shape[:-1], 24))

    def call(self, x: Any) -> Any:
        return x + self.down(self.up(x))


def stacked(*activations: str) -> Any:
    x = y = sequence()
    for i, activation in enumerate(activations):
        y = Pair(activation, name=f"pair_{i}")(y)
    return keras.Model(x, y)


def test_blocks_alike_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 blocks that take 80 times as long."""
    looks = []
    monkeypatch.setattr(searches, "prove", lambda *given: looks.append(1) or regions.prove(*given))
    made = proposed(stacked(*["relu"] * 12))
    assert len(styles(made)) == 24
    assert set(made) == {r"pair_\d+/up/kernel", r"pair_\d+/up/bias", r"pair_\d+/down/kernel"}
    assert len(looks) == 1


def test_blocks_that_differ_in_settings_are_not_alike() -> None:
    """What was found of the first block taken for all of its class."""
    made = proposed(stacked("relu", "softmax", "gelu"))
    assert set(styles(made)) == {f"pair_{i}/{name}" for i in (0, 2) for name in ("up", "down")}
    why = made.left["pair_1/up/kernel"]
    assert why == "its output would be gathered: softmax along the sharded dim"


class Counting(layers.Layer):
    """Goes round as often as its hidden units say, which is another number on shards."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hidden = layers.Dense(24, name="hidden")
        self.out = layers.Dense(WIDTH, name="out")

    def build(self, shape: Any) -> None:
        self.hidden.build(shape)
        self.out.build((*shape[:-1], 24))

    def call(self, x: Any) -> Any:
        y = self.hidden(x)
        for _ in range(y.shape[-1] // 6):
            x = keras.ops.tanh(x)
        return x + self.out(y)


def test_code_that_is_lost_costs_its_own_layers_only() -> None:
    """A layer whose code runs otherwise on shards keeps all that come before it whole."""
    x = sequence()
    y = layers.Dense(WIDTH, name="down_0")(layers.Dense(32, name="up_0")(x))
    y = layers.Add()([y, Counting(name="counting")(y)])
    y = layers.Dense(WIDTH, name="down_1")(layers.Dense(32, name="up_1")(y))
    made = proposed(keras.Model(x, y))
    columns, rows = ("up_0", "up_1"), ("down_0", "down_1")
    assert styles(made) == dict.fromkeys(columns, "column") | dict.fromkeys(rows, "row")
    assert "on shards it calls" in made.left["counting/hidden/kernel"]


def test_gates_are_cut_together() -> None:
    """A gate left whole meets a shard, so that both are gathered."""
    x = sequence()
    gate = layers.Dense(32, activation="silu", name="gate")(x)
    y = layers.Multiply()([gate, layers.Dense(32, name="up")(x)])
    model = keras.Model(x, layers.Add()([x, layers.Dense(WIDTH, name="down")(y)]))
    made = proposed(model)
    assert styles(made) == {"gate": "column", "up": "column", "down": "row"}
    assert made["gate/bias"].axes == ("model",)
    assert made["down/bias"] is None
    assert reduced(made) == ({"all_reduce": 1}, {"all_reduce": 1})


def test_convolutions_are_left_and_it_is_said() -> None:
    """A weight that is cut and gathered on use, as if that were parallel."""
    x = keras.Input((8, 8, 3))
    y = layers.Conv2D(8, 3, name="conv")(x)
    y = layers.BatchNormalization(name="norm")(y)
    y = layers.Dense(4, name="head")(layers.GlobalAveragePooling2D()(y))
    made = proposed(keras.Model(x, y))
    assert not made
    assert reduced(made) == ({}, {})
    assert made.left["conv/kernel"] == "no rule computes Conv2D on shards"
    assert made.left["norm/moving_mean"] == "no rule computes BatchNormalization on shards"
    assert "send" in made.left["head/kernel"]


def block(attention: Any) -> Any:
    x = sequence()
    y = layers.Add()([x, attention(x, x)])
    z = layers.Dense(32, activation="relu", name="up")(y)
    return keras.Model(x, layers.Add()([y, layers.Dense(WIDTH, name="down")(z)]))


def test_heads_that_do_not_divide() -> None:
    """Heads that are cut through; or an MLP left whole because attention is."""
    made = proposed(block(layers.MultiHeadAttention(3, 8, name="attention")))
    assert styles(made) == {"up": "column", "down": "row"}
    assert "3 of its output (3 x 8) is not cut evenly into 2" in made.left["attention/query/kernel"]


def test_one_head_of_keys_for_all() -> None:
    """Queries that are cut, with keys whose gradient is then one rank's."""
    made = proposed(block(layers.GroupQueryAttention(8, 4, 1, name="attention")))
    assert styles(made) == {"up": "column", "down": "row"}
    assert "1 of its output (1 x 8) is not cut evenly" in made.left["attention/key/kernel"]


def test_experts_are_cut_as_such() -> None:
    """Experts cut within, at twice the communication; or one of the two weights only."""
    x = sequence()
    made = proposed(keras.Model(x, models.Experts(4, 32, name="experts")(x)))
    assert styles(made) == {"experts/up": "batched", "experts/down": "batched"}
    assert made["experts/up/bias"].axes == ("model", None)
    assert reduced(made) == ({"all_gather": 1}, {"all_gather": 1})
    assert "softmax" in made.left["experts/gate/kernel"]


def test_experts_that_do_not_divide_are_cut_within() -> None:
    """Batched labels are looked at alone."""
    x = sequence()
    made = proposed(keras.Model(x, models.Experts(3, 32, name="experts")(x)))
    assert styles(made) == {"experts/up": "column", "experts/down": "row"}
    assert reduced(made) == ({"all_reduce": 1}, {"all_reduce": 1})


def test_nothing_to_cut() -> None:
    """No weights, no ranks, replicas only: an error, or a map along the axis of rows."""
    x = sequence()
    made = proposed(keras.Model(x, layers.ReLU()(x)))
    assert (dict(made), made.left) == ({}, {})
    for mesh in ({"batch": 4}, {"batch": 2, "model": 1}):
        made = keras_tp.auto_layout_map(models.dense_stack(), keras_tp.device_mesh(mesh))
        assert (dict(made), made.axis) == ({}, None)
        assert set(made.left.values()) == {
            f"the mesh ({', '.join(f'{a}={n}' for a, n in mesh.items())}) has no axis of several "
            "ranks to cut along"
        }


def test_one_axis_is_cut_along_and_others_are_named() -> None:
    """The axis of replicas, or an axis of no ranks, taken for the one to cut along."""
    mesh = keras_tp.device_mesh({"rows": 8, "one": 1, "a": 2, "b": 4})
    made = keras_tp.auto_layout_map(models.dense_stack(), mesh, batch_axis="rows")
    assert made.axis == "b"
    assert made.notes == ("nothing is cut along axis 'a': a proposal is for one axis, 'b'.",)
    assert {axis for layout in made.values() for axis in layout.axes} == {None, "b"}
    assert keras_tp.auto_layout_map(models.dense_stack(), mesh, batch_axis=None).axis == "rows"


def test_weights_that_something_else_reads_are_left() -> None:
    """A regularizer gathers its weight in every step; an RNN reads its cell's at every one."""
    x = sequence()
    y = layers.Dense(32, kernel_regularizer="l2", name="up")(x)
    y = layers.Dense(WIDTH, name="down")(y)
    y = layers.TimeDistributed(keras.Sequential([layers.Dense(8), layers.Dense(8)]), name="each")(y)
    made = proposed(keras.Model(x, y))
    assert not made
    assert "regularizer" in made.left["up/kernel"]
    assert {why for path, why in made.left.items() if path.startswith("each")} == {
        "'each' needs it at every time step"
    }


class Same(keras.Model):
    """Two layers of one name, of which one alone could be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.one = layers.Dense(8, name="dense")
        self.two = layers.Dense(8, name="dense")

    def build(self, shape: Any) -> None:
        self.one.build(shape)
        self.two.build(shape)

    def call(self, x: Any) -> Any:
        return self.two(self.one(x))


def test_paths_that_are_there_twice() -> None:
    """A pattern that cuts a row as a column, because it has its name."""
    model = Same()
    model.build((None, 8))
    assert len({v.path for v in model.variables}) == 2
    made = proposed(model)
    assert not made
    assert "no pattern could tell" in made.left["same/dense/kernel"]


def test_a_model_that_cannot_be_called_is_left_with_a_note() -> None:
    """What cannot be seen is guessed by names; or the error of the model is raised here."""

    class Stubborn(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = layers.Dense(8, name="up"), layers.Dense(8, name="down")

        def build(self, shape: Any) -> None:
            self.up.build(shape)
            self.down.build(shape)

        def call(self, x: Any) -> Any:
            if float(keras.ops.sum(x)) > 0:
                x = self.up(x)
            return self.down(x)

    model = Stubborn()
    model.build((None, 8))
    made = proposed(model)
    assert not made
    assert "could not be called without values" in made.notes[0]
    assert set(made.left.values()) >= {
        "its output would be gathered: it is not known how the model calls it"
    }


def test_a_model_stays_as_it_is() -> None:
    """A layer that keeps the call it had in the search; a process group that was started."""
    model = models.transformer()
    before = {v.path: v.numpy().copy() for v in model.variables}
    attributes = [(layer, dict(vars(layer))) for layer in model._flatten_layers()]
    x, _ = models.transformer_data()
    expected = model.predict_on_batch(x)
    made = proposed(model)
    assert not dist.is_initialized()
    assert all((v.numpy() == before[v.path]).all() for v in model.variables)
    for layer, had in attributes:
        assert vars(layer).keys() - had.keys() <= {"_trainable_variables"}
        assert all(vars(layer)[name] is had[name] for name in ("call",) if name in had)
    assert (model.predict_on_batch(x) == expected).all()
    assert isinstance(made, keras.distribution.LayoutMap)


def test_what_cannot_be_planned_is_an_error() -> None:
    """A riddle from deep within."""
    mesh = keras_tp.device_mesh({"model": 2})
    with pytest.raises(keras_tp.LayoutError, match=r"DeviceMesh, got LayoutMap"):
        keras_tp.auto_layout_map(models.dense_stack(), keras.distribution.LayoutMap(mesh))
    with pytest.raises(keras_tp.LayoutError, match="is not built"):
        keras_tp.auto_layout_map(keras.Sequential([layers.Dense(2)]), mesh)
    with pytest.raises(keras_tp.LayoutError, match="is no axis of the mesh"):
        keras_tp.auto_layout_map(models.dense_stack(), mesh, batch_axis="rows")


def test_it_is_drawn() -> None:
    """A table that names no reason; repeated blocks that take a line each."""
    text = str(proposed(models.transformer()))
    (up,) = [line for line in text.splitlines() if line.startswith(r"up_\d+/kernel")]
    assert re.split(r" {2,}", up)[1:] == ["(None, 'model')", "column", "2", "8.0 KiB", "4.0 KiB"]
    (norm,) = [line for line in text.splitlines() if line.startswith(r"norm_a_\d+/gamma")]
    assert norm.endswith("no rule computes LayerNormalization on shards")
    assert "forward 4 all_reduce; backward 4 all_reduce" in text


@pytest.mark.parametrize(
    ("meant", "others", "patterns"),
    [
        (["b_0/k", "b_1/k", "b_12/k"], ["c/k", "b_1/bias"], [r"b_\d+/k"]),
        (["dense/k", "dense_1/k"], ["dense_a/k"], [r"dense(_\d+)?/k"]),
        (["dense/k", "dense_2/k"], ["dense_1/k"], ["dense(|_2)/k"]),
        (["a0b/c_1", "a1b/c_1"], ["a1b/c_2"], [r"a\d+b/c_1"]),
        (["a0/c_0", "a1/c_1"], ["a0/c_1"], ["a0/c_0", "a1/c_1"]),
        (["a.b/k", "a(c/k"], ["axb/k"], [r"a\.b/k", r"a\(c/k"]),
        (["v", "v_1"], ["v_1/v"], [r"v(_\d+)?"]),
    ],
)
def test_patterns_claim_what_is_meant(
    meant: list[str], others: list[str], patterns: list[str]
) -> None:
    """A pattern of a block that claims another layer's weight; a dot that stands for any letter."""
    assert list(patterns_for(dict.fromkeys(meant, 1), [*meant, *others])) == patterns


def gated() -> Any:
    """A block of grouped attention and a gated MLP, with dropout between."""
    x = sequence()
    h = layers.LayerNormalization()(x)
    h = layers.GroupQueryAttention(4, 4, 2, name="attention")(h, h, use_causal_mask=True)
    y = layers.Add()([x, layers.Dropout(0.2, seed=3)(h)])
    h = layers.RMSNormalization()(y)
    gate = layers.Dense(24, activation="silu", name="gate")(h)
    h = layers.Multiply()([gate, layers.Dense(24, name="up")(h)])
    return keras.Model(x, layers.Add()([y, layers.Dense(WIDTH, name="down")(h)]))


def experts() -> Any:
    x = sequence()
    return keras.Model(x, layers.Dense(5)(models.Experts(4, 24, name="experts")(x)))


BUILD = {"gated": (gated, WIDTH), "experts": (experts, 5)}


def trained(name: str) -> parity.Report:
    build, width = BUILD[name]
    random = np.random.default_rng(4)
    data = random.standard_normal((4, TOKENS, WIDTH)), random.standard_normal((4, TOKENS, width))
    model = parity.build_seeded(build)
    return parity.compare(
        build, lambda mesh: keras_tp.auto_layout_map(model, mesh), {"batch": 1, "model": 2}, data
    )


@pytest.mark.parametrize("name", BUILD)
def test_numbers_of_one_process(ranks: Any, name: str) -> None:
    """A proposal that is carried out otherwise than it was confirmed."""
    for report in ranks(2)(trained, name):
        assert report.sharded >= 3
        assert report.worst() < 1e-10, report


def counted(name: str) -> tuple[Any, ...]:
    model = parity.build_seeded(BUILD[name][0])
    plan = proposed(model).plan
    assert plan is not None
    keras_tp.parallelize(model, plan=plan, check_batches=False)
    x = torch.ones((4, TOKENS, WIDTH), requires_grad=True)
    with Collectives() as forward:
        out = model(x)
    with Collectives() as backward:
        out.sum().backward()
    return forward, backward, plan.collectives("forward"), plan.collectives("backward")


@pytest.mark.parametrize("name", BUILD)
def test_it_costs_what_was_said(ranks: Any, name: str) -> None:
    """The plan of a batched layer that slices its input said nothing of the gather backward."""
    for forward, backward, *said in ranks(2)(counted, name):
        assert [forward, backward] == said
