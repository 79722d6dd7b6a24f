"""Weights that are read and written elsewhere than in a layer's call: in full, wherever.

Each case trains or uses a model twice on every rank, with and without
parallelizing it, and gives numbers; the two must be equal.
"""

from __future__ import annotations

import pickle
import random
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import parity
import pytest
import torch
import torch.distributed as dist
from keras import layers, ops
from torch.utils.checkpoint import checkpoint

import keras_tp
from keras_tp.messages import broadcast_object
from keras_tp.seam.variables import ShardedVariable, local_tensor
from keras_tp.seam.weights import FullWeight

Shard = Callable[[Any, dict[str, tuple[Any, ...]]], Any]


def floats(*shape: int, seed: int = 3) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def dense(*units: int, inputs: int = 4) -> Any:
    names = [layers.Dense(n, activation="tanh", name=f"d{i}") for i, n in enumerate(units)]
    return keras.Sequential([keras.Input((inputs,)), *names])


def alone(layer: Callable[[], Any], *shape: int) -> Any:
    return parity.build_seeded(lambda: keras.Sequential([keras.Input(shape), layer()]))


def trained(model: Any, *shape: int, optimizer: Any = "sgd", steps: int = 3) -> list[float]:
    model.compile(optimizer, "mse")
    x = floats(2, *shape)
    y = floats(*model(x).shape, seed=5)
    return [float(model.train_on_batch(x, y)) for _ in range(steps)]


class CustomStep(keras.Model):
    """A training step of Keras's guides, with penalties inside and outside `compute_loss`."""

    def __init__(self) -> None:
        super().__init__()
        self.d = layers.Dense(6, name="d")

    def call(self, x: Any) -> Any:
        return self.d(x)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) + 0.1 * ops.norm(self.d.kernel)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data[:2]
        self.zero_grad()
        loss = self.compute_loss(x, y, self(x, training=True))
        loss = loss + ops.norm(self.d.kernel.value) + torch.logsumexp(self.d.kernel.value, (0, 1))
        loss.backward()
        weights = list(self.trainable_weights)
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in weights], weights)
        return {"loss": loss.detach()}


def custom_step(shard: Shard, kind: type[keras.Model] = CustomStep) -> Any:
    def build() -> Any:
        model = kind()
        model(np.zeros((1, 4)))
        return model

    return trained(shard(parity.build_seeded(build), {".*d/kernel": (None, "model")}), 4)


class ReadsAnother(keras.Model):
    """Its loss reads a weight of a model that is not its own."""

    def __init__(self, other: Any):
        super().__init__()
        self.d = layers.Dense(6, name="mine")
        self.other = [lambda: other.layers[0].kernel]  # hidden from Keras's tracking

    def call(self, x: Any) -> Any:
        return self.d(x)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) + ops.max(ops.abs(self.other[0]()))


