"""The one seam to Keras's internals. Nothing else in the package touches them.

What is relied upon, in Keras 3.13 to 3.15 on torch, and why:

- A variable's tensor is the `nn.Parameter` in `Variable._value`; its layer and
  every ancestor hold the *same* object in `_torch_params`. Sharding replaces
  the parameter's `.data` and so keeps every reference valid: `zero_grad`,
  `v.value.grad`, and torch optimizers made before.
- `Variable._shape` is what symbolic calls, `summary()` and checks see. It stays
  the full shape.
- Everything reads a weight through the property `Variable.value`. A sharded
  variable changes class to `ShardedVariable`, whose `value` is the full weight
  (gathered) while a layer's `call` runs, and this rank's shard otherwise, which
  is what `v.value.grad`, optimizers and `zero_grad` want. Whether a call is
  running is Keras's own `current_call_ctx`.
- Optimizers make a slot with `add_variable_from_reference` and see their
  variables in `build`. Both are wrapped, once, for all optimizers; for
  variables that are not sharded the wrappers do nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import keras
import numpy as np
import torch
from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.random.seed_generator import global_seed_generator

from keras_tp.errors import LayoutError
from keras_tp.layouts import Shape
from keras_tp.optimizers import optimizer_problems


@dataclass(frozen=True)
class Owner:
    """A layer and the variables it owns itself, its sublayers' not counted."""

    layer: Any
    path: str
    variables: tuple[Any, ...]


def walk_layers(model: Any) -> list[Owner]:
    """The model and all layers below it, depth first, each once, in creation order.

    The order is the same on every rank; collectives rely on it.
    """
    owners: list[Owner] = []
    seen: set[int] = set()

    def visit(layer: Any) -> None:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        own = [*layer._trainable_variables, *layer._non_trainable_variables]
        own += [generator.state for generator in layer._seed_generators]
        unique = tuple({id(v): v for v in own}.values())
        owners.append(Owner(layer, layer.path or layer.name, unique))
        for sublayer in layer._layers:
            visit(sublayer)

    visit(model)
    return owners


def overrides_build(layer: Any) -> bool:
    """Whether the layer's class makes weights in a `build` of its own."""
    return type(layer).build is not keras.layers.Layer.build


def is_symbolic() -> bool:
    """Whether Keras only asks for shapes: no values, no communication."""
    return in_symbolic_scope() or str(backend.core.get_device()) == "meta"


def _reads_whole() -> bool:
    return (
        global_state.get_global_attribute("current_call_ctx") is not None
        or global_state.get_global_attribute(_WHOLE) is not None
    )


_WHOLE = "keras_tp_whole_weights"


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """While open, reading a sharded variable gives the full weight, as in a layer's `call`."""
    before = global_state.get_global_attribute(_WHOLE)
    global_state.set_global_attribute(_WHOLE, True)
    try:
        yield
    finally:
        global_state.set_global_attribute(_WHOLE, before)


def compute_loss_on_whole_weights(model: Any) -> None:
    """Lets a `compute_loss` that reads weights, or a loss function that does, see them whole."""
    original = model._compute_loss

    @functools.wraps(original)
    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        with whole_weights():
            return original(*args, **kwargs)

    model._compute_loss = compute_loss


def global_seed() -> Any:
    """The variable behind `keras.random` calls without a seed."""
    return global_seed_generator().state


class Cut(Protocol):
    """What a sharded variable asks of `keras_tp.shards.Shards`."""

    local_shape: Shape

    def local(self, full: torch.Tensor) -> torch.Tensor: ...
    def whole(self, local: torch.Tensor, keep: Collection[str] = ()) -> torch.Tensor: ...
    def distribute(self, full: torch.Tensor) -> torch.Tensor: ...


