"""Batches: whatever a script does around the step, it sees whole ones and one process's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import distributed
import features
import keras
import numpy as np
import parity
import pytest
import scripts
import torch
import torch.distributed as dist
from counting import Collectives
from keras import layers, ops
from precision import real_float64
from torch.utils.data import DataLoader, TensorDataset

import keras_tp

X, Y = distributed.classes(10)
WEIGHTS = np.linspace(0.5, 1.5, 10)


def classifier() -> Any:
    return distributed.classifier()


def compiled(model: Any, **options: Any) -> Any:
    options = {
        "loss": "categorical_crossentropy",
        "metrics": ["accuracy", keras.metrics.FalsePositives(thresholds=0.3)],
        "weighted_metrics": ["accuracy"],
        **options,
    }
    model.compile(keras.optimizers.Adam(0.01), **options)
    return model


def fitted(model: Any, *data: Any, **options: Any) -> dict[str, Any]:
    """Its history: of ten rows in batches of four, the last of two, unless told otherwise."""
    options = {"batch_size": 4, "shuffle": False, **options}
    return model.fit(*(data or (X, Y)), verbose=0, **options).history


def fitting(**options: Any) -> scripts.Script:
    return lambda model: fitted(compiled(model), **options)


def fewer_rows(model: Any) -> dict[str, Any]:
    return fitted(compiled(model), X[:5], Y[:5], validation_data=(X[:1], Y[:1]))


def epochs(model: Any) -> dict[str, Any]:
    """The second of two, of two batches each, of an endless source."""
    history = fitted(
        compiled(model), generated(), batch_size=None, steps_per_epoch=2, initial_epoch=1, epochs=2
    )
    assert len(history["loss"]) == 1
    return history


def validation(model: Any) -> dict[str, Any]:
    """In the second of two epochs, two of three batches."""
    history = fitted(
        compiled(model),
        epochs=2,
        validation_data=(X, Y, WEIGHTS),
        validation_batch_size=4,
        validation_steps=2,
        validation_freq=2,
    )
    assert (len(history["loss"]), len(history["val_loss"])) == (2, 1)
    return history


def predicted(model: Any) -> dict[str, Any]:
    by_four = model.predict(X, batch_size=4, verbose=0)
    assert by_four.shape == (10, 4)
    whole = model.predict(Batches(), verbose=0)
    np.testing.assert_allclose(by_four, model(X).detach(), rtol=1e-12)  # in order
    return {"arrays": by_four, "a PyDataset": whole, "one row": model.predict(X[:1], verbose=0)}


def evaluated(model: Any) -> dict[str, Any]:
    options = {"batch_size": 4, "verbose": 0}
    compiled(model)
    return {
        "list": model.evaluate(X, Y, **options),
        "dict": model.evaluate(X, Y, sample_weight=WEIGHTS, return_dict=True, **options),
    }


def by_batch(model: Any) -> dict[str, Any]:
    compiled(model)
    weights = {0: 1.0, 1: 2.0, 2: 0.5, 3: 0.0}
    return {
        "train": model.train_on_batch(X, Y),
        "weighted": model.train_on_batch(X[:7], Y[:7], sample_weight=WEIGHTS[:7]),
        "of classes": model.train_on_batch(X, Y, class_weight=weights, return_dict=True),
        "test": model.test_on_batch(X[:3], Y[:3], WEIGHTS[:3], return_dict=True),
        "predict": model.predict_on_batch(X[:5]),
    }


# Sources.


class Batches(keras.utils.PyDataset):
    def __init__(self) -> None:
        super().__init__(workers=1)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        mine = slice(4 * index, 4 * index + 4)
        return X[mine], Y[mine], WEIGHTS[mine]


def generated() -> Iterator[Any]:
    while True:
        yield from (Batches()[i] for i in range(3))


def from_dataset(model: Any) -> dict[str, Any]:
    history = fitted(compiled(model), Batches(), batch_size=None, shuffle=True)
    return {**history, "evaluated": model.evaluate(Batches(), verbose=0)}


def from_generator(model: Any) -> dict[str, Any]:
    history = fitted(compiled(model), generated(), batch_size=None, steps_per_epoch=3)
    return {**history, "evaluated": model.evaluate(generated(), steps=3, verbose=0)}


# Steps and losses of one's own.


class OwnSteps(keras.Model):
    """The steps of Keras's guide, with a loss and metrics that Keras does not compile."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.size = keras.metrics.Sum(name="size")
        self.error = keras.metrics.Mean(name="error")

    @property
    def metrics(self) -> list[Any]:
        return [self.size, self.error]

    def train_step(self, data: Any) -> Any:
        x, y = data
        self.zero_grad()
        outputs = self(x, training=True)
        loss = ops.mean(ops.square(outputs - y)) + sum(self.losses)
        loss.backward()
        weights = self.trainable_weights
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in weights], weights)
        return self.seen(outputs, loss)

    def test_step(self, data: Any) -> Any:
        x, y = data
        outputs = self(x, training=False)
        return self.seen(outputs, ops.max(ops.abs(outputs - y)))

    def seen(self, outputs: Any, loss: Any) -> Any:
        self.size.update_state(outputs)
        self.error.update_state(loss, sample_weight=len(outputs))
        return {metric.name: metric.result() for metric in self.metrics}


