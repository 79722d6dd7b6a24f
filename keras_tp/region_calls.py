"""Calls of a layer, within which layers below it hand each other shards.

Each kind of call is looked at once, as it comes, by the same proof as for the plan
(`keras_tp.regions`; no communication, every rank finds the same), because a call with a mask,
a cache or another shape may run other code. What is not proven is gathered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.distributed.tensor import Shard

from keras_tp.calls import ContractionCall, ShardCall, Stage
from keras_tp.collectives import Axis
from keras_tp.copies import Readers, SharedCopies
from keras_tp.errors import LayoutWarning
from keras_tp.regions import prove
from keras_tp.rehearsal import Call, Member, Proof
from keras_tp.seam.contexts import (
    current_parts,
    drawing_parts,
    is_stateless,
    is_symbolic,
    is_training,
)
from keras_tp.seam.layers import Owner, take_any_size, variables_of, walk_layers
from keras_tp.seam.masks import keras_mask
from keras_tp.seam.trials import restored
from keras_tp.seam.variables import copied_on_read, sharding_of

P = TypeVar("P")

# Kinds of calls of a layer that are looked at. A number that counts tokens makes one of each.
MOST_KINDS = 256


class Draws:
    """See `keras_tp.seam.contexts.Parts`."""

    def __init__(self, axis: Axis, dims: Sequence[int | None]):
        self.parts, self.rank = axis.size, axis.rank
        self.dims = list(dims)

    def next_dim(self) -> int | None:
        return self.dims.pop(0)

    def skip(self, count: int) -> None:
        """Numbers were drawn in a region within."""
        del self.dims[:count]


GATHERED = "outputs are gathered that were planned to stay sharded"


class Kinds(Generic[P]):
    """What was proven of each kind of call of a layer.

    Args:
        layer: the layer.
        prove: looks at a call.
        nothing: what is known of a call that is not looked at.
    """

    def __init__(self, layer: Any, prove: Callable[[Any, Any], P], nothing: P):
        self.layer = layer
        self.prove = prove
        self.nothing = nothing
        self.proofs: dict[Any, P] = {}
        self.told = False

    def of(self, args: Any, kwargs: Any) -> P:
        """What is proven of a call."""
        kind = kind_of(args, kwargs)
        if torch.compiler.is_compiling():
            # A compiler cannot look; what was not looked at before is gathered.
            found = [proof for known, proof in self.proofs.items() if known == kind]
            return found[0] if found else self.nothing
        proof = self.proofs.get(kind)
        if proof is None and len(self.proofs) == MOST_KINDS:
            self.tell(f"it has been called in {MOST_KINDS} ways, and no more are looked at")
            return self.nothing
        if proof is None:
            proof = self.proofs[kind] = self.prove(args, kwargs)
        return proof

    def tell(self, reason: str, what: str = GATHERED) -> None:
        """Says, once, what is not as it was planned."""
        if self.told:
            return
        self.told = True
        warnings.warn(
            f"in this call of '{self.layer.path}' {what}: {reason}. The numbers are the same.",
            LayoutWarning,
            stacklevel=2,
        )


class ReadersOf:
    """Which calls share what they read, by what was proven.

    Args:
        members: layers that may.
    """

    def __init__(self, members: Sequence[tuple[Member, Stage]]):
        self.calls = {member.number: member.layer.call for member, _ in members}
        self.known: dict[Any, Readers] = {}

    def of(self, groups: tuple[tuple[int, ...], ...]) -> Readers:
        """See `keras_tp.copies.SharedCopies`.

        Args:
            groups: numbers of members; see `keras_tp.rehearsal.Proof`.
        """
        if groups not in self.known:
            calls = [tuple(self.calls[n] for n in group) for group in groups]
            able = [tuple(c for c in group if isinstance(c, ContractionCall)) for group in calls]
            self.known[groups] = {call: group for group in able for call in group}
        return self.known[groups]


class RegionCall:
    """A layer's `call`, within which `members` may hand each other shards.

    Args:
        layer: the layer.
        members: layers below it, with the stage of each along the axis.
        axis: along which they compute on shards.
    """

    style = "region"

    def __init__(self, layer: Any, members: Sequence[tuple[Member, Stage]], axis: Axis):
        self.layer = layer
        self.original = layer.call
        self.members = members
        self.axis = axis
        self.owners: list[Owner] = walk_layers(layer)
        self.variables = variables_of(self.owners)
        self.calls: list[ShardCall] = [member.layer.call for member, _ in members]
        self.readers = ReadersOf(members)
        self.kinds = Kinds(layer, self._prove, Proof())
        self.passed_over = False  # a call around it says what members do

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_symbolic() or is_stateless() or self.passed_over:
            return self.original(*args, **kwargs)
        if not all(call.as_planned for call in self.calls):  # each of them says so
            return self.original(*args, **kwargs)
        proof = self.kinds.of(args, kwargs)
        if not proof.taken:
            return self.original(*args, **kwargs)
        return self._call_open(proof, args, kwargs)

    def _call_open(self, proof: Proof, args: Any, kwargs: Any) -> Any:
        copies = SharedCopies(self.axis, self.readers.of(proof.readers))
        divided = [(vars(self.owners[n].layer), name, value) for n, name, value in proof.divided]
        before = [attributes[name] for attributes, name, _ in divided]
        summed = [self.variables[n] for n in proof.summed]
        for member, stage in self.members:
            stage.open(copies, member.number in proof.taken, member.number in proof.handed)
        for attributes, name, value in divided:
            attributes[name] = value
        try:
            if not summed and all(dim is None for dim in proof.draws):
                return self.original(*args, **kwargs)
            around, draws = current_parts(), Draws(self.axis, proof.draws)
            with drawing_parts(draws), copied_on_read(summed, copies.of):
                result = self.original(*args, **kwargs)
            if around is not None:
                around.skip(len(proof.draws))
            return result
        finally:
            for _, stage in self.members:
                stage.close()
            for (attributes, name, _), value in zip(divided, before, strict=True):
                attributes[name] = value

    def _prove(self, args: Any, kwargs: Any) -> Proof:
        cut = frozenset(id(v) for v in self.variables if sharding_of(v) is not None)
        members = [member for member, _ in self.members]
        call = Call(self.owners, self.original, args, kwargs, members, self.axis.size, cut)
        with restored(self.owners, trained=False):
            proof = prove(call)
        paths = {m.number: m.layer.path for m, stage in self.members if stage.plan.kept}
        refused = [(paths[n], reason) for n, reason in proof.refused if n in paths]
        if refused:
            self.kinds.tell("; ".join(f"'{path}': {reason}" for path, reason in refused))
        return proof


def kind_of(args: Any, kwargs: Any) -> Any:
    """What may decide which way the code goes, or what it gives; but for values of tensors."""
    names = tuple(kwargs)
    return tuple(map(_kind, args)), names, tuple(map(_kind, kwargs.values())), is_training()


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        mask = keras_mask(value)
        kind = tuple(value.shape), str(value.dtype)
        return kind if mask is None else (*kind, tuple(mask.shape), str(mask.dtype))
    if isinstance(value, np.ndarray):
        return tuple(value.shape), "array"
    if isinstance(value, tuple | list):
        return "list", tuple(map(_kind, value))
    if isinstance(value, dict):
        return "dict", tuple((name, _kind(entry)) for name, entry in value.items())
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return type(value).__name__, id(value)


def share_region(layer: Any, members: Sequence[Member], axis: Axis) -> None:
    """Has layers below `layer` hand each other shards, where that is proven, when it is called.

    Args:
        layer: the layer above.
        members: of the layers below, which compute on shards along the axis already.
        axis: the axis.
    """
    layer.call = RegionCall(layer, with_stages(members, axis), axis)


def with_stages(members: Sequence[Member], axis: Axis) -> list[tuple[Member, Stage]]:
    """Layers that compute on shards along an axis, each with what it does along it."""
    staged = []
    for member in members:
        assert isinstance(member.layer.call, ShardCall), member.layer.path
        stages = member.layer.call.stages
        if isinstance(member.style.input, Shard):
            take_any_size(member.layer)
        staged.append((member, next(s for s in stages if s.axis.name == axis.name)))
    return staged
