"""One training step of one rank without values: what it would send, keep and compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import torch

from keras_tp.costs import Slots
from keras_tp.dry_calls import DryGatheredCall, DryRegionCall, DryShardCall
from keras_tp.dry_collectives import DryAxis
from keras_tp.dry_drops import DryDrops
from keras_tp.dry_prefetch import DryReads, Trails
from keras_tp.dry_rows import DryRowsCall, DryWholeRowsCall, Named
from keras_tp.dry_sequences import DrySequenceCall
from keras_tp.dry_weights import DryWeights
from keras_tp.handovers import members_along
from keras_tp.ledger import Ledger, Traffic
from keras_tp.live_bytes import FusedAttention, LiveBytes
from keras_tp.optimizers import inner_optimizers, updates_elementwise
from keras_tp.outputs import is_sharded, part_of
from keras_tp.plans import Plan
from keras_tp.seam.layers import Owner, variables_of, walk_layers
from keras_tp.seam.metrics import metrics_in_training
from keras_tp.seam.rehearsals import rehearsal
from keras_tp.seam.rows import share_statistics
from keras_tp.seam.steps import (
    batch_without_values,
    like_without_values,
    loss_in_training,
    outputs_in_training,
    own_loss,
)
from keras_tp.seam.trials import restored

Call = Callable[..., Any]


@dataclass(frozen=True)
class Found:
    """What a step of one rank would do.

    Attributes:
        traffic: what it would send.
        activations: bytes alive at most in forward, backward and metrics, besides parameters
            and a gradient of each.
        flops: floating-point operations of these.
        shared: whether replicas share out the rows.
        uncounted: names of metrics that need values, and what each fails with without them.
    """

    traffic: tuple[Traffic, ...]
    activations: int
    flops: int
    shared: bool
    uncounted: dict[str, Exception]


class DryStep:
    """A training step of one rank.

    Args:
        plan: the plan.
        model: the model it was made for.
        rank: the rank.
        trails: what another such step has gathered; None if there was none.
    """

    def __init__(self, plan: Plan, model: Any, rank: int, trails: Trails | None = None):
        self.plan, self.model, self.rank = plan, model, rank
        self.known, self.trails = trails is not None, trails or {}
        self.owners = walk_layers(model)
        self.variables = variables_of(self.owners)
        self.ledger = Ledger()
        where = zip(plan.mesh.axes, plan.mesh.sizes, plan.mesh.coordinates(rank), strict=True)
        self.axes = {
            name: DryAxis(name, size, at, self.ledger) for name, size, at in where if size > 1
        }
        path_of = {id(v): owner.path for owner in reversed(self.owners) for v in owner.variables}
        paths = [path_of[id(v)] for v in self.variables]
        self.weights = DryWeights(plan, self.variables, paths, self.axes, rank, self.ledger)

    def run(
        self, batch: Any, targets: Any, slots: Slots | None, sample_weight: Any = None
    ) -> Found:
        """Makes the step; the model is as before.

        Args:
            batch: shapes or arrays, as `keras_tp.prices.price` takes them.
            targets: the same of targets; with None there are no loss and no metrics.
            slots: what the optimizer keeps; None where there is no optimizer.
            sample_weight: as targets, of what weighs them.
        """
        found = self._run(batch, targets, slots, sample_weight)
        if self.known or not self.trails:
            return found
        # Now it is known what is gathered after what, and with it what is begun ahead.
        again = DryStep(self.plan, self.model, self.rank, self.trails)
        return again.run(batch, targets, slots, sample_weight)

    def _run(self, batch: Any, targets: Any, slots: Slots | None, sample_weight: Any) -> Found:
        calls, rows_call = self._calls()
        attributes = [] if targets is None else own_loss(self.model)
        open_rehearsal = rehearsal(
            self.owners,
            calls=[(owner.layer, calls[id(owner.layer)]) for owner in self._called(calls)],
            attributes=attributes,
            watch=DryDrops(),
            read=self.weights.read,
        )
        known = self.weights.tensors
        live = LiveBytes(known, self.ledger)
        with restored(self.owners, trained=False), open_rehearsal as losses:
            for owner, layer in zip(self.owners, self.plan.layers, strict=True):
                if layer.rows == "statistics":
                    share_statistics(owner.layer)
            if rows_call is not None:
                rows_call.losses = losses
            with live, FusedAttention():
                uncounted = self._step(batch, targets, sample_weight, losses)
        self._update(slots)
        kept = sum(t.nbytes for t in known) + sum(t.nbytes for t in self.weights.trained)
        return Found(
            self.ledger.traffic(),
            live.peak - kept,
            live.flops,
            rows_call is not None and rows_call.shared,
            uncounted,
        )

    def _step(
        self, batch: Any, targets: Any, sample_weight: Any, losses: list[torch.Tensor]
    ) -> dict[str, Exception]:
        """All but the update; gives what could not be counted of metrics."""
        x = batch_without_values(self.model, batch)
        y, weights = (
            None if n is None else like_without_values(n) for n in (targets, sample_weight)
        )
        # Those of the step before, of which Keras lets go only here.
        gradients = [torch.empty_like(tensor) for tensor in self.weights.trained]
        with self.weights.followed_by(DryReads(self.trails)):
            outputs = outputs_in_training(self.model, x)
        del gradients
        if y is None:
            heads = [part_of(t) for t in keras.tree.flatten(outputs) if _has_gradient(t)]
            heads += [loss for loss in losses if _has_gradient(loss)]
            seeds = [torch.empty_like(head) for head in heads]
        else:
            heads = [loss_in_training(self.model, x, y, outputs, weights)]
            seeds = [None]  # type: ignore[list-item]
        self.ledger.phase = "backward"
        if heads and any(head.requires_grad for head in heads):
            torch.autograd.backward(heads, seeds)
        if y is None:
            return {}
        self.ledger.phase = "metrics"  # (after the update, which is written down at the end)
        return metrics_in_training(self.model, x, y, outputs, weights, _has_shard)

    def _called(self, calls: dict[int, Call]) -> list[Owner]:
        return [owner for owner in self.owners if id(owner.layer) in calls]

    def _calls(self) -> tuple[dict[int, Call], DryRowsCall | None]:
        """What takes the place of layers' calls, put on in the order of `keras_tp.wrapper`."""
        calls: dict[int, Call] = {}
        plan, axes, weights = self.plan, self.axes, self.weights
        sharded: dict[int, DryShardCall] = {}
        for number, (owner, layer) in enumerate(zip(self.owners, plan.layers, strict=True)):
            computing = [style for style in layer.styles if style.name != "gathered"]
            if layer.computation is not None and computing:
                sharded[number] = DryShardCall(owner, layer, axes, weights)
                calls[id(owner.layer)] = sharded[number]
            if layer.gathers:
                held = [self.variables[i] for i in layer.gathers]
                original = calls.get(id(owner.layer), owner.layer.call)
                calls[id(owner.layer)] = DryGatheredCall(original, held, weights)
        for region in plan.regions:
            above = self.owners[region.layer]
            stages = [
                stage
                for number in region.members
                for stage in sharded[number].stages
                if stage.axis.name == region.axis
            ]
            calls[id(above.layer)] = DryRegionCall(
                calls.get(id(above.layer), above.layer.call),
                region,
                axes[region.axis],
                walk_layers(above.layer),
                [
                    member
                    for member in members_along(region.axis, self.owners, plan.layers)
                    if member.number in region.members
                ],
                stages,
                [self.variables[i] for i in region.summed],
                weights,
            )
        if plan.sequence is not None:
            along = axes[plan.sequence.axis]
            inner = [calls[id(self.owners[r.layer].layer)] for r in plan.regions]
            calls[id(self.model)] = DrySequenceCall(
                calls.get(id(self.model), self.model.call),
                self.owners,
                plan,
                along,
                {n: s for n, call in sharded.items() for s in call.stages if s.axis is along},
                [c for c in inner if isinstance(c, DryRegionCall) and c.axis is along],
                weights,
            )
        if plan.batch_axis is None:
            return calls, None
        rows_call = DryRowsCall(
            calls.get(id(self.model), self.model.call), axes[plan.batch_axis], self.path, weights
        )
        for owner, layer in zip(self.owners, plan.layers, strict=True):
            original = calls.get(id(owner.layer), owner.layer.call)
            if layer.rows == "all":
                original = DryWholeRowsCall(original, owner.path, rows_call)
            if layer.rows != "own":
                calls[id(owner.layer)] = Named(original, owner.path, self.ledger)
        calls[id(self.model)] = rows_call
        return calls, rows_call

    @property
    def path(self) -> str:
        """Of the model."""
        return self.owners[0].path

    def _update(self, slots: Slots | None) -> None:
        """What the optimizer would send."""
        self.ledger.phase = "optimizer"
        optimizer = getattr(self.model, "optimizer", None)
        trained = [
            (number, variable)
            for number, (variable, planned) in enumerate(
                zip(self.variables, self.plan.variables, strict=True)
            )
            if planned.trainable and self.weights.cuts(variable)
        ]
        if optimizer is None or not trained:
            return
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            self._note_sum("whether gradients are finite", 4)
        inner = inner_optimizers(optimizer)
        updating = inner or [optimizer]
        for each in updating[:1]:  # of several it is not known which updates what
            if max(each.clipnorm or 0, each.global_clipnorm or 0) > 0:
                self._note_sum("norms of gradients", 8 * len(trained))
            if not updates_elementwise(each):
                for number, variable in trained:
                    kept = 0 if slots is None else slots.counts[number]
                    for of in (" gradient", "", *[" slot"] * kept):
                        self.weights.gather_for_update(variable, of)

    def _note_sum(self, of: str, size: int) -> None:
        ranks = self.plan.mesh.size
        self.ledger.note("all_reduce", "all", ranks, self.path, of, size)


def _has_shard(nest: Any) -> bool:
    return any(is_sharded(leaf) for leaf in keras.tree.flatten(nest))


def _has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def layers_named(owners: Sequence[Owner], wanted: Callable[[Any], bool]) -> list[str]:
    """Paths of the layers that are so."""
    return [owner.path for owner in owners if wanted(owner.layer)]