class ShardedVariable(keras.Variable):
    """A Keras variable of which this rank stores a shard.

    Never constructed: `shard_variable` changes the class of an existing one, so
    that the object, its id and its path stay what layers and optimizers know.
    `shape` is the full shape throughout.
    """

    _cut: Cut
    _gathered: dict[torch.dtype, torch.Tensor] | None

    @property
    def value(self) -> torch.Tensor:
        """The full weight while a layer's `call` runs (an all-gather), else this rank's shard."""
        if in_stateless_scope():
            mapped = get_stateless_scope().get_current_value(self)
            if mapped is not None:
                return self._maybe_autocast(mapped)
        if is_symbolic():
            return self._maybe_autocast(self._stand_in())
        if _reads_whole():
            return self.whole()
        return self._maybe_autocast(self._value)

    def whole(self, keep: Collection[str] = ()) -> torch.Tensor:
        """The full value, gathered along every axis not in `keep`; differentiable. Collective."""
        local = self._maybe_autocast(self._value)
        if self._gathered is None or keep:
            return self._cut.whole(local, keep)
        if local.dtype not in self._gathered:
            self._gathered[local.dtype] = self._cut.whole(local)
        return self._gathered[local.dtype]

    def _stand_in(self) -> torch.Tensor:
        # One element, shown as the full shape.
        element = backend.convert_to_tensor(0, dtype=self._dtype)
        return element.expand(self._shape)

    def assign(self, value: Any) -> Any:
        """Assigns a full value, of which this rank keeps its shard, or a value of the shard."""
        value = self._convert_to_tensor(value, dtype=self._dtype)
        shape = tuple(value.shape)
        if in_stateless_scope() or shape not in (tuple(self._shape), self._cut.local_shape):
            # Keras's own way, and its own error for a wrong shape.
            return super().assign(value)
        self._direct_assign(value)
        return value

    def _direct_assign(self, value: torch.Tensor) -> None:
        with torch.no_grad():
            if tuple(value.shape) != self._cut.local_shape:
                value = self._cut.local(value)
            self._value.copy_(value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The full value (collective): what `numpy()`, `get_weights` and saving read."""
        with torch.no_grad():
            array = backend.convert_to_numpy(self._cut.whole(self._value))
        return array if dtype is None else array.astype(dtype)

    def __repr__(self) -> str:
        return (
            f"<ShardedVariable path={self.path}, shape={self.shape}, dtype={self.dtype}, "
            f"local shape={self._cut.local_shape}>"
        )

    # Regularizers and constraints look at the whole weight (a norm, a sum), so
    # they are handed one that is whole.

    @property
    def regularizer(self) -> Any:
        return _on_whole(self._regularizer)

    @regularizer.setter
    def regularizer(self, value: Any) -> None:
        keras.Variable.regularizer.fset(self, value)

    @property
    def constraint(self) -> Any:
        return _on_whole(self._constraint)

    @constraint.setter
    def constraint(self, value: Any) -> None:
        keras.Variable.constraint.fset(self, value)


def _on_whole(function: Any) -> Any:
    if function is None:
        return None
    return lambda v: function(v.whole() if isinstance(v, ShardedVariable) else v)


def shard_variable(variable: Any, cut: Cut) -> None:
    """Makes `variable` store this rank's shard of the first rank's value. Collective."""
    _become_sharded(variable, cut, cut.distribute(variable._value))


def shard_like(slot: Any, reference: ShardedVariable) -> None:
    """Makes an optimizer slot store the shard that its variable stores. Collective."""
    shard_variable(slot, reference._cut)


def _become_sharded(variable: Any, cut: Cut, local: torch.Tensor) -> None:
    parameter = variable._value
    parameter.grad = None
    # While an earlier output of the model lives, so does the node of its graph that
    # accumulates this gradient, in the full shape, and a new graph would take it
    # up. torch makes a new node once the data has changed dtype.
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = parameter.data.new_empty(0, dtype=other)
    parameter.data = local
    variable._cut = cut
    variable._gathered = None
    variable.__class__ = ShardedVariable


def replicate_variable(variable: Any, cut: Cut) -> None:
    """Gives a variable that stays whole the first rank's value. Collective."""
    with torch.no_grad():
        variable._value.copy_(cut.distribute(variable._value))


def local_tensor(variable: Any) -> torch.Tensor:
    """What this rank stores of a variable, sharded or not."""
    return variable._value


def whole_numpy(variable: Any) -> np.ndarray:
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
    finally:
        for variable in opened:
            variable._gathered = None


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
        cut = reference_variable._cut
        full_shape = reference_variable.shape
        initializer = keras.initializers.get(initializer)
        if not isinstance(initializer, keras.initializers.Constant | keras.initializers.Zeros):
            initial = initializer

            def initializer(shape: Any, dtype: Any = None) -> torch.Tensor:
                return cut.local(initial(full_shape, dtype=dtype))

        like = SimpleNamespace(
            path=reference_variable.path, shape=cut.local_shape, dtype=reference_variable.dtype
        )
        slot = original_add(self, like, name=name, initializer=initializer)
        slot._shape = full_shape
        _become_sharded(slot, cut, slot._value.data)
        return slot

    build._keras_tp = True  # type: ignore[attr-defined]
    BaseOptimizer.build = build
    BaseOptimizer.add_variable_from_reference = add_variable_from_reference
