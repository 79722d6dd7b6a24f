"""Everything around the layers: when to parallelize, optimizer slots, random numbers, losses."""

from __future__ import annotations

import contextlib
import gc
import warnings
from pathlib import Path
from typing import Any

import keras
import models
import numpy as np
import parity
import pytest
import torch
import torch.distributed as dist
from keras import layers, ops
from patience import soon
from torch._subclasses.fake_tensor import FakeTensor

import keras_tp
from keras_tp.seam.variables import ShardedVariable, local_tensor
from keras_tp.seam.weights import FullWeight

AXES = {"batch": 1, "model": 2}
ADAM = {"class_name": "Adam", "config": {"learning_rate": 0.01}}


def stack(layout: Any = models.DENSE_LAYOUT) -> Any:
    return parity.layout_map(layout, {"batch": 1, "model": dist.get_world_size()})


def gap(one: Any, many: Any) -> float:
    """Largest difference of any weight or optimizer variable."""
    full = keras_tp.full_weights(many)
    gaps = [parity.difference(v, full[path]) for path, v in keras_tp.full_weights(one).items()]
    for a, b in zip(one.optimizer.variables, many.optimizer.variables, strict=True):
        gaps.append(parity.difference(a.numpy(), b.numpy()))
    return max(gaps)


def compiled(model: Any, optimizer: Any = ADAM, **options: Any) -> Any:
    model.compile(keras.optimizers.deserialize(optimizer), loss="mse", **options)
    return model


def before_and_after_compile() -> list[float]:
    gaps = []
    x, y = models.dense_data()
    with parity.real_float64():
        for when in ("before compile", "after compile", "after training"):
            one = compiled(parity.build_seeded(models.dense_stack))
            many = parity.build_seeded(models.dense_stack)
            if when == "before compile":
                keras_tp.parallelize(many, stack())
            compiled(many)
            if when == "after training":  # the optimizer has full slots by then
                many.train_on_batch(x, y)
                one.train_on_batch(x, y)
            if when != "before compile":
                keras_tp.parallelize(many, stack())
            for _ in range(3):
                one.train_on_batch(x, y)
                many.train_on_batch(x, y)
            gaps.append(gap(one, many))
            sharded = [v for v in many.optimizer.variables if isinstance(v, ShardedVariable)]
            assert len(sharded) == 2 * 4
            for slot in sharded:
                assert tuple(local_tensor(slot).shape) == slot._sharding.local_shape
    return gaps


def test_before_and_after_compile(ranks: Any) -> None:
    """Slots made in full before, or by an optimizer that came later, must follow their weight."""
    for gaps in ranks(2)(before_and_after_compile):
        assert max(gaps) < 1e-10


def earlier_output() -> float:
    x, y = (torch.tensor(a) for a in models.dense_data())
    gradients = []
    with parity.real_float64():
        one, many = (parity.build_seeded(models.dense_stack) for _ in range(2))
        before = many(x)
        keras_tp.parallelize(many, stack())
        for model in (one, many):
            ((model(x) - y) ** 2).mean().backward()
            gradients.append(model.trainable_variables[0].value.grad)
        with pytest.raises(RuntimeError):  # the old graph is of weights that are gone
            before.sum().backward()
        mine = many.trainable_variables[0]._sharding.local(gradients[0])
    return parity.difference(mine.numpy(), gradients[1].numpy())


def test_an_output_from_before_may_still_live(ranks: Any) -> None:
    """In a notebook it does; its graph then refused the shard's gradient for its shape."""
    assert max(ranks(2)(earlier_output)) < 1e-10


def keras_methods() -> list[float]:
    gaps = []
    random = np.random.default_rng(5)
    x, y = random.standard_normal((22, 128)), random.standard_normal((22, 10))
    with parity.real_float64():
        one, many = (parity.build_seeded(models.dense_stack) for _ in range(2))
        keras_tp.parallelize(many, stack())
        results = []
        for model in (one, many):
            counts = keras.metrics.FalsePositives(thresholds=0.0, name="counted")
            compiled(model, metrics=["mae", counts], weighted_metrics=["mse"])
            keras.utils.set_random_seed(11)  # the same shuffles in both runs
            history = model.fit(
                x,
                y,
                batch_size=8,  # ragged: 8, 8, 6
                epochs=2,
                shuffle=True,
                sample_weight=np.linspace(0.5, 1.5, 22),
                validation_data=(x[:5], y[:5]),
                verbose=0,
            ).history
            results.append(
                {
                    **history,
                    "evaluate": model.evaluate(x, y, batch_size=8, verbose=0),
                    "predict": model.predict(x, batch_size=8, verbose=0),
                    "train_on_batch": model.train_on_batch(x, y),
                    "test_on_batch": model.test_on_batch(x, y),
                    "predict_on_batch": model.predict_on_batch(x),
                }
            )
        for key, value in results[0].items():
            gaps.append(parity.difference(value, results[1][key]))
        gaps.append(gap(one, many))
    return gaps


