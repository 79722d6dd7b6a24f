"""Keras optimizers' steps, on variables of which this rank holds a shard."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import keras
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.optimizers.base_optimizer import BaseOptimizer

from keras_tp.errors import LayoutError, LayoutWarning
from keras_tp.optimizers import check_optimizer, price_of, updates_elementwise
from keras_tp.seam.contexts import reading_shards
from keras_tp.seam.gradients import hook_losses
from keras_tp.seam.optimizers import adopt_slots, copy_layout, optimizer_variables
from keras_tp.seam.variables import (
    ShardedVariable,
    become_sharded,
    local_tensor,
    sharding_of,
)

_UPDATED = "_keras_tp_updated"  # of an optimizer: the variables that it updates just now


def hook_optimizers() -> None:
    """Teaches Keras's optimizers to compute on the shards of sharded variables. Idempotent."""
    if hasattr(BaseOptimizer.build, "_keras_tp"):
        return
    for hook in (_hook_build, _hook_slots, _hook_apply, _hook_update, _hook_clip, _hook_finite):
        hook()
    hook_losses()
    BaseOptimizer.build._keras_tp = True


def _any_sharded(variables: Sequence[Any]) -> bool:
    return any(isinstance(v, ShardedVariable) for v in variables)


def _hook_build() -> None:
    original = BaseOptimizer.build

    @functools.wraps(original)
    def build(self: Any, variables: Any) -> Any:
        if _any_sharded(variables):
            check_optimizer(self)
        return original(self, variables)

    BaseOptimizer.build = build


def _hook_slots() -> None:
    original = BaseOptimizer.add_variable_from_reference

    @functools.wraps(original)
    def add_variable_from_reference(
        self: Any, reference_variable: Any, name: Any = None, initializer: Any = "zeros"
    ) -> Any:
        if not isinstance(reference_variable, ShardedVariable):
            return original(self, reference_variable, name=name, initializer=initializer)
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
        slot = original(self, like, name=name, initializer=initializer)
        slot._shape = full_shape
        copy_layout(reference_variable, slot)
        become_sharded(slot, sharding, slot._value.data)
        return slot

    BaseOptimizer.add_variable_from_reference = add_variable_from_reference


def _hook_apply() -> None:
    original_apply = BaseOptimizer.apply
    original_rate = BaseOptimizer._get_current_learning_rate

    @functools.wraps(original_apply)
    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        updated = trainable_variables or self._trainable_variables
        if _any_sharded(updated):
            check_optimizer(self)  # again: its options may have been set since
            adopt_slots(self)
            grads = list(grads)
            if in_stateless_scope():
                _check_stateless(self)
            else:
                _check_gradients(grads, updated)
        with reading_shards():
            return original_apply(self, grads, trainable_variables)

    @functools.wraps(original_rate)
    def learning_rate(self: Any) -> Any:
        with reading_shards(False):  # a schedule may look at weights
            return original_rate(self)

    BaseOptimizer.apply = apply
    BaseOptimizer._get_current_learning_rate = learning_rate


def _hook_update() -> None:
    original = BaseOptimizer._backend_update_step

    @functools.wraps(original)
    def update(self: Any, grads: Any, trainable_variables: Any, learning_rate: Any) -> None:
        if updates_elementwise(self) or not _any_sharded(trainable_variables):
            original(self, grads, trainable_variables, learning_rate)
            return
        _say_price(self)
        slots: dict[int, list[Any]] = {}
        for slot, reference in optimizer_variables(self):
            slots.setdefault(id(reference), []).append(slot)
        for grad, variable in zip(grads, trainable_variables, strict=True):
            if isinstance(variable, ShardedVariable):
                grad = variable._sharding.full(grad.detach())
            with _held_whole([variable, *slots.get(id(variable), ())]):
                self.update_step(grad, variable, learning_rate)

    BaseOptimizer._backend_update_step = update


@contextlib.contextmanager
def _held_whole(variables: Sequence[Any]) -> Iterator[None]:
    """While open, each variable is its full value; then this rank keeps its part. Collective.

    It is one tensor all the while, written in place, as in one process: an update that
    reads, assigns and looks again at what it has read sees what it would see there.
    """
    held = [v for v in variables if isinstance(v, ShardedVariable)]
    with torch.no_grad(), reading_shards(False):
        try:
            for variable in held:
                variable._stood_in = variable._sharding.full(variable._value.detach()).contiguous()
            yield
            for variable in held:
                assert variable._stood_in is not None
                variable._value.copy_(variable._sharding.local(variable._stood_in))
        finally:
            for variable in held:
                variable._stood_in = None


