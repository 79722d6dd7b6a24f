"""Where one of Keras's own steps reads gradients, for which it wants no weights.

Keras asks each weight for its value, and that for its gradient. In its own `train_step` nothing
else is read between `loss.backward()` and the optimizer's `apply`. There, a sharded variable gives
the shard, which has the gradient, and of which nothing is made (a compiler would have to stop for
each). In a step of the user's, weights read there may be computed with, and are full ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import torch
from keras.src.backend.common import global_state
from keras.src.backend.torch.trainer import TorchTrainer
from keras.src.optimizers.base_optimizer import BaseOptimizer
from torch._C import _current_graph_task_id

# None, or how far one of Keras's own steps has come. (Set and unset by plain calls in place of a
# `with`, in which no compiler can stop for backward and go on.)
_STATE = "keras_tp_gradients"
_BEGUN, _DUE = "begun", "due"


def _set(state: str | None) -> None:
    global_state.set_global_attribute(_STATE, state)


def gradients_are_read() -> bool:
    """Whether values of weights are read for their gradients, and for nothing else."""
    if global_state.get_global_attribute(_STATE) != _DUE:
        return False
    # What computes in backward is no part of the step; it is never compiled with it.
    return torch.compiler.is_compiling() or _current_graph_task_id() == -1


def hook_losses() -> None:
    """Has optimizers tell when they scale a loss, and when they are given the gradients."""
    for kind in (BaseOptimizer, keras.optimizers.LossScaleOptimizer):
        kind.scale_loss = _announcing(kind.scale_loss)
        kind.apply = _beginning(kind.apply)


def _beginning(apply: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(apply)
    def begun(self: Any, *args: Any, **kwargs: Any) -> Any:
        _set(None)
        return apply(self, *args, **kwargs)

    return begun


def _announcing(scale_loss: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(scale_loss)
    def scaled(self: Any, loss: Any) -> Any:
        result = scale_loss(self, loss)
        if global_state.get_global_attribute(_STATE) == _BEGUN:
            _set(_DUE)
        return result

    return scaled


def announce_gradients(model: Any) -> None:
    """Has it be known where `model` reads gradients, if its `train_step` is Keras's own."""
    if getattr(type(model), "train_step", None) is not TorchTrainer.train_step:
        return
    step, make = model.train_step, model.make_train_function

    @functools.wraps(step)
    def train_step(data: Any) -> Any:
        _set(_BEGUN)
        if torch.compiler.is_compiling():
            return step(data)
        try:
            return step(data)
        finally:
            _set(None)

    @functools.wraps(make)
    def make_train_function(force: bool = False) -> Any:
        before = model.train_function
        result = make(force)
        if model.train_function is not before and model.train_function is not None:
            model.train_function = _ending(model.train_function)
        return result

    model.train_step, model.make_train_function = train_step, make_train_function


def _ending(steps: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Compiled steps, after which weights are full ones, errors or not."""

    @functools.wraps(steps)
    def run(data: Any) -> Any:
        try:
            return steps(data)
        finally:
            _set(None)

    return run
