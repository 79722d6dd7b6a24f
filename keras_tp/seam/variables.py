"""Keras variables of which a rank stores a shard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import torch
from keras.src import backend
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope

from keras_tp.seam.contexts import (
    announce_read,
    current_replicas,
    in_call,
    is_symbolic,
    joining_of,
    reading_shards,
    reads_shards,
)
from keras_tp.seam.gradients import gradients_are_read
from keras_tp.seam.sharding import Sharding
from keras_tp.seam.weights import FullWeight, was_written, write_error


def _renew(variable: Any) -> None:
    replicas = current_replicas()
    if replicas is not None:
        replicas.renew(variable)


class _Variable(keras.Variable):
    def _convert_to_tensor(self, value: Any, dtype: Any = None) -> Any:
        # Keras copies arrays, which beside a full weight that is loaded is another. What is
        # assigned is copied into this variable's memory at once (not in a stateless scope).
        if type(value) is np.ndarray and value.flags.writeable and value.dtype == self._dtype:
            value = value if in_stateless_scope() else torch.from_numpy(value)
        return super()._convert_to_tensor(value, dtype)


class ReplicatedVariable(_Variable):
    """A Keras variable that is whole on every rank, and used by each on something else.

    Never constructed, as `ShardedVariable`. While replicas compute, each its rows, or
    layers hand each other shards, what is read of it gives the sum of their gradients.
    """

    _copied: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def value(self) -> torch.Tensor:
        """The weight."""
        replicas = current_replicas()
        plain = in_stateless_scope() or is_symbolic()
        if plain or (replicas is None and self._copied is None):
            return keras.Variable.value.fget(self)
        own = self._value if replicas is None else replicas.own(self)
        return self._maybe_autocast(own if self._copied is None else self._copied(own))

    def _direct_assign(self, value: torch.Tensor) -> None:
        with torch.no_grad():
            self._value.copy_(value)
        _renew(self)


class ShardedVariable(_Variable):
    """A Keras variable of which this rank stores a shard.

    Never constructed: `shard_variable` changes the class of an existing one, so
    that the object, its id and its path stay what layers and optimizers know.
    `shape` is the full shape throughout.
    """

    _sharding: Sharding
    _gathered: dict[tuple[torch.dtype, bool], torch.Tensor] | None
    _stood_in: torch.Tensor | None = None  # read in place of what is gathered
    _awaits_plan = False  # sharded as it was made, and no plan has been carried out yet

    @property
    def value(self) -> torch.Tensor:
        """The full weight, gathered when it is used; inside an optimizer, this rank's shard."""
        if in_stateless_scope():
            mapped = get_stateless_scope().get_current_value(self)
            if mapped is not None:
                return self._maybe_autocast(mapped)
        if is_symbolic():
            return self._maybe_autocast(self._stand_in())
        if self._stood_in is not None:
            return self._maybe_autocast(self._stood_in)
        if reads_shards():
            return self._maybe_autocast(self._value)
        # In a layer's call it is used at once, as a tensor that compilers know.
        if self._gathered is not None or in_call():
            return self.full()
        if gradients_are_read():
            return self._value
        return self._maybe_autocast(FullWeight.of(self))

    def full(self, keep: Collection[str] = (), own: torch.Tensor | None = None) -> torch.Tensor:
        """The full value, gathered along every axis not in `keep`; differentiable. Collective.

        `own` stands for what this rank stores of it.
        """
        announce_read(self)
        replicas = current_replicas()
        along = None if replicas is None else replicas.axis
        local = self._maybe_autocast(self.own() if own is None else own)
        if self._gathered is None or keep:
            return self._sharding.full(local, keep, along, joining_of(self))
        kind = local.dtype, torch.is_grad_enabled()
        if kind not in self._gathered:
            self._gathered[kind] = self._sharding.full(local, (), along, joining_of(self))
        return self._gathered[kind]

    def own(self) -> torch.Tensor:
        """What this rank stores of it, for use on its rows."""
        replicas = current_replicas()
        return self._value if replicas is None else replicas.own(self)

    def _stand_in(self) -> torch.Tensor:
        # One element, shown as the full shape.
        element = backend.convert_to_tensor(0, dtype=self._dtype)
        return element.expand(self._shape)

    def assign(self, value: Any) -> Any:
        """Assigns a full value, of which this rank keeps its shard; an optimizer assigns shards."""
        value = self._convert_to_tensor(value, dtype=self._dtype)
        local = reads_shards() and tuple(value.shape) == self._sharding.local_shape
        if in_stateless_scope() or not (local or tuple(value.shape) == tuple(self._shape)):
            # Keras's own way, and its own error for a wrong shape.
            return super().assign(value)
        self._direct_assign(value)
        return value

    def _direct_assign(self, value: torch.Tensor) -> None:
        local = tuple(value.shape) == self._sharding.local_shape
        with torch.no_grad():
            self._value.copy_(value if local else self._sharding.part(value))
        _renew(self)
        if self._gathered is not None:
            self._gathered = {}
        if self._stood_in is not None and tuple(value.shape) == tuple(self._shape):
            with torch.no_grad():
                self._stood_in.copy_(value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The full value (collective): what `numpy()`, `get_weights` and saving read."""
        announce_read(self)
        with torch.no_grad():
            array = backend.convert_to_numpy(self._sharding.full(self._value))
        return array if dtype is None else array.astype(dtype)

    def __repr__(self) -> str:
        return (
            f"<ShardedVariable path={self.path}, shape={self.shape}, dtype={self.dtype}, "
            f"local shape={self._sharding.local_shape}>"
        )

    @property
    def constraint(self) -> Any:
        """The constraint, which optimizers call, but which looks at the full weight (a norm)."""
        return None if self._constraint is None else self._constrained

    @constraint.setter
    def constraint(self, value: Any) -> None:
        keras.Variable.constraint.fset(self, value)

    def _constrained(self, variable: Any) -> Any:
        with reading_shards(False):
            return self._constraint(variable)


def shard_variable(variable: Any, sharding: Sharding, first: torch.Tensor) -> None:
    """Makes `variable` store this rank's shard of a full value, the first rank's."""
    become_sharded(variable, sharding, sharding.local(first))


def shard_like(slot: Any, reference: ShardedVariable) -> None:
    """Makes an optimizer slot store the shard that its variable stores. Collective."""
    sharding = reference._sharding
    become_sharded(slot, sharding, sharding.distribute(slot._value))


def replicate_variable(variable: Any, value: torch.Tensor) -> None:
    """Gives a variable that stays whole a value, the first rank's."""
    if variable._value.is_contiguous():
        with torch.no_grad():
            variable._value.copy_(value)
    else:  # such as an expanded tensor, into which nothing can be written
        variable._value.data = value.clone()


def replicate_for_rows(variable: Any) -> None:
    """Has a variable that stays whole give replicas the sum of their gradients."""
    if type(variable) is keras.Variable:
        variable.__class__ = ReplicatedVariable


@contextlib.contextmanager
def copied_on_read(
    variables: Iterable[Any], copied: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """While open, what is read of these variables, which are whole, is `copied`."""
    opened = [v for v in variables if v._value.requires_grad]
    for variable in opened:
        replicate_for_rows(variable)
        variable._copied = copied
    try:
        yield
    finally:
        for variable in opened:
            variable._copied = None


def cut_along(variable: Any, axis: str) -> bool:
    """Whether ranks along the mesh axis store different parts of a variable."""
    return isinstance(variable, ShardedVariable) and variable._sharding.cut_along(axis)


def become_sharded(variable: Any, sharding: Sharding, local: torch.Tensor) -> None:
    """Makes `variable` store `local`."""
    parameter = variable._value
    parameter.grad = None
    # While an earlier output of the model lives, so does the node of its graph that
    # accumulates this gradient, in the full shape, and a new graph would take it
    # up. torch makes a new node once the data has changed dtype.
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = parameter.data.new_empty(0, dtype=other)
    parameter.data = local
    variable._sharding = sharding
    variable._gathered = None
    variable.__class__ = ShardedVariable


def reshard_variable(variable: ShardedVariable, sharding: Sharding | None) -> None:
    """Makes `variable` store another shard, or with None its full value. Collective: gathers it."""
    full = variable._sharding.full(variable._value.detach())
    if sharding is not None:
        become_sharded(variable, sharding, sharding.local(full))
        return
    become_sharded(variable, variable._sharding, full)
    variable.__class__ = keras.Variable


def sharding_of(variable: Any) -> Any | None:
    """How a sharded variable is sharded, None for a whole one."""
    return variable._sharding if isinstance(variable, ShardedVariable) else None


def awaits_plan(variable: Any) -> bool:
    """Whether `variable` was sharded as it was made, and no plan has been carried out since."""
    return isinstance(variable, ShardedVariable) and variable._awaits_plan


def set_awaiting_plan(variable: ShardedVariable, awaiting: bool) -> None:
    """Sets what `awaits_plan` gives."""
    variable._awaits_plan = awaiting


def local_tensor(variable: Any) -> torch.Tensor:
    """What this rank stores of a variable, sharded or not."""
    return variable._value


def full_numpy(variable: Any) -> np.ndarray:
    """The full value of a variable. Collective for sharded ones."""
    if isinstance(variable, ShardedVariable):
        return variable.__array__()
    return backend.convert_to_numpy(variable._value)


@contextlib.contextmanager
def gathered_once(variables: Iterable[ShardedVariable]) -> Iterator[None]:
    """While open, each of `variables` is gathered at its first read and at no other."""
    opened = [v for v in variables if v._gathered is None]
    for variable in opened:
        variable._gathered = {}
    try:
        yield
        if not torch.compiler.is_compiling():
            for variable in opened:
                _check_unwritten(variable)
    finally:
        for variable in opened:
            variable._gathered = None


def _check_unwritten(variable: ShardedVariable) -> None:
    if any(map(was_written, (variable._gathered or {}).values())):
        raise write_error(variable.path, "a layer's call")
