"""Keras optimizers, whose slots follow their variables."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import keras
from keras.src.backend.torch.core import device_scope

from keras_tp.optimizers import inner_optimizers
from keras_tp.seam.variables import (
    ShardedVariable,
    reshard_variable,
    shard_like,
    sharding_of,
)


def optimizer_variables(optimizer: Any) -> list[tuple[Any, Any | None]]:
    """Every variable of an optimizer with the model variable it is a slot of, or None.

    A slot stands in a list of the optimizer beside the variables it was built
    for, at its variable's place and with its shape.
    """
    slot_of: dict[int, Any] = {}
    for each in (optimizer, *inner_optimizers(optimizer)):
        slot_of |= _slots_of(each)
    return [(v, slot_of.get(id(v))) for v in optimizer.variables]


def _slots_of(optimizer: Any) -> dict[int, Any]:
    references = optimizer._trainable_variables
    slot_of: dict[int, Any] = {}
    for name, values in vars(optimizer).items():
        if name in ("_variables", "_trainable_variables") or not isinstance(values, list):
            continue
        if len(values) == len(references):
            for slot, reference in zip(values, references, strict=True):
                if isinstance(slot, keras.Variable) and slot.shape == reference.shape:
                    slot_of[id(slot)] = reference
    return slot_of


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
        copy_layout(reference, slot)
    vars(optimizer)["_keras_tp_sharded"] = sharded


def copy_layout(reference: Any, slot: Any) -> None:
    """Gives a slot the `keras.distribution` layout of its variable, if it has one."""
    if getattr(reference, "_layout", None) is not None:
        slot._layout = reference._layout


def slots_kept(optimizer: Any, variables: Sequence[Any]) -> tuple[dict[int, int], int]:
    """What an optimizer keeps, or will once built, of the `variables` it is to train.

    One that is not built yet stays so: a copy is built, on the meta device, where
    slots have shapes and no memory. (One that was itself made there is built; it can train
    nothing, and has no values that could be copied.)

    Returns:
        By the id of a variable the number of slots in its shape, and the bytes of the
        slots in other shapes.

    Raises:
        ValueError: one that is not built and of which Keras cannot make a copy.
    """
    if not optimizer.built:
        if not any(v._value.is_meta for v in optimizer.variables):
            optimizer = _copy_of(optimizer)
        with device_scope("meta"):
            optimizer.build(list(variables))
    counts: Counter[int] = Counter()
    others = 0
    for slot, reference in optimizer_variables(optimizer):
        if reference is not None:
            counts[id(reference)] += 1
        elif len(slot.shape) > 0:  # not the step count, the rate, the scale of losses
            others += slot._value.untyped_storage().nbytes()
    return counts, others


def _copy_of(optimizer: Any) -> Any:
    try:
        return copy.deepcopy(optimizer)
    except Exception as error:
        raise ValueError(
            f"optimizer {type(optimizer).__name__} cannot be copied by Keras, so that what it "
            "keeps is known only once it is built."
        ) from error
