"""Copies of tensors for use on shards, with which the gradients of what read them are summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from keras_tp.collectives import Axis, copy
from keras_tp.late_gradients import Reading


class Reader(Protocol):
    """A layer's call that multiplies what it reads by a kernel of which it has columns."""

    def own_kernel(self) -> torch.Tensor | None:
        """What is stored of the kernel, if it is used as it is stored."""


Readers = Mapping[Reader, Sequence[Reader]]


def read_by(calls: Sequence[Reader], x: torch.Tensor, axis: Axis) -> Reading[Reader] | None:
    """A tensor as it is read by layers whose kernels' gradients may come late.

    Args:
        calls: those that read it, each of which computes columns along the axis.
        x: replicated over the axis.
        axis: the axis.

    Returns:
        None if no gradient of it is to be summed, or no kernel's can be computed meanwhile.
    """
    if axis.size == 1 or not (x.requires_grad and torch.is_grad_enabled()):
        return None
    if torch.compiler.is_compiling():  # its graph has the order that it thinks best
        return None
    found = {call: call.own_kernel() for call in calls}
    kernels = {c: own for c, own in found.items() if own is not None and own.requires_grad}
    return Reading(x, kernels, axis) if kernels else None


class SharedCopies:
    """Copies of tensors for use on shards, one for all layers that read the same tensor.

    Args:
        axis: the axis.
        readers: for each layer that is known to share what it reads, all that do, in order.
    """

    def __init__(self, axis: Axis, readers: Readers | None = None):
        self.axis = axis
        self.readers = readers or {}
        self.made: list[tuple[torch.Tensor, torch.Tensor | Reading[Reader]]] = []

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """`x`; its gradient is summed over the axis once, whoever reads it."""
        made = self._made(x)
        if made is None:
            made = copy(x, self.axis)
            self.made.append((x, made))
        return made.copy if isinstance(made, Reading) else made

    def reading(self, x: torch.Tensor, call: Reader) -> Reading[Reader] | None:
        """As `Stage.reading`."""
        made = self._made(x)
        if made is None:
            made = read_by(self.readers.get(call, (call,)), x, self.axis)
            if made is not None:
                self.made.append((x, made))
        return made if isinstance(made, Reading) and call in made.kernels else None

    def _made(self, x: torch.Tensor) -> torch.Tensor | Reading[Reader] | None:
        return next((made for source, made in self.made if source is x), None)


class AsIs(SharedCopies):
    """In place of copies of what was gathered for use on shards: its gradient is summed there."""

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def reading(self, x: torch.Tensor, call: Reader) -> Reading[Reader] | None:
        return None
