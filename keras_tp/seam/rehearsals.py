"""Layers called on tensors without values, to see what they do. Afterwards all is as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import keras
import numpy as np
import torch
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import StatelessScope, get_stateless_scope
from keras.src.backend.torch import random as backend_random
from keras.src.backend.torch.core import device_scope, to_torch_dtype

from keras_tp.layouts import Shape
from keras_tp.seam.contexts import on_rows_of
from keras_tp.seam.layers import Owner, variables_of, walk_layers
from keras_tp.seam.masks import keras_mask
from keras_tp.seam.rows import RANDOM
from keras_tp.seam.trials import restored

META = torch.device("meta")


class _WithoutValues(str):
    """The meta device, which Keras does not know as such.

    Keras computes otherwise on it here and there (a `cond` takes the first branch, `repeat`
    fails), where the question is what it does on any other device.
    """

    def __eq__(self, other: object) -> bool:
        if isinstance(other, torch.device):
            return other == META
        return isinstance(other, _WithoutValues)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


@contextlib.contextmanager
def _on_meta_unnoticed() -> Iterator[None]:
    before = global_state.get_global_attribute("torch_device", None)
    global_state.set_global_attribute("torch_device", _WithoutValues("meta"))
    try:
        yield
    finally:
        global_state.set_global_attribute("torch_device", before)


class Watch(Protocol):
    """What sees a rehearsal."""

    def dropout(
        self, draw: Callable[..., torch.Tensor], inputs: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Keras's `random.dropout`, which is `draw`."""


class _Scope(StatelessScope):
    """Gives of a variable what `read` gives, until something is assigned to it."""

    def __init__(self, read: Callable[[Any], torch.Tensor | None]):
        super().__init__(collect_losses=True)
        self._read = read
        self.assigned: list[int] = []

    def get_current_value(self, variable: Any) -> Any:
        assigned = super().get_current_value(variable)
        return self._read(variable) if assigned is None else assigned

    def add_update(self, update: Any) -> None:
        variable, value = update
        self.assigned.append(id(variable))
        if type(value) is not torch.Tensor:
            # A tensor of a class of its own may have to be made one that can be written.
            with torch.no_grad():
                value = weight_without_values(variable).copy_(value)
        super().add_update((variable, value))


def assigned_so_far() -> list[int]:
    """Identities of the variables that were assigned to in this rehearsal, in turn."""
    return get_stateless_scope().assigned


def times_written(tensors: Iterable[torch.Tensor]) -> list[int]:
    """How often each tensor has been written into."""
    return [tensor._version for tensor in tensors]


@contextlib.contextmanager
def rehearsal(
    owners: list[Owner],
    weights: Iterable[tuple[Any, torch.Tensor]] = (),
    calls: Iterable[tuple[Any, Callable[..., Any]]] = (),
    attributes: Iterable[tuple[Any, str, Any]] = (),
    watch: Watch | None = None,
    read: Callable[[Any], torch.Tensor | None] | None = None,
) -> Iterator[list[torch.Tensor]]:
    """While open, layers compute without values, and change nothing that stays.

    Args:
        owners: all layers that may be called.
        weights: variables, and the tensor on the meta device that is read of each.
        calls: layers, and what is called in place of their `call`; they take any input.
        attributes: layers, names and values of attributes that they have meanwhile.
        watch: what sees more of it than torch's functions.
        read: gives the tensor that is read of a variable, each time, in place of `weights`. With
            it gradients are followed.

    Gives the losses that layers add, as they do.
    """
    before = [(vars(owner.layer), dict(vars(owner.layer))) for owner in owners]
    with_gradients = read is not None
    filtering = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()  # it rewrites what errors say
    try:
        for layer, call in calls:
            vars(layer)["call"] = call
            vars(layer)["_input_spec"] = None
        for layer, name, value in attributes:
            vars(layer)[name] = value
        if read is None:
            read = _empty_ones(weights, variables_of(owners))
        follows = watch is not None or with_gradients
        with (
            _on_meta_unnoticed(),
            torch.set_grad_enabled(follows),
            contextlib.ExitStack() as stack,
        ):
            stack.enter_context(on_rows_of(None))
            scope = stack.enter_context(_Scope(read))
            stack.enter_context(_watched(watch))
            yield scope.losses
    finally:
        if filtering:
            keras.config.enable_traceback_filtering()
        for now, kept in before:
            now.clear()
            now.update(kept)


def _empty_ones(
    weights: Iterable[tuple[Any, torch.Tensor]], variables: Iterable[Any]
) -> Callable[[Any], torch.Tensor | None]:
    """Gives the tensor that is read of a variable: of one without, as it is first read, a new."""
    known = {id(v): tensor for v, tensor in weights}
    others = {id(v) for v in variables}

    def read(variable: Any) -> torch.Tensor | None:
        if id(variable) not in known and id(variable) in others:
            known[id(variable)] = weight_without_values(variable)
        return known.get(id(variable))

    return read


