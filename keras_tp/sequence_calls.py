"""Calls of a model, stretches of which are computed on shards of the sequence.

Each kind of call is looked at once, as it comes (`keras_tp.sequences`; no communication, every
rank finds the same). One that cannot be computed so is computed as it would be without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from keras_tp.buckets import Buckets, summed
from keras_tp.calls import ShardCall, Stage
from keras_tp.collectives import Axis, cut, gather
from keras_tp.copies import AsIs, SharedCopies
from keras_tp.gates import CUT, SEQUENCE, SUM, Gates, gated
from keras_tp.handovers import members_along
from keras_tp.plans import Plan
from keras_tp.region_calls import Draws, Kinds, ReadersOf, RegionCall, with_stages
from keras_tp.rehearsal import Member
from keras_tp.row_collectives import gather_weight
from keras_tp.seam.contexts import (
    current_parts,
    current_replicas,
    drawing_parts,
    is_stateless,
    is_symbolic,
)
from keras_tp.seam.layers import Owner, variables_of
from keras_tp.seam.trials import restored
from keras_tp.seam.variables import copied_on_read, local_tensor, sharding_of
from keras_tp.sequences import SequenceProof, prove_sequence
from keras_tp.stretches import outer_call

INSTEAD = "tokens are not shared out as was planned"


class SequenceCall:
    """A model's `call`, in which layers hand each other shards of the sequence.

    Args:
        owners: the model and all layers below it.
        plan: what is computed on shards of features.
        members: layers that are, with the stage of each along the axis.
        axis: the axis.
    """

    style = "sequence"

    def __init__(
        self,
        owners: Sequence[Owner],
        plan: Plan,
        members: Sequence[tuple[Member, Stage]],
        axis: Axis,
    ):
        self.layer = owners[0].layer
        self.original = self.layer.call
        self.owners = owners
        self.members = members
        self.axis = axis
        self.outer = outer_call(owners, plan.layers, plan.regions, axis.name, axis.size)
        self.variables = variables_of(owners)
        self.calls: list[ShardCall] = [member.layer.call for member, _ in members]
        inner = [owners[region.layer].layer.call for region in plan.regions]
        self.inner = [c for c in inner if isinstance(c, RegionCall) and c.axis.name == axis.name]
        self.readers = ReadersOf(members)
        self.kinds = Kinds(self.layer, self._prove, SequenceProof(reason="it is not looked at"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_symbolic() or is_stateless() or not all(call.as_planned for call in self.calls):
            return self.original(*args, **kwargs)
        if torch.compiler.is_compiling():  # gates are put up anew in each call
            return self.original(*args, **kwargs)
        if getattr(self.layer, "jit_compile", False):  # so is the call before the compiled ones
            self.kinds.tell("its step is compiled", INSTEAD)
            return self.original(*args, **kwargs)
        proof = self.kinds.of(args, kwargs)
        if proof.reason:
            return self.original(*args, **kwargs)
        with self._open(proof):
            gates = Gates(proof.passages, self._convert)
            layers = [(n, self.owners[n].layer) for n in gated(proof.passages) if n]
            original = gates.around(0, self.original) if _at_the_ends(proof) else self.original
            with gates.open(layers):
                return original(*args, **kwargs)

    @contextlib.contextmanager
    def _open(self, proof: SequenceProof) -> Iterator[None]:
        inner = proof.inner
        copies = SharedCopies(self.axis, self.readers.of(inner.readers))
        divided = [(vars(self.owners[n].layer), name, value) for n, name, value in inner.divided]
        before = [attributes[name] for attributes, name, _ in divided]
        for member, stage in self.members:
            number = member.number
            read = AsIs(self.axis) if number in proof.gathered else copies
            given, kept = number in inner.taken, number in inner.handed
            stage.open(read, given, kept, number in proof.scattered)
        for call in self.inner:
            call.passed_over = True
        for attributes, name, value in divided:
            attributes[name] = value
        around = current_parts()
        weights = [self.variables[n] for n in sorted(inner.summed)]
        try:
            with drawing_parts(Draws(self.axis, inner.draws)), self._summing(weights):
                yield
            if around is not None:
                around.skip(len(inner.draws))
        finally:
            for _, stage in self.members:
                stage.close()
            for call in self.inner:
                call.passed_over = False
            for (attributes, name, _), value in zip(divided, before, strict=True):
                attributes[name] = value

    def _summing(self, weights: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
        """While open, the gradients of weights, which are whole, are summed."""
        replicas: Any = current_replicas()
        own = [local_tensor(v) if replicas is None else replicas.own(v) for v in weights]
        buckets = Buckets(own, self.axis)

        def copied(weight: torch.Tensor) -> torch.Tensor:
            return summed(weight, self.axis, buckets)

        return copied_on_read(weights, copied)

    def _convert(self, what: str, x: torch.Tensor, layer: int) -> torch.Tensor:
        if what == CUT:
            return cut(x, SEQUENCE, self.axis)
        join = gather_weight if what == SUM else gather
        return join(x, SEQUENCE, x.shape[SEQUENCE] * self.axis.size, self.axis)

    def _prove(self, args: Any, kwargs: Any) -> SequenceProof:
        sharded = frozenset(id(v) for v in self.variables if sharding_of(v) is not None)
        with restored(self.owners, trained=False):
            proof = prove_sequence(self.outer(self.original, args, kwargs, sharded))
        if proof.reason:
            self.kinds.tell(proof.reason, INSTEAD)
        return proof


def _at_the_ends(proof: SequenceProof) -> bool:
    return 0 in gated(proof.passages)


def share_sequence(owners: Sequence[Owner], plan: Plan, axis: Axis) -> None:
    """Has a model compute on shards of the sequence, where that is proven, when it is called.

    Args:
        owners: the model and all layers below it, of which some compute on shards already.
        plan: the plan.
        axis: the axis.
    """
    members = members_along(axis.name, owners, plan.layers, lookups=True)
    owners[0].layer.call = SequenceCall(owners, plan, with_stages(members, axis), axis)
