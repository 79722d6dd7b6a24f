"""Gathers that are begun ahead of their turn, without values; see `keras_tp.prefetch`.

What is begun takes its memory from then on. A step is therefore made twice: once to see what comes
after what, and once as ranks make it when they know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from keras_tp.dry_collectives import DryAxis, Joining, placed, sent
from keras_tp.trails import Step, Trail


@dataclass(frozen=True)
class DrySource:
    """What a gather takes: this rank's part of a weight.

    Attributes:
        shape, dtype: of the part.
        dim, sizes: along which it is joined, and how much of it each rank has.
        layer, of: how it is written down.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int
    sizes: tuple[int, ...]
    layer: str
    of: str

    def begin(self, axis: DryAxis) -> list[torch.Tensor]:
        """The memory of what comes of it, which is on its way."""
        x = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return sent(x, self.dim, self.sizes, axis, self.layer, self.of)

    @property
    def bytes(self) -> int:
        """Of what comes of it, with what fills up an uneven cut."""
        others = math.prod(n for dim, n in enumerate(self.shape) if dim != self.dim)
        return max(self.sizes) * len(self.sizes) * others * self.dtype.itemsize


Trails = dict[str, Trail[DrySource]]  # by axis


class DryReads:
    """The gathers of one call of a model; see `keras_tp.prefetch.Reads`.

    Args:
        trails: what is known of them, to which this call adds.
    """

    def __init__(self, trails: Trails):
        self._trails = trails
        self._at: dict[str, Step[DrySource] | None] = {}
        self._begun: dict[str, dict[Step[DrySource], list[torch.Tensor]]] = {}

    def joining(self, variable: Any) -> Joining:
        """What gathers the variable's shards, in place of `joined`."""
        first = True

        def join(
            x: torch.Tensor, dim: int, sizes: tuple[int, ...], axis: DryAxis, layer: str, of: str
        ) -> torch.Tensor:
            nonlocal first
            source = DrySource(tuple(x.shape), x.dtype, dim, sizes, layer, of)
            key, early, first = (id(variable), x.dtype, dim, first), first, False
            return self._read(key, source, early, axis)

        return join

    def _read(self, key: Any, source: DrySource, early: bool, axis: DryAxis) -> torch.Tensor:
        trail = self._trails.setdefault(axis.name, Trail())
        begun = self._begun.setdefault(axis.name, {})
        step = self._at.get(axis.name, trail.start)
        if step is not None:
            step = trail.go(step, key, source, source.bytes, early)
        self._at[axis.name] = step
        parts = begun.pop(step, None) if step is not None else None
        whole = placed(parts or source.begin(axis), source.dim, source.sizes)
        del parts
        for later in step.ahead() if step is not None else ():
            if later not in begun and later.what is not None:
                begun[later] = later.what.begin(axis)
        return whole