def test_keras_methods_give_the_one_process_results(ranks: Any) -> None:
    """Ragged batches, shuffles, weights and metrics see whole batches on every rank. Keras nightly
    multiplies count metrics by the number of replicas, and refuses arrays in `fit`."""
    for gaps in ranks(2)(keras_methods):
        assert len(gaps) > 10
        assert max(gaps) < 1e-10


def unseeded_replicas() -> Any:
    rank = dist.get_rank()
    torch.manual_seed(1000 + rank)
    np.random.seed(rank)
    keras.utils.clear_session()
    model = keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(16, activation="relu"),
            layers.Dropout(0.5),
            layers.BatchNormalization(),
            layers.Dense(10),
            layers.Dropout(0.5, seed=rank),
            layers.Dense(3),
        ]
    )
    axes = {"batch": dist.get_world_size() // 2, "model": 2}
    layout = {".*dense_1/kernel": ("model", "batch")}
    keras_tp.parallelize(model, parity.layout_map(layout, axes))
    compiled(model)
    start = keras_tp.full_weights(model)
    x = np.random.default_rng(6).standard_normal((32, 12)).astype("float32")
    model.fit(x, x[:, :3], batch_size=8, epochs=2, verbose=0)
    return start, keras_tp.full_weights(model)


@pytest.mark.parametrize("size", [2, 4])
def test_replicas_are_bit_equal_without_a_seed(ranks: Any, size: int) -> None:
    """Megatron-LM #1446, Keras nightly: unseeded replicas start different and stay different.
    Dropout masks come from torch's own state where no seed is given, shuffles always do."""
    (start, end), *others = ranks(size)(unseeded_replicas)
    for other_start, other_end in others:
        for path in start:
            assert (start[path] == other_start[path]).all(), path
            assert (end[path] == other_end[path]).all(), path
    assert any((start[path] != end[path]).any() for path in start)


def files(folder: str) -> list[float]:
    path = Path(folder) / f"rank{dist.get_rank()}.weights.h5"
    one = compiled(parity.build_seeded(models.dense_stack))
    x, y = (a.astype("float32") for a in models.dense_data())
    one.train_on_batch(x, y)
    one.save_weights(path)
    many = compiled(parity.build_seeded(models.dense_stack, seed=8))
    many.optimizer.build(many.trainable_variables)  # the file has slots to load
    many.load_weights(path)
    keras_tp.parallelize(many, stack())
    gaps = [gap(one, many)]
    later = parity.build_seeded(models.dense_stack, seed=9)
    keras_tp.parallelize(later, stack())
    later.load_weights(path)
    gaps += [
        parity.difference(a, b) for a, b in zip(one.get_weights(), later.get_weights(), strict=True)
    ]
    again = Path(folder) / "again.weights.h5"  # of all ranks
    later.save_weights(again)
    plain = parity.build_seeded(models.dense_stack, seed=10)
    plain.load_weights(again)
    gaps += [
        parity.difference(a, b) for a, b in zip(one.get_weights(), plain.get_weights(), strict=True)
    ]
    return gaps


def test_weights_load_before_and_after_and_save_in_full(ranks: Any, tmp_path: Path) -> None:
    """ColossalAI #6108: the saved embedding held an eighth of the vocabulary. transformers #48569:
    training went on from another optimizer state, without a word."""
    for gaps in ranks(2)(files, str(tmp_path)):
        assert max(gaps) == 0.0


class OwnLoss(keras.Model):
    """Reads weights in compute_loss, as many do for their own regularization."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(4, name="dense")

    def call(self, x: Any) -> Any:
        return self.dense(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True) -> Any:  # type: ignore[no-untyped-def]
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + 0.1 * ops.sqrt(ops.sum(ops.square(self.dense.kernel)))


def own_loss() -> float:
    def build() -> Any:
        model = OwnLoss()
        model(np.zeros((1, 6)))
        return model

    random = np.random.default_rng(7)
    x, y = random.standard_normal((5, 6)), random.standard_normal((5, 4))
    axes = {"batch": 1, "model": 2}
    return parity.compare(build, models.DENSE_LAYOUT, axes, (x, y)).worst()


def test_a_loss_that_reads_weights_sees_them_whole(ranks: Any) -> None:
    """The norm of a shard is not the norm of the weight."""
    assert max(ranks(2)(own_loss)) < 1e-10


def lora_later() -> tuple[float, int]:
    import warnings

    random = np.random.default_rng(8)
    x, y = random.standard_normal((6, 128)), random.standard_normal((6, 10))
    with parity.real_float64():
        one, many = (parity.build_seeded(models.dense_stack) for _ in range(2))
        keras_tp.parallelize(many, stack())
        for model in (one, many):
            keras.utils.set_random_seed(3)
            for layer in model.layers:
                layer.enable_lora(2)
                layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
            compiled(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                one.train_on_batch(x, y)
                many.train_on_batch(x, y)
        said = [w for w in caught if issubclass(w.category, keras_tp.LayoutWarning)]
        return gap(one, many), len(said)


def test_lora_after_parallelize_is_exact_and_said(ranks: Any) -> None:
    """A call on shards would leave the adapters out."""
    for difference, warned in ranks(2)(lora_later):
        assert difference < 1e-9
        assert warned > 0


def gradients_flow() -> None:
    model = parity.build_seeded(models.transformer)
    keras_tp.parallelize(model, stack(models.TRANSFORMER_LAYOUT))
    x, y = models.transformer_data()
    out = model(torch.tensor(x), training=True)
    torch.nn.functional.cross_entropy(out.flatten(0, 1), torch.tensor(y).flatten()).backward()
    for v in model.trainable_variables:
        grad = v.value.grad
        assert grad is not None, v.path
        assert torch.isfinite(grad).all(), v.path
        assert (grad != 0).any(), v.path


@pytest.mark.parametrize("size", [2, 4])
def test_every_trainable_variable_of_every_rank_has_a_gradient(ranks: Any, size: int) -> None:
    """A shard that the computation does not read trains nothing, in silence."""
    ranks(size)(gradients_flow)


def live_storages() -> dict[int, int]:
    """Bytes of every storage that some live tensor keeps, by address."""
    found = {}
    for thing in gc.get_objects():
        kind = type(thing)
        # (A FakeTensor is what a compiler has left over: of no memory, like a meta tensor.)
        if not issubclass(kind, torch.Tensor) or issubclass(kind, FullWeight | FakeTensor):
            continue
        if thing.is_meta:
            continue
        with contextlib.suppress(NotImplementedError):  # a tensor that torch has emptied
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def memory() -> None:
    """Sizes are such that no activation has as many bytes as a full weight."""

    def build() -> Any:
        return keras.Sequential(
            [
                keras.Input((11,), dtype="int32"),
                layers.Embedding(1009, 52),
                layers.LayerNormalization(),
                layers.Dense(307, activation="gelu"),
                layers.Conv1D(53, 3, padding="same"),
                layers.Dense(211),
                layers.LSTM(71),
                layers.Dense(101),
            ]
        )

    layout = {
        ".*embeddings": ("model", None),
        ".*dense/kernel": (None, "model"),
        ".*conv1d/kernel": (None, None, "model"),
        ".*dense_1/kernel": ("model", None),
        ".*dense_2/kernel": (None, "model"),
        ".*(lstm_cell/kernel|recurrent_kernel)": ("model", None),
    }
    x = np.arange(22).reshape(2, 11)
    for trained_before in (False, True):
        keras.utils.clear_session()
        gc.collect()
        others = live_storages()
        model = compiled(build())
        if trained_before:
            model.train_on_batch(x, np.ones((2, 101)))
        full = {4 * v.numpy().size: v.path for v in model.variables}
        plan = keras_tp.plan(model, stack(layout))
        keras_tp.parallelize(model, plan=plan)
        full = {size: path for size, path in full.items() if _sharded(plan, path)}
        assert len(full) == 7
        for _ in range(2):
            gc.collect()
            assert soon(lambda: not kept(full, others)), kept(full, others)  # noqa: B023
            held = sum(local_tensor(v).untyped_storage().nbytes() for v in model.variables)
            assert held == plan.bytes_per_rank(dist.get_rank())
            model.train_on_batch(x, np.ones((2, 101)))  # gradients and slots now exist
            model.predict_on_batch(x)


def kept(full: dict[int, str], others: dict[int, int]) -> list[str]:
    """Paths of variables as large as which there are new tensors."""
    return [full[n] for k, n in live_storages().items() if k not in others and n in full]


def _sharded(plan: keras_tp.Plan, path: str) -> bool:
    return next(v for v in plan.variables if v.path == path).sharded


@pytest.mark.parametrize("size", [2, 4])
def test_no_rank_keeps_a_full_copy(ranks: Any, size: int) -> None:
    """A view keeps all of its storage: seen to fail with gradients that were views of full ones."""
    ranks(size)(memory)


def other_plans() -> str:
    model = parity.build_seeded(models.dense_stack)
    axes = (None, "model") if dist.get_rank() == 0 else ("model", None)
    try:
        keras_tp.parallelize(model, stack({".*dense_1/kernel": axes}))
    except keras_tp.LayoutError as error:
        assert not any(isinstance(v, ShardedVariable) for v in model.variables)
        return str(error)
    return "accepted"


def other_trainables() -> str:
    model = parity.build_seeded(models.dense_stack)
    model.layers[dist.get_rank()].trainable = False
    try:
        keras_tp.parallelize(model, stack())
    except keras_tp.LayoutError as error:
        return str(error)
    return "accepted"


def test_ranks_that_disagree_are_told_where(ranks: Any) -> None:
    """Their collectives would not match, and the job would hang or abort without a reason."""
    for message in ranks(2)(other_plans):
        first, second = message.split("where rank 1 plans")
        for part, layout in ((first, "(None, 'model')"), (second, "('model', None)")):
            assert "path='sequential/dense_1/kernel'" in part
            assert f"layout={layout}" in part
    for message in ranks(2)(other_trainables):
        assert "its ranks disagree" in message


def other_batches(what: str) -> str:
    model = compiled(parity.build_seeded(models.dense_stack))
    keras_tp.parallelize(model, stack())
    x, y = (a.astype("float32") for a in models.dense_data())
    mine = np.random.default_rng(dist.get_rank())
    try:
        if what == "predict":
            model.predict(mine.standard_normal((4, 128)), verbose=0)
        elif what == "inputs":
            model.train_on_batch(mine.standard_normal((6, 128)), y)
        elif what == "targets":
            model.train_on_batch(x, mine.standard_normal((6, 10)))
        elif what == "rows":
            model.train_on_batch(x[: 4 + dist.get_rank()], y[: 4 + dist.get_rank()])
        elif what == "later":
            for batch in range(9):
                late = batch == 7 and dist.get_rank() == 1
                model.train_on_batch(x + late, y)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("what", ["predict", "inputs", "targets", "rows", "later"])
def test_ranks_that_are_fed_different_batches_are_told(ranks: Any, what: str) -> None:
    """Each rank computes a part of a batch; parts of different batches add up to nonsense, and
    replicated weights part ways, in silence. The 8th batch is compared, as the 1st, 2nd and 4th."""
    kind = "targets or sample weights" if what == "targets" else "inputs"
    for message in ranks(2)(other_batches, what):
        assert f"ranks are given different {kind}: rank 0 has float" in message


def smaller_file(folder: str) -> str:
    path = Path(folder) / f"rank{dist.get_rank()}.weights.h5"
    keras.utils.set_random_seed(1)  # ranks with other weights are refused before
    small, large = (keras.Sequential([keras.Input((4,)), layers.Dense(n)]) for n in (4, 8))
    small.save_weights(path)
    keras_tp.parallelize(large, stack({".*bias": ("model",), ".*kernel": (None, "model")}))
    try:
        large.load_weights(path)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_weights_of_a_smaller_model_do_not_load_as_a_shard(ranks: Any, tmp_path: Path) -> None:
    """Half as many units on two ranks: the file's kernel has just the shape of the shard."""
    for message in ranks(2)(smaller_file, str(tmp_path)):
        assert message != "accepted"
        assert "is to load" not in message


def test_loading_makes_no_copy_of_a_full_weight_but_the_one_it_reads(fake_ranks: Any) -> None:
    """Keras copies each array that is assigned: beside the shards there were two of the largest."""
    fake_ranks(1, 2)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8)])
    keras_tp.parallelize(model, stack({".*kernel": (None, "model")}))
    variable = model.layers[0].kernel
    value = np.arange(32, dtype="float32").reshape(4, 8)
    assert variable._convert_to_tensor(value).data_ptr() == value.ctypes.data
    variable.assign(value)
    kept = value[:, 4:].copy()
    value[:] = -1  # what is assigned is not the array itself
    assert np.array_equal(local_tensor(variable).detach().numpy(), kept)