def _hook_clip() -> None:
    original_gradients = BaseOptimizer._backend_apply_gradients
    original_clip = BaseOptimizer._clip_gradients

    @functools.wraps(original_gradients)
    def apply_gradients(self: Any, grads: Any, trainable_variables: Any) -> None:
        vars(self)[_UPDATED] = trainable_variables
        try:
            original_gradients(self, grads, trainable_variables)
        finally:
            del vars(self)[_UPDATED]

    @functools.wraps(original_clip)
    def clip(self: Any, grads: Any) -> Any:
        variables = vars(self).get(_UPDATED, ())
        each, together = self.clipnorm or 0, self.global_clipnorm or 0
        if max(each, together) <= 0 or not _any_sharded(variables):
            return original_clip(self, grads)
        squares = _squared_norms(grads, variables)
        if each > 0:
            scales = each / torch.clamp(squares.sqrt(), min=each)
        else:
            norm = squares.sum().sqrt()
            # (What is not finite makes all of them NaN, as in Keras.)
            scales = (together / torch.clamp(norm, min=together) + (norm - norm)).expand(len(grads))
        return [g * scale.to(g.dtype) for g, scale in zip(grads, scales, strict=True)]

    BaseOptimizer._backend_apply_gradients = apply_gradients
    BaseOptimizer._clip_gradients = clip


def _squared_norms(grads: Sequence[torch.Tensor], variables: Sequence[Any]) -> torch.Tensor:
    """Squared norm of each full gradient, in float64. Collective: one all-reduce of them all.

    Of a whole variable each rank has it already; a shard counts on the first rank that stores it.
    """
    norms = [torch.linalg.vector_norm(g, dtype=_wide(g)).double().square() for g in grads]
    cut = [(i, v._sharding) for i, v in enumerate(variables) if isinstance(v, ShardedVariable)]
    counted = [norms[i] if s.counts else torch.zeros_like(norms[i]) for i, s in cut]
    totals = cut[0][1].add_up(torch.stack(counted))
    for (i, _), total in zip(cut, totals.unbind(), strict=True):
        norms[i] = total
    return torch.stack(norms)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _hook_finite() -> None:
    scaled = keras.optimizers.LossScaleOptimizer
    original = scaled.check_finite

    @functools.wraps(original)
    def check_finite(self: Any, grads: Any) -> Any:
        shardings = (v._sharding for v in self._trainable_variables if sharding_of(v) is not None)
        sharding = next(shardings, None)
        grads = [g for g in grads if g is not None]
        if sharding is None or not grads:
            return original(self, grads)
        bad = torch.stack([(~torch.isfinite(g)).any() for g in grads]).any()
        return sharding.add_up(bad.float()) == 0

    scaled.check_finite = check_finite


def _say_price(optimizer: Any) -> None:
    """Says once that somebody's own optimizer is slower than it may have to be."""
    if type(optimizer).__module__.startswith("keras.") or vars(optimizer).get("_keras_tp_said"):
        return
    vars(optimizer)["_keras_tp_said"] = True
    warnings.warn(price_of(optimizer), LayoutWarning, stacklevel=2)


def _check_stateless(optimizer: Any) -> None:
    if not updates_elementwise(optimizer) or optimizer.clipnorm or optimizer.global_clipnorm:
        raise LayoutError(
            f"optimizer {type(optimizer).__name__} looks at whole tensors, which a stateless "
            "update of shards cannot give it. Use `apply`.",
            where="this optimizer",
        )


def _check_gradients(grads: list[Any], variables: list[Any]) -> None:
    # A full gradient would be broadcast over a shard of size one without a word.
    for grad, variable in zip(grads, variables, strict=False):
        wanted = tuple(local_tensor(variable).shape)
        if grad is not None and tuple(grad.shape) != wanted:
            raise ValueError(
                f"the gradient of '{variable.path}' has shape {tuple(grad.shape)}, this rank's "
                f"shard {wanted}. `variable.value.grad` is the gradient of the shard."
            )
