"""Applying a plan, on virtual ranks: structure, shapes, counts and refusals."""

from __future__ import annotations

from typing import Any

import keras
import models
import numpy as np
import pytest
import torch
from counting import Collectives
from keras import layers
from parity import layout_map

import keras_tp
from keras_tp.seam.variables import ShardedVariable, local_tensor


def apply(model: Any, layout: dict[Any, Any], size: int, **options: Any) -> Any:
    return keras_tp.parallelize(model, layout_map(layout, {"batch": 1, "model": size}), **options)


@pytest.mark.parametrize("rank", range(8))
def test_local_shapes_are_those_of_the_plan(fake_ranks: Any, rank: int) -> None:
    """A plan that says one thing and a model that does another. Seen to fail with Shard(0)."""
    fake_ranks(rank, 8)
    model = models.dense_stack()
    plan = keras_tp.plan(model, layout_map(models.DENSE_LAYOUT, {"batch": 1, "model": 8}))
    assert keras_tp.parallelize(model, plan=plan) is model
    assert keras_tp.local_shapes(model) == {v.path: v.local_shape(rank) for v in plan.variables}
    # 10 columns on 8 ranks: two each for five, none for three.
    assert keras_tp.local_shapes(model)["sequential/dense_3/kernel"] == (128, 2 if rank < 5 else 0)


def test_everything_else_sees_full_shapes(fake_ranks: Any, capsys: Any) -> None:
    """`summary()` that counts shards tells the user another model."""
    model = models.transformer()
    counts = model.count_params()
    config = model.get_config()
    fake_ranks(0, 2)
    apply(model, models.TRANSFORMER_LAYOUT, 2)
    assert model.count_params() == counts
    assert model.get_config() == config
    model.summary()
    assert f"{counts:,}" in capsys.readouterr().out
    assert model.compute_output_shape((3, models.TOKENS)) == (3, models.TOKENS, models.VOCABULARY)
    assert model(keras.Input((models.TOKENS,), dtype="int32")).shape[1:] == (
        models.TOKENS,
        models.VOCABULARY,
    )


@pytest.mark.parametrize("size", [2, 4])
def test_collectives_are_those_of_the_plan(fake_ranks: Any, size: int) -> None:
    """The plan's price is what is paid; a collective more is right and slow: Keras nightly takes 56
    for a transformer block."""
    fake_ranks(0, size)
    model = models.transformer()
    plan = keras_tp.plan(model, layout_map(models.TRANSFORMER_LAYOUT, {"batch": 1, "model": size}))
    keras_tp.parallelize(model, plan=plan)
    x, _ = models.transformer_data()
    for _ in range(2):
        model(torch.tensor(x))  # the ranks compare the 1st, 2nd and 4th batch they are given
    with Collectives() as counted:
        out = model(torch.tensor(x), training=True)
    assert counted == plan.collectives("forward")
    assert set(counted) == {"all_reduce", "all_gather"}
    with Collectives() as counted:
        out.sum().backward()
    assert counted == plan.collectives("backward")
    assert set(counted) == {"all_reduce"}


def test_a_training_step_costs_what_the_plan_says(fake_ranks: Any) -> None:
    """A gather of each weight for its `.grad`, its moving average or its accumulator."""
    fake_ranks(0, 2)
    model = models.transformer()
    plan = keras_tp.plan(model, layout_map(models.TRANSFORMER_LAYOUT, {"batch": 1, "model": 2}))
    keras_tp.parallelize(model, plan=plan)
    optimizer = keras.optimizers.AdamW(use_ema=True, gradient_accumulation_steps=2)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = models.transformer_data()
    for _ in range(4):
        model.train_on_batch(x, y)
    with Collectives() as counted:
        model.train_on_batch(x, y)
    assert counted == plan.collectives("forward") + plan.collectives("backward")


def test_parameters_stay_the_objects_they_were(fake_ranks: Any) -> None:
    """`zero_grad`, torch optimizers and `_torch_params` of every ancestor hold the old object."""
    fake_ranks(0, 2)
    model = models.dense_stack()
    parameters = dict(model.named_parameters())
    ids = [id(v) for v in model.variables]
    apply(model, models.DENSE_LAYOUT, 2)
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in after)
    assert [id(v) for v in model.variables] == ids
    for v in model.trainable_variables:
        tensor = local_tensor(v)
        assert type(tensor) is torch.nn.Parameter
        assert tensor.is_leaf
        assert tensor.requires_grad
        assert any(parameter is tensor for parameter in after.values())


def test_integers_and_scalars_never_track_gradients(fake_ranks: Any) -> None:
    """torch refuses integer parameters with gradients; iterations and seeds are integers."""
    fake_ranks(0, 2)
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(8), layers.Dropout(0.5), layers.BatchNormalization()]
    )
    apply(model, {".*kernel": (None, "model"), ".*moving_mean": ("model",)}, 2)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    for v in [*model.non_trainable_variables, *model.optimizer.variables]:
        assert not local_tensor(v).requires_grad, v.path
    slots = [v for v in model.optimizer.variables if isinstance(v, ShardedVariable)]
    assert [tuple(local_tensor(v).shape) for v in slots] == [(8, 4)] * 2


