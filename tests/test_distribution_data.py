"""What `fit`, `evaluate` and `predict` are given under a `keras.distribution`, and what else a
model does under it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import distributed
import keras
import numpy as np
import parity
import pytest
import torch
from distributed import LAYOUT, Scope, both, classes, classifier, compiled, fitted, state
from keras import layers
from keras.src.backend.common.variables import Variable
from keras.src.backend.torch.trainer import TorchTrainer
from keras.src.initializers import random_initializers
from precision import real_float64
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import keras_tp
from keras_tp.rows import Rows
from keras_tp.seam.variables import local_tensor

EXACT = 1e-10
ROWS = 11


class Recorded(Dataset):
    """Remembers which samples it was asked for."""

    def __init__(self) -> None:
        self.x, self.y = classes(ROWS)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return self.x[index], self.y[index]


class Streamed(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return zip(*classes(ROWS), strict=True)


class Batches(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return tuple(array[4 * index : 4 * index + 4] for array in classes(ROWS))


def generated() -> Iterator[Any]:
    while True:
        yield from (Batches()[i] for i in range(3))


def tensors() -> list[torch.Tensor]:
    return [torch.tensor(array) for array in classes(ROWS)]


Arguments = dict[str, Any]
# How each is given to `fit`; and to `evaluate` but for what is said of epochs.
SOURCES: dict[str, Callable[[], Arguments]] = {
    "arrays": lambda: dict(zip("xy", classes(ROWS), strict=True), batch_size=4, shuffle=True),
    "tensors": lambda: dict(zip("xy", tensors(), strict=True), batch_size=4, shuffle=True),
    "loader": lambda: {"x": DataLoader(TensorDataset(*tensors()), 4, shuffle=True)},
    "stream": lambda: {"x": DataLoader(Streamed(), 4)},
    "dataset": lambda: {"x": Batches(workers=1), "shuffle": True},
    "generator": lambda: {"x": generated(), "steps_per_epoch": 3},
}


def read_from(name: str, shape: tuple[int, int]) -> dict[str, float]:
    def script(scope: Scope) -> dict[str, Any]:
        # Keras says so of streams whose end it did not know of.
        warnings.filterwarnings("ignore", message="Your input ran out of data")
        with scope():
            model = compiled(classifier())
            given: Arguments = {"epochs": 2, "verbose": 0, "shuffle": False, **SOURCES[name]()}
            history = model.fit(**given).history
            given = {k: v for k, v in SOURCES[name]().items() if k != "shuffle"}
            given["steps"] = given.pop("steps_per_epoch", None)
            evaluated = model.evaluate(**given, verbose=0)
            given.pop("y", None)
            predicted = model.predict(**given, verbose=0)
            return {**history, "evaluated": evaluated, "predicted": predicted, **state(model)}

    return both(script, lambda: distributed.model_parallel(shape, LAYOUT))


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
@pytest.mark.parametrize("name", SOURCES)
def test_whatever_holds_the_data(ranks: Any, name: str, shape: tuple[int, int]) -> None:
    """Keras refuses all but tf.data in a job of several processes; rows that are read twice, never,
    or in another order; a source that is cut although each rank's is cut already."""
    for differences in ranks(shape[0] * shape[1])(read_from, name, shape):
        assert max(differences.values()) < EXACT, differences


def recorded(by: str) -> tuple[dict[str, float], list[int]]:
    dataset = Recorded()

    def script(scope: Scope) -> dict[str, Any]:
        dataset.asked.clear()
        with scope():
            model = compiled(classifier())
            loader: Any = DataLoader(dataset, 4, shuffle=True)
            current = keras.distribution.distribution()
            if by == "hand" and current is not None:
                loader = current.distribute_dataset(loader)
                assert isinstance(next(iter(loader))[0], Rows)
                assert loader is current.distribute_dataset(loader)
                keras.utils.set_random_seed(3)
                dataset.asked.clear()
            else:
                keras.utils.set_random_seed(3)
            history = model.fit(loader, epochs=2, verbose=0, shuffle=False).history
            return {**history, **state(model)}

    return both(script, distributed.data_parallel), dataset.asked


@pytest.mark.parametrize("by", ["fit", "hand"])
def test_each_rank_reads_its_rows_alone(ranks: Any, by: str) -> None:
    """Every rank that reads, decodes and augments the whole batch is as slow as one process; and
    what `distribute_dataset` has shared out must not be shared out again."""
    (one, first), (two, second) = ranks(2)(recorded, by)
    assert max(one.values()) < EXACT, one
    assert max(two.values()) < EXACT, two
    # Two epochs, and the batch that Keras looks at before the first.
    looked_at = len(first) + len(second) - 2 * ROWS
    assert 0 <= looked_at <= 4, (first, second)
    drawn = first[-2 * 6 :] + second[-2 * 5 :]
    assert sorted(drawn) == sorted(2 * list(range(ROWS)))