def vocabulary_edges(size: int) -> list[float]:
    worst = []
    for vocabulary in (3, 7):  # 3 rows on 4 ranks leave one rank with none

        def build(vocabulary: int = vocabulary) -> Any:
            return keras.Sequential(
                [keras.Input((4,), dtype="int32"), layers.Embedding(vocabulary, 6)]
            )

        ids = np.array([[-1, 0, 1, 2], [2, -3, 0, 0]], "int32")
        layout = {".*": ("model", None)}
        axes = {"batch": 1, "model": size}
        worst.append(parity.compare(build, layout, axes, (ids, np.ones((2, 4, 6)))).worst())
    return worst


@pytest.mark.parametrize("size", [2, 4])
def test_negative_ids_and_ranks_without_a_row(ranks: Any, size: int) -> None:
    """Keras counts negative ids from the end, of the full vocabulary."""
    for worst in ranks(size)(vocabulary_edges, size):
        assert max(worst) < 1e-10


def attention_and_convolution() -> Any:
    x = keras.Input((6,), dtype="int32")
    h = layers.Embedding(9, 8, name="table")(x)
    h = layers.MultiHeadAttention(4, 6, name="attention")(h, h)
    h = layers.Conv1D(8, 3, name="conv")(h)
    return keras.Model(x, layers.EinsumDense("abc,cde->abde", (None, 2, 4), name="end")(h))


