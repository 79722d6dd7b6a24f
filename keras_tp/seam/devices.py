"""Models without values: variables on torch's meta device, which have shapes and no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from keras.src.backend.common import global_state
from keras.src.backend.torch import core
from keras.src.backend.torch import numpy as torch_numpy


class _Meta(str):
    """The name of the meta device, equal to the device itself.

    `convert_to_tensor` compares a tensor's `torch.device` with the name of the current
    device, and moves the tensor where they differ, as they always do. On a CPU what was
    moved is the tensor itself; on the meta device it is a new one, and no longer a view of
    the weight that a functional graph was given (`captured_views`).
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, torch.device):
            return other.type == "meta"
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """While open, variables are made with their shape and dtype, and no memory.

    Symbolic calls work as ever, but for their way out: where one fails on the meta device,
    Keras computes with 83 rows of ones on the default device, which for the models that this
    is made for takes all memory. Here the error is raised, as for whatever reads a value.
    """
    before = global_state.get_global_attribute("torch_device")
    default, repeat = core.DEFAULT_DEVICE, torch_numpy.repeat
    global_state.set_global_attribute("torch_device", _Meta("meta"))
    core.DEFAULT_DEVICE = "meta"
    torch_numpy.repeat = _repeat_on_meta(repeat)
    try:
        yield
    finally:
        torch_numpy.repeat = repeat
        core.DEFAULT_DEVICE = default
        global_state.set_global_attribute("torch_device", before)


def _repeat_on_meta(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keras's `repeat`, which fails on the meta device: grouped attention calls it."""

    def repeat(x: Any, repeats: Any, axis: int | None = None) -> Any:
        if core.get_device() != "meta" or not isinstance(repeats, int):
            return original(x, repeats, axis=axis)
        return torch.repeat_interleave(core.convert_to_tensor(x), repeats, dim=axis)

    return repeat


def have_values(variables: Iterable[Any]) -> bool:
    """Whether every one of these Keras variables has a value."""
    return not any(v._value.is_meta for v in variables)
