"""Models that share layers, freeze them, adapt them and draw random numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import parity
import pytest
import torch
from keras import layers
from layer_cases import floats, integers

import keras_tp


def compiled(model: Any) -> Any:
    model.compile(keras.optimizers.deserialize(parity.SGD), "mse")
    return model


def gap(one: Any, many: Any) -> float:
    full = keras_tp.full_weights(many)
    return max(parity.difference(v, full[p]) for p, v in keras_tp.full_weights(one).items())


def both(build: Callable[[], Any], layout: dict[str, Any], use: Callable[[Any], Any]) -> float:
    """The largest difference of what `use` gives, and of the weights afterwards."""
    with parity.real_float64():
        one, many = parity.build_seeded(build), parity.build_seeded(build)
        keras_tp.parallelize(many, parity.layout_map(layout, {"model": 2}))
        results = []
        for model in (one, many):
            keras.utils.set_random_seed(3)
            results.append([np.asarray(part) for part in keras.tree.flatten(use(model))])
        return max([gap(one, many), *map(parity.difference, *results)])


def dense_pair() -> Any:
    parts = [layers.Dense(6, "tanh", name="d0"), layers.Dense(4, name="d1")]
    return keras.Sequential([keras.Input((5,)), *parts])


def frozen_later() -> float:
    x, y = floats(6, 5), floats(6, 4)

    def use(model: Any) -> Any:
        losses = [compiled(model).train_on_batch(x, y)]
        model.layers[0].trainable = False
        losses += [compiled(model).train_on_batch(x, y) for _ in range(2)]
        assert len(model.trainable_variables) == 2
        model.layers[0].trainable = True
        model.layers[1].trainable = False
        return [*losses, *(compiled(model).train_on_batch(x, y) for _ in range(2))]

    layout = {".*d0/kernel": (None, "model"), ".*d1/kernel": ("model", None)}
    return both(dense_pair, layout, use)


def test_layers_frozen_and_thawed_after_parallelize(ranks: Any) -> None:
    """A frozen shard that goes on training, or a thawed one that no longer does. Seen to fail when
    `use` freezes only the plain model."""
    assert max(ranks(2)(frozen_later)) < 1e-10


ADAPTED: dict[str, tuple[Callable[[], Any], Any, dict[str, Any]]] = {
    "Dense": (lambda: layers.Dense(6, name="d"), floats(4, 5), {".*d/kernel": (None, "model")}),
    "Dense, contracted": (
        lambda: layers.Dense(6, name="d"),
        floats(4, 5),
        {".*d/kernel": ("model", None)},
    ),
    "EinsumDense": (
        lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 6), bias_axes="de", name="d"),
        floats(3, 4, 5),
        {".*d/kernel": (None, None, "model")},
    ),
    "Embedding": (
        lambda: layers.Embedding(7, 6, name="d"),
        integers(7, 3, 5),
        {".*d/embeddings": ("model", None)},
    ),
}


def adapted_later(name: str) -> tuple[float, int]:
    layer, x, layout = ADAPTED[name]

    def build() -> Any:
        return keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype.name), layer()])

    def use(model: Any) -> Any:
        model.layers[0].enable_lora(2)
        for v in model.layers[0].trainable_variables:
            v.assign(floats(*v.shape))
        compiled(model)
        y = floats(*model(x).shape)
        return [model.train_on_batch(x, y) for _ in range(3)]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        worst = both(build, layout, use)
    return worst, sum(issubclass(w.category, keras_tp.LayoutWarning) for w in caught)


@pytest.mark.parametrize("name", ADAPTED)
def test_lora_after_parallelize_on_every_layer_that_has_it(ranks: Any, name: str) -> None:
    """A call on shards would leave the adapters out: seen to fail with `original` replaced by
    `compute` in `ShardCall.__call__`."""
    for worst, warned in ranks(2)(adapted_later, name):
        assert worst < 1e-10
        assert warned > 0


def lora_by_the_kernels_pattern() -> parity.Report:
    def build() -> Any:
        model = dense_pair()
        model.layers[0].enable_lora(2)
        return model

    layout = {".*kernel.*": ("model", None)}
    return parity.compare(build, layout, {"model": 2}, (floats(6, 5), floats(6, 4)))


def test_adapters_that_a_kernels_pattern_claims(ranks: Any) -> None:
    """keras #19496: `.*kernel.*` means the kernel, and claims its adapters as well."""
    for report in ranks(2)(lora_by_the_kernels_pattern):
        assert report.sharded == 4
        assert report.worst() < 1e-10