def own_rows() -> dict[str, float]:
    rank = torch.distributed.get_rank()
    x, y = classes(12)

    def script(scope: Scope) -> dict[str, Any]:
        with scope():
            model = compiled(classifier())
            alone = keras.distribution.distribution() is None
            mine: Any = slice(None) if alone else slice(6 * rank, 6 * rank + 6)
            # What one process reads: the first three rows of both ranks, then the others.
            order = [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11] if alone else range(12)[mine]
            given = {"batch_size": 6 if alone else 3, "verbose": 0}
            weight = np.linspace(0.5, 1.5, 12)[order]
            history = model.fit(
                *(x[order], y[order]), sample_weight=weight, epochs=2, shuffle=False, **given
            ).history
            predicted = model.predict(x[order], **given)
            loader = DataLoader(TensorDataset(torch.tensor(x[order]), torch.tensor(y[order])), 3)
            if alone:
                loader = DataLoader(loader.dataset, 6)
            again = model.fit(loader, verbose=0, shuffle=False).history
            again = {f"again {name}": value for name, value in again.items()}
            return {**history, "predicted": predicted, **again, **state(model)}

    return both(script, lambda: distributed.data_parallel(auto_shard_dataset=False))


def test_rows_that_are_shared_out_already(ranks: Any) -> None:
    """`auto_shard_dataset=False`: half of what a rank reads would be dropped, or the ranks' batches
    taken for different ones, which is an error elsewhere. And a second epoch drops out by other
    numbers where an iterator draws from torch later than a DataLoader does."""
    for differences in ranks(2)(own_rows):
        assert max(differences.values()) < EXACT, differences


# A model that is a part of another.


def autoencoder() -> tuple[Any, Any]:
    inputs = keras.Input((6,))
    x = layers.Dense(8, "gelu", name="up")(inputs)
    code = layers.Dense(4, name="middle")(layers.BatchNormalization(name="norm")(x))
    encoder = keras.Model(inputs, code, name="encoder")
    decoder = keras.Sequential([keras.Input((4,)), layers.Dense(6, name="down")], name="decoder")
    whole = keras.Model(inputs, decoder(encoder(inputs)), name="whole")
    return encoder, whole


def part_afterwards(scope: Scope) -> dict[str, Any]:
    """Trains the whole, then uses and trains the part, then the whole again."""
    x, _ = classes(10)
    with scope():
        encoder, whole = autoencoder()
        whole.compile("adam", "mse")
        history = dict(whole.fit(x, x, batch_size=4, epochs=2, verbose=0).history)
        history["codes"] = encoder.predict(x, batch_size=4, verbose=0)
        loader = DataLoader(TensorDataset(torch.tensor(x)), 4)
        history["codes of a loader"] = encoder.predict(loader, verbose=0)
        encoder.compile("sgd", "mse")
        history["of the part"] = encoder.fit(
            x, x[:, :4], batch_size=4, epochs=2, verbose=0
        ).history["loss"]
        history["again"] = whole.fit(x, x, batch_size=4, epochs=3, verbose=0).history["loss"]
        return {**history, **state(whole)}


def part_first(scope: Scope) -> dict[str, Any]:
    """Trains the part, then the whole."""
    x, _ = classes(10)
    with scope():
        encoder, whole = autoencoder()
        encoder.compile("sgd", "mse")
        whole.compile("adam", "mse")
        first = encoder.fit(x, x[:, :4], batch_size=4, epochs=2, verbose=0).history["loss"]
        distributed_now = keras.distribution.distribution() is not None
        says = (
            pytest.warns(keras_tp.LayoutWarning, match="Train the outermost model first")
            if distributed_now
            else contextlib.nullcontext()
        )
        with says:
            history = whole.fit(x, x, batch_size=4, epochs=2, verbose=0).history
        with says:
            predicted = whole.predict(x, batch_size=4, verbose=0)
        return {"first": first, **history, "predicted": predicted, **state(whole)}


def trained_in_parts(name: str, shape: tuple[int, int] | None) -> dict[str, float]:
    def make() -> Any:
        if shape is None:
            return distributed.data_parallel()
        layout = {"up/kernel": ("batch", "model"), "middle/kernel": ("model", None)}
        return distributed.model_parallel(shape, layout)

    return both(globals()[name], make)


