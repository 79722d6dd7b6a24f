"""What a plan costs that is known without running it: bytes that a rank stores, by kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keras_tp.layouts import local_shapes
from keras_tp.plans import Plan, VariablePlan, itemsize
from keras_tp.seam.layers import variables_of, walk_layers
from keras_tp.seam.optimizers import slots_kept


@dataclass(frozen=True)
class StoredBytes:
    """What one rank keeps from step to step, in bytes.

    Attributes:
        parameters: all variables, those too that are not trained, such as statistics.
        gradients: one for each trainable variable, in its dtype and shape.
        slots: what the optimizer keeps of each trainable variable.
    """

    parameters: int
    gradients: int
    slots: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.slots


@dataclass(frozen=True)
class Slots:
    """What an optimizer keeps of the variables of a plan.

    Attributes:
        counts: of each variable of the plan, the number of slots in its shape, which are cut as
            it is. 0 for those that are not trained.
        whole: bytes of the slots in other shapes (Adafactor's factors), whole on every rank.
    """

    counts: tuple[int, ...]
    whole: int = 0


def slots_of(model: Any) -> Slots | None:
    """What the optimizer that a model is compiled with keeps; None where there is none.

    Exact for any Keras optimizer, built or not: one that is not is built as a copy.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return None
    variables = variables_of(walk_layers(model))
    kept, whole = slots_kept(optimizer, model.trainable_variables)
    return Slots(tuple(kept.get(id(v), 0) for v in variables), whole)


def stored_bytes(plan: Plan, rank: int, slots_per_variable: int | Slots = 2) -> StoredBytes:
    """Bytes that `rank` stores, by kind.

    Exact for what stays from step to step, but for a few numbers that an optimizer keeps
    besides (a step count, a rate). Activations, weights gathered for a call and buffers
    of communication come on top.

    Args:
        plan: any plan; nothing is allocated.
        rank: a global rank of its mesh.
        slots_per_variable: tensors that the optimizer keeps of each trainable variable, in its
            shape and dtype: 2 for Adam, 0 for SGD, 1 with momentum. Or the `Slots` of a built
            optimizer, which differ from variable to variable.

    Raises:
        ValueError: a rank that the mesh lacks, or slots of another number of variables.
    """
    return stored_by_rank(plan, slots_per_variable, (rank,))[0]


def stored_by_rank(
    plan: Plan, slots_per_variable: int | Slots = 2, ranks: Sequence[int] | None = None
) -> tuple[StoredBytes, ...]:
    """`stored_bytes` of many ranks, by default of all of them in the order of the mesh.

    Variables that are alike are counted once, so that thousands of ranks cost little.
    """
    if ranks is None:
        ranks = plan.mesh.ranks
    unknown = sorted(set(ranks) - set(plan.mesh.ranks))
    if unknown:
        raise ValueError(f"the mesh ({plan.mesh}) has no rank {unknown[0]}.")
    slots = _slots_of(plan, slots_per_variable)
    where = [plan.mesh.ranks.index(rank) for rank in ranks]
    sums = [[0, 0, slots.whole] for _ in where]
    for (shape, layout, parameters, gradients, kept), number in _alike(plan, slots).items():
        elements = [math.prod(s) for s in local_shapes(shape, layout, plan.mesh)]
        for row, position in zip(sums, where, strict=True):
            count = number * elements[position]
            row[0] += count * parameters
            row[1] += count * gradients
            row[2] += count * kept
    return tuple(StoredBytes(*row) for row in sums)


def whole_bytes(plan: Plan, slots_per_variable: int | Slots = 2) -> StoredBytes:
    """What one process stores that has all of the model."""
    slots = _slots_of(plan, slots_per_variable)
    sums = [0, 0, slots.whole]
    for v, number in zip(plan.variables, slots.counts, strict=True):
        size = math.prod(v.shape) * itemsize(v.dtype)
        sums[0] += size
        sums[1] += size * v.trainable
        sums[2] += size * number
    return StoredBytes(*sums)


def _slots_of(plan: Plan, given: int | Slots) -> Slots:
    if isinstance(given, Slots):
        if len(given.counts) != len(plan.variables):
            raise ValueError(
                f"got slots of {len(given.counts)} variables for a plan of {len(plan.variables)}."
            )
        return given
    return Slots(tuple(given if v.trainable else 0 for v in plan.variables))


def _alike(plan: Plan, slots: Slots) -> Counter[tuple]:
    """How often each (shape, layout, bytes per element by kind) comes."""

    def key(v: VariablePlan, number: int) -> tuple:
        size = itemsize(v.dtype)
        return v.shape, v.layout, size, size * v.trainable, size * number

    return Counter(key(v, n) for v, n in zip(plan.variables, slots.counts, strict=True))