def meshes_in_turn() -> list[float]:
    worst = []
    layout = {
        "table/embeddings": ("rows", "columns"),
        ".*(query|key)/kernel": ("rows", "columns", None),
        ".*value/kernel": ("columns", None, "rows"),
        ".*query/bias": ("columns", "rows"),
        ".*attention_output/kernel": ("rows", None, "columns"),
        "conv/kernel": (None, "rows", "columns"),
        "end/kernel": ("columns", "rows", None),
    }
    ids = np.arange(18).reshape(3, 6) % 9
    data = (ids.astype("int32"), np.ones((3, 4, 2, 4)))
    for names in (["cpu:0", "cpu:1", "cpu:2", "cpu:3"], ["cpu:2", "cpu:0", "cpu:3", "cpu:1"]):
        mesh = keras.distribution.DeviceMesh((2, 2), ["rows", "columns"], names)
        worst.append(parity.compare(attention_and_convolution, layout, mesh, data).worst())
    # torch orders the ranks of a group, a mesh need not; uneven shards show which is whose.
    for order in ([0, 3, 1, 2], [3, 2, 1, 0], [1, 3, 0, 2]):
        mesh = keras.distribution.DeviceMesh(
            (2, 2), ["rows", "columns"], [f"cpu:{r}" for r in order]
        )
        uneven = {".*dense/kernel": ("rows", "columns"), ".*dense_3/kernel": ("columns", "rows")}
        report = parity.compare(models.dense_stack, uneven, mesh, models.dense_data(), steps=1)
        mesh = keras.distribution.DeviceMesh((4,), ["model"], [f"cpu:{r}" for r in order])
        uneven = {".*dense_3/kernel": (None, "model"), ".*dense_3/bias": ("model",)}
        other = parity.compare(models.dense_stack, uneven, mesh, models.dense_data(), steps=1)
        worst += [report.worst(), other.worst()]
    for axes in ({"batch": 1, "model": 4}, {"rows": 2, "columns": 2}, {"batch": 1, "model": 4}):
        first, second = list(axes)[-2:]
        dense = {
            ".*dense/kernel": (None, second),
            ".*dense_1/kernel": (second, None if axes[first] == 1 else first),
            ".*dense_1/bias": (second,),
            ".*dense_2/kernel": (None if axes[first] == 1 else first, second),
        }
        report = parity.compare(models.dense_stack, dense, axes, models.dense_data())
        worst.append(report.worst())
    return worst


