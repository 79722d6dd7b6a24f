"""Optimizers, precision and gradient checkpointing on each mesh, against one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import features
import keras
import models
import numpy as np
import parity
import pytest
import scripts
import torch
from features import MESHES, Found, exact
from keras import layers, ops

import keras_tp
from keras_tp.seam.variables import ShardedVariable, local_tensor

STEPS = 4
Make = Callable[[], Any]


class Centralized(keras.optimizers.Adam):
    """Somebody's own: a mean over the gradient of a whole kernel (gradient centralization)."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if len(variable.shape) > 1:
            gradient = gradient - ops.mean(gradient, axis=0, keepdims=True)
        super().update_step(gradient, variable, learning_rate)


class InPlace(keras.optimizers.SGD):
    """Somebody's own, that writes into what it reads, looks at all of it, and at a slot it has
    read after it was assigned to: on torch it is one tensor."""

    def build(self, variables: Any) -> None:
        super().build(variables)
        self.traces = self.add_optimizer_variables(variables, "trace")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        slot = self.traces[self._get_variable_index(variable)]
        weight, trace = variable.value, slot.value
        self.assign_add(slot, 0.1 * gradient)
        norm = torch.linalg.vector_norm(weight)
        with torch.no_grad():
            weight.sub_(float(learning_rate) * (gradient + trace) / (1 + norm))


def small() -> Any:
    """Weights of one to four dims, cut as columns, rows and otherwise, of even and odd sizes."""
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(11, 12),
            layers.Reshape((6, 12, 1)),
            layers.Conv2D(3, 3, strides=3, activation="tanh"),
            layers.Flatten(),
            layers.Dense(10, activation="gelu"),
            layers.BatchNormalization(),
            layers.Dense(7),
            layers.Dense(3),
        ]
    )


LAYOUT = {
    ".*embeddings": ("model", None),
    ".*conv2d/kernel": (None, None, None, "model"),
    ".*dense/kernel": (None, "model"),
    ".*dense/bias": ("model",),
    ".*dense_1/kernel": ("model", None),
    ".*normalization/gamma": ("model",),
    ".*dense_2/kernel": (None, "model"),
}


def layout_on(mesh: dict[str, int]) -> dict[str, tuple[str | None, ...]]:
    """As above; without a model axis, weights are cut along the replicas."""
    if "model" in mesh:
        cut = dict(LAYOUT)
        if "batch" in mesh:
            cut[".*dense_2/kernel"] = ("batch", "model")
        return cut
    swap = {"model": "batch", None: None}
    return {
        pattern: tuple(swap[axis] for axis in axes)
        for pattern, axes in LAYOUT.items()
        if "dense" not in pattern or "dense_1" in pattern
    }


def data() -> tuple[Any, Any]:
    random = np.random.default_rng(5)
    return random.integers(0, 11, (6, 6)), random.standard_normal((6, 3))


def optimizers() -> dict[str, tuple[Make, bool]]:
    """What makes each, and whether its slots exist before the model is parallelized."""
    kinds = keras.optimizers
    cases: dict[str, tuple[Make, bool]] = {}

    def add(name: str, make: Make, built_before: bool = False) -> None:
        assert name not in cases
        cases[name] = make, built_before

    wrappers = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer", "OptimizerMap"}
    for name, cls in vars(kinds).items():
        if isinstance(cls, type) and name not in wrappers:
            add(name, lambda cls=cls: cls(learning_rate=0.01))

    def of(cls: Any, **options: Any) -> Make:
        return lambda: cls(**{"learning_rate": 0.01, **options})

    add("SGD nesterov", of(kinds.SGD, momentum=0.9, nesterov=True))
    add("RMSprop centered", of(kinds.RMSprop, momentum=0.9, centered=True))
    add("Adam amsgrad", of(kinds.Adam, amsgrad=True))
    add("Muon, all of it", of(kinds.Muon, exclude_embeddings=False), True)
    add("Adafactor, built before", of(kinds.Adafactor), True)
    add("Lamb, built before", of(kinds.Lamb), True)
    add("clipvalue", of(kinds.Adam, clipvalue=1e-3))
    add("clipnorm", of(kinds.SGD, clipnorm=0.05))
    add("global_clipnorm", of(kinds.SGD, global_clipnorm=0.1))
    add("global_clipnorm of whole updates", of(kinds.Lamb, global_clipnorm=0.1))
    add("clipnorm, accumulated", of(kinds.SGD, clipnorm=0.05, gradient_accumulation_steps=2))
    add("accumulated", of(kinds.Adam, gradient_accumulation_steps=2))
    add("accumulated whole updates", of(kinds.Adafactor, gradient_accumulation_steps=2))
    add("use_ema", of(kinds.Adam, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2))
    add("use_ema of whole updates", of(kinds.Lamb, use_ema=True, ema_momentum=0.9), True)
    add("loss_scale_factor", of(kinds.Adam, loss_scale_factor=8.0))
    add("schedule", of(kinds.Adam, learning_rate=kinds.schedules.ExponentialDecay(0.1, 2, 0.5)))

    def decayed() -> Any:
        made = kinds.AdamW(0.01, weight_decay=0.3)
        made.exclude_from_weight_decay(var_names=["bias", "gamma"])
        return made

    add("weight_decay with exclusions", decayed)
    add("LossScaleOptimizer", lambda: kinds.LossScaleOptimizer(kinds.Adam(0.01)))
    scaled = of(kinds.Lamb, clipnorm=0.5)
    add("LossScaleOptimizer, built before", lambda: kinds.LossScaleOptimizer(scaled()), True)
    if hasattr(kinds, "MultiOptimizer"):

        def several() -> Any:
            chosen = {".*dense.*": kinds.Lamb(0.01), ".*conv.*": kinds.Adam(0.01)}
            return kinds.MultiOptimizer(kinds.OptimizerMap(kinds.SGD(0.01), chosen))

        add("MultiOptimizer", several)
        add("MultiOptimizer, built before", several, True)
    add("one's own update of whole tensors", of(Centralized))
    add("one's own update, in place", of(InPlace))
    return cases


