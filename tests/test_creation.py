"""Variables that are made as shards, under a distribution."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import keras
import models
import numpy as np
import parity
import pytest
import torch
from counting import Collectives
from keras import layers
from keras.src.backend.common import variables as common
from keras.src.backend.torch import random as torch_random
from keras.src.backend.torch.trainer import TorchTrainer
from keras.src.distribution import distribution_lib as public
from keras.src.initializers import random_initializers
from precision import real_float64
from rank_pool import RankPool

import keras_tp
from keras_tp import distribution_lib
from keras_tp.distributions import plan_of
from keras_tp.seam.distribution import layout_of
from keras_tp.seam.variables import ShardedVariable, awaits_plan, local_tensor

Map = keras.distribution.LayoutMap
TensorLayout = keras.distribution.TensorLayout
LAYOUT = {
    ".*embeddings": ("model", None),
    ".*kernel": (None, "model"),
    ".*up/bias": ("model",),
    ".*moving_mean": ("model",),
}


def model_parallel(layout: Any, **axes: int) -> Any:
    mesh = keras_tp.device_mesh(axes or {"batch": 1, "model": distribution_lib.num_processes()})
    layout_map = parity.layout_map(layout, mesh)
    keras_tp.enable()  # until 3.14 Keras asks who it is as a distribution is made
    try:
        return keras.distribution.ModelParallel(layout_map=layout_map, auto_shard_dataset=False)
    finally:
        keras_tp.disable()


@pytest.fixture(autouse=True)
def no_job() -> None:
    """What other tests have joined in this process, these join anew."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def under(distribution: Any) -> Iterator[Any]:
    keras_tp.enable()
    try:
        with distribution.scope():
            yield distribution
    finally:
        keras_tp.disable()


def small_model() -> Any:
    """Dims that no two or four ranks divide, and every kind of initial value."""
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(11, 7, name="ids"),
            layers.Dense(13, kernel_initializer="he_normal", name="up"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.5, name="dropout"),
            layers.Dense(5, kernel_initializer="orthogonal", name="down"),
        ]
    )


def shards(model: Any) -> dict[str, Any]:
    return {v.path: local_tensor(v).detach().numpy() for v in model.variables}


def joined(parts: list[Any], axes: tuple[Any, ...]) -> Any:
    return np.concatenate(parts, axes.index("model")) if "model" in axes else parts[0]


# enable and disable


def patched() -> list[Any]:
    owners = common.Variable, keras.Variable, TorchTrainer, public.Distribution, keras.Model
    return [
        keras.src.backend.distribution_lib,
        public.distribution_lib,
        random_initializers.random,
        *(dict(vars(owner)) for owner in owners),
        dict(vars(torch_random)),
    ]


def test_disable_puts_everything_back() -> None:
    """What stays patched changes a script that asked for nothing."""
    before = patched()
    keras_tp.enable()
    during = patched()
    keras_tp.enable()
    assert patched() == during
    assert public.distribution_lib is distribution_lib
    assert sum(a != b for a, b in zip(before, during, strict=True)) == 6
    keras_tp.disable()
    assert patched() == before
    keras_tp.disable()
    assert patched() == before