@contextlib.contextmanager
def _watched(watch: Watch | None) -> Iterator[None]:
    drawing = {name: getattr(backend_random, name) for name in RANDOM}

    def without_generator(name: str) -> Callable[..., Any]:
        def draw(*args: Any, **kwargs: Any) -> Any:
            with device_scope("meta"):  # of which there are no generators, as Keras knows
                return drawing[name](*args, **kwargs)

        return draw

    def watched_dropout(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        draw = without_generator("dropout")
        if watch is None:
            return draw(inputs, *args, **kwargs)
        return watch.dropout(draw, keras.ops.convert_to_tensor(inputs), *args, **kwargs)

    for name in RANDOM:
        setattr(backend_random, name, without_generator(name))
    backend_random.dropout = watched_dropout
    try:
        yield
    finally:
        for name, draw in drawing.items():
            setattr(backend_random, name, draw)


def without_values(nest: Any, seen: dict[int, torch.Tensor]) -> Any:
    """`nest` with tensors on the meta device, the same one for the same one, masks included.

    Args:
        nest: of tensors and anything else.
        seen: by identity, those that were made already; is added to.
    """

    def made(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor | np.ndarray):
            return leaf
        if id(leaf) not in seen:
            # (A functional model makes a tensor of an array first of all.)
            dtype = torch.as_tensor(leaf[:0]).dtype if leaf.ndim else torch.as_tensor(leaf).dtype
            empty = torch.empty(leaf.shape, dtype=dtype, device=META)
            seen[id(leaf)] = empty
            mask = keras_mask(leaf)
            if mask is not None:
                empty._keras_mask = made(mask)  # type: ignore[attr-defined]
        return seen[id(leaf)]

    return keras.tree.map_structure(made, nest)


def weight_without_values(variable: Any) -> torch.Tensor:
    """A tensor of the full shape of a variable, on the meta device."""
    return torch.empty(tuple(variable.shape), dtype=to_torch_dtype(variable.dtype), device=META)


def weights_without_values(variables: Iterable[Any]) -> list[torch.Tensor]:
    """One of each, which nobody sees made who follows torch's functions."""
    with torch._C.DisableTorchFunction():
        return [weight_without_values(v) for v in variables]


def as_layers_see(variable: Any, tensor: torch.Tensor) -> torch.Tensor:
    """What is read of a variable, in the dtype that the layer whose call runs computes in."""
    return variable._maybe_autocast(tensor)


def is_computed_again(layer: Any) -> bool:
    """Whether the layer was made under a `RematScope`: backward computes it a second time."""
    return getattr(layer, "_remat_mode", None) is not None


def bare_call(layer: Any) -> Callable[..., torch.Tensor]:
    """The class's own `call` of a layer, but for its activation."""

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        attributes = vars(layer)
        kept = attributes.get("activation")
        attributes["activation"] = None
        try:
            return type(layer).call(layer, *args, **kwargs)
        finally:
            attributes["activation"] = kept

    return call


def rehearse_model(
    model: Any, sizes: Shape, calls: Iterable[tuple[Any, Callable[..., Any]]]
) -> None:
    """Calls a model once as it is trained, on inputs of the shapes it was built for.

    Args:
        model: a built model.
        sizes: what an unknown number of rows, and any other unknown size, is taken to be.
        calls: layers, and what is called in place of their `call`.

    Raises:
        Exception: whatever the model raises, or if what it takes is not known.
    """
    owners = walk_layers(model)
    training = {"training": True} if model._call_has_training_arg else {}
    with restored(owners, trained=False), rehearsal(owners, calls=calls):
        positional, named = _inputs_of(model, sizes)
        model(*positional, **named, **training)


def inputs_struct(model: Any) -> Any:
    """What a model takes, as Keras's symbolic tensors; None of one that does not tell."""
    struct = getattr(model, "_inputs_struct", None)
    if struct is None and isinstance(model, keras.Sequential) and model._functional is not None:
        struct = model._functional._inputs_struct
    return struct


def _inputs_of(model: Any, sizes: Shape) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def empty(shape: Any, dtype: Any) -> torch.Tensor:
        known = [sizes[min(i, 1)] if size is None else size for i, size in enumerate(shape)]
        return keras.ops.zeros(known, dtype)

    struct = inputs_struct(model)
    if struct is not None:
        given = keras.tree.map_structure(lambda t: empty(t.shape, t.dtype), struct)
        return (given,), {}
    shapes = dict(model._build_shapes_dict or {})
    if not shapes:
        raise ValueError("the shapes of its inputs are not known")

    def from_shape(shape: Any) -> Any:
        if isinstance(shape, dict):
            return {name: from_shape(entry) for name, entry in shape.items()}
        if isinstance(shape, tuple | list) and any(isinstance(e, tuple | list) for e in shape):
            return type(shape)(from_shape(entry) for entry in shape)
        return empty(shape, model.input_dtype)

    if len(shapes) == 1:
        return (from_shape(*shapes.values()),), {}
    return (), {n.removesuffix("_shape"): from_shape(s) for n, s in shapes.items()}
