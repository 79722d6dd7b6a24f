"""Keras optimizers, whose slots follow their variables."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import keras
import torch
from keras.src.optimizers.base_optimizer import BaseOptimizer

from keras_tp.errors import LayoutError
from keras_tp.optimizers import optimizer_problems
from keras_tp.seam.variables import ShardedVariable, become_sharded


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
    """Teaches Keras's optimizers that slots of sharded variables are shards. Idempotent."""
    if hasattr(BaseOptimizer.build, "_keras_tp"):
        return
    original_build = BaseOptimizer.build
    original_add = BaseOptimizer.add_variable_from_reference

    @functools.wraps(original_build)
    def build(self: Any, variables: Any) -> Any:
        if any(isinstance(v, ShardedVariable) for v in variables):
            problems = optimizer_problems(self)
            if problems:
                raise LayoutError(problems, where="this optimizer")
        return original_build(self, variables)

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
        become_sharded(slot, sharding, slot._value.data)
        return slot

    build._keras_tp = True  # type: ignore[attr-defined]
    BaseOptimizer.build = build
    BaseOptimizer.add_variable_from_reference = add_variable_from_reference
