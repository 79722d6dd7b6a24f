"""What one rank stores of a planned model's variables, without values, and how it is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import Shard

from keras_tp.dry_collectives import DryAxis, gather, gather_weight, joined
from keras_tp.dry_prefetch import DryReads
from keras_tp.dry_replicas import DryReplicas
from keras_tp.ledger import Ledger
from keras_tp.plans import Plan, VariablePlan
from keras_tp.seam.contexts import current_replicas
from keras_tp.seam.rehearsals import as_layers_see, weight_without_values

Copied = Callable[[torch.Tensor, str, str], torch.Tensor]


class DryWeights:
    """The variables of a plan as one rank has them.

    Args:
        plan: the plan.
        variables: those of the model, in the plan's order.
        layers: of each, path of the layer that owns it.
        axes: of more than one rank, as the rank sees them.
        rank: the rank.
        ledger: where what is sent is written down.
    """

    def __init__(
        self,
        plan: Plan,
        variables: Sequence[Any],
        layers: Sequence[str],
        axes: dict[str, DryAxis],
        rank: int,
        ledger: Ledger,
    ):
        self.ledger = ledger
        self._plans: dict[int, VariablePlan] = {}
        self._tensors: dict[int, torch.Tensor] = {}
        self._layers: dict[int, str] = {}
        self._axes = axes
        self._gathered: dict[int, dict[Any, torch.Tensor]] = {}
        self._copied: dict[int, Copied] = {}
        self._reads: DryReads | None = None
        for variable, planned, layer in zip(variables, plan.variables, layers, strict=True):
            dtype = weight_without_values(variable).dtype
            tensor = torch.empty(planned.local_shape(rank), dtype=dtype, device="meta")
            tensor.requires_grad_(planned.trainable and dtype.is_floating_point)
            self._plans[id(variable)] = planned
            self._tensors[id(variable)] = tensor
            self._layers[id(variable)] = layer

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the rank stores."""
        return list(self._tensors.values())

    @property
    def trained(self) -> list[torch.Tensor]:
        """What of it gets a gradient."""
        return [tensor for tensor in self.tensors if tensor.requires_grad]

    def cuts(self, variable: Any) -> list[tuple[DryAxis, int]]:
        """Axes along which the rank stores a part, with the dim."""
        placements = zip(
            self._plans[id(variable)].mesh.axes, self._plans[id(variable)].placements, strict=True
        )
        return [
            (self._axes[name], placement.dim)
            for name, placement in placements
            if isinstance(placement, Shard) and name in self._axes
        ]

    def own(self, variable: Any) -> torch.Tensor:
        """What the rank stores of a variable, for use on its rows where replicas compute."""
        replicas: Any = current_replicas()
        stored: torch.Tensor = self._tensors[id(variable)]
        return stored if replicas is None else replicas.own(variable)

    def read(self, variable: Any, keep: Collection[str] = ()) -> Any:
        """What layers see: the full value, but along the axes of `keep`; None if it is unknown."""
        if id(variable) not in self._tensors:
            return None
        stored = self.own(variable)
        cuts = self.cuts(variable)
        if not cuts:
            copied = self._copied.get(id(variable))
            if copied is not None and stored.requires_grad:
                name = f"{self._name(variable)} gradient"
                stored = copied(stored, self._layers[id(variable)], name)
            return as_layers_see(variable, stored)
        local = as_layers_see(variable, stored)
        known = self._gathered.get(id(variable))
        if known is None or keep:
            return self._full(variable, local, keep)
        kind = local.dtype, torch.is_grad_enabled()
        if kind not in known:
            known[kind] = self._full(variable, local, ())
        return known[kind]

    def _full(self, variable: Any, local: torch.Tensor, keep: Collection[str]) -> torch.Tensor:
        replicas: Any = current_replicas()
        shape, layer = self._plans[id(variable)].shape, self._layers[id(variable)]
        name, joining = self._name(variable), joined
        if self._reads is not None:
            joining = self._reads.joining(variable)
        for axis, dim in self.cuts(variable):
            if replicas is not None and axis.name == replicas.axis:
                local = gather_weight(local, dim, shape[dim], axis, layer, name, joining)
            elif axis.name not in keep:
                local = gather(local, dim, shape[dim], axis, layer, name, joining)
        return local

    def _name(self, variable: Any) -> str:
        return self._plans[id(variable)].path.rpartition("/")[2]

    def gather_for_update(self, variable: Any, of: str) -> None:
        """Writes down what it takes to join a tensor that lies as this variable does."""
        with torch.no_grad():
            local, shape = self._tensors[id(variable)], self._plans[id(variable)].shape
            layer, name = self._layers[id(variable)], self._name(variable)
            for axis, dim in self.cuts(variable):
                local = gather(local, dim, shape[dim], axis, layer, f"{name}{of}")

    @contextlib.contextmanager
    def followed_by(self, reads: DryReads) -> Iterator[None]:
        """While open, `reads` gathers what layers read."""
        self._reads = reads
        try:
            yield
        finally:
            self._reads = None

    @contextlib.contextmanager
    def gathered_once(self, variables: Iterable[Any]) -> Iterator[None]:
        """While open, each of `variables` is gathered at its first read and at no other."""
        opened = [v for v in variables if id(v) not in self._gathered]
        self._gathered |= {id(v): {} for v in opened}
        try:
            yield
        finally:
            for variable in opened:
                del self._gathered[id(variable)]

    @contextlib.contextmanager
    def copied_on_read(self, variables: Sequence[Any], copied: Copied) -> Iterator[None]:
        """While open, what is read of these variables, which are whole, is `copied`."""
        before = dict(self._copied)
        self._copied |= {id(v): copied for v in variables}
        try:
            yield
        finally:
            self._copied = before

    def replicas(self, axis: DryAxis, counts: tuple[int, ...], model: str) -> DryReplicas:
        """Replicas along an axis, which compute so many rows each."""
        cut = {
            key: any(name == axis.name for name in planned.layout)
            for key, planned in self._plans.items()
        }
        whole = [tensor for key, tensor in self._tensors.items() if not cut[key]]
        return DryReplicas(
            axis,
            counts,
            model,
            lambda variable: self._tensors[id(variable)],
            lambda variable: cut[id(variable)],
            whole,
        )
