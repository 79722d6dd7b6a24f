"""A model's call on shards of the sequence, without values; see `keras_tp.sequence_calls`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from keras_tp.dry_calls import DryAsIs, DryCopies, DryRegionCall, DryStage
from keras_tp.dry_collectives import DryAxis, cut, gather, gather_weight
from keras_tp.dry_drops import DryParts
from keras_tp.dry_replicas import DryBuckets
from keras_tp.dry_weights import DryWeights
from keras_tp.gates import CUT, SEQUENCE, SUM, Gates, gated
from keras_tp.plans import Plan
from keras_tp.seam.contexts import current_parts, drawing_parts
from keras_tp.seam.layers import Owner, variables_of
from keras_tp.sequences import SequenceProof, prove_sequence
from keras_tp.stretches import outer_call


class DrySequenceCall:
    """See `keras_tp.sequence_calls.SequenceCall`.

    Args:
        original: the model's call without.
        owners: the model and all layers below it.
        plan: the plan.
        axis: along which the sequence is shared out.
        stages: what layers do along it, by number.
        inner: calls within which layers hand each other shards of features.
        weights: what the rank stores.
    """

    def __init__(
        self,
        original: Callable[..., Any],
        owners: Sequence[Owner],
        plan: Plan,
        axis: DryAxis,
        stages: Mapping[int, DryStage],
        inner: Sequence[DryRegionCall],
        weights: DryWeights,
    ):
        self.original, self.owners, self.axis = original, owners, axis
        self.stages, self.inner, self.weights = stages, inner, weights
        self.outer = outer_call(owners, plan.layers, plan.regions, axis.name, axis.size)
        self.variables = variables_of(owners)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ledger = self.weights.ledger
        if ledger.resting:
            return self.original(*args, **kwargs)
        sharded = frozenset(id(v) for v in self.variables if self.weights.cuts(v))
        ledger.resting = True
        try:
            proof = prove_sequence(self.outer(self.original, args, kwargs, sharded))
        finally:
            ledger.resting = False
        if proof.reason:
            return self.original(*args, **kwargs)
        with self._open(proof):
            gates = Gates(proof.passages, self._convert)
            numbers = gated(proof.passages)
            original = gates.around(0, self.original) if 0 in numbers else self.original
            with gates.open([(n, self.owners[n].layer) for n in numbers if n]):
                return original(*args, **kwargs)

    @contextlib.contextmanager
    def _open(self, proof: SequenceProof) -> Iterator[None]:
        inner, copies, as_is = proof.inner, DryCopies(self.axis), DryAsIs(self.axis)
        for number, stage in self.stages.items():
            stage.copies = as_is if number in proof.gathered else copies
            stage.scattered = number in proof.scattered
        for call in self.inner:
            call.passed_over = True
        divided = [(vars(self.owners[n].layer), name, value) for n, name, value in inner.divided]
        before = [(attributes, name, attributes[name]) for attributes, name, _ in divided]
        for attributes, name, value in divided:
            attributes[name] = value
        weights = [self.variables[n] for n in sorted(inner.summed)]
        own = [self.weights.own(v) for v in weights]
        buckets = DryBuckets(own, self.axis, self.owners[0].path)

        def copied(stored: torch.Tensor, layer: str, of: str) -> torch.Tensor:
            return buckets.read(stored)

        around, parts = current_parts(), DryParts(self.axis.size, self.axis.rank, inner.draws)
        try:
            with drawing_parts(parts), self.weights.copied_on_read(weights, copied):
                yield
            if around is not None:
                around.skip(len(inner.draws))
        finally:
            for stage in self.stages.values():
                stage.copies, stage.scattered = None, False
            for call in self.inner:
                call.passed_over = False
            for attributes, name, value in before:
                attributes[name] = value

    def _convert(self, what: str, x: torch.Tensor, layer: int) -> torch.Tensor:
        path, of = self.owners[layer].path, "tokens"
        if what == CUT:
            return cut(x, SEQUENCE, self.axis, path, f"{of} gradient")
        join = gather_weight if what == SUM else gather
        total = x.shape[SEQUENCE] * self.axis.size
        return join(x, SEQUENCE, total, self.axis, path, of)