def train(model: Any) -> list[float]:
    x, y = data()
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_tp.LayoutWarning)
        for _ in range(STEPS):
            losses.append(float(model.train_on_batch(x, y)))
    model.optimizer.finalize_variable_values(model.trainable_weights)
    return losses


def updates(mesh: dict[str, int]) -> dict[str, Found]:
    found = {}
    with parity.real_float64():
        one, many = (parity.build_seeded(small) for _ in range(2))
        start = one.get_weights()
        keras_tp.parallelize(many, parity.layout_map(layout_on(mesh), mesh))
        for name, (make, built_before) in optimizers().items():
            if built_before:
                before = parity.build_seeded(small)
                before.compile(make(), loss="mse")
                before.optimizer.build(before.trainable_variables)
                keras_tp.parallelize(before, parity.layout_map(layout_on(mesh), mesh))
            else:
                many.compile(make(), loss="mse")
                many.set_weights(start)
            model = before if built_before else many
            one.compile(make(), loss="mse")
            one.set_weights(start)
            assert sum(isinstance(v, ShardedVariable) for v in model.variables) >= 4
            found[name] = compared(one, model)
            _check_slots(model, name)
    return found


def compared(one: Any, many: Any) -> Found:
    """Trains both; losses, weights and slots."""
    gaps = [parity.difference(train(one), train(many))]
    full = keras_tp.full_weights(many).values()
    gaps += [parity.difference(v.numpy(), w) for v, w in zip(one.variables, full, strict=True)]
    pairs = zip(one.optimizer.variables, many.optimizer.variables, strict=True)
    gaps += [parity.difference(a.numpy(), b.numpy()) for a, b in pairs]
    return exact(max(gaps))


def _check_slots(model: Any, name: str) -> None:
    """What is as large as a sharded variable is sharded like it."""
    shapes = {tuple(v.shape) for v in model.trainable_variables if isinstance(v, ShardedVariable)}
    whole = {tuple(v.shape) for v in model.trainable_variables} - shapes
    for slot in model.optimizer.variables:
        if tuple(slot.shape) in shapes - whole and len(slot.shape) > 1:
            assert isinstance(slot, ShardedVariable), (name, slot.path)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_optimizer(ranks: Any, mesh: str, record_property: Any) -> None:
    """LAMB's trust ratio of a shard is another number than that of the weight, Muon of a shard
    another matrix; a rank that clips by the norm of its shards clips by the wrong norm (DeepSpeed
    #5411, TransformerEngine #715), and one that counts replicated weights on every rank too."""
    answers = ranks(scripts.size_of(mesh))(updates, MESHES[mesh], timeout=300.0)
    features.note(record_property, "optimizers", mesh, answers)