def test_another_keras_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Keras that shards variables by itself would have them sharded twice."""
    before = patched()
    own = ModuleType("keras.src.backend.torch.distribution_lib")
    monkeypatch.setattr(keras.src.backend, "distribution_lib", own)
    with pytest.raises(RuntimeError, match=f"found Keras {keras.__version__}, which brings a "):
        keras_tp.enable()
    monkeypatch.undo()
    monkeypatch.delattr(common.Variable, "_deferred_initialize")
    with pytest.raises(RuntimeError, match=r"without Variable\._deferred_initialize"):
        keras_tp.enable()
    monkeypatch.undo()
    assert patched() == before


def test_a_second_enable_takes_the_first_one_away_alone() -> None:
    """Nested patches would leave one behind."""
    keras_tp.enable()
    keras_tp.enable()
    keras_tp.disable()
    assert public.distribution_lib is None


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("shape", [(3,), (5, 7), (181, 183), (300, 333, 1), (1 << 15,), (32771,)])
def test_thrifty_initial_values_are_keras_s(shape: tuple[int, ...], dtype: str) -> None:
    """Numbers drawn in parts, or scaled in another order, may be others."""
    for name, args in (("uniform", (-0.3, 0.7)), ("truncated_normal", (0.1, 2.5))):
        draw = getattr(keras.random, name)
        plain = draw(shape, *args, dtype=dtype, seed=5)
        keras_tp.enable()
        try:
            thrifty = draw(shape, *args, dtype=dtype, seed=5)
        finally:
            keras_tp.disable()
        assert thrifty.dtype == plain.dtype
        assert torch.equal(plain, thrifty), name


# What needs one process alone.


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (
            {".*kernel": ("model",)},
            r"'.*kernel' gives 'up/kernel' \(3, 4\) a layout \('model',\) of 1 ent",
        ),
        ({".*kernel": ("model", None), "up/.*": (None, None)}, "'up/kernel' is matched by 2 patt"),
        ({".*kernel": ("model", "model")}, "axis 'model' on 2 dims; an axis can cut one"),
    ],
)
def test_layouts_that_do_not_fit_are_told_as_the_variable_is_made(layout: Any, words: str) -> None:
    """Whole on every rank, the variable would be a surprise when memory runs out."""
    with under(model_parallel(layout)), pytest.raises(keras_tp.LayoutError, match=words):
        layers.Dense(4, name="up").build((None, 3))


def test_a_distribution_for_more_ranks_says_how_to_start_them() -> None:
    """A DataParallel over four devices in one process must not be four copies of nothing."""
    devices = [f"cpu:{rank}" for rank in range(4)]
    keras_tp.enable()  # before it, Keras 3.13 cannot make one
    with (
        under(keras.distribution.DataParallel(devices=devices)),
        pytest.raises(keras_tp.LayoutError, match="torchrun --standalone --nproc-per-node 4"),
    ):
        keras.Variable(np.ones(3))


class OwnRules(keras.distribution.ModelParallel):
    def get_variable_layout(self, variable: Any) -> Any:
        raise AssertionError


def test_distributions_with_rules_of_their_own_are_refused() -> None:
    """Their rules would be passed over in silence."""
    distribution = model_parallel({})
    distribution.__class__ = OwnRules
    with under(distribution), pytest.raises(keras_tp.LayoutError, match="OwnRules decides by"):
        keras.Variable(np.ones(3))


def test_without_a_distribution_nothing_happens() -> None:
    """An enabled package must not join a job for a plain script."""
    keras_tp.enable()
    try:
        layer = layers.Dense(4)
        layer.build((None, 3))
    finally:
        keras_tp.disable()
    assert layout_of(layer.kernel) is None
    assert type(layer.kernel) is keras.Variable
    assert not torch.distributed.is_initialized()


# On real ranks.


def make_small(seed: int | None) -> tuple[Any, Any, Any]:
    rank = distribution_lib.process_id()
    keras.utils.set_random_seed(rank if seed is None else seed)
    plain = {v.path: v.numpy() for v in small_model().variables}
    keras.utils.clear_session()
    keras.utils.set_random_seed(rank if seed is None else seed)
    with under(model_parallel(LAYOUT)):
        model = small_model()
    layouts = {v.path: v._layout.axes for v in model.variables}
    full = {v.path: v.numpy() for v in model.variables}
    for v in model.variables:
        assert v._value.untyped_storage().nbytes() == v._value.nbytes, v.path
        assert tuple(v.shape) == plain[v.path].shape
        assert v._value.is_leaf
        assert v._value.requires_grad == v.trainable
        assert isinstance(v, ShardedVariable) == (v.shape != v._value.shape)
    assert {id(p) for p in model.parameters()} == {id(v._value) for v in model.variables}
    return plain, full, (layouts, shards(model))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("seed", [3, None])
def test_initial_values_are_those_of_one_process(
    ranks: Callable[[int], RankPool], size: int, seed: int | None
) -> None:
    """Unseeded replicas start different and stay different; shards that each rank draws for itself
    are no shards of one weight. To the bit, for there is no arithmetic between."""
    results = ranks(size)(make_small, seed)
    first = results[0][0]
    sharded = 0
    for _, full, (layouts, _) in results:
        for path, value in first.items():
            if seed is None and "generator" in path:
                continue  # made from the random state of joining, below
            np.testing.assert_array_equal(full[path], value, path)
            axes = layouts[path]
            parts = [local[path] for _, _, (_, local) in results]
            np.testing.assert_array_equal(joined(parts, axes), value, path)
            sharded += "model" in axes
    assert sharded == 5 * size
    states = [full["seed_generator/seed_generator_state"] for _, full, _ in results]
    assert all((state == states[0]).all() for state in states)


def make_records() -> dict[str, Any]:
    rank = distribution_lib.process_id()

    with under(
        model_parallel(
            {**LAYOUT, ".*(momentum|velocity)": (None, "model"), "kernel/.*": ("model",)}
        )
    ):
        with Collectives() as counts:
            if rank == 1:  # which the other rank would wait for
                keras.metrics.MeanSquaredError()
                keras.optimizers.Adam(0.1)
        model = small_model()
        model.compile("adam", "mse", metrics=["mae"])
        model.optimizer.build(model.trainable_variables)
        metric = keras.metrics.Mean(name="kernel")
    slots = {v.name: (tuple(v.shape), tuple(v._value.shape)) for v in model.optimizer.variables}
    records = [*metric.variables, model.optimizer.iterations, model.optimizer._learning_rate]
    return {
        "counts": dict(counts),
        "slots": slots,
        "layouts": {v.name: v._layout.axes for v in model.optimizer.variables},
        "whole": all(type(v) is keras.Variable for v in records),
        "tracking": any(v._value.requires_grad for v in [*records, *model.optimizer.variables]),
        "axes": {v._layout.axes for v in records},
    }


def test_slots_follow_their_weight_and_records_stay_whole(ranks: Callable[[int], RankPool]) -> None:
    """A pattern such as '.*kernel' finds the slot of a kernel's shard, and a metric called kernel,
    by their paths; a slot cut twice is a quarter. keras #19496: LoRA weights were caught so."""
    results = ranks(2)(make_records)
    for rank, result in enumerate(results):
        assert result["counts"] == {}
        assert result["whole"]
        assert not result["tracking"]
        assert result["axes"] == {()}
        for kind in ("momentum", "velocity"):
            full, local = result["slots"][f"sequential_up_kernel_{kind}"]
            assert (full, local) == ((7, 13), (7, [7, 6][rank]))
            assert result["layouts"][f"sequential_up_kernel_{kind}"] == (None, "model")
            full, local = result["slots"][f"sequential_down_bias_{kind}"]
            assert (full, local) == ((5,), (5,))