def quantized_later() -> tuple[float, list[str]]:
    def use(model: Any) -> Any:
        model.quantize("int8")
        return model(floats(3, 5).astype("float32"))

    layout = {".*d0/kernel": (None, "model"), ".*d1/kernel": ("model", None)}
    results = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for parallel in (False, True):
            model = parity.build_seeded(dense_pair)
            if parallel:
                keras_tp.parallelize(model, parity.layout_map(layout, {"model": 2}))
            results.append(use(model).detach().numpy())
    said = [str(w.message) for w in caught if issubclass(w.category, keras_tp.LayoutWarning)]
    return parity.difference(*results), said


def test_quantizing_afterwards_is_said(ranks: Any) -> None:
    """The new kernel is whole on every rank: right, and not what the plan says."""
    for gap, said in ranks(2)(quantized_later):
        assert gap < 1e-6
        assert len(said) == 2
        assert "'sequential/d0' is quantized after keras_tp.parallelize" in said[0]


def one_layer_in_two_models() -> float:
    shared: list[Any] = []

    def build() -> Any:
        x = keras.Input((5,))
        h = layers.Dense(6, "tanh", name="shared")
        first = keras.Model(x, layers.Dense(4, name="a")(h(x)))
        shared.append(keras.Model(x, layers.Dense(3, name="b")(h(x))))
        return first

    def use(model: Any) -> Any:
        other = compiled(shared[0])
        results = []
        for _ in range(2):
            results.append(compiled(model).train_on_batch(floats(6, 5), floats(6, 4)))
            results.append(other.train_on_batch(floats(6, 5), floats(6, 3)))
        shared.pop(0)
        return [*results, *other.get_weights()]

    layout = {"shared/kernel": (None, "model"), "a/kernel": ("model", None)}
    return both(build, layout, use)


def test_a_layer_that_two_models_share(ranks: Any) -> None:
    """The other model was never parallelized, and trains the shard all the same. Seen to fail when
    the other model's step is left out on one side."""
    assert max(ranks(2)(one_layer_in_two_models)) < 1e-10


def masks(seed: int) -> list[Any]:
    """Outputs and weights of a dropout model, each rank's own."""
    keras.utils.set_random_seed(seed)
    keras.utils.clear_session()
    model = keras.Sequential(
        [
            keras.Input((5, 8)),
            layers.Dropout(0.5),
            layers.Dense(8, name="up"),
            layers.GaussianDropout(0.3),
            layers.LSTM(6, dropout=0.3, recurrent_dropout=0.2, name="lstm"),
            layers.Dense(3, name="down"),
        ]
    )
    layout = {
        "sequential/up/kernel": (None, "model"),
        "sequential/down/kernel": ("model", None),
        ".*lstm_cell/kernel": (None, "model"),
    }
    keras_tp.parallelize(model, parity.layout_map(layout, {"model": 2}))
    compiled(model)
    x, y = floats(6, 5, 8), floats(6, 3)
    losses = [model.train_on_batch(x, y) for _ in range(3)]
    out = model(torch.tensor(x, dtype=torch.float32), training=True).detach().numpy()
    return [out, np.asarray(losses), *keras_tp.full_weights(model).values()]


def test_random_layers_repeat_themselves_and_agree(ranks: Any) -> None:
    """All activations that meet a random layer are whole, so masks are the same bits on every rank;
    a seeded run gives the same bits again; another seed gives others."""
    first, again, other = (ranks(2)(masks, seed) for seed in (1, 1, 2))
    for one, two, repeated in zip(first[0], first[1], again[0], strict=True):
        assert (one == two).all()
        assert (one == repeated).all()
    assert (first[0][0] != other[0][0]).any()


def test_keras_itself_refuses_two_axes_on_one_dim() -> None:
    """A tuple of axes that is dropped in silence would leave the dim whole."""
    made = keras.distribution.LayoutMap(keras_tp.device_mesh({"batch": 2, "model": 2}))
    with pytest.raises(ValueError, match=r"\('batch', 'model'\)"):
        made["dense/kernel"] = (("batch", "model"), None)
    layout = keras.distribution.TensorLayout((("batch", "model"), None))
    with pytest.raises(ValueError, match=r"\('batch', 'model'\)"):
        made["dense/kernel"] = layout
