"""What a plan says that metrics send of outputs that stay shards, against what ranks send.

Seen to fail: metrics counted with the loss, or without what weighs them; ones that are built by the
price and left so; a shard of classes that is kept in a metric's state without the gather that
writing it takes; a failing metric that ends the others, or is named though it has nothing to ask;
an output that is gathered twice, or that a cast to what it is makes another; an axis taken for
another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import parity
import pytest
import scripts
import test_metrics
import torch
from counting import Traffic
from keras import layers, ops

import keras_tp
from keras_tp.seam.contexts import stepping

CLASSES, TOKENS = 12, 6
LAYOUT = {
    "words/embeddings": ("model", None),
    "up/kernel": (None, "model"),
    "down/kernel": ("model", None),
    "(head|other)/kernel": (None, "model"),
    "(head|other)/bias": ("model",),
}
PHASES = ("forward", "backward", "optimizer", "metrics")
Sent = dict[tuple[str, tuple[int, ...]], tuple[int, int]]


def body() -> tuple[Any, Any]:
    tokens = keras.Input((TOKENS,), dtype="int32")
    x = layers.Embedding(CLASSES, 6, mask_zero=True, name="words")(tokens)
    return tokens, layers.Dense(6, name="down")(layers.Dense(8, "tanh", name="up")(x))


def one_output() -> Any:
    tokens, x = body()
    return keras.Model(tokens, layers.Dense(CLASSES, name="head")(x))


def two_outputs() -> Any:
    """Of which both stay shards, and a third that is whole."""
    tokens, x = body()
    outputs = {name: layers.Dense(CLASSES, name=name)(x) for name in ("head", "other")}
    return keras.Model(tokens, {**outputs, "size": layers.Dense(1, name="size")(x)})


class OwnMetrics(keras.Model):
    """Computes a metric of its own around those it is compiled with."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.spread = keras.metrics.Mean(name="spread")

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        found = super().compute_metrics(x, y, y_pred, sample_weight)
        self.spread.update_state(ops.max(y_pred, axis=-1) - ops.min(y_pred, axis=-1))
        return {**found, "spread": self.spread.result()}


def with_own_metrics() -> Any:
    tokens, x = body()
    return OwnMetrics(tokens, layers.Dense(CLASSES, name="head")(x))


class OfValues(keras.metrics.Mean):
    """Looks at values, once it has gathered all of them."""

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        super().update_state(float(np.asarray(ops.cumsum(y_pred, -1).detach()).max()))


class PerClass(keras.metrics.Metric):
    """What it keeps is of the classes, and is written as a shard of them; it is built late."""

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        if not self.variables:
            self.total = self.add_variable((CLASSES,), "zeros", name="total")
        summed = ops.sum(ops.reshape(ops.abs(y_pred), (-1, CLASSES)), axis=0)
        self.total.assign(self.total + summed)

    def result(self) -> Any:
        return ops.sum(self.total)  # (a shard would give a sum for ranks to add)


def labels() -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def in_order(y: Any, y_pred: Any) -> Any:
    """What is not known to keep shards apart."""
    return ops.mean(ops.square(ops.cumsum(y_pred, axis=-1) - ops.convert_to_tensor(y)), axis=-1)


def classes() -> Any:
    return keras.losses.CategoricalCrossentropy(from_logits=True)


@dataclass
class Case:
    """A model, what it is compiled with, and how its targets and weights are made."""

    compiled: Callable[[], dict[str, Any]]
    build: Callable[[], Any] = one_output
    one_hot: bool = False
    weighted: bool = False
    named: bool = False  # one of the metrics needs values, which the price says
    policy: str = "float32"
    phases: set[str] = field(default_factory=lambda: {"forward", "backward", "metrics"})