def test_several_meshes_in_one_job_and_two_sharded_axes(ranks: Any) -> None:
    """A stale mesh on one rank hangs the job; a weight sharded along two axes is reduced along one
    and gathered along the other; device names say which rank holds what, in whatever order (ranks
    out of order had garbled weights, or hung)."""
    for worst in ranks(4)(meshes_in_turn):
        assert max(worst) < 1e-10


def unknown_id() -> str:
    model = parity.build_seeded(models.transformer)
    keras_tp.parallelize(model, stack(models.TRANSFORMER_LAYOUT))
    x, _ = models.transformer_data()
    x[0, 0] = models.VOCABULARY
    try:
        model(torch.tensor(x))
    except Exception as error:
        return str(error)
    return "accepted"


def test_an_id_outside_the_vocabulary_is_an_error_on_every_rank(ranks: Any) -> None:
    """No rank has that row: the sum of zeros would be a silent embedding of nothing."""
    for message in ranks(2)(unknown_id):
        assert "'tokens' was given an id outside its vocabulary of 24" in message


def second_derivatives() -> float:
    from keras_tp.collectives import Axis, copy, gather, reduce, split
    from keras_tp.layouts import MeshShape
    from keras_tp.mesh import torch_mesh

    mesh = torch_mesh(MeshShape.from_keras(keras_tp.device_mesh({"model": 2})))
    axis = Axis.of(mesh, "model")
    torch.manual_seed(0)
    full = torch.randn(4, 6, dtype=torch.float64)
    first, second = (torch.randn(6, 5, dtype=torch.float64) for _ in range(2))

    def penalty(x: Any, forward: Any) -> Any:
        (grad,) = torch.autograd.grad(forward(x).tanh().sum(), x, create_graph=True)
        (twice,) = torch.autograd.grad((grad**2).sum(), x)
        return twice

    def whole(x: Any) -> Any:
        return (x @ first) @ second.T

    def sharded(x: Any) -> Any:
        mine = split(torch.arange(5), 0, axis)
        hidden = gather(copy(x, axis) @ first[:, mine], 1, 5, axis)
        return reduce(split(hidden, 1, axis) @ second[:, mine].T, axis)

    one = penalty(full.clone().requires_grad_(), whole)
    many = penalty(full.clone().requires_grad_(), sharded)
    return parity.difference(one.numpy(), many.numpy())


