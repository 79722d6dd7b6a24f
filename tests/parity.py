"""The oracle: the same training with and without keras_tp, in the same rank, compared in full.

Every rank trains the plain model by itself and the parallelized one with the
others, from the same seed, and reports the largest differences it sees. So all
ranks are compared, not the first alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend.common import dtypes

import keras_tp
from keras_tp.seam.variables import ShardedVariable, local_tensor

# Differences are relative to a tensor's largest value, or to this where that is
# smaller: what is zero but for rounding (the gradient of an attention key's bias,
# its momentum) has no scale of its own. A float64 tensor of 1e-12 that is wrong
# still shows.
FLOOR = 1e-3


@contextlib.contextmanager
def real_float64(on: bool = True) -> Iterator[None]:
    """Makes Keras compute float64 models in float64.

    On torch, `keras.backend.result_type("float64", "float64")` is "float32": matmul,
    layer norms and attention of a float64 model silently compute in float32, and
    a difference of 1e-7 could be rounding or a bug. Without that step it is a bug.
    """
    if not on:
        yield
        return
    keras.config.set_floatx("float64")
    before = dtypes.BIT64_TO_BIT32_DTYPE["float64"]
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    try:
        yield
    finally:
        dtypes.BIT64_TO_BIT32_DTYPE["float64"] = before
        keras.config.set_floatx("float32")


@dataclass
class Report:
    """Largest differences on one rank, each relative to the largest plain value."""

    loss: float = 0.0
    output: float = 0.0
    input_gradient: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    slots: dict[str, float] = field(default_factory=dict)
    sharded: int = 0

    def worst(self, but: Callable[[str], bool] = lambda path: False) -> float:
        """The largest of all but those of the variables and slots that `but` picks out."""
        named = [*self.gradients.items(), *self.weights.items(), *self.slots.items()]
        kept = [value for path, value in named if not but(path)]
        return max([self.loss, self.output, self.input_gradient, *kept])


def difference(one: Any, many: Any) -> float:
    """Largest difference relative to the largest value of `one`; inf if not comparable."""
    one, many = np.asarray(one, dtype="float64"), np.asarray(many, dtype="float64")
    if one.shape != many.shape or not (np.isfinite(one).all() and np.isfinite(many).all()):
        return float("inf")
    if one.size == 0:
        return 0.0
    return float(np.abs(one - many).max() / max(np.abs(one).max(), FLOOR))


# Patterns of variable paths to axes, or what makes the whole map of a Keras mesh.
Layout = Mapping[str, tuple[Any, ...]] | Callable[[Any], Any]


def layout_map(layout: Layout, mesh: Any) -> Any:
    """A LayoutMap over a Keras mesh, or one of axes such as `{"model": 2}`."""
    mesh = keras_tp.device_mesh(mesh) if isinstance(mesh, dict) else mesh
    if callable(layout):
        return layout(mesh)
    made = keras.distribution.LayoutMap(mesh)
    for pattern, entry in layout.items():
        made[pattern] = entry
    return made


def build_seeded(build: Callable[[], Any], seed: int = 7) -> Any:
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = build()
    # Zeros and ones hide mistakes: a bias of zero can be added twice.
    noise = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        weight.assign(weight.numpy() + 0.1 * noise.standard_normal(weight.shape))
    return model


def compare(
    build: Callable[[], Any],
    layout: Layout,
    mesh: Any,
    data: tuple[Any, Any],
    *,
    optimizer: dict[str, Any] | None = None,
    loss: Any = "mse",
    steps: int = 3,
    float64: bool = True,
) -> Report:
    """Trains both for `steps` batches and reports. Runs on every rank.

    `data` is inputs and targets; inputs may be a nest.
    """
    with real_float64(float64):
        return _compare(build, layout, mesh, data, optimizer, loss, steps)


def _compare(
    build: Callable[[], Any],
    layout: Layout,
    mesh: Any,
    data: tuple[Any, Any],
    optimizer: dict[str, Any] | None,
    loss: Any,
    steps: int,
) -> Report:
    config = optimizer or {"class_name": "SGD", "config": {"learning_rate": 0.05, "momentum": 0.9}}
    one, many = build_seeded(build), build_seeded(build)
    keras_tp.parallelize(many, layout_map(layout, mesh))
    for model in (one, many):
        model.compile(keras.optimizers.deserialize(config), loss=keras.losses.get(loss))
    report = Report(sharded=sum(isinstance(v, ShardedVariable) for v in many.variables))

    x, y = data
    out_one, in_one = _gradients(one, x, y)
    out_many, in_many = _gradients(many, x, y)
    report.output = difference(out_one, out_many)
    for a, b in zip(in_one, in_many, strict=True):
        report.input_gradient = max(report.input_gradient, difference(a, b))
    for a, b in zip(one.trainable_variables, many.trainable_variables, strict=True):
        full = local_tensor(a).grad
        assert full is not None, a.path
        mine = b._sharding.local(full) if isinstance(b, ShardedVariable) else full
        grad = local_tensor(b).grad
        assert grad is not None, b.path
        assert tuple(grad.shape) == tuple(mine.shape), b.path
        gap = float((grad - mine).abs().max()) if grad.numel() else 0.0
        report.gradients[a.path] = gap / max(float(full.abs().max()), FLOOR)

    for _ in range(steps):
        report.loss = max(
            report.loss, difference(one.train_on_batch(x, y), many.train_on_batch(x, y))
        )
    report.output = max(
        report.output, difference(one.predict_on_batch(x), many.predict_on_batch(x))
    )
    full_many = keras_tp.full_weights(many)
    for path, value in keras_tp.full_weights(one).items():
        report.weights[path] = difference(value, full_many[path])
    for a, b in zip(one.optimizer.variables, many.optimizer.variables, strict=True):
        report.slots[a.path] = difference(a.numpy(), b.numpy())
    return report


def _gradients(model: Any, x: Any, y: Any) -> tuple[Any, list[Any]]:
    model.zero_grad()
    inputs = keras.tree.map_structure(_as_input, x)
    outputs = model(inputs, training=True)
    model._compute_loss(inputs, torch.tensor(y), outputs, None, training=True).backward()
    floats = [tensor for tensor in keras.tree.flatten(inputs) if tensor.requires_grad]
    # An input that the output does not depend on has no gradient.
    grads = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in floats]
    return outputs.detach().numpy(), [grad.numpy() for grad in grads]


def _as_input(x: Any) -> torch.Tensor:
    tensor = torch.tensor(x)
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(getattr(torch, keras.config.floatx())).requires_grad_()
