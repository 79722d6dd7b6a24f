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
import torch.distributed as dist
from precision import real_float64

import keras_tp
from keras_tp.seam.trials import shard_of
from keras_tp.seam.variables import ShardedVariable, local_tensor

# Differences are relative to a tensor's largest value, or to this where that is
# smaller: what is zero but for rounding (the gradient of an attention key's bias,
# its momentum) has no scale of its own. A float64 tensor of 1e-12 that is wrong
# still shows.
FLOOR = 1e-3

SGD = {"class_name": "SGD", "config": {"learning_rate": 0.05, "momentum": 0.9}}


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
    styles: str = ""

    def worst(self, but: Callable[[str], bool] = lambda path: False) -> float:
        """The largest of all but those of the variables and slots that `but` picks out."""
        named = [*self.gradients.items(), *self.weights.items(), *self.slots.items()]
        kept = [value for path, value in named if not but(path)]
        worst = max([self.loss, self.output, self.input_gradient, *kept])
        return worst if np.isfinite([*kept, worst]).all() else float("inf")


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


def once(compute: Callable[[], Any]) -> Any:
    """What one rank computes for all: of one process, each would find the same. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return compute()
    told: list[Any] = [None]
    failure = None
    if dist.get_rank() == 0:
        try:
            told = [compute()]
        except Exception as error:  # nobody is left waiting
            failure = error
    dist.broadcast_object_list(told, device=torch.device("cpu"))
    if failure is not None:
        raise failure
    assert told[0] is not None, "the first rank failed"
    return told[0]


def planned(model: Any, layout_map: Any, **options: Any) -> keras_tp.Plan:
    """The plan, which one rank makes for all: each would make the same. Collective.

    Raises:
        LayoutError: on every rank.
    """

    def make() -> Any:
        try:
            return keras_tp.plan(model, layout_map, advise=False, **options)
        except keras_tp.LayoutError as error:
            return error

    plan = once(make)
    if isinstance(plan, keras_tp.LayoutError):
        raise plan
    return plan


def build_seeded(build: Callable[[], Any], seed: int = 7) -> Any:
    keras.utils.clear_session(free_memory=False)  # a garbage collection takes longer than the rest
    keras.utils.set_random_seed(seed)
    model = build()
    # Zeros and ones hide mistakes: a bias of zero can be added twice.
    noise = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        weight.assign(weight.numpy() + 0.1 * noise.standard_normal(weight.shape))
    return model


@dataclass
class Case:
    """What is trained: both sides of every comparison get the same."""

    build: Callable[[], Any]
    data: tuple[Any, Any]
    optimizer: dict[str, Any] | None = None
    loss: Any = "mse"
    steps: int = 3


@dataclass
class Run:
    """All that a training gives, on one rank; gradients are those of what the rank stores."""

    output: Any
    input_gradients: list[Any]
    gradients: list[tuple[str, torch.Tensor]]
    losses: list[Any]
    prediction: Any
    weights: dict[str, Any]
    slots: list[tuple[str, Any]]


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
    case = Case(build, data, optimizer, loss, steps)
    with real_float64(float64):
        one = once(lambda: train(build_seeded(build), case))
        model = build_seeded(build)
        plan = planned(model, layout_map(layout, mesh))
        return compare_with(one, case, model, plan)


def compare_with(one: Run, case: Case, model: Any, plan: keras_tp.Plan) -> Report:
    """Trains the case's model by a plan and reports how it differs from `one`, the plain run."""
    keras_tp.parallelize(model, plan=plan)
    many = train(model, case)
    report = Report(
        styles=", ".join(sorted({layer.style for layer in plan.layers if layer.styles})),
        sharded=sum(isinstance(v, ShardedVariable) for v in model.variables),
        output=max(
            difference(one.output, many.output), difference(one.prediction, many.prediction)
        ),
        loss=max(map(difference, one.losses, many.losses)),
    )
    for a, b in zip(one.input_gradients, many.input_gradients, strict=True):
        report.input_gradient = max(report.input_gradient, difference(a, b))
    trained = model.trainable_variables
    for (path, full), (_, grad), shard in zip(one.gradients, many.gradients, trained, strict=True):
        mine = shard_of(shard, full)
        assert tuple(grad.shape) == tuple(mine.shape), shard.path
        gap = float((grad - mine).abs().max()) if grad.numel() else 0.0
        report.gradients[path] = gap / max(float(full.abs().max()), FLOOR)
    for path, value in one.weights.items():
        report.weights[path] = difference(value, many.weights[path])
    for (path, a), (_, b) in zip(one.slots, many.slots, strict=True):
        report.slots[path] = difference(a, b)
    return report


def train(model: Any, case: Case) -> Run:
    """Trains a model. Collective where it is parallelized."""
    config = case.optimizer or SGD
    model.compile(keras.optimizers.deserialize(config), loss=keras.losses.get(case.loss))
    x, y = case.data
    output, input_gradients = _gradients(model, x, y)
    gradients = []
    for v in model.trainable_variables:
        grad = local_tensor(v).grad
        assert grad is not None, v.path
        gradients.append((v.path, grad.clone()))
    losses = [model.train_on_batch(x, y) for _ in range(case.steps)]  # of CausalLM, with a metric
    return Run(
        output,
        input_gradients,
        gradients,
        losses,
        prediction=model.predict_on_batch(x),
        weights=keras_tp.full_weights(model),
        slots=[(v.path, v.numpy()) for v in model.optimizer.variables],
    )


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
