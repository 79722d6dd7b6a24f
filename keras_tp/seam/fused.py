"""Keras's Adam on CPUs in one pass over memory, where Keras makes about ten.

torch's fused kernel does all of it for an element at once: it reads a value, its gradient and
its two slots, and writes three of them. Told that infinitely many steps have been made, so that
it corrects no bias, and given the rate that Keras has corrected, it computes Keras's formula.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from keras import ops
from keras.src.backend.torch.optimizers import torch_adam

from keras_tp.seam.variables import ShardedVariable


def hook_adam() -> None:
    """Has Adam and AdamW update what is sharded by the fused kernel, on CPUs. Idempotent."""
    original = torch_adam.Adam._parallel_update_step
    if hasattr(original, "_keras_tp"):
        return

    @functools.wraps(original)
    def update(self: Any, grads: Any, variables: Any, learning_rate: Any) -> None:
        if not _can_fuse(self, grads, variables):
            original(self, grads, variables, learning_rate)
            return
        indices = [self._get_variable_index(variable) for variable in variables]
        torch._fused_adam_(
            [variable.value for variable in variables],
            grads,
            [self._momentums[i].value for i in indices],
            [self._velocities[i].value for i in indices],
            [],
            [torch.tensor(math.inf)] * len(grads),
            lr=_corrected_rate(self, learning_rate, grads[0].dtype),
            beta1=float(self.beta_1),
            beta2=float(self.beta_2),
            weight_decay=0.0,  # Keras has seen to it
            eps=float(self.epsilon),
            amsgrad=False,
            maximize=False,
        )

    update._keras_tp = True  # type: ignore[attr-defined]
    torch_adam.Adam._parallel_update_step = update


def _corrected_rate(optimizer: Any, learning_rate: Any, dtype: torch.dtype) -> float:
    # In the dtype of the variables and in Keras's order, so that it rounds as Keras's does.
    step = ops.cast(optimizer.iterations + 1, dtype)
    first, second = (
        1 - ops.power(ops.cast(beta, dtype), step) for beta in (optimizer.beta_1, optimizer.beta_2)
    )
    return float(ops.cast(learning_rate, dtype) * ops.sqrt(second) / first)


def _can_fuse(optimizer: Any, grads: Any, variables: Any) -> bool:
    if torch.compiler.is_compiling() or optimizer.amsgrad:  # a compiler fuses by itself
        return False
    if not any(isinstance(variable, ShardedVariable) for variable in variables):
        return False
    kinds = {(t.dtype, t.device.type) for t in (*grads, *(v._value for v in variables))}
    return kinds in ({(torch.float32, "cpu")}, {(torch.float64, "cpu")})