def train_made(layout: Any, axes: dict[str, int]) -> tuple[float, int]:
    build, data = models.transformer, models.transformer_data()
    case = parity.Case(build, data, loss=parity_loss(), steps=3)
    with real_float64():
        one = parity.train(parity.build_seeded(build), case)
        distribution = model_parallel(layout, **axes)

        def made() -> Any:  # for a fresh session has no distribution
            with under(distribution):
                return build()

        model = parity.build_seeded(made)
        assert any(isinstance(v, ShardedVariable) for v in model.variables)
        plan = plan_of(model, distribution)
        assert plan == keras_tp.plan(model, distribution._layout_map)
        report = parity.compare_with(one, case, model, plan)
    return report.worst(), report.sharded


def parity_loss() -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize("axes", [{"batch": 1, "model": 2}, {"batch": 2, "model": 2}])
def test_training_what_was_made_as_shards(
    ranks: Callable[[int], RankPool], axes: dict[str, int]
) -> None:
    """Made or sharded, a model is to train alike: outputs, gradients, weights and slots."""
    for worst, sharded in ranks(axes["batch"] * 2)(train_made, models.TRANSFORMER_LAYOUT, axes):
        assert worst < 1e-10
        assert sharded > 10


def plan_stored() -> list[Any]:
    size = distribution_lib.num_processes()
    distribution = model_parallel(LAYOUT)
    keras.utils.set_random_seed(1)
    with under(distribution):
        model = small_model()
    model.compile("sgd", "mse")
    before = {id(v): v._value.untyped_storage().data_ptr() for v in model.variables}
    assert any(map(awaits_plan, model.variables))
    plan = plan_of(model, distribution)
    with Collectives() as counts:
        keras_tp.parallelize(model, plan=plan)
    assert {id(v): v._value.untyped_storage().data_ptr() for v in model.variables} == before
    assert not any(map(awaits_plan, model.variables))
    assert size == 1 or "all_gather" not in counts
    with pytest.raises(keras_tp.LayoutError, match="is parallelized already"):
        plan_of(model, distribution)
    # A layer of it, in another model, is no more to be sharded than the model is.
    other = keras.Sequential([model.get_layer("up")])
    with pytest.raises(keras_tp.LayoutError, match="'sequential/up/kernel' is parallelized"):
        keras_tp.plan(other, distribution._layout_map)
    return [counts["broadcast"], len(model.optimizer.variables)]


def test_what_is_stored_as_planned_is_left_alone(ranks: Callable[[int], RankPool]) -> None:
    """Weights that are gathered and cut again need, for a moment, what was to be saved."""
    for broadcasts, slots in ranks(2)(plan_stored):
        assert broadcasts <= slots + 2  # the optimizer's numbers, the random state, no weight