class Shrinking(keras.optimizers.SGD):
    """Looks at gradients where shards of them arrive."""

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        return super().apply([g / (1 + g.norm()) for g in grads], trainable_variables)


def test_an_optimizer_is_checked_only_where_something_is_sharded(fake_ranks: Any) -> None:
    """What shards refuse is nobody's business on another model of the same program."""
    fake_ranks(0, 2)
    apply(models.dense_stack(), models.DENSE_LAYOUT, 2)
    plain = models.dense_stack()
    plain.compile(Shrinking(), "mse")
    plain.train_on_batch(*models.dense_data())
    nothing_sharded = apply(models.dense_stack(), {}, 2)
    nothing_sharded.compile(Shrinking(), "mse")
    nothing_sharded.train_on_batch(*models.dense_data())


class Twins(keras.Model):
    """Two layers of one name, which Keras allows in a subclassed model."""

    def __init__(self) -> None:
        super().__init__()
        self.both = [layers.Dense(4, name="same") for _ in range(2)]

    def call(self, x: Any) -> Any:
        return self.both[1](self.both[0](x))


def test_paths_that_come_again_are_told_apart(fake_ranks: Any) -> None:
    """In a dict, the second of two variables of one path would vanish."""
    model = Twins()
    model(np.zeros((1, 4)))
    paths = [v.path for v in model.variables]
    assert paths == ["twins/same/kernel", "twins/same/bias"] * 2
    assert list(keras_tp.local_shapes(model)) == [*paths[:2], *(f"{p}#2" for p in paths[:2])]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: layers.LSTM(4), (6, 3)),
        (lambda: layers.TimeDistributed(layers.BatchNormalization()), (6, 3)),
        (lambda: layers.Bidirectional(layers.GRU(4)), (6, 3)),
        (lambda: layers.Dense(4, use_bias=False), (3,)),
    ],
)
def test_a_weight_travels_once_however_often_it_is_read(
    fake_ranks: Any, make: Any, shape: Any
) -> None:
    """A cell reads its weights at each of six steps."""
    fake_ranks(0, 2)
    model = keras.Sequential([keras.Input(shape), make()])
    layout = {v.path: (*(None,) * (len(v.shape) - 1), "model") for v in model.weights}
    plan = keras_tp.plan(model, layout_map(layout, {"model": 2}))
    keras_tp.parallelize(model, plan=plan)
    x = torch.zeros(2, *shape)
    for _ in range(2):
        model(x)
    with Collectives() as counted:
        model(x)
    assert counted == plan.collectives("forward")


def snapshot(model: Any) -> Any:
    return [
        (type(v), tuple(local_tensor(v).shape), local_tensor(v).data_ptr()) for v in model.variables
    ]


def refused(model: Any, message: str, *args: Any, **options: Any) -> None:
    before = snapshot(model)
    with pytest.raises(keras_tp.LayoutError, match=message):
        keras_tp.parallelize(model, *args, **options)
    assert snapshot(model) == before
    assert all("call" not in vars(layer) for layer in model._flatten_layers())


def test_refusals_leave_the_model_untouched(fake_ranks: Any) -> None:
    """A model half of which is sharded is lost."""
    fake_ranks(0, 2)
    axes = {"batch": 1, "model": 2}
    good = layout_map(models.DENSE_LAYOUT, axes)
    model = models.dense_stack()
    refused(model, "3 entries", layout_map({".*kernel": (None, "model", None)}, axes))
    refused(model, "the mesh has 4 ranks .* but the job has 2", layout_map({}, {"model": 4}))
    refused(model, "either a layout map .* or a plan")
    refused(model, "either a layout map .* or a plan", good, plan=keras_tp.plan(model, good))
    other = keras_tp.plan(keras.Sequential([keras.Input((3,)), layers.Dense(4)]), good)
    refused(model, "the plan has 'sequential_1/dense_4/kernel'", plan=other)
    multiplies, transposed = (
        keras.Sequential(
            [keras.Input((4,), name="i"), layers.EinsumDense(e, 4, name="e")], name="s"
        )
        for e in ("ab,bc->ac", "ab,cb->ac")
    )
    columns = layout_map({"s/e/kernel": (None, "model")}, axes)
    refused(transposed, "which it does not", plan=keras_tp.plan(multiplies, columns))
    model.compile(Shrinking(), "mse")
    refused(model, "optimizer Shrinking defines apply", good)
    model.compile("adam", "mse")
    permuted = keras.distribution.DeviceMesh((2,), ["model"], ["cpu:1", "cpu:2"])
    refused(model, r"stand for ranks \[1, 2\]", keras.distribution.LayoutMap(permuted))
    unbuilt = keras.Sequential([layers.Dense(2)])
    refused(unbuilt, "is not built", good)