def test_gradients_of_gradients(ranks: Any) -> None:
    """A backward made of bare collectives has no gradient of its own, and says nothing."""
    assert max(ranks(2)(second_derivatives)) < 1e-12


def own_loops(how: str) -> float:
    x, y = (torch.tensor(a) for a in models.dense_data())
    with parity.real_float64():
        one, many = (parity.build_seeded(models.dense_stack) for _ in range(2))
        keras_tp.parallelize(many, stack())
        for model in (one, many):
            if how == "torch":
                optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.01)
            else:
                optimizer = keras.optimizers.Adam(0.01)
            for _ in range(3):
                model.zero_grad()
                loss = ((model(x, training=True) - y) ** 2).mean() + sum(model.losses)
                loss.backward()
                if how == "torch":
                    optimizer.step()
                else:
                    grads = [v.value.grad for v in model.trainable_weights]
                    with torch.no_grad():
                        optimizer.apply(grads, model.trainable_weights)
        full = keras_tp.full_weights(many)
        return max(parity.difference(v, full[p]) for p, v in keras_tp.full_weights(one).items())


@pytest.mark.parametrize("how", ["torch", "keras"])
def test_own_training_loops(ranks: Any, how: str) -> None:
    """The loops of Keras's guides: `v.value.grad` must be the shard's gradient."""
    assert max(ranks(2)(own_loops, how)) < 1e-10


def compiled_steps() -> float:
    def build() -> Any:
        dense = [layers.Dense(units, activation="tanh") for units in (6, 2)]
        return keras.Sequential([keras.Input((4,)), *dense])

    layout = {".*dense/kernel": (None, "model"), ".*dense_1/kernel": ("model", None)}
    one, many = parity.build_seeded(build), parity.build_seeded(build)
    keras_tp.parallelize(many, stack(layout))
    compiled(one)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler has some of its own
        compiled(many, jit_compile=True)
        for model in (one, many):
            x, y = np.ones((4, 4)), np.ones((4, 2))
            losses = [model.train_on_batch(x, y) for _ in range(2)]
            losses += [model.test_on_batch(x, y)]  # compiled again
            results.append(losses)
    return max(parity.difference(*results), gap(one, many))


def test_compiled_steps_are_exact(ranks: Any) -> None:
    """Keras nightly takes no notice of `jit_compile`. Here, a second compilation of an all-gather
    that went as bytes failed."""
    for worst in ranks(2)(compiled_steps, timeout=300):
        assert worst < 1e-5
