"""Outputs that stay shards until the loss: the numbers of whole ones, and little communication.

`test_losses` and `test_metrics` have every loss and metric of Keras computed on them. Seen to
fail: `check_range` doing nothing (labels), `start` being 0, `Softmax.backward` without its sum
over the ranks, `_fitting` giving a whole tensor that a gradient is wanted of as it is ("times a
weight"), writes computed on the part ("written into"), `whole` gathering without a graph, steps
of the user's marked as Keras's, `Recorder.take` doing nothing, and tables that say no mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import parity
import pytest
import scripts
import torch
from counting import Collectives, Traffic
from keras import layers
from precision import real_float64
from torch.nn import functional

import keras_tp
from keras_tp import heads
from keras_tp.collectives import Axis
from keras_tp.layouts import MeshShape
from keras_tp.meetings import AxisMeeting
from keras_tp.mesh import torch_mesh
from keras_tp.outputs import ShardedOutput, is_sharded

SHAPE = (3, 5, 8)
RANDOM = np.random.default_rng(6)
LABELS = torch.tensor(RANDOM.integers(0, 8, (3, 5)))
SOME = torch.where(LABELS > 2, LABELS, -100)
CHANCES = torch.tensor(RANDOM.random(SHAPE))
ONE = torch.tensor(RANDOM.random((1,)), requires_grad=True)
EIGHT = torch.tensor(RANDOM.random((8,)), requires_grad=True)
PICK = torch.tensor(RANDOM.integers(0, 8, (3, 5, 5)))

Function = Callable[[torch.Tensor], Any]


def written(y: torch.Tensor) -> torch.Tensor:
    y = y * 1
    y[..., 0] = 7.0
    return y


def copied(y: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros(SHAPE, dtype=y.dtype)
    with torch.no_grad():
        kept.copy_(y)
    return kept * y


# What stays on shards to the end, what is whole without a gather, and what has to be gathered.
SHARDS: dict[str, Function] = {
    "elementwise": lambda y: (y * 2 + y.tanh()).clip(-1, 0.5),
    "with a whole tensor": lambda y: torch.where(CHANCES > 0.5, y - CHANCES, y / 3),
    "times a weight": lambda y: y * ONE,
    "with a weight for each class": lambda y: y * EIGHT + EIGHT,
    "softmax": lambda y: y.softmax(-1),
    "log_softmax": lambda y: torch.log_softmax(y, dim=2),
    "softmax of tokens": lambda y: y.softmax(1),
    "moved": lambda y: y.movedim(-1, 1).transpose(0, 1),
    "of other shape": lambda y: y.reshape(15, 8).reshape(-1, 4, 2).flatten(0, 0),
    "merged": lambda y: y.movedim(-1, 0).reshape(8, 15),
    "a part of the rows": lambda y: y[:, 1:, None],
    "two of them": lambda y: torch.cat([y, y * 2], 0),
    "summed over tokens": lambda y: y.sum(1),
    "cast": lambda y: y.to(torch.float32).to(torch.float64),
}
WHOLE: dict[str, Function] = {
    "cross-entropy": lambda y: functional.cross_entropy(y.movedim(-1, 1), LABELS, reduction="none"),
    "cross-entropy of some": lambda y: functional.cross_entropy(
        y.movedim(-1, 1), SOME, reduction="none"
    ),
    "likelihood": lambda y: functional.nll_loss(
        y.log_softmax(-1).movedim(-1, 1), SOME, reduction="none"
    ),
    "of one row": lambda y: functional.cross_entropy(y[0, 0], LABELS[0, 0], reduction="none"),
    "sum": lambda y: y.sum(-1) + y.sum(),
    "mean": lambda y: y.mean(dim=-1, keepdim=True) * y.mean(),
    "sum of squares, twice": lambda y: (y / y.square().sum(-1, keepdim=True)).square().sum((1, 2)),
    "logsumexp": lambda y: y.logsumexp(-1) + y.logsumexp(2, keepdim=True).sum(),
    "argmax": lambda y: y.detach().argmax(-1),
    "argmax of equals": lambda y: (y.detach() > 0).double().argmax(-1, keepdim=True),
    "largest": lambda y: y.detach().amax(-1),
    "least": lambda y: y.detach().amin(-1),
    "top": lambda y: y.topk(3, dim=-1).values,
    "which are top": lambda y: torch.topk(y, 6).indices,
    "picked": lambda y: y.gather(-1, PICK[..., :1]),
    "picked, numpy's way": lambda y: torch.take_along_dim(y, PICK[..., :1], dim=-1),
}
GATHERED: dict[str, Function] = {
    "cumsum": lambda y: y.cumsum(-1),
    "sorted": lambda y: y.sort(-1).values,
    "one class": lambda y: y[..., 3],
    "every other class": lambda y: y[..., ::2],
    "flat": lambda y: y.reshape(-1),
    "written into": written,
    "copied": copied,
    "weighted cross-entropy": lambda y: functional.cross_entropy(y[0], LABELS[0], EIGHT.detach()),
    "smoothed cross-entropy": lambda y: functional.cross_entropy(
        y[0], LABELS[0], label_smoothing=0.1
    ),
    "largest, with a gradient": lambda y: y.amax(-1),
    "matmul": lambda y: y @ CHANCES.transpose(1, 2),
    "numpy": lambda y: torch.as_tensor(y.detach().numpy()),
    "several picked": lambda y: y.gather(-1, PICK),
}


def computed(name: str, function: Function, axis: Axis) -> tuple[str, float]:
    """How it was computed, and the largest difference of values and gradients."""
    full = torch.tensor(np.random.default_rng(1).standard_normal(SHAPE), requires_grad=True)
    part = full.detach().chunk(axis.size, -1)[axis.rank].clone().requires_grad_()
    output = ShardedOutput.of(part, 2, AxisMeeting(axis))
    assert output.shape == SHAPE
    assert output.requires_grad
    assert "ShardedOutput" in repr(output)
    found = []
    for tensor in (full, output):
        with Collectives() as counts:
            result = function(tensor)
        how = "shards" if is_sharded(result) else "whole"
        gathers = counts["all_gather"]
        value = result * 1.0 if is_sharded(result) else result
        ONE.grad = EIGHT.grad = None
        if value.requires_grad:
            weights = torch.cos(torch.arange(value.numel())).reshape(value.shape)
            (value * weights).sum().backward()
        found.append((np.asarray((value + 0).detach()), ONE.grad, EIGHT.grad))
    if gathers and name not in ("argmax", "argmax of equals", "top", "which are top"):
        how = "gathered" if gathers == 1 else f"{gathers} gathers"
    one, many = found
    gaps = [parity.difference(one[0], many[0])]
    if full.grad is not None:
        mine = full.grad.chunk(axis.size, -1)[axis.rank]
        gaps.append(parity.difference(mine.numpy(), part.grad.numpy()))  # type: ignore[union-attr]
    for a, b in zip(one[1:], many[1:], strict=True):
        assert (a is None) == (b is None)
        gaps += [] if a is None else [parity.difference(a.numpy(), b.numpy())]
    return how, max(gaps)


def all_functions(size: int) -> dict[str, tuple[str, float]]:
    axis = Axis.of(torch_mesh(MeshShape(("model",), (size,), tuple(range(size)))), "model")
    cases = {**SHARDS, **WHOLE, **GATHERED}
    return {name: computed(name, function, axis) for name, function in cases.items()}


@pytest.mark.parametrize("size", [2, 4])
def test_functions_of_a_part(ranks: Any, size: int) -> None:
    """A function that mixes classes computed on some of them; a gradient that lacks what other
    ranks contribute, or has it twice; something gathered that need not be.
    """
    for found in ranks(size)(all_functions, size):
        wrong = {name: gap for name, (_, gap) in found.items() if not gap < 1e-12}
        assert not wrong
        kinds = {"shards": SHARDS, "whole": WHOLE, "gathered": GATHERED}
        expected = {name: kind for kind, cases in kinds.items() for name in cases}
        assert {name: how for name, (how, _) in found.items()} == expected


def text(rows: int = 4) -> tuple[Any, Any]:
    tokens = np.random.default_rng(2).integers(0, 12, (rows, 7))
    return tokens[:, :-1].astype("int32"), tokens[:, 1:]


def with_dense(tie: bool = False) -> Any:
    """A language model of 12 words, of which 0 is masked, with a head of its own."""
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(12, 6, mask_zero=True, name="words")(tokens)
    x = layers.Dense(8, "tanh", name="up")(x)
    x = layers.Dense(6, name="down")(x)
    return keras.Model(tokens, layers.Dense(12, name="head")(x))


class Halved(layers.Layer):
    """What is masked, halved."""

    supports_masking = True

    def call(self, x: Any, mask: Any = None) -> Any:
        return x if mask is None else x * (1 + keras.ops.cast(mask, x.dtype))[..., None] / 2


def tied(tie: bool = True) -> Any:
    """The same, whose head is its table of words."""
    tokens = keras.Input((6,), dtype="int32")
    table = layers.ReversibleEmbedding(
        12, 6, tie_weights=tie, mask_zero=True, logit_soft_cap=3.0, name="words"
    )
    x = layers.Dense(8, "tanh", name="up")(Halved()(table(tokens)))
    x = layers.Dense(6, "tanh", name="down")(x)
    return keras.Model(tokens, table(x, reverse=True))


def untied() -> Any:
    return tied(tie=False)


LAYOUT = {
    "words/embeddings": ("model", None),
    "up/kernel": (None, "model"),
    "up/bias": ("model",),
    "down/kernel": ("model", None),
}
HEAD = {"head/kernel": (None, "model"), "head/bias": ("model",)}
UNTIED = {"words/reverse_embeddings": (None, "model")}
BUILDERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "dense": (with_dense, {**LAYOUT, **HEAD}),
    "tied": (tied, LAYOUT),
    "untied": (untied, {**LAYOUT, **UNTIED}),
}


def labels(**options: Any) -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def trained(build: str, mesh: str) -> dict[str, float]:
    """What training sees with masks, sample weights, an ignored class, smoothing and metrics."""

    def script(model: Any) -> dict[str, Any]:
        x, y = text()
        weights = np.linspace(0.5, 2, y.size).reshape(y.shape)
        seen: dict[str, Any] = {}
        one_hot = np.eye(12)[y]
        smooth = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
        for name, loss, targets in (
            ("labels", labels(), y),
            ("ignored", labels(ignore_class=3), y),
            ("smooth", smooth, one_hot),
        ):
            kind = "sparse_" * (targets is y)
            metrics = [f"{kind}categorical_accuracy", f"{kind}top_k_categorical_accuracy"]
            optimizer = keras.optimizers.Adam(0.01)
            model.compile(optimizer, loss, metrics=metrics, weighted_metrics=metrics)
            given = {"sample_weight": weights, "batch_size": 3, "verbose": 0}
            seen[name] = list(model.fit(x, targets, epochs=2, **given).history.values())
            seen[name] += model.evaluate(x, targets, **given)
        seen["predicted"] = model.predict(x, verbose=0)
        return seen

    with real_float64(), scripts.open_from(2):
        return scripts.both(*BUILDERS[build], mesh, script)[1]


@pytest.mark.parametrize(("mesh", "fewest"), scripts.OPEN)
@pytest.mark.parametrize("build", BUILDERS)
def test_language_models(ranks: Any, mesh: str, fewest: int, build: str) -> None:
    """Weights of a token counted once for each rank, a mask of a shard, an ignored class that is
    another rank's; gradients of a tied table that lack one of its two uses.
    """
    for gaps in ranks(scripts.size_of(mesh))(trained, build, mesh):
        assert max(gaps.values()) < 1e-10, gaps


def steps(build: str) -> tuple[Counter[str], Counter[str], dict[Any, Any], Any]:
    """Collectives of a training step, of one of evaluation, their bytes, and the price."""
    with scripts.open_from(2):
        make, layout = BUILDERS[build]
        model = parity.build_seeded(make)
        model.compile(keras.optimizers.SGD(), labels())
        plan = keras_tp.plan(model, parity.layout_map(layout, {"model": 2}))
        x, y = text()
        cost = plan.cost(model, x, targets=y)
        keras_tp.parallelize(model, plan=plan, check_batches=False)
    model.train_on_batch(x, y)
    with Traffic() as sent:
        model.train_on_batch(x, y)
    with Collectives() as training:
        model.train_on_batch(x, y)
    with Collectives() as testing:
        model.test_on_batch(x, y)
    planned: dict[Any, Any] = {}
    for traffic in cost.traffic:
        count, size = planned.get((traffic.kind, traffic.ranks), (0, 0))
        planned[traffic.kind, traffic.ranks] = count + traffic.count, size + traffic.bytes
    return training, testing, sent, planned


@pytest.mark.parametrize("build", BUILDERS)
def test_what_a_step_sends(ranks: Any, build: str) -> None:
    """Logits that are gathered all the same: for Megatron-LM's layout a step sends the sums of the
    table and the row, two small ones for the loss, and the gradients of what two columns read.
    """
    for training, testing, sent, planned in ranks(2)(steps, build):
        assert training == {"all_reduce": 2 + 2 + 2}
        assert testing == {"all_reduce": 2 + 2}
        assert sent == planned


def refused() -> tuple[str, str]:
    with scripts.open_from(2):
        model = parity.build_seeded(with_dense)
        keras_tp.parallelize(model, parity.layout_map({**LAYOUT, **HEAD}, {"model": 2}))
    x, y = text()
    y[1, 1] = 12
    model.compile("sgd", labels())
    with pytest.raises(RuntimeError) as raised:
        model.train_on_batch(x, y)
    return str(raised.value), type(model(x)).__name__


def test_a_label_beyond_the_vocabulary(ranks: Any) -> None:
    """A label that no rank has: its logit would be 0, in silence. Elsewhere outputs are whole."""
    for message, kind in ranks(2)(refused):
        assert "cross_entropy was given an index that is out of range" in message
        assert kind == "Tensor"


class OwnStep(keras.Model):
    """A step that looks at the outputs on the first rank alone."""

    def train_step(self, data: Any) -> Any:
        seen = []
        outputs = self(data[0], training=True)
        if torch.distributed.get_rank() == 0:
            seen.append(float(outputs.detach().sum()))
        assert type(outputs) is torch.Tensor
        return {"loss": 0.0}


def own_step() -> float:
    with scripts.open_from(2):
        model = parity.build_seeded(lambda: OwnStep(*_ends(with_dense())))
        keras_tp.parallelize(model, parity.layout_map({**LAYOUT, **HEAD}, {"model": 2}))
    model.compile("sgd", labels())
    return float(model.train_on_batch(*text()))


def _ends(model: Any) -> tuple[Any, Any]:
    return model.inputs[0], model.outputs[0]


def test_a_step_of_the_users_has_whole_outputs(ranks: Any) -> None:
    """A collective that one rank makes alone, because it prints something of the outputs."""
    assert ranks(2)(own_step) == [0.0, 0.0]


def test_which_layers_are_heads() -> None:
    """A small head, whose gather is cheaper, and outputs that code mixes, cuts or uses twice."""
    mesh = keras.distribution.DeviceMesh((2,), ["model"], ["cpu:0", "cpu:1"])

    def open_layers(end: Callable[[Any, Any], Any], classes: int) -> list[str]:
        layout_map = keras.distribution.LayoutMap(mesh)
        layout_map["head.*kernel"] = (None, "model")
        keras.backend.clear_session()
        x = keras.Input((4,))
        head = layers.Dense(classes, name="head")
        plan = keras_tp.plan(keras.Model(x, end(head, x)), layout_map)
        noted = [note for note in plan.notes if "stays a shard" in note]
        found = [p.path for p in plan.layers if any(s.open for s in p.styles)]
        assert len(noted) == len(found)
        return found

    fewest = heads.FEWEST
    assert open_layers(lambda head, x: head(x), fewest) == ["head"]
    assert open_layers(lambda head, x: head(x), fewest - 2) == []
    assert open_layers(lambda head, x: head(x), fewest + 1) == []  # not even
    assert open_layers(lambda head, x: layers.Softmax()(head(x)), fewest) == ["head"]
    assert open_layers(lambda head, x: {"a": head(x), "b": 2 * head(x)}, fewest) == []
    assert open_layers(lambda head, x: head(x)[:, :5], fewest) == []
    assert open_layers(lambda head, x: layers.Dense(3)(head(x)), fewest) == []
    both = lambda head, x: (y := head(x), layers.Dense(3)(y))  # noqa: E731
    assert open_layers(both, fewest) == []
    again = lambda head, x: (y := head(x), layers.Dense(fewest, name="head_2")(y))  # noqa: E731
    assert open_layers(again, fewest) == ["head_2"]