def reshard() -> list[Any]:
    x, y = np.arange(24).reshape(4, 6) % 11, np.ones((4, 6, 5))
    keras.utils.set_random_seed(1)
    with under(model_parallel({".*kernel": (None, "model"), ".*norm/gamma": ("model",)})) as made:
        model = small_model()
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        model.optimizer.build(model.trainable_variables)
        for i, slot in enumerate(model.optimizer.momentums):
            slot.assign(np.random.default_rng(i).random(slot.shape))
    before = {v.path: v.numpy() for v in [*model.variables, *model.optimizer.variables]}
    wanted = {
        ".*up/kernel": ("model", None),
        ".*down/bias": ("model",),
        ".*down/kernel": (None, "model"),
    }
    layout_map = parity.layout_map(wanted, made.device_mesh)
    plan = keras_tp.plan(model, layout_map)
    with pytest.raises(keras_tp.LayoutError, match=r"up/kernel' is stored by \(None, 'model'\)"):
        plan_of(model, model_parallel(wanted))
    keras_tp.parallelize(model, plan=plan)
    after = {v.path: v.numpy() for v in [*model.variables, *model.optimizer.variables]}
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, path)
    for v, planned in zip(model.variables[:5], plan.variables[:5], strict=False):
        assert v._layout.axes == planned.layout
    kernel, gamma = (
        next(v for v in model.optimizer.variables if v.path.endswith(f"{name}_momentum"))
        for name in ("up_kernel", "norm_gamma")
    )
    assert type(gamma) is type(model.get_layer("norm").gamma) is keras.Variable
    assert kernel._layout.axes == ("model", None)
    loss = float(model.train_on_batch(x, y))
    return [local_tensor(kernel).shape, local_tensor(gamma).shape, loss]


def test_other_plans_reshard(ranks: Callable[[int], RankPool]) -> None:
    """A weight cut anew, whose momentum is not, is updated with another weight's."""
    results = ranks(2)(reshard)
    assert [tuple(r[0]) for r in results] == [(4, 13), (3, 13)]
    assert [tuple(r[1]) for r in results] == [(13,), (13,)]
    assert results[0][2] == results[1][2]


def other_mesh() -> str:
    with under(model_parallel(LAYOUT, batch=1, model=2)):
        model = small_model()
    with pytest.raises(keras_tp.LayoutError) as error:
        plan_of(model, model_parallel(LAYOUT, batch=2, model=1))
    return str(error.value)


def test_a_model_of_another_mesh_is_refused(ranks: Callable[[int], RankPool]) -> None:
    """Its shards would be taken for those of ranks that hold others."""
    message = ranks(2)(other_mesh)[0]
    assert "'sequential/up/kernel' lies on another mesh (batch=1, model=2)" in message
    assert "made under another distribution (this one has mesh: batch=2, model=1)" in message


def data_parallel() -> list[Any]:
    rank = distribution_lib.process_id()
    keras.utils.set_random_seed(rank)
    keras_tp.enable()
    try:
        distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
        with distribution.scope():
            model = small_model()
    finally:
        keras_tp.disable()
    plan = plan_of(model, distribution)
    assert not any(v.sharded for v in plan.variables)
    assert {axis for v in model.variables for axis in v._layout.axes} == {None}
    assert all(type(v) is keras.Variable for v in model.variables)
    return [shards(model), plan.mesh]


def test_data_parallel_replicas_start_alike(ranks: Callable[[int], RankPool]) -> None:
    """Unseeded replicas start different and stay different."""
    (one, mesh), (other, _) = ranks(2)(data_parallel)
    assert str(mesh) == "batch=2"
    for path, value in one.items():
        np.testing.assert_array_equal(other[path], value, path)


def make_from_values() -> list[Any]:
    rank = distribution_lib.process_id()
    array, tensor = np.full((4, 3), float(rank)), torch.full((4, 3), float(rank))
    expanded = torch.tensor([float(rank)]).expand(4, 3)
    torch.manual_seed(rank)
    module = torch.nn.Linear(3, 2)
    wrapped = module.weight
    with under(model_parallel({"cut.*": (None, "model")})):
        made = [
            keras.Variable(array, name="cut"),
            keras.Variable(tensor, name="whole"),
            keras.Variable(expanded, name="cut_too"),
            keras.Variable(lambda shape, dtype: expanded, shape=(4, 3), name="lazy"),
            keras.Variable(float(rank), name="scalar"),
            keras.Variable(torch.empty(0, 3), name="empty"),
        ]
        layer = keras.layers.TorchModuleWrapper(module)
    assert (array == rank).all()  # not written over
    assert (tensor == rank).all()
    assert (expanded == rank).all()
    assert layer.module.weight is wrapped
    assert layer.weights[0]._value is wrapped
    assert [tuple(v.shape) for v in made] == [(4, 3)] * 4 + [(), (0, 3)]
    assert [v.ndim for v in made] == [2, 2, 2, 2, 0, 2]
    return [
        [local_tensor(v).detach().numpy() for v in made],
        [v.numpy() for v in made],
        wrapped.detach().numpy(),
    ]


