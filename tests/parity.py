"""The oracle: the same training with and without keras_tp, in the same rank, compared in full.

Every rank trains the plain model by itself and the parallelized one with the
others, from the same seed, and reports the largest differences it sees. So all
ranks are compared, not the first alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import torch
from precision import real_float64

import keras_tp
from keras_tp.seam.variables import ShardedVariable, local_tensor

# Differences are relative to a tensor's largest value, or to this where that is
# smaller: what is zero but for rounding (the gradient of an attention key's bias,
# its momentum) has no scale of its own. A float64 tensor of 1e-12 that is wrong
# still shows.
FLOOR = 1e-3


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


def layout_map(layout: Mapping[str, tuple[Any, ...]], mesh: Any) -> Any:
    """A LayoutMap over a Keras mesh, or one of axes such as `{"model": 2}`."""
    mesh = keras_tp.device_mesh(mesh) if isinstance(mesh, dict) else mesh
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
    layout: Mapping[str, tuple[Any, ...]],
    mesh: Any,
    data: tuple[Any, Any],
    *,
    optimizer: dict[str, Any] | None = None,
    loss: Any = "mse",
    steps: int = 3,
    float64: bool = True,
) -> Report:
    """Trains both for `steps` batches and reports. Runs on every rank."""
    with real_float64(float64):
        return _compare(build, layout, mesh, data, optimizer, loss, steps)


def _compare(
    build: Callable[[], Any],
    layout: Mapping[str, tuple[Any, ...]],
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
    if in_one is not None:
        report.input_gradient = difference(in_one, in_many)
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


def _gradients(model: Any, x: Any, y: Any) -> tuple[Any, Any]:
    model.zero_grad()
    inputs = torch.tensor(x)
    if inputs.is_floating_point():
        inputs = inputs.to(getattr(torch, keras.config.floatx())).requires_grad_()
    outputs = model(inputs, training=True)
    model._compute_loss(inputs, torch.tensor(y), outputs, None, training=True).backward()
    grad = None if inputs.grad is None else inputs.grad.numpy()
    return outputs.detach().numpy(), grad