ACCURACY, TOP = "sparse_categorical_accuracy", "sparse_top_k_categorical_accuracy"
CASES = {
    "accuracy": Case(lambda: {"loss": labels(), "metrics": [ACCURACY]}),
    "top": Case(lambda: {"loss": labels(), "metrics": [TOP, "accuracy"]}),
    "half": Case(lambda: {"loss": labels(), "metrics": [ACCURACY, TOP]}, policy="mixed_bfloat16"),
    "gathered": Case(
        lambda: {
            "loss": classes(),
            "metrics": ["accuracy", keras.metrics.CosineSimilarity(), "auc", "accuracy"],
        },
        one_hot=True,
        named=True,  # the AUC, though it sends no more than is counted
    ),
    # What the loss has gathered, no metric has to.
    "gathered by the loss": Case(
        lambda: {"loss": in_order, "metrics": [in_order, OfValues(), "cosine_similarity"]},
        one_hot=True,
        phases={"forward", "backward"},
    ),
    "weighted": Case(
        lambda: {"loss": labels(), "metrics": [TOP], "weighted_metrics": [ACCURACY, TOP]},
        weighted=True,
    ),
    "weighted, by nothing": Case(lambda: {"loss": labels(), "weighted_metrics": [ACCURACY]}),
    "several": Case(
        lambda: {
            "loss": {"head": labels(), "other": labels(), "size": "mse"},
            "metrics": {"head": [ACCURACY], "other": [TOP, "accuracy"], "size": ["mae"]},
            "weighted_metrics": {"other": [ACCURACY], "size": ["mse"]},
        },
        two_outputs,
        weighted=True,
    ),
    "own": Case(lambda: {"loss": labels(), "metrics": [ACCURACY]}, with_own_metrics),
    "per class": Case(lambda: {"loss": labels(), "metrics": [PerClass(), ACCURACY]}),
    "of values": Case(
        lambda: {"loss": labels(), "metrics": [ACCURACY, OfValues(name="looks"), TOP]}, named=True
    ),
    "none": Case(lambda: {"loss": labels()}, phases={"forward", "backward"}),
}


def data_of(case: Case) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(2)
    x, y = random.integers(0, CLASSES, (2, 5, TOKENS))
    weights = random.random((5, TOKENS)).astype("float32") if case.weighted else None
    targets: Any = np.eye(CLASSES, dtype="float32")[y] if case.one_hot else y
    if case.build is two_outputs:
        size = random.random((5, TOKENS, 1)).astype("float32")
        targets = {"head": y, "other": y[:, ::-1].copy(), "size": size}
        weights = dict.fromkeys(targets, weights)
    return x.astype("int32"), targets, weights


def as_tensor(array: Any) -> Any:
    return None if array is None else torch.as_tensor(array)


def by_hand(model: Any, x: Any, y: Any, weights: Any) -> dict[str, Sent]:
    """A step as Keras's `train_step` makes it, and what it sends in each phase."""
    traffic = {phase: Traffic() for phase in PHASES}
    with stepping():
        with traffic["forward"]:
            outputs = model(x, training=True)
            model.zero_grad()
            loss = model._compute_loss(x=x, y=y, y_pred=outputs, sample_weight=weights)
        with traffic["backward"]:
            loss.backward()
        trained = model.trainable_weights[:]
        gradients = [v.value.grad for v in trained]
        with traffic["optimizer"], torch.no_grad():
            model.optimizer.apply(gradients, trained)
        with traffic["metrics"]:
            model.compute_metrics(x, y, outputs, sample_weight=weights)
    return {phase: found.groups for phase, found in traffic.items()}


def planned(cost: Any, rank: int, mesh: dict[str, int]) -> dict[str, Sent]:
    """What a price has, by phase, kind and the ranks themselves."""
    numbers = np.arange(np.prod(list(mesh.values()))).reshape(list(mesh.values()))
    (here,) = np.argwhere(numbers == rank)
    groups = {"all": tuple(numbers.ravel().tolist())}
    for dim, axis in enumerate(mesh):
        line = tuple(slice(None) if d == dim else at for d, at in enumerate(here))
        groups[axis] = tuple(numbers[line].tolist())
    found: dict[str, Sent] = {phase: {} for phase in PHASES}
    for traffic in cost.traffic:
        key = traffic.kind, groups[traffic.axis]
        count, size = found[traffic.phase].get(key, (0, 0))
        found[traffic.phase][key] = count + traffic.count, size + traffic.bytes
    return found