def test_optimizers_made_later_are_checked_when_they_are_built(fake_ranks: Any) -> None:
    """compile() after parallelize must not let in what parallelize refuses."""
    fake_ranks(0, 2)
    model = apply(models.dense_stack(), models.DENSE_LAYOUT, 2)
    model.compile(Shrinking(), "mse")
    with pytest.raises(keras_tp.LayoutError, match="optimizer Shrinking defines apply"):
        model.train_on_batch(*models.dense_data())
    model.compile(keras.optimizers.Adam(), "mse")
    model.train_on_batch(*models.dense_data())


def test_twice_is_an_error(fake_ranks: Any) -> None:
    """A shard of a shard computes with a quarter of the weight."""
    fake_ranks(0, 2)
    model = apply(models.dense_stack(), models.DENSE_LAYOUT, 2)
    with pytest.raises(keras_tp.LayoutError, match="is parallelized already"):
        apply(model, models.DENSE_LAYOUT, 2)
    inputs = keras.Input((128,))
    outer = keras.Model(inputs, model(inputs))
    with pytest.raises(keras_tp.LayoutError, match="is parallelized already"):
        apply(outer, models.DENSE_LAYOUT, 2)


def test_one_process_is_a_mesh_of_one_rank() -> None:
    """Without torchrun the same script runs, with plain Keras variables and calls."""
    model = apply(models.dense_stack(), models.DENSE_LAYOUT, 1)
    try:
        assert all(type(v) is keras.Variable for v in model.variables)
        assert all("call" not in vars(layer) for layer in model._flatten_layers())
        model.compile("adam", "mse")
        x, y = models.dense_data()
        model.fit(x, y, verbose=0)
        assert model.predict(x, verbose=0).shape == (6, 10)
        assert np.isfinite(model.evaluate(x, y, verbose=0))
    finally:
        torch.distributed.destroy_process_group()


def test_meshes_are_cached_by_what_they_are(fake_ranks: Any) -> None:
    """By id, a collected mesh's number came back with another mesh, on some ranks only."""
    from keras_tp.layouts import MeshShape
    from keras_tp.mesh import torch_mesh

    fake_ranks(1, 4)

    def mesh(shape: dict[str, int]) -> Any:
        return torch_mesh(MeshShape.from_keras(keras_tp.device_mesh(shape)))

    data, model = mesh({"batch": 4}), mesh({"batch": 1, "model": 4})
    assert data.mesh_dim_names == ("batch",)
    assert model.mesh_dim_names == ("batch", "model")
    assert mesh({"batch": 4}) is data
    assert mesh({"model": 4}) is not data
    for _ in range(20):  # ids of dropped Keras meshes do come back
        assert mesh({"batch": 2, "model": 2}).mesh.tolist() == [[0, 1], [2, 3]]
        assert mesh({"batch": 1, "model": 4}) is model
    torch.distributed.destroy_process_group()
    fake_ranks(1, 4)
    assert mesh({"batch": 4}) is not data


def test_an_input_of_another_width_is_an_error(fake_ranks: Any) -> None:
    """Four wide, it is sliced to nothing that fits six rows: by accident it may."""
    fake_ranks(0, 2)
    model = keras.Sequential([layers.EinsumDense("ab,bc->ac", 3, name="e")])
    model.build((None, 6))
    apply(model, {".*kernel": ("model", None)}, 2)
    with pytest.raises(ValueError, match="has 3 in dim 1, where the layer's kernel has 6"):
        model.layers[0].call(torch.ones(2, 3))


class OddTypes(layers.Layer):
    """Variables of types that no collective takes, and one that shares one element."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(4,), name="kernel")
        for dtype in ("int16", "uint8", "bool", "uint16", "bfloat16"):
            name = f"of_{dtype}"
            self.add_weight(shape=(3,), name=name, dtype=dtype, trainable=False, initializer="ones")
        one = torch.ones(1)
        self.add_weight(
            shape=(3,), name="one", trainable=False, initializer=lambda *a, **k: one.expand(3)
        )

    def call(self, x: Any) -> Any:
        return x * self.kernel


def odd_types() -> int:
    layer = OddTypes(name="odd")
    layer.build((None, 4))  # a layer alone, not a model
    keras_tp.parallelize(layer, layout_map({"odd/.*": ("model",)}, {"model": 2}))
    for path, value in keras_tp.full_weights(layer).items():
        if "kernel" not in path:
            assert value.astype("float32").tolist() == [1.0] * 3, path
    return len(keras_tp.local_shapes(layer))


def test_any_dtype_and_any_layer(ranks: Any) -> None:
    """gloo knows neither int16 nor bool: it raised when half of the layer was sharded."""
    assert ranks(2)(odd_types) == [7, 7]