def test_variables_made_of_values(ranks: Callable[[int], RankPool]) -> None:
    """The first rank's value must not be written into the other's array, of which the variable on
    torch is a view; and a shard's shape is not the variable's."""
    results = ranks(2)(make_from_values)
    for local, full, _ in results:
        assert all((value == 0).all() for value in [*local, *full])
        assert [value.shape for value in full] == [(4, 3)] * 4 + [(), (0, 3)]
    assert [results[rank][0][0].shape for rank in range(2)] == [(4, 2), (4, 1)]
    assert [results[rank][0][2].shape for rank in range(2)] == [(4, 2), (4, 1)]
    np.testing.assert_array_equal(results[0][2], results[1][2])


def make_given_layout() -> list[Any]:
    mesh = keras_tp.device_mesh({"batch": 1, "model": 2})
    with under(model_parallel({".*": (None, None)})):
        given = keras.Variable(np.ones((4, 3)), layout=TensorLayout(("model", None)))
        with pytest.raises(keras_tp.LayoutError, match=r"'wrong' \(4, 3\) is given a layout .* of"):
            keras.Variable(np.ones((4, 3)), layout=TensorLayout(("model",)), name="wrong")
    keras_tp.enable()
    try:
        outside = keras.Variable(np.ones((4, 3)), layout=TensorLayout((None, "model"), mesh))
        with pytest.raises(keras_tp.LayoutError, match="without a device mesh"):
            keras.Variable(np.ones((4, 3)), layout=TensorLayout((None, "model")))
    finally:
        keras_tp.disable()
    return [tuple(local_tensor(v).shape) for v in (given, outside)]


def test_layouts_that_a_variable_is_given(ranks: Callable[[int], RankPool]) -> None:
    """`add_weight(layout=...)` goes before any pattern, and needs no scope."""
    assert ranks(2)(make_given_layout) == [[(2, 3), (4, 2)], [(2, 3), (4, 1)]]


class Late(keras.layers.Layer):
    """Its layer is built as it is called, which Keras first does to ask for shapes."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.dense = layers.Dense(4, name="dense")
        self.seen: dict[str, Any] = {}

    def call(self, x: Any) -> Any:
        if not self.seen:
            self.seen["metric"] = keras.metrics.Mean(name="kernel")
        return self.dense(x)


def make_late() -> list[Any]:
    keras.utils.set_random_seed(distribution_lib.process_id())
    with under(model_parallel({".*kernel.*": (None, "model")})):
        layer = Late(name="late")
        inputs = keras.Input((3,))
        model = keras.Model(inputs, layer(inputs))
        with keras.device("meta"):
            meta = keras.Variable(np.ones((3, 4)), name="kernel")
    assert type(meta) is keras.Variable
    assert meta._value.is_meta
    assert isinstance(layer.dense.kernel, ShardedVariable)
    assert not any(isinstance(v, ShardedVariable) for v in layer.seen["metric"].variables)
    assert model.variables[0] is layer.dense.kernel
    assert layer.seen["metric"].total._layout.axes == ()
    output = model.predict_on_batch(np.ones((2, 3), "float32"))
    return [tuple(local_tensor(layer.dense.kernel).shape), layer.dense.kernel.numpy(), output]


def test_weights_made_in_a_call(ranks: Callable[[int], RankPool]) -> None:
    """Their value comes later, outside of every name scope, where a metric looks like a weight."""
    (shape, kernel, output), (_, other, other_output) = ranks(2)(make_late)
    assert shape == (3, 2)
    np.testing.assert_array_equal(kernel, other)
    np.testing.assert_allclose(output, np.ones((2, 3)) @ kernel, rtol=1e-6)
    np.testing.assert_array_equal(output, other_output)


def count_broadcasts() -> dict[str, int]:
    with under(model_parallel({".*kernel": (None, "model")})), Collectives() as counts:
        layers.Dense(4).build((None, 3))
    return dict(counts)


def test_a_weight_is_sent_once(ranks: Callable[[int], RankPool]) -> None:
    """A broadcast a weight, and no gather."""
    assert ranks(2)(count_broadcasts) == [{"broadcast": 2}] * 2