def added(phases: dict[str, Sent]) -> Sent:
    total: Sent = {}
    for sent in phases.values():
        for key, (count, size) in sent.items():
            before = total.get(key, (0, 0))
            total[key] = before[0] + count, before[1] + size
    return total


def measured(mesh: dict[str, int]) -> dict[str, tuple[Any, ...]]:
    """Of each case what was planned to be sent, what was by hand, what by Keras, and notes."""
    found = {}
    rank = torch.distributed.get_rank()
    for name, case in CASES.items():
        keras.config.set_dtype_policy(case.policy)
        try:
            with scripts.open_from(2):
                model = parity.build_seeded(case.build)
                model.compile(keras.optimizers.Adam(), **case.compiled())
                plan = parity.planned(model, parity.layout_map(LAYOUT, mesh))
                x, y, weights = data_of(case)
                cost = plan.cost(model, x, targets=y, sample_weight=weights, rank=rank)
                keras_tp.parallelize(model, plan=plan, check_batches=False)
            x, y, weights = keras.tree.map_structure(as_tensor, (x, y, weights))
            for _ in range(2):  # rows are compared in these, and in the fourth
                model.train_on_batch(x, y, weights)
            hand = by_hand(model, x, y, weights)
            model.train_on_batch(x, y, weights)
            whole = Traffic()
            with whole:
                model.train_on_batch(x, y, weights)
            found[name] = planned(cost, rank, mesh), hand, whole.groups, " ".join(cost.notes)
        finally:
            keras.config.set_dtype_policy("float32")
    return found


@pytest.mark.parametrize("mesh", [{"batch": 1, "model": 2}, {"batch": 2, "model": 2}], ids=str)
def test_metrics_send_what_is_planned(ranks: Any, mesh: dict[str, int]) -> None:
    """An accuracy of a shard that was taken to be free; a gather for each metric where the first
    one's is kept; sums along the wrong axis; rows of one replica where all are looked at.
    """
    for found in ranks(mesh["batch"] * mesh["model"])(measured, mesh, timeout=180):
        for name, (price, by_hand, by_keras, notes) in found.items():
            assert price == by_hand, name
            assert added(price) == by_keras, name
            assert {phase for phase, sent in price.items() if sent} == CASES[name].phases, name
            assert ("wants values" in notes) == CASES[name].named, name
            assert ("compiled with no metrics" in notes) == (name == "none"), name


WANT_VALUES = {
    "AUC",
    "Hinge",
    "OneHotIoU",
    "OneHotMeanIoU",
    "PrecisionAtRecall",
    "RecallAtPrecision",
    "SensitivityAtSpecificity",
    "SpecificityAtSensitivity",
    "SquaredHinge",
}


def one_by_one(mesh: str) -> dict[str, tuple[Sent, Sent, bool]]:
    """Of every metric of Keras what it was planned to send, what it sent, and if it is named."""
    x, targets = test_metrics.X.astype("float32"), test_metrics.TARGETS
    weights = dict.fromkeys(targets, test_metrics.WEIGHTS)
    rank = torch.distributed.get_rank()

    def compiled(name: str) -> None:
        output, options = test_metrics.METRICS[name]
        metrics = {output: [getattr(keras.metrics, name)(**options)]}
        loss = {"one_hot": "categorical_crossentropy"}
        model.compile("sgd", loss, metrics=metrics, weighted_metrics=metrics)

    with scripts.open_from(1):
        model = parity.build_seeded(test_metrics.many_ways)
        plan = parity.planned(model, scripts.layout_on(test_metrics.LAYOUT, mesh))
    there = [name for name in test_metrics.METRICS if hasattr(keras.metrics, name)]
    prices = {}
    for name in there:
        compiled(name)
        cost = plan.cost(model, x, targets=targets, sample_weight=weights, rank=rank)
        prices[name] = cost, any("wants values" in note for note in cost.notes)
    with scripts.open_from(1):
        keras_tp.parallelize(model, plan=plan, check_batches=False)
    axes = test_metrics.features.MESHES[mesh]
    x, y, w = keras.tree.map_structure(torch.as_tensor, (x, targets, weights))
    found = {}
    for name in there:
        compiled(name)
        with stepping():
            outputs = model(x, training=True)
            with (traffic := Traffic()):
                model.compute_metrics(x, y, outputs, sample_weight=w)
        cost, named = prices[name]
        found[name] = planned(cost, rank, axes)["metrics"], traffic.groups, named
    return found