@pytest.mark.parametrize("shape", [None, (1, 2), (2, 2)])
@pytest.mark.parametrize("order", [part_afterwards, part_first])
def test_a_model_that_is_a_part_of_another(ranks: Any, order: Any, shape: Any) -> None:
    """An encoder's rows shared out within rows that are shared out, its inputs compared where they
    are to differ, or its weights' gradients summed twice, or by nobody."""
    for differences in ranks(4 if shape == (2, 2) else 2)(trained_in_parts, order.__name__, shape):
        assert max(differences.values()) < EXACT, differences


# What is there to see, and what is left behind.


def kinds_seen() -> tuple[set[str], int]:
    seen: set[str] = set()
    calls = []

    def look(*nests: Any) -> None:
        for leaf in keras.tree.flatten(nests):
            if isinstance(leaf, torch.Tensor):
                assert not isinstance(leaf, DTensor)
                seen.add(type(leaf).__name__)

    def hook(layer: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        calls.append(layer.name)
        look(args, list(kwargs.values()), outputs)

    with distributed.enabled(), distributed.model_parallel((2, 2), LAYOUT).scope():
        model = compiled(classifier())
        for layer in [model, *model.layers]:
            layer.register_forward_hook(hook, with_kwargs=True)
        model.fit(DataLoader(TensorDataset(*tensors()), 4), verbose=0, shuffle=False)
        assert {"classifier", "up", "norm", "down"} <= set(calls)
        seen.discard("Rows")  # what the model is given
        stored = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
        look([local_tensor(v) for v in stored], [v.value for v in stored])
        look([local_tensor(v).grad for v in model.trainable_variables])
        look(model(tensors()[0].float()), list(model.parameters()))
    return seen, len(calls)


def test_no_dtensor_anywhere(ranks: Any) -> None:
    """A DTensor that a layer, a callback or an optimizer of one's own meets is an error there, or a
    redistribution that nobody asked for."""
    for seen, calls in ranks(4)(kinds_seen):
        assert seen <= {"Tensor", "Parameter", "FullWeight"}
        assert calls > 20


def disabled() -> dict[str, float]:
    owners = [
        *(keras.src.backend, keras.src.distribution.distribution_lib, keras.distribution),
        *(Variable, TorchTrainer, keras.distribution.DataParallel.__base__, random_initializers),
    ]
    before = [dict(vars(owner)) for owner in owners]
    kept: dict[str, Any] = {}

    def script(scope: Scope) -> dict[str, Any]:
        with scope():
            kept["model"] = compiled(classifier())
            return {"first": fitted(kept["model"])["loss"]}

    def later() -> dict[str, Any]:
        keras.utils.set_random_seed(2)
        found = fitted(kept["model"])
        found.pop("parallelized")
        return {f"later {name}": value for name, value in found.items()}

    with real_float64():
        distributed.start()
        one = {**script(contextlib.nullcontext), **later()}
        with distributed.enabled():
            distributed.start()
            many = script(distributed.model_parallel((1, 2), LAYOUT).scope)
        after = [dict(vars(owner)) for owner in owners]
        changed = [k for a, b in zip(before, after, strict=True) for k in b if a.get(k) is not b[k]]
        assert changed == [], changed
        many |= later()
        # A plain model again, after all that: on each rank alone, and of plain variables.
        distributed.start()
        plain = {**script(contextlib.nullcontext), **later()}
        assert {type(v) for v in kept["model"].variables} == {keras.Variable}
    assert all(np.array_equal(plain[name], value) for name, value in one.items())
    return {name: parity.difference(value, many[name]) for name, value in one.items()}


def test_after_disable(ranks: Any) -> None:
    """What stays patched changes plain models; what is taken away, parallelized ones, which look
    for it at every call."""
    for differences in ranks(2)(disabled):
        assert max(differences.values()) < EXACT, differences


def compiled_steps() -> tuple[list[float], list[float]]:
    def losses(scope: Scope, jit: bool) -> list[float]:
        distributed.start()
        with scope():
            model = keras.Sequential([keras.Input((6,)), layers.Dense(8, "gelu"), layers.Dense(4)])
            model.compile("sgd", "mse", jit_compile=jit)
            return [float(model.train_on_batch(*classes(6))) for _ in range(2)]

    torch.compiler.reset()
    one = losses(contextlib.nullcontext, False)
    with distributed.enabled(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler has some of its own
        return one, losses(distributed.data_parallel().scope, True)


@pytest.mark.slow
def test_compiled_steps(ranks: Any) -> None:
    """A compiled step that leaves out the sum of gradients, or is compiled before the model is
    parallelized, trains each replica on its own rows."""
    for one, many in ranks(2)(compiled_steps, timeout=300):
        np.testing.assert_allclose(many, one, rtol=1e-6)
