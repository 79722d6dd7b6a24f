"""Keras optimizers, whose slots follow their variables."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import keras
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.optimizers.base_optimizer import BaseOptimizer

from keras_tp.optimizers import check_optimizer
from keras_tp.seam.contexts import reading_shards
from keras_tp.seam.variables import (
    ShardedVariable,
    become_sharded,
    local_tensor,
    reshard_variable,
    shard_like,
    sharding_of,
)


def optimizer_variables(optimizer: Any) -> list[tuple[Any, Any | None]]:
    """Every variable of an optimizer with the model variable it is a slot of, or None.

    A slot stands in a list of the optimizer beside the variables it was built
    for, at its variable's place and with its shape.
    """
    references = optimizer._trainable_variables
    slot_of: dict[int, Any] = {}
    for name, values in vars(optimizer).items():
        if name in ("_variables", "_trainable_variables") or not isinstance(values, list):
            continue
        if len(values) == len(references):
            for slot, reference in zip(values, references, strict=True):
                if isinstance(slot, keras.Variable) and slot.shape == reference.shape:
                    slot_of[id(slot)] = reference
    return [(v, slot_of.get(id(v))) for v in optimizer.variables]


def hook_optimizers() -> None:
    """Teaches Keras's optimizers to compute on the shards of sharded variables. Idempotent."""
    if hasattr(BaseOptimizer.build, "_keras_tp"):
        return
    original_build = BaseOptimizer.build
    original_apply = BaseOptimizer.apply
    original_rate = BaseOptimizer._get_current_learning_rate
    original_add = BaseOptimizer.add_variable_from_reference

    @functools.wraps(original_build)
    def build(self: Any, variables: Any) -> Any:
        if any(isinstance(v, ShardedVariable) for v in variables):
            check_optimizer(self)
        return original_build(self, variables)

    @functools.wraps(original_apply)
    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        updated = trainable_variables or self._trainable_variables
        if any(isinstance(v, ShardedVariable) for v in updated):
            check_optimizer(self)  # again: its options may have been set since
            adopt_slots(self)
            grads = list(grads)
            if not in_stateless_scope():
                _check_gradients(grads, updated)
        with reading_shards():
            return original_apply(self, grads, trainable_variables)

    @functools.wraps(original_rate)
    def learning_rate(self: Any) -> Any:
        with reading_shards(False):  # a schedule may look at weights
            return original_rate(self)

    @functools.wraps(original_add)
    def add_variable_from_reference(
        self: Any, reference_variable: Any, name: Any = None, initializer: Any = "zeros"
    ) -> Any:
        if not isinstance(reference_variable, ShardedVariable):
            return original_add(self, reference_variable, name=name, initializer=initializer)
        sharding = reference_variable._sharding
        full_shape = reference_variable.shape
        initializer = keras.initializers.get(initializer)
        if not isinstance(initializer, keras.initializers.Constant | keras.initializers.Zeros):
            initial = initializer

            def initializer(shape: Any, dtype: Any = None) -> torch.Tensor:
                return sharding.local(initial(full_shape, dtype=dtype))

        like = SimpleNamespace(
            path=reference_variable.path,
            shape=sharding.local_shape,
            dtype=reference_variable.dtype,
        )
        slot = original_add(self, like, name=name, initializer=initializer)
        slot._shape = full_shape
        _copy_layout(reference_variable, slot)
        become_sharded(slot, sharding, slot._value.data)
        return slot

    build._keras_tp = True  # type: ignore[attr-defined]
    BaseOptimizer.build = build
    BaseOptimizer.apply = apply
    BaseOptimizer._get_current_learning_rate = learning_rate
    BaseOptimizer.add_variable_from_reference = add_variable_from_reference


def adopt_slots(optimizer: Any, *, again: bool = False) -> None:
    """Shards the slots of an optimizer that was built before its variables were. Collective.

    Does nothing until more of its variables are sharded than the last time, or
    `again` says that some have been sharded otherwise.
    """
    sharded = sum(isinstance(v, ShardedVariable) for v in optimizer._trainable_variables)
    if vars(optimizer).get("_keras_tp_sharded") == sharded and not again:
        return
    for slot, reference in optimizer_variables(optimizer):
        wanted = sharding_of(reference)
        if sharding_of(slot) is wanted or reference is None:
            continue
        if sharding_of(slot) is None:
            shard_like(slot, reference)
        else:
            reshard_variable(slot, wanted)
        _copy_layout(reference, slot)
    vars(optimizer)["_keras_tp_sharded"] = sharded


def _copy_layout(reference: Any, slot: Any) -> None:
    if getattr(reference, "_layout", None) is not None:
        slot._layout = reference._layout


def _check_gradients(grads: list[Any], variables: list[Any]) -> None:
    # A full gradient would be broadcast over a shard of size one without a word.
    for grad, variable in zip(grads, variables, strict=False):
        wanted = tuple(local_tensor(variable).shape)
        if grad is not None and tuple(grad.shape) != wanted:
            raise ValueError(
                f"the gradient of '{variable.path}' has shape {tuple(grad.shape)}, this rank's "
                f"shard {wanted}. `variable.value.grad` is the gradient of the shard."
            )
