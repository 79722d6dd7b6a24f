"""Calls that are made to look at, after which everything is as it was."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import torch

from keras_tp.seam.compilation import wait_late
from keras_tp.seam.layers import (
    Owner,
    metric_variables_of,
    states_of,
    variables_of,
    walk_layers,
)
from keras_tp.seam.seeds import global_seed, set_global_seed
from keras_tp.seam.variables import ShardedVariable


@contextlib.contextmanager
def restored(owners: Sequence[Owner], *, trained: bool = True) -> Iterator[None]:
    """Afterwards all that a call of these layers changes is as before.

    Their variables (with `trained=False` only those that are never trained), those
    of metrics they hold, buffers of torch modules, the layers' attributes and
    random generators among them, the losses they have added, and the random states
    of Python, NumPy, torch and Keras. Within, no losses have been added yet. What
    Python code remembers elsewhere, or in lists and dicts, is not followed.
    """
    tensors = [v._value for v in (variables_of(owners) if trained else states_of(owners))]
    tensors += [v._value for v in metric_variables_of(owners)]
    before = [(t, t._version, t.detach().clone()) for t in tensors]
    # (A torch module writes some of its buffers without counting it.)
    buffers = {id(t): (t, t.clone()) for o in owners for t in _buffers(o.layer)}
    losses = [(vars(o.layer), name) for o in owners for name in ("_losses", "_loss_ids")]
    added = [(kept, name, kept[name]) for kept, name in losses if kept[name]]
    without = [kept[name] for kept, name in losses if not kept[name]]
    attributes = [(vars(o.layer), _attributes(o.layer)) for o in owners]
    kinds = {type(value) for _, kept in attributes for value in kept.values()}
    kinds = {kind for kind in kinds if issubclass(kind, _GENERATORS)}
    generators = [
        _state_setter(value)
        for _, kept in attributes
        if kinds
        for value in kept.values()
        if type(value) in kinds
    ]
    states = random.getstate(), np.random.get_state(), global_seed()
    try:
        for kept, name, value in added:
            kept[name] = type(value)()
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        with torch.no_grad():
            for tensor, version, value in before:
                if tensor._version != version:  # a write would spoil graphs that hold it
                    tensor.copy_(value)
            for tensor, value in buffers.values():
                tensor.copy_(value)
        for now, kept in attributes:
            for name in now.keys() - kept.keys() - _OURS:
                del now[name]
            now.update(kept)
        for reset in generators:
            reset()
        for none in without:
            none.clear()
        for kept, name, value in added:
            kept[name] = value
        random.setstate(states[0])
        np.random.set_state(states[1])
        set_global_seed(states[2])
        random.setstate(states[0])  # making Keras's generator has drawn from it


def _buffers(layer: Any) -> Iterator[torch.Tensor]:
    """Of a layer and of torch's modules in it; layers below have their own."""
    yield from layer.buffers(recurse=False)
    for module in layer._modules.values():
        if isinstance(module, torch.nn.Module) and not isinstance(module, keras.layers.Layer):
            yield from module.buffers()


# What takes the place of a layer's call stays: a first batch may show that another is wanted.
_OURS = {"call"}


def _attributes(layer: Any) -> dict[str, Any]:
    kept = dict(vars(layer))
    for name in _OURS:
        kept.pop(name, None)
    return kept


_GENERATORS = np.random.Generator, np.random.RandomState, random.Random, torch.Generator


def _state_setter(generator: Any) -> Callable[[], Any]:
    """Sets a random generator to the state it is in now."""
    if isinstance(generator, np.random.Generator):
        bits, now = generator.bit_generator, generator.bit_generator.state
        return lambda: setattr(bits, "state", now)
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    return functools.partial(generator.set_state, generator.get_state())


@contextlib.contextmanager
def gathered_instead(
    variables: Iterable[Any], nudged: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[list[torch.Tensor]]:
    """While open, sharded variables are read as full leaves, gathered here, and not again.

    Gives a tensor per variable for gradients to be taken of: the leaf, or a
    whole variable's own. Collective; gathers in another way than layers do.

    Args:
        variables: sharded and whole ones.
        nudged: what is read of a full value.
    """
    opened: list[ShardedVariable] = []
    sources = []
    try:
        for variable in variables:
            if isinstance(variable, ShardedVariable):
                full = nudged(variable._sharding.assembled(variable._value.detach()))
                variable._stood_in = full.requires_grad_(variable._value.requires_grad)
                opened.append(variable)
                sources.append(full)
            else:
                sources.append(variable._value)
        yield sources
    finally:
        for variable in opened:
            variable._stood_in = None


def try_before_compiling(model: Any) -> None:
    """Has `model` called once by itself, and all put back, before a compiled step calls it.

    For what is looked at on first batches and no compiler should see: on the first
    of each of `fit`, `evaluate` and `predict`, without gradients.
    """
    for kind in ("train", "test", "predict"):
        make = getattr(model, f"make_{kind}_function", None)
        if make is not None:  # a mere layer has none
            setattr(model, f"make_{kind}_function", _looking(model, make, kind))


def _looking(model: Any, make: Callable[..., Any], kind: str) -> Callable[..., Any]:
    name, done = f"{kind}_function", False

    @functools.wraps(make)
    def make_function(force: bool = False) -> Any:
        result = make(force)
        step = getattr(model, name)
        if done or not model.jit_compile:
            return result
        wait_late()

        def try_first(data: Any) -> Any:
            nonlocal done
            x, _, _ = keras.utils.unpack_x_y_sample_weight(data[0])
            training = {"training": kind == "train"} if model._call_has_training_arg else {}
            with restored(walk_layers(model), trained=False), torch.no_grad():
                for given in (x, _as_tensors(x)):  # `fit` hands on tensors, `train_on_batch` arrays
                    model(given, **training)
            done = True
            setattr(model, name, step)
            return step(data)

        setattr(model, name, try_first)
        return result

    return make_function


def _as_tensors(x: Any) -> Any:
    return keras.tree.map_structure(keras.ops.convert_to_tensor, x)


@contextlib.contextmanager
def nudged_weights(
    variables: Iterable[Any], nudged: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """While open, what this rank stores of the variables that are trained is `nudged`."""
    stored = [(v._value, v._value.data) for v in variables if v._value.requires_grad]
    try:
        for parameter, value in stored:
            parameter.data = nudged(value)
        yield
    finally:
        for parameter, value in stored:
            parameter.data = value


def leaf_of(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` as an input to take a gradient of, with the mask that Keras has put on `tensor`."""
    leaf = value.detach().requires_grad_()
    mask = getattr(tensor, "_keras_mask", None)
    if mask is not None:
        leaf._keras_mask = mask  # type: ignore[attr-defined]
    return leaf


def shard_of(variable: Any, full: torch.Tensor) -> torch.Tensor:
    """What this rank stores of a full value or gradient of a variable, sharded or not."""
    return variable._sharding.local(full) if isinstance(variable, ShardedVariable) else full


def position_of(variable: Any, rank: int) -> tuple[int, ...]:
    """Which shard of a variable a rank stores; ranks with the same one store the same."""
    return variable._sharding.position(rank) if isinstance(variable, ShardedVariable) else ()