def test_every_metric_sends_what_is_planned(ranks: Any) -> None:
    """A metric whose way of computing differs without values, and nobody says so."""
    for found in ranks(2)(one_by_one, "model=2"):
        for name, (price, sent, named) in found.items():
            assert named == (name in WANT_VALUES), name
            if not named:
                assert price == sent, name
            for key, (count, size) in price.items():
                assert count <= sent[key][0], name
                assert size <= sent[key][1], name


def prepared(**compiled: Any) -> tuple[Any, Any]:
    with scripts.open_from(2):
        model = parity.build_seeded(one_output)
        layout_map = parity.layout_map(LAYOUT, {"batch": 2, "model": 2})
        plan = keras_tp.plan(model, layout_map, advise=False)
    if compiled:
        model.compile("sgd", **compiled)
    return model, plan


def test_metrics_are_as_before() -> None:
    """A metric that was built without values, or updated; a stand-in that stays."""
    late, entropy = PerClass(name="late"), keras.metrics.SparseCategoricalCrossentropy()
    model, plan = prepared(loss=labels(), metrics=[late, "accuracy"], weighted_metrics=[entropy])
    before = dict(vars(model)), dict(vars(late)), dict(vars(entropy))
    plan.cost(model, (4, TOKENS), targets=(4, TOKENS))
    assert (dict(vars(model)), dict(vars(late)), dict(vars(entropy))) == before
    assert not late.variables
    assert not model._compile_metrics.built
    assert [float(v.numpy()) for v in entropy.variables] == [0, 0]
    x, y, _ = data_of(CASES["accuracy"])
    seen = model.fit(x, y, verbose=0).history
    assert seen["late"][0] > 0
    state = [v.numpy() for v in model.metrics_variables]
    plan.cost(model, x, targets=y)
    for variable, value in zip(model.metrics_variables, state, strict=True):
        assert (variable.numpy() == value).all()
    assert len(late.variables) == 1


def test_what_is_not_counted_of_metrics_is_said() -> None:
    """A price without metrics that looks like one with them; a metric nobody can count, unnamed."""
    batch = (4, TOKENS)
    model, plan = prepared()
    said = " ".join(plan.cost(model, batch).notes)
    assert "loss and metrics are not counted: compile the model with them, give targets" in said
    assert "communicate about that of 'head', which stays a shard" in said
    model.compile("sgd", labels())
    assert "loss and metrics are not counted: give targets" in str(plan.cost(model, batch))
    cost = plan.cost(model, batch, targets=batch)
    assert any("no metrics, and none are counted" in note for note in cost.notes)
    assert not cost.collectives("metrics")
    model.compile("sgd", labels(), metrics=[OfValues(name="looks"), ACCURACY])
    cost = plan.cost(model, batch, targets=batch)
    assert any(note.startswith("the metric 'looks' wants values") for note in cost.notes)
    # What it has gathered is counted, and asked for again by none.
    assert cost.collectives("metrics") == {"all_gather": 1}
    assert ["metrics", "all_gather", "model"] in [
        line.split()[:3] for line in str(cost).splitlines()
    ]
    with pytest.raises(ValueError, match="give both"):
        plan.cost(model, batch, sample_weight=batch)
