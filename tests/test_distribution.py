"""Scripts written for `keras.distribution`, from end to end on real ranks."""

from __future__ import annotations

from typing import Any

import distributed
import keras
import models
import numpy as np
import parity
import pytest
import torch
from distributed import (
    LAYOUT,
    Scope,
    both,
    classes,
    classifier,
    compiled,
    fitted,
    is_parallelized,
    state,
)
from keras import layers
from torch.utils.data import DataLoader, TensorDataset

import keras_tp
from keras_tp.seam.distribution import layout_map_of
from keras_tp.seam.variables import awaits_plan, local_tensor

EXACT = 1e-10


def trained_by_data(rows: int, options: dict[str, Any]) -> dict[str, float]:
    def script(scope: Scope) -> dict[str, Any]:
        x, y = classes(6, seed=1)
        with scope():
            model = compiled(classifier())
            weight = np.linspace(0.5, 1.5, rows)
            weights = {"sample_weight": weight} if "class_weight" not in options else {}
            found = fitted(model, rows, validation_data=(x, y), **weights, **options)
            evaluated = model.evaluate(x, y, sample_weight=weight[:6], batch_size=4, verbose=0)
            return {**found, "evaluated": evaluated}

    return both(script, distributed.data_parallel)


@pytest.mark.parametrize(
    ("rows", "options"),
    [(13, {}), (11, {"class_weight": {0: 0.5, 1: 2.0, 2: 1.0, 3: 3.0}})],
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_data_parallel_training(ranks: Any, size: int, rows: int, options: dict[str, Any]) -> None:
    """Means of means in a loss, a metric, or the statistics of a batch whose last part is short
    (of one row, fewer than there are replicas); weights of samples that part from their rows;
    masks drawn for fewer rows; predictions in the order of the ranks."""
    for differences in ranks(size)(trained_by_data, rows, options):
        assert {"val_auc", "f1_score", "weighted_auc", "one_hot_mean_io_u"} < set(differences)
        assert sum(name.startswith("optimizer") for name in differences) == 18
        assert max(differences.values()) < EXACT, differences


def trained_by_model(shape: tuple[int, int]) -> tuple[dict[str, float], dict[str, Any]]:
    made = []

    def script(scope: Scope) -> dict[str, Any]:
        x, y = classes(6, seed=1)
        with scope():
            made.append(compiled(classifier()))
            return fitted(made[-1], 9, validation_data=(x, y))

    differences = both(script, lambda: distributed.model_parallel(shape, LAYOUT))
    return differences, {
        v.path.removeprefix("classifier/"): (tuple(local_tensor(v).shape), v._layout.axes)
        for v in made[-1].variables
    }


@pytest.mark.parametrize(
    ("shape", "up", "middle", "gamma"),
    [
        ((1, 1), (6, 8), (8, 8), 8),
        ((1, 2), (6, 4), (4, 8), 8),
        ((2, 1), (3, 8), (8, 4), 4),
        ((1, 4), (6, 2), (2, 8), 8),
        ((4, 1), (2, 8), (8, 2), 2),
        ((2, 2), (3, 4), (4, 4), 4),
    ],
)
def test_model_parallel_training(
    ranks: Any, shape: tuple[int, int], up: Any, middle: Any, gamma: int
) -> None:
    """Axis "batch" on weights and on rows: a gradient summed twice along it, or once too few; what
    is cut along one axis taken for what is cut along the other."""
    results = ranks(shape[0] * shape[1])(trained_by_model, shape)
    for rank, (differences, stored) in enumerate(results):
        assert max(differences.values()) < EXACT, differences
        if shape[0] == 4:  # 6 rows on 4 ranks, by torch.chunk's rule
            up = ((2, 2, 2, 0)[rank], 8)
        assert stored["up/kernel"] == (up, ("batch", "model"))
        assert stored["middle/kernel"] == (middle, ("model", "batch"))
        assert stored["norm/gamma"] == ((gamma,), ("batch",))
        assert stored["norm/beta"] == ((8,), (None,))


# The map of a KerasHub backbone in small.
TRANSFORMER = {
    "tokens/embeddings": ("model", "batch"),
    r".*(query|key|value)/kernel": ("batch", "model", None),
    r".*attention_output/kernel": ("model", None, "batch"),
    r"up_\d+/kernel": ("batch", "model"),
    r"down_\d+/kernel": ("model", "batch"),
    "head/kernel": ("batch", "model"),
}


def trained_transformer(shape: tuple[int, int]) -> dict[str, float]:
    def script(scope: Scope) -> dict[str, Any]:
        x, y = models.transformer_data()
        with scope():
            model = models.transformer()
            model.compile("adamw", parity_loss(), weighted_metrics=["accuracy"])
            found = model.fit(x, y, sample_weight=(y > 3) * 1.0, batch_size=3, epochs=2, verbose=0)
            return {**found.history, "predicted": model.predict(x, verbose=0), **state(model)}

    return both(script, lambda: distributed.model_parallel(shape, TRANSFORMER))


def parity_loss() -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
def test_a_transformer_under_model_parallel(ranks: Any, shape: tuple[int, int]) -> None:
    """Kernels of three dims, embeddings and slots cut along both axes; tokens without weight."""
    for differences in ranks(shape[0] * shape[1])(trained_transformer, shape):
        assert max(differences.values()) < EXACT, differences


# Where a model meets its distribution.


class Own(keras.Model):
    """Has no variables before it is called."""

    def __init__(self) -> None:
        super().__init__(name="classifier")
        self.up = layers.Dense(8, "gelu", name="up")
        self.norm = layers.BatchNormalization(name="norm")
        self.drop = layers.Dropout(0.3)
        self.middle = layers.Dense(8, "tanh", name="middle")
        self.down = layers.Dense(4, "softmax", name="down")

    def call(self, x: Any, training: bool = False) -> Any:
        x = self.drop(self.norm(self.up(x), training=training), training=training)
        return self.down(self.middle(x))


def built_before(scope: Scope) -> dict[str, Any]:
    model = compiled(classifier())
    with scope():
        return fitted(model)


def trained_before(scope: Scope) -> dict[str, Any]:
    model = compiled(classifier())
    model.fit(*classes(8), batch_size=4, verbose=0)
    model.predict(classes(8)[0], verbose=0)
    with scope():
        return fitted(model)


def fitted_outside(scope: Scope) -> dict[str, Any]:
    with scope():
        model = classifier()
    return fitted(compiled(model))


def fitted_twice(scope: Scope) -> dict[str, Any]:
    with scope():
        model = compiled(classifier())
        first = fitted(model)
        assert first.pop("parallelized") == is_parallelized(model)
        again = fitted(model)
    return {**{f"first {name}": value for name, value in first.items()}, **again, **fitted(model)}


def compiled_anew(scope: Scope) -> dict[str, Any]:
    with scope():
        model = compiled(classifier())
        fitted(model)
        model.compile("sgd", "mse")
        return fitted(model)


def evaluated_first(scope: Scope) -> dict[str, Any]:
    x, y = classes(10)
    with scope():
        model = compiled(Own())
        return {"evaluated": model.evaluate(x, y, batch_size=4, verbose=0), **fitted(model)}


def predicted_first(scope: Scope) -> dict[str, Any]:
    with scope():
        model = Own()
        predicted = model.predict(classes(10, seed=2)[0], batch_size=4, verbose=0)
        return {"before": predicted, **fitted(compiled(model))}


def batch_trained_first(scope: Scope) -> dict[str, Any]:
    x, y = classes(5)
    with scope():
        model = compiled(Own())
        losses = [model.train_on_batch(x, y, class_weight={0: 2, 1: 1, 2: 1, 3: 0})]
        losses += [model.train_on_batch(x, y, sample_weight=np.arange(5.0)) for _ in range(2)]
        return {"losses": losses, **state(model)}


def batch_tested_first(scope: Scope) -> dict[str, Any]:
    with scope():
        model = compiled(Own())
        return {"tested": model.test_on_batch(*classes(5)), **fitted(model)}


def batch_predicted_first(scope: Scope) -> dict[str, Any]:
    with scope():
        model = Own()
        return {"before": model.predict_on_batch(classes(5)[0]), **fitted(compiled(model))}


def set_and_unset(scope: Scope) -> dict[str, Any]:
    with scope():
        current = keras.distribution.distribution()
    keras.distribution.set_distribution(current)
    model = compiled(classifier())
    found = fitted(model)
    keras.distribution.set_distribution(None)
    return {**found, **fitted(model)}


LIFE = [
    built_before,
    trained_before,
    fitted_outside,
    fitted_twice,
    compiled_anew,
    evaluated_first,
    predicted_first,
    batch_trained_first,
    batch_tested_first,
    batch_predicted_first,
    set_and_unset,
]


def lived(name: str, shape: tuple[int, int] | None) -> dict[str, float]:
    def make() -> Any:
        if shape is None:
            return distributed.data_parallel()
        return distributed.model_parallel(shape, LAYOUT)

    return both(globals()[name], make)


@pytest.mark.parametrize("life", LIFE)
@pytest.mark.parametrize("shape", [None, (2, 2)])
def test_where_a_model_meets_its_distribution(ranks: Any, life: Any, shape: Any) -> None:
    """A model that is carried into a scope or out of it is parallelized once, whatever is asked of
    it first: neither left alone, so that each rank trains it for itself, nor sharded twice."""
    for differences in ranks(2 if shape is None else 4)(lived, life.__name__, shape):
        assert max(differences.values()) < EXACT, differences


OTHER = {
    ".*up/kernel": (None, "model"),
    ".*middle/kernel": (None, "model"),
    ".*norm/gamma": (None,),
}


def parallelized_explicitly(other: tuple[int, int] | None) -> tuple[dict[str, float], str]:
    """`other`: the mesh of another layout map than the distribution's; None for the same map."""
    refused = []

    def script(scope: Scope) -> dict[str, Any]:
        with scope():
            model = compiled(classifier())
            made_under = keras.distribution.distribution()
            if made_under is not None and other is None:
                keras_tp.parallelize(model, layout_map_of(made_under))
            elif made_under is not None:
                another = distributed.model_parallel(other, OTHER)
                keras_tp.parallelize(model, layout_map_of(another))
                refused.append(message(model.fit, *classes(4), verbose=0))
            if other is None:
                fitted(model)
        if other is None:
            return fitted(model)
        loader = shuffled(10)
        history = model.fit(loader, epochs=2, verbose=0, shuffle=False).history
        return {**history, **fitted(model)}

    differences = both(script, lambda: distributed.model_parallel((2, 2), LAYOUT))
    return differences, "".join(refused)


def shuffled(rows: int) -> DataLoader:
    tensors = [torch.tensor(array) for array in classes(rows)]
    return DataLoader(TensorDataset(*tensors), 4, shuffle=True)


def message(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(keras_tp.LayoutError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("other", [None, (2, 2), (1, 4), (4, 1)])
def test_a_model_passed_to_parallelize(ranks: Any, other: tuple[int, int] | None) -> None:
    """What was asked for by name gives way to what the variables were made under: a refusal, or
    rows that are shared out along the axis of a mesh on which the model no longer lies."""
    for differences, refused in ranks(4)(parallelized_explicitly, other):
        assert max(differences.values()) < EXACT, differences
        assert ("parallelized otherwise" in refused) == (other is not None)


def under_another(fit_first: bool) -> tuple[dict[str, float], list[str]]:
    told = []

    def script(scope: Scope) -> dict[str, Any]:
        with scope():
            model = compiled(classifier())
            if fit_first:
                fitted(model)
        if keras.distribution.distribution() is None and told_by(scope):
            stored, awaiting = keras_tp.local_shapes(model), list(map(awaits_plan, model.variables))
            other_map = {**LAYOUT, ".*up/kernel": (None, "model")}
            others = [
                distributed.model_parallel((2, 2), other_map),
                distributed.model_parallel((1, 4), LAYOUT),
                distributed.data_parallel(),
            ]
            for other in others:
                with other.scope():
                    told.append(message(model.fit, *classes(4), verbose=0))
                    assert told[-1] == message(model.predict, classes(4)[0], verbose=0)
            assert keras_tp.local_shapes(model) == stored
            assert list(map(awaits_plan, model.variables)) == awaiting
        with scope():
            return fitted(model)

    return both(script, lambda: distributed.model_parallel((2, 2), LAYOUT)), told


def told_by(scope: Scope) -> bool:
    with scope():
        return keras.distribution.distribution() is not None


@pytest.mark.parametrize("fit_first", [False, True])
def test_a_model_under_another_distribution(ranks: Any, fit_first: bool) -> None:
    """Shards of one layout read as those of another; a refusal that leaves half of a model
    parallelized, which then goes on with other numbers."""
    for differences, (kernel, mesh, replicas) in ranks(4)(under_another, fit_first):
        assert max(differences.values()) < EXACT, differences
        where = "parallelized otherwise" if fit_first else "made under another distribution"
        assert where in kernel
        assert where in mesh
        assert where in replicas
        assert "'classifier/up/kernel' is stored by ('batch', 'model')" in kernel
        assert "batch=1, model=4" in mesh
        assert "batch=4" in replicas


def scopes() -> None:
    """Two distributions one after the other, one in the other, and one again."""
    with distributed.enabled():
        data, model = (
            distributed.data_parallel(),
            distributed.model_parallel((1, 2), {".*kernel": (None, "model")}),
        )
        again = distributed.model_parallel((1, 2), {".*kernel": (None, "model")})
        assert again.device_mesh is not model.device_mesh
        assert again.device_mesh.backend_mesh is model.device_mesh.backend_mesh
        keras.distribution.set_distribution(data)
        first = compiled(classifier())
        with model.scope():
            inner = compiled(classifier())
            fitted(inner)
        with model.scope(), data.scope():
            innermost = classifier()
        outer = compiled(classifier())
        fitted(outer)
        fitted(first)
        assert "lies on a mesh batch=1, model=2" in message(inner.predict, classes(4)[0])
        keras.distribution.set_distribution(again)
        fitted(inner)  # an equal distribution is as good as the same
        axes = [
            [v._layout.axes for v in m.trainable_variables if v.name == "kernel"]
            for m in (first, inner, innermost, outer)
        ]
        cut, whole = [(None, "model")] * 3, [(None, None)] * 3
        assert axes == [whole, cut, whole, whole]
        assert {v._layout.device_mesh.axis_names[0] for v in outer.variables} == {"batch"}


def test_one_distribution_after_another(ranks: Any) -> None:
    """A job that makes a new process group for each mesh runs out of them; and what is made after
    an inner scope belongs to the outer one."""
    ranks(2)(scopes)


def unseeded() -> tuple[list[dict[str, Any]], Any]:
    rank = torch.distributed.get_rank()
    found = []
    with distributed.enabled():
        distributed.start(seed=100 + rank)  # as the clock would
        with distributed.data_parallel().scope():
            model = compiled(classifier())
            for epochs in (0, 3):
                if epochs:
                    losses = model.fit(*classes(11), batch_size=4, epochs=3, verbose=0).history
                found.append(
                    {v.path: local_tensor(v).detach().numpy().copy() for v in variables(model)}
                )
    return found, losses


def variables(model: Any) -> list[Any]:
    # (Seeds are no weights: random numbers agree once a model is used.)
    return [v for v in model.variables if "seed" not in v.path]


@pytest.mark.parametrize("size", [2, 4])
def test_unseeded_replicas_stay_equal(ranks: Any, size: int) -> None:
    """Replicas that start otherwise, shuffle otherwise or sum gradients in another order part, bit
    by bit, and no loss shows it."""
    first, *others = ranks(size)(unseeded)
    for other in others:
        assert other[1] == first[1]
        for one, another in zip(first[0], other[0], strict=True):
            assert all((another[path] == value).all() for path, value in one.items())


def too_many(shape: tuple[int, int]) -> list[str]:
    devices = [f"cpu:{rank}" for rank in range(4)]
    mesh = keras.distribution.DeviceMesh(shape, ["batch", "model"], devices)
    with distributed.enabled():
        model = compiled(classifier())
        for distribution in (
            keras.distribution.DataParallel(devices=devices),
            keras.distribution.ModelParallel(
                layout_map=parity.layout_map(LAYOUT, mesh), batch_dim_name="batch"
            ),
        ):
            with distribution.scope():
                told = [message(classifier), message(model.fit, *classes(4), verbose=0)]
        fitted(model)  # as ever
    return told


def test_a_mesh_of_another_size_than_the_job(ranks: Any) -> None:
    """Ranks that do not exist would be waited for; and a mesh of fewer leaves some out."""
    for told in ranks(2)(too_many, (2, 2)):
        for text in told:
            assert "has 4 ranks" in text
            assert "the job has 2" in text
            assert "torchrun --standalone --nproc-per-node 4" in text
