"""Replicas during one call of a model without values: see `keras_tp.replicas`."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

import torch

from keras_tp.dry_collectives import DryAxis, copy, gather_rows, reduce, split_rows
from keras_tp.places import FIRST, SIZE, Bucket, Place, places


class DryReplicas:
    """What `keras_tp.seam.contexts.Replicas` asks for.

    Args:
        along: the axis along which they stand.
        counts: rows of each.
        model: path of the model.
        local: what the rank stores of a variable.
        is_cut: whether a variable is cut along the axis.
        whole: what the rank stores of the variables that are not.
    """

    def __init__(
        self,
        along: DryAxis,
        counts: tuple[int, ...],
        model: str,
        local: Callable[[Any], torch.Tensor],
        is_cut: Callable[[Any], bool],
        whole: Sequence[torch.Tensor],
    ):
        self.training = True
        self.fixed: Set[tuple[int, ...]] = frozenset()
        self.alike: list[torch.Tensor] = []
        self.along = along
        self.counts = counts
        self.model = model
        self.axis = along.name
        self.rows = counts[along.rank]
        self.total = sum(counts)
        self._local = local
        self._is_cut = is_cut
        self._buckets = DryBuckets(whole, along, model)

    def own(self, variable: Any) -> torch.Tensor:
        stored = self._local(variable)
        if not (torch.is_grad_enabled() and stored.requires_grad) or self._is_cut(variable):
            return stored
        return self._buckets.read(stored)

    def renew(self, variable: Any) -> None:
        raise AssertionError(f"{variable} is assigned to; without values nothing is")

    @property
    def _layer(self) -> str:
        return self.along.ledger.layer or self.model

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        summed = reduce(x, self.along, layer, "statistics")
        return copy(summed, self.along, layer, "statistics")

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return reduce(x * (self.rows / self.total), self.along, self.model, "losses of layers")

    def gather(self, x: torch.Tensor, of: str = "rows") -> torch.Tensor:
        return gather_rows(x, self.counts, self.along, self._layer, of)

    def take(self, x: torch.Tensor, of: str = "gradient of rows") -> torch.Tensor:
        return split_rows(x, self.counts, self.along, self._layer, of)


class DryBuckets:
    """The gradient buckets of one call of a model; see `keras_tp.buckets`."""

    def __init__(self, parameters: Sequence[torch.Tensor], axis: DryAxis, model: str):
        self._wanted = [p for p in parameters if p.requires_grad]
        self._axis = axis
        self._model = model
        self._read: dict[int, torch.Tensor] = {}
        self._views: dict[int, tuple[int, torch.Tensor]] = {}

    def read(self, parameter: torch.Tensor) -> torch.Tensor:
        if not self._views:
            where, buckets = places(self._wanted, FIRST, SIZE)
            self._pass = _Pass(where, buckets, self._axis, self._model)
            views = _Finish.apply(self._pass, *self._wanted)
            self._views = {
                id(p): (i, view)
                for i, (p, view) in enumerate(zip(self._wanted, views, strict=True))
            }
        if id(parameter) not in self._read:
            number, view = self._views[id(parameter)]
            self._read[id(parameter)] = _Arrive.apply(view, self._pass, number)
        return self._read[id(parameter)]


class _Pass:
    def __init__(self, where: list[Place], buckets: list[Bucket], axis: DryAxis, model: str):
        self.where, self.buckets = where, buckets
        self.axis, self.model = axis, model
        self.flats: dict[int, torch.Tensor] = {}
        self.arrived: set[int] = set()

    def flat(self, index: int) -> torch.Tensor:
        if index not in self.flats:
            self.flats[index] = self.buckets[index].empty()
        return self.flats[index]

    def add(self, number: int) -> None:
        self.flat(self.where[number].bucket)
        self.arrived.add(number)

    def finish(self) -> list[torch.Tensor | None]:
        for index in range(len(self.buckets)):
            size = self.flat(index).nbytes
            self.axis.note("all_reduce", self.model, "gradients, in buckets", size)
        flats, self.flats = self.flats, {}
        return [
            place.within(flats[place.bucket]) if number in self.arrived else None
            for number, place in enumerate(self.where)
        ]


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: _Pass, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.made = made
        ctx.set_materialize_grads(False)
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return None, *ctx.made.finish()


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, view: torch.Tensor, made: _Pass, number: int) -> torch.Tensor:
        ctx.made, ctx.number = made, number
        ctx.set_materialize_grads(False)
        return view.view_as(view)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        if grad is not None:
            ctx.made.add(ctx.number)
        return None, None, None