class OwnLoss(keras.Model):
    """A loss of outputs, of pairs of rows and of a weight."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True) -> Any:  # type: ignore[no-untyped-def]
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        spread = ops.mean(ops.square(y_pred - ops.mean(y_pred, axis=0)))
        return loss - 0.1 * spread + 0.1 * ops.norm(self.get_layer("middle").kernel)


def with_own_steps() -> Any:
    model = distributed.classifier()
    return OwnSteps(model.inputs, model.outputs)


def with_own_loss() -> Any:
    model = distributed.classifier()
    return OwnLoss(model.inputs, model.outputs)


def own_steps(model: Any) -> dict[str, Any]:
    model.compile(keras.optimizers.Adam(0.01))
    history = fitted(model, validation_data=(X[:7], Y[:7]))
    loader = DataLoader(TensorDataset(torch.tensor(X), torch.tensor(Y)), 4)
    again = model.fit(loader, verbose=0, shuffle=False).history
    return {**history, "of a DataLoader": again, "evaluated": model.evaluate(X, Y, verbose=0)}


def own_loss(model: Any) -> dict[str, Any]:
    return fitted(compiled(model), sample_weight=WEIGHTS, validation_data=(X[:7], Y[:7]))


def torch_loop(kind: type[torch.optim.Optimizer], **options: Any) -> scripts.Script:
    def script(model: Any) -> dict[str, Any]:
        optimizer = kind(model.parameters(), **options)
        x, y = torch.tensor(X), torch.tensor(Y)
        losses = []
        for _ in range(2):
            for start in range(0, 10, 4):
                mine = slice(start, start + 4)
                optimizer.zero_grad()
                outputs = model(x[mine], training=True)
                loss = -(y[mine] * outputs.log()).sum(-1).mean() + sum(model.losses)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return {"losses": losses}

    return script


# Many inputs and outputs, and steps that are masked.


def branching() -> Any:
    tokens, numbers = keras.Input((5,), name="tokens"), keras.Input((6,), name="numbers")
    x = layers.Embedding(9, 8, mask_zero=True, name="table")(tokens)
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    x = layers.Concatenate()([x, layers.Dense(8, "gelu", name="up")(numbers)])
    x = layers.Dense(8, "tanh", name="middle")(layers.BatchNormalization(name="norm")(x))
    outputs = {"kind": layers.Dense(4, "softmax", name="down")(x), "size": layers.Dense(1)(x)}
    return keras.Model({"tokens": tokens, "numbers": numbers}, outputs)


def per_step() -> Any:
    tokens = keras.Input((5,), name="tokens")
    x = layers.Embedding(9, 8, mask_zero=True, name="table")(tokens)
    x = layers.Dense(8, "gelu", name="up")(x)
    x = layers.Dense(8, "tanh", name="middle")(layers.BatchNormalization(name="norm")(x))
    return keras.Model(tokens, layers.Dense(4, "softmax", name="down")(x))


# Rows of 5, 4, 3, 2, 1, ... tokens, and padding.
TOKENS = (np.arange(50).reshape(10, 5) % 8 + 1) * (np.arange(5) < 5 - np.arange(10)[:, None] % 5)


def branches(model: Any) -> dict[str, Any]:
    sizes = X.sum(1, keepdims=True)
    compiled(
        model,
        loss={"kind": "categorical_crossentropy", "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.3},
        metrics={"kind": ["accuracy"], "size": ["mae"]},
        weighted_metrics={"size": [keras.metrics.RootMeanSquaredError()]},
    )
    inputs, targets = {"tokens": TOKENS, "numbers": X}, {"kind": Y, "size": sizes}
    weights = {"kind": WEIGHTS, "size": WEIGHTS[::-1].copy()}
    history = fitted(model, inputs, targets, sample_weight=weights, validation_split=0.3)
    return {**history, "predicted": model.predict(inputs, batch_size=4, verbose=0)}


def masked(model: Any) -> dict[str, Any]:
    compiled(model, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    history = fitted(model, TOKENS, TOKENS % 4)
    weights = np.linspace(0.5, 1.5, 50).reshape(10, 5)
    weighted = fitted(model, TOKENS, TOKENS % 4, sample_weight=weights)
    return {**history, "weighted steps": weighted}


LAYOUT: scripts.Layout = distributed.LAYOUT
TABLE: scripts.Layout = {"table/embeddings": ("model", "batch")}
CLASSES = {0: 1.0, 1: 2.0, 2: 0.5, 3: 1.5}
FEATURES: dict[str, tuple[Callable[[], Any], scripts.Script]] = {
    "a ragged last batch": (classifier, fitting()),
    "fewer rows than replicas": (classifier, fewer_rows),
    "shuffle=True": (classifier, fitting(shuffle=True, epochs=2)),
    "sample_weight": (classifier, fitting(sample_weight=WEIGHTS)),
    "class_weight": (classifier, fitting(class_weight=CLASSES)),
    "validation_data": (classifier, fitting(validation_data=(X[:7], Y[:7]))),
    "validation_data, weighted": (
        classifier,
        fitting(validation_data=(X[:7], Y[:7], WEIGHTS[:7])),
    ),
    "validation_split": (classifier, fitting(validation_split=0.3)),
    "validation_steps, validation_freq": (classifier, validation),
    "steps_per_epoch, initial_epoch": (classifier, epochs),
    "a PyDataset": (classifier, from_dataset),
    "a generator": (classifier, from_generator),
    "evaluate": (classifier, evaluated),
    "predict, in order": (classifier, predicted),
    "train_, test_, predict_on_batch": (classifier, by_batch),
    "several inputs, outputs, losses": (branching, branches),
    "masked steps": (per_step, masked),
    "compute_loss of one's own": (with_own_loss, own_loss),
    "train_step, test_step of one's own": (with_own_steps, own_steps),
    "a torch loop: SGD, momentum": (
        classifier,
        torch_loop(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    ),
    "a torch loop: AdamW": (classifier, torch_loop(torch.optim.AdamW, lr=0.01, weight_decay=0.1)),
}


def batches(mesh: str) -> dict[str, features.Found]:
    found = {}
    with real_float64():
        for feature, (build, script) in FEATURES.items():
            layout = LAYOUT if build not in (branching, per_step) else {**LAYOUT, **TABLE}
            _, gaps = scripts.both(build, layout, mesh, script)
            found[feature] = features.exact(max(gaps.values()))
    return found


@pytest.mark.parametrize("mesh", features.MESHES)
def test_batches(ranks: Any, record_property: Any, mesh: str) -> None:
    """A mean of the means of unequal parts, of a loss or a metric; a sum of gradients divided by
    the replicas; weights that part from their rows, or masks from their steps; shuffles that
    differ; predictions in the order of the ranks, or of one replica's rows.

    Seen to fail with averaged gradients, with those of weights cut along the batch axis left
    unsummed, with metrics that are updated twice, and with outputs in another order.
    """
    answers = ranks(scripts.size_of(mesh))(batches, mesh, timeout=180)
    features.note(record_property, "batches", mesh, answers)


def on_four() -> dict[str, float]:
    found = {}
    with real_float64():
        for rows, batch_size in ((10, 10), (10, 4), (3, 4), (5, 4)):
            for parallelized in (False, True):
                model = parity.build_seeded(classifier)
                if parallelized:
                    keras_tp.parallelize(model, parity.layout_map({}, {"batch": 4}))
                keras.utils.set_random_seed(3)
                given = {"batch_size": batch_size, "sample_weight": WEIGHTS[:rows]}
                seen = fitted(compiled(model), X[:rows], Y[:rows], **given)
                seen["predicted"] = model.predict(X[:rows], batch_size=batch_size, verbose=0)
                seen |= scripts.state(model)
                if not parallelized:
                    one = seen
            gaps = [scripts.difference(one[name], value) for name, value in seen.items()]
            found[f"{rows} rows by {batch_size}"] = max(gaps)
    return found


def test_rows_that_do_not_come_out_even_on_four_replicas(ranks: Any) -> None:
    """10 rows on 4 replicas are 3, 3, 2, 2; 3 rows leave one without, so that each computes all of
    them, and gradients that are summed are four times too large.

    Seen to fail with just that, and with averaged gradients.
    """
    for found in ranks(4)(on_four):
        assert max(found.values()) < features.EXACT, found


# Ranks that are fed different batches.


def other_batches(mesh: str, stranger: int, what: str) -> str:
    """What the ranks say when the fourth batch is another one on rank `stranger`."""
    model = compiled(parity.build_seeded(classifier))
    keras_tp.parallelize(model, scripts.layout_on(LAYOUT, mesh))

    def source() -> Iterator[Any]:
        for number in range(1, 9):
            other = number == 4 and dist.get_rank() == stranger
            yield X + (what == "inputs" and other), Y[:: -1 if what == "targets" and other else 1]

    try:
        model.fit(source(), shuffle=False, verbose=0)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("mesh", features.MESHES)
def test_ranks_that_are_fed_other_batches_are_named(
    ranks: Any, record_property: Any, mesh: str
) -> None:
    """Parts of different batches add up to nonsense, in silence: by the ranks of one replica (the
    first two, on the last mesh) to wrong outputs, by replicas to wrong gradients. Every rank
    raises, so that the job ends and none waits for another.

    Seen to fail without `AgreedInputs`.
    """
    size = scripts.size_of(mesh)
    for stranger, what in ((1, "inputs"), (size - 1, "targets")):
        kind = "targets or sample weights" if what == "targets" else "inputs"
        for message in ranks(size)(other_batches, mesh, stranger, what):
            assert f"ranks are given different {kind}: rank 0 has float" in message
            assert f"where rank {stranger} has float" in message
    record_property("feature", ["batches", "other batches on a rank", mesh, "an error", ""])


def unchecked() -> tuple[dict[str, int], dict[str, int], float, str]:
    """Collectives of a step with and without the comparison, what differs, and ranks that part."""
    counts, losses = [], []
    for check in (True, False):
        model = parity.build_seeded(classifier)
        keras_tp.parallelize(model, parity.layout_map({}, {"model": 2}), check_batches=check)
        compiled(model)
        with Collectives() as counted:
            losses.append(model.train_on_batch(X, Y))
        counts.append(dict(counted))
    model.train_on_batch(X + dist.get_rank(), Y)  # in silence, as asked for
    model = parity.build_seeded(classifier)
    try:
        keras_tp.parallelize(
            model, parity.layout_map({}, {"model": 2}), check_batches=dist.get_rank() == 0
        )
    except keras_tp.LayoutError as error:
        return counts[0], counts[1], scripts.difference(*losses), str(error)
    return counts[0], counts[1], scripts.difference(*losses), "accepted"


def test_the_comparison_of_batches_can_be_switched_off(ranks: Any) -> None:
    """A switch that leaves half of the checks on, and one that is off on one rank alone, which
    the others wait for.

    Seen to fail with targets that are compared in any case.
    """
    for checked, without, gap, said in ranks(2)(unchecked):
        assert checked == {"all_reduce": 2}
        assert without == {}
        assert gap == 0.0
        assert "check_batches=True" in said
        assert "check_batches=False" in said