class Squared(torch.autograd.Function):
    """What torch hands over to C++, and no `__torch_function__` sees."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.x = x
        return (x * x).sum()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return 2 * ctx.x * grad


class OwnFunction(CustomStep):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) + Squared.apply(self.d.kernel.value)


def own_autograd_function(shard: Shard) -> Any:
    return custom_step(shard, OwnFunction)


def a_rate_that_reads_a_weight(shard: Shard) -> Any:
    model = shard(parity.build_seeded(lambda: dense(6, 2)), {".*d0/kernel": (None, "model")})
    kernel = model.layers[0].kernel
    rate = lambda: 0.1 / (1 + ops.norm(kernel))  # noqa: E731
    return [
        *trained(model, 4, optimizer=keras.optimizers.SGD(rate, momentum=0.9)),
        model.layers[1].bias.numpy(),
    ]


class AsksAModel(keras.optimizers.Optimizer):
    """Calls a model in the midst of an update, where weights are otherwise read as shards."""

    elementwise = True
    asked: Any = None

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        rate = learning_rate * ops.mean(ops.abs(self.asked(np.ones((1, 2)))))
        self.assign_sub(variable, rate * gradient)


def a_model_called_by_an_optimizer(shard: Shard) -> Any:
    model = shard(alone(Scale, 2), {".*/s": ("model",)})
    optimizer = AsksAModel(1.0)
    optimizer.asked = model
    return trained(model, 2, optimizer=optimizer)


def made_to_require_a_gradient(shard: Shard) -> Any:
    model = shard(parity.build_seeded(lambda: dense(6, 2)), {".*d0/kernel": (None, "model")})
    w = model.layers[0].kernel.value.requires_grad_()
    return [(w**2).sum(), w[1:, 2], w.T]


def another_models_loss(shard: Shard) -> Any:
    other = shard(parity.build_seeded(lambda: dense(6)), {".*d0/kernel": (None, "model")})
    model = ReadsAnother(other)
    model(np.zeros((1, 4)))
    return trained(parity.build_seeded(lambda: model), 4)


class Counts(layers.Layer):
    """Assigns its weight during a call, and reads it again."""

    def build(self, shape: Any) -> None:
        self.n = self.add_weight(shape=(6,), name="n", initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        self.n.assign(self.n + 1.0)
        self.n.assign_add(ops.ones((6,)))
        return x + self.n


def assigned_in_a_call(shard: Shard) -> Any:
    counts = shard(alone(Counts, 6), {".*/n": ("model",)})
    normed = alone(lambda: layers.SpectralNormalization(layers.Conv1D(6, 2, name="c")), 7, 5)
    shard(normed, {".*c/kernel": (None, None, "model")})
    return [counts(np.zeros((1, 6))), *trained(normed, 7, 5)]


class Scaled(layers.Layer):
    """Reads its weight without a gradient first."""

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(shape=(shape[-1], 6), name="w")

    def call(self, x: Any) -> Any:
        with torch.no_grad():
            scale = ops.max(ops.abs(self.w))
        return ops.matmul(x, self.w) / scale


def first_read_without_a_gradient(shard: Shard) -> Any:
    return trained(shard(alone(Scaled, 5), {".*/w": (None, "model")}), 5)


def lora_in_a_file(shard: Shard) -> Any:
    model = alone(lambda: layers.Dense(2, name="d"), 4)
    model.layers[0].enable_lora(2)
    shard(model, {".*d/kernel": (None, "model"), ".*lora_kernel_b": (None, "model")})
    # Its merged kernel (4, 2) is read outside any call; a shard would be (4, 1).
    with tempfile.TemporaryDirectory() as folder:
        # A plain model is this rank's own affair, a parallelized one that of all.
        together = any(isinstance(v, ShardedVariable) for v in model.variables)
        path = broadcast_object(f"{folder}/model.keras") if together else f"{folder}/model.keras"
        model.save(path)
        output = keras.models.load_model(path)(floats(3, 4))
        dist.barrier()  # then the folder goes
        return output


def quantized(shard: Shard) -> Any:
    model = alone(lambda: layers.EinsumDense("ab,bc->ac", 4, bias_axes="c", name="e"), 4)
    shard(model, {".*e/kernel": (None, "model")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_tp.LayoutWarning)  # computes with other weights
        model.layers[0].quantize("int8")
        return model(floats(3, 4))


def statistics_from_a_file(shard: Shard) -> Any:
    layer = layers.Normalization(name="n")
    layer.adapt(floats(20, 4).astype("float32"))
    model = keras.Sequential([keras.Input((4,)), layer])
    with tempfile.TemporaryDirectory() as folder:
        model.save_weights(f"{folder}/a.weights.h5")
        shard(model, {".*(mean|variance)": ("model",)})
        model.load_weights(f"{folder}/a.weights.h5")
    return model(floats(3, 4))


class Scale(layers.Layer):
    """One value a rank: what is not gathered is broadcast, without a word."""

    def build(self, shape: Any) -> None:
        self.s = self.add_weight(shape=(2,), name="s", initializer="ones")

    def call(self, x: Any) -> Any:
        return ops.tanh(x * self.s)


def calls_that_are_no_call(shard: Shard) -> Any:
    layer = shard(alone(Scale, 2), {".*/s": ("model",)}).layers[0]
    x = torch.tensor(floats(3, 2))
    return [layer.call(x), layer.forward(x)]


class Checkpointed(Scale):
    """Computed again in the backward pass, when no call runs."""

    def call(self, x: Any) -> Any:
        return checkpoint(super().call, x, use_reentrant=False)


def computed_again(shard: Shard) -> Any:
    losses = trained(shard(alone(Checkpointed, 2), {".*/s": ("model",)}), 2)
    with keras.RematScope(mode="full"):
        layer = layers.Conv1D(6, 2, name="c")
    model = keras.Sequential([keras.Input((7, 5)), layer])
    layer.kernel.assign(floats(2, 5, 6))
    return losses + trained(shard(model, {".*c/kernel": (None, None, "model")}), 7, 5)


def handed_values(shard: Shard) -> Any:
    model = parity.build_seeded(lambda: dense(6, 2))
    shard(model, {".*d0/kernel": (None, "model"), ".*d1/kernel": ("model", None)})
    zeros = [np.zeros(v.shape, "float32") for v in model.trainable_variables]
    ones = [np.ones(v.shape, "float32") for v in model.trainable_variables]
    return [model.stateless_call(values, [], floats(3, 4))[0] for values in (zeros, ones)]


def handed_to_a_regularizer(shard: Shard) -> Any:
    model = alone(lambda: layers.Dense(6, kernel_regularizer="l1", name="d"), 4)
    shard(model, {".*d/kernel": (None, "model")})
    zeros = [np.zeros(v.shape, "float32") for v in model.trainable_variables]
    losses = model.stateless_call(zeros, [], floats(3, 4), return_losses=True)[2]
    return [float(loss) for loss in losses]


def an_optimizer_with_slots_already(shard: Shard) -> Any:
    model = parity.build_seeded(lambda: dense(6, 2))
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build(model.trainable_variables)
    shard(model, {".*d./kernel": (None, "model")})
    losses = trained(model, 4, optimizer=optimizer)
    for v in optimizer.variables:
        if isinstance(model.layers[0].kernel, ShardedVariable) and "d1_kernel" in v.path:
            assert tuple(local_tensor(v).shape) == (6, 1)
    return losses


def random_numbers_afterwards(shard: Shard) -> Any:
    keras.utils.set_random_seed(5)
    model = dense(6)
    shard(model, {".*d0/kernel": (None, "model")})
    model.add(layers.Dropout(0.5))
    model.add(layers.Dense(4))
    return [random.random(), *trained(model, 4)]


def written_by_users(shard: Shard) -> Any:
    model = shard(parity.build_seeded(lambda: dense(6, 2)), {".*d./kernel": (None, "model")})
    kernel = model.layers[0].kernel
    kernel.assign(ops.tanh(kernel.value) * 2.0)
    kernel.assign_add(ops.arange(6, dtype="float32"))  # broadcast over the rows
    kernel.assign_sub(kernel / 3.0)
    kernel.value.grad = None
    return [kernel.numpy(), kernel.value, kernel + 1, kernel.value.detach().sum()]


CASES: dict[str, Callable[[Shard], Any]] = {
    case.__name__: case
    for case in (
        custom_step,
        own_autograd_function,
        a_rate_that_reads_a_weight,
        a_model_called_by_an_optimizer,
        made_to_require_a_gradient,
        another_models_loss,
        assigned_in_a_call,
        first_read_without_a_gradient,
        lora_in_a_file,
        quantized,
        statistics_from_a_file,
        calls_that_are_no_call,
        computed_again,
        handed_values,
        handed_to_a_regularizer,
        an_optimizer_with_slots_already,
        random_numbers_afterwards,
        written_by_users,
    )
}


def plain_and_parallel(name: str) -> float:
    def parallelized(model: Any, layout: dict[str, tuple[Any, ...]]) -> Any:
        keras_tp.parallelize(model, parity.layout_map(layout, {"model": 2}))
        assert any(isinstance(v, ShardedVariable) for v in model.variables)
        return model

    results = []
    for shard in (lambda model, layout: model, parallelized):
        keras.utils.clear_session()
        parts = keras.tree.flatten(CASES[name](shard))
        results.append([ops.convert_to_numpy(part) for part in parts])
    return max(parity.difference(one, many) for one, many in zip(*results, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_weights_are_read_in_full(ranks: Any, name: str) -> None:
    """Each has been silently wrong while a read outside a call gave the shard, a weight was
    gathered once for a call whatever was assigned to it, or its gathered value was kept without
    the gradient."""
    for gap in ranks(2)(plain_and_parallel, name):
        assert gap < 1e-5


class WritesInPlace(layers.Layer):
    def build(self, shape: Any) -> None:
        self.n = self.add_weight(shape=(6,), name="kernel", initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        self.n.value.add_(1.0)
        return x + self.n


def writes_that_would_be_lost() -> list[str]:
    model = dense(6, 2)
    keras_tp.parallelize(model, parity.layout_map({".*d0/kernel": (None, "model")}, {"model": 2}))
    kernel = model.layers[0].kernel
    assert isinstance(kernel.value, FullWeight)
    counts = keras.Sequential([keras.Input((6,)), WritesInPlace(name="d0")], name="sequential")
    keras_tp.parallelize(counts, parity.layout_map({".*d0/kernel": ("model",)}, {"model": 2}))
    told = []

    def assign_data() -> None:
        kernel.value.data = torch.zeros(4, 6)

    def set_item() -> None:
        kernel.value[0] = 1.0

    for write in (
        lambda: kernel.value.mul_(2.0),
        lambda: kernel.value.data.mul_(2.0),
        lambda: kernel.value.detach().zero_(),
        lambda: torch.nn.init.zeros_(kernel.value),
        lambda: torch.add(torch.ones(4, 6), 1.0, out=kernel.value),
        lambda: torch._foreach_add_([kernel.value], 1.0),
        lambda: kernel.value[0].zero_(),
        lambda: kernel[0].zero_(),
        lambda: kernel.value.T[1:].mul_(2.0),
        lambda: [row.div_(2.0) for row in kernel.value],
        lambda: torch.nn.functional.relu(kernel.value, inplace=True),
        lambda: torch.nn.functional.relu(kernel.value[0], inplace=True),
        lambda: torch.ops.aten.mul_.Tensor(kernel.value, torch.ones(())),
        lambda: ops.convert_to_tensor(kernel).cpu().mul_(2.0),
        lambda: kernel.value.data.numpy().fill(0.0),
        assign_data,
        set_item,
        lambda: counts(np.zeros((1, 6))),
    ):
        try:
            with torch.no_grad():
                write()
        except ValueError as error:
            told.append(str(error))
    return told


def test_writes_that_would_be_lost_are_errors(ranks: Any) -> None:
    """`v.value.mul_(0.5)` is how torch users write; into a gathered weight it would do nothing."""
    for told in ranks(2)(writes_that_would_be_lost):
        assert len(told) == 18
        read_only = [text for text in told if text == "assignment destination is read-only"]
        assert len(read_only) == 1  # the array
        for text in told:
            assert text in read_only or "'sequential/d0/kernel' is sharded: what is" in text


def what_needs_no_gather() -> tuple[Any, ...]:
    model = dense(6, 2)
    keras_tp.parallelize(model, parity.layout_map({".*d0/kernel": (None, "model")}, {"model": 2}))
    model(floats(3, 4)).sum().backward()
    w = model.layers[0].kernel.value
    if torch.distributed.get_rank() > 0:  # the other rank does not take part
        return ()
    assert not w.detach().requires_grad
    return tuple(w.shape), w.dtype, w.ndim, len(w), w.requires_grad, tuple(w.grad.shape), repr(w)


def test_shapes_and_gradients_need_no_gather(ranks: Any) -> None:
    """A `print` on one rank that waits for the others, a gradient that costs a gather."""
    answer, _ = ranks(2)(what_needs_no_gather)
    words = "<FullWeight of 'sequential/d0/kernel', shape=(4, 6)>"
    assert answer == ((4, 6), torch.float32, 2, 4, True, (4, 3), words)


def refused_uses() -> list[str]:
    model = dense(6, 2)
    keras_tp.parallelize(model, parity.layout_map({".*d0/kernel": (None, "model")}, {"model": 2}))
    kernel, x = model.layers[0].kernel, keras.Input((6,))
    keras.Model(x, ops.matmul(x, ops.reshape(kernel.value * 1.0, (6, 4))))  # no view: a constant
    told = []
    for use in (
        lambda: pickle.dumps(kernel.value),
        lambda: ops.matmul(x, ops.transpose(kernel)),
    ):
        try:
            use()
        except keras_tp.LayoutError as error:
            told.append(str(error))
    return told


def test_uses_that_would_keep_one_ranks_or_an_old_weight_are_errors(ranks: Any) -> None:
    """A tied head that stays as it was, a file with half of a weight."""
    for told in ranks(2)(refused_uses):
        pickled, captured = told
        assert "pickled, it would be one rank's shard" in pickled
        assert "of a functional model would keep a view of 'sequential/d0/kernel'" in captured


def a_full_gradient() -> str:
    model = dense(2)
    keras_tp.parallelize(model, parity.layout_map({".*d0/kernel": (None, "model")}, {"model": 2}))
    model.compile("sgd", "mse")
    try:
        model.optimizer.apply([torch.ones(4, 2), torch.ones(2)], model.trainable_variables)
    except ValueError as error:
        return str(error)
    return ""


def test_a_full_gradient_is_refused(ranks: Any) -> None:
    """On a shard of one column it would be broadcast."""
    for told in ranks(2)(a_full_gradient):
        assert (
            "the gradient of 'sequential/d0/kernel' has shape (4, 2), this rank's shard (4, 1)"
            in told
        )


class Outer(layers.Layer):
    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(shape=(2,), name="w")

    def call(self, x: Any) -> Any:
        return self.inner(x) * self.w


class BuiltInACall(keras.Model):
    def __init__(self, inner: Any):
        super().__init__()
        self.outer = Outer(inner)

    def call(self, x: Any) -> Any:
        return self.outer(x)


def parameters_of_a_later_layer() -> list[tuple[int, ...]]:
    inner = dense(6, 2)
    keras_tp.parallelize(inner, parity.layout_map({".*d0/kernel": (None, "model")}, {"model": 2}))
    model = BuiltInACall(inner)
    model(floats(3, 4))
    return [tuple(p.shape) for name, p in model.named_parameters() if "d0/kernel" in name]


def test_a_layer_built_later_tracks_shards(ranks: Any) -> None:
    """Built within a call, it kept the gathered weights as parameters of its own."""
    for shapes in ranks(2)(parameters_of_a_later_layer):
        assert set(shapes) == {(4, 3)}