def overflow(mesh: dict[str, int]) -> dict[str, Found]:
    """A gradient of one shard is infinite at the second of four steps."""
    with parity.real_float64():
        one, many = (parity.build_seeded(small) for _ in range(2))
        keras_tp.parallelize(many, parity.layout_map(layout_on(mesh), mesh))
        gaps = []
        kept = []
        for model in (one, many):
            inner = keras.optimizers.SGD(0.01, momentum=0.9)
            optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
            kept.append(optimizer)
            x, y = (torch.tensor(a) for a in data())
            for step in range(4):
                model.zero_grad()
                loss = optimizer.scale_loss(((model(x, training=True) - y) ** 2).mean())
                loss.backward()
                grads = [v.value.grad for v in model.trainable_variables]
                if step == 1:
                    rows = local_tensor(model.trainable_variables[0]).shape[0]
                    # Of the last row, which the last rank has; on the others nothing is wrong.
                    last = model is one or _has_last(model.trainable_variables[0])
                    if last:
                        grads[0][rows - 1, 0] = torch.inf
                with torch.no_grad():
                    optimizer.apply(grads, model.trainable_variables)
        assert float(kept[1].dynamic_scale) == float(kept[0].dynamic_scale) == 2.0
        full = keras_tp.full_weights(many)
        gaps += [parity.difference(v.numpy(), full[v.path]) for v in one.variables]
        return {"LossScaleOptimizer skips a step": exact(max(gaps))}


def _has_last(variable: Any) -> bool:
    full = torch.zeros(tuple(variable.shape))
    full[-1] = 1
    return bool(variable._sharding.local(full).any())


@pytest.mark.parametrize("mesh", MESHES)
def test_all_ranks_skip_a_step(ranks: Any, mesh: str, record_property: Any) -> None:
    """A rank whose own shards are finite went on, and had other weights from then on."""
    answers = ranks(scripts.size_of(mesh))(overflow, MESHES[mesh])
    features.note(record_property, "optimizers", mesh, answers)


def precision(mesh: dict[str, int], policy: str) -> dict[str, Found]:
    x, y = models.transformer_data()

    def build() -> Any:
        keras.config.set_dtype_policy(policy)  # a new session begins without
        return models.transformer()

    try:
        with parity.real_float64(policy == "float64"):
            one, many = (parity.build_seeded(build) for _ in range(2))
            layout = (
                models.TRANSFORMER_LAYOUT if "model" in mesh else {"head/kernel": ("batch", None)}
            )
            keras_tp.parallelize(many, parity.layout_map(layout, mesh))
            losses, outputs, scales = [], [], []
            for model in (one, many):
                loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
                model.compile(keras.optimizers.Adam(1e-3), loss=loss)
                outputs.append(model(x))
                losses.append([float(model.train_on_batch(x, y)) for _ in range(5)])
                scales.append(float(getattr(model.optimizer, "dynamic_scale", 1.0)))
            compute = policy.removeprefix("mixed_")
            assert {str(t.dtype) for t in outputs} == {f"torch.{compute}"}
            assert scales[0] == scales[1]

            wide = [t.detach().double().numpy() for t in outputs]
            gap = max(parity.difference(*losses), parity.difference(*wide))
    finally:
        keras.config.set_dtype_policy("float32")
    if policy == "float64":
        return {policy: exact(gap)}
    unit = 2.0 ** {"bfloat16": -8, "float16": -11}[compute]
    return {policy: (gap, 5 * unit, f"sums of shards round elsewhere: 5 units of {compute}")}


@pytest.mark.parametrize("policy", ["float64", "mixed_bfloat16", "mixed_float16", "bfloat16"])
@pytest.mark.parametrize("mesh", MESHES)
def test_precision(ranks: Any, mesh: str, policy: str, record_property: Any) -> None:
    """To a few units of the dtype; a float16 step whose loss was not scaled back shows at once."""
    answers = ranks(scripts.size_of(mesh))(precision, MESHES[mesh], policy)
    features.note(record_property, "precision", mesh, answers)


def checkpointed() -> Any:
    with keras.RematScope("full"):
        return models.transformer()


def rematerialized(mesh: dict[str, int]) -> dict[str, Found]:
    layout = models.TRANSFORMER_LAYOUT if "model" in mesh else {"head/bias": ("batch",)}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    report = parity.compare(checkpointed, layout, mesh, models.transformer_data(), loss=loss)
    return {"RematScope": exact(report.worst())}


@pytest.mark.parametrize("mesh", MESHES)
def test_gradient_checkpointing(ranks: Any, mesh: str, record_property: Any) -> None:
    """What is computed again in backward gathers again, on this replica's rows."""
    answers = ranks(scripts.size_of(mesh))(rematerialized, MESHES[mesh])
    features.note(record_property, "gradient checkpointing", mesh, answers)
