"""What takes the place of layers' calls while a planned model is called without values.

Each does on tensors of one rank's shapes what its like in `keras_tp.calls` and
`keras_tp.region_calls` does with values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import torch
from keras import ops
from torch.distributed.tensor import Partial, Shard

from keras_tp.computations import Contraction, Lookup
from keras_tp.dry_collectives import DryAxis, DryMeeting, copy, gather, reduce_own, scatter, split
from keras_tp.dry_drops import DryParts
from keras_tp.dry_weights import DryWeights
from keras_tp.gates import SEQUENCE
from keras_tp.heads import is_reverse, logits_of
from keras_tp.outputs import ShardedOutput
from keras_tp.plans import LayerPlan, Region, StylePlan
from keras_tp.regions import prove
from keras_tp.rehearsal import Call as ShownCall
from keras_tp.rehearsal import Member
from keras_tp.rules import bias_dim
from keras_tp.seam.contexts import current_parts, drawing_parts
from keras_tp.seam.layers import Owner, variables_of
from keras_tp.seam.masks import masked

Call = Callable[..., Any]


@dataclass
class DryStage:
    """What a style does along one axis; see `keras_tp.calls.Stage`."""

    plan: StylePlan
    axis: DryAxis
    copies: DryCopies | None = None
    scattered: bool = False

    @property
    def given(self) -> bool:
        return self.copies is not None and self.plan.given

    @property
    def kept(self) -> bool:
        return self.copies is not None and self.plan.kept


@dataclass
class DryCopies:
    """See `keras_tp.copies.SharedCopies`."""

    axis: DryAxis
    made: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def of(self, x: torch.Tensor, layer: str, of: str) -> torch.Tensor:
        for source, made in self.made:
            if source is x:
                return made
        made = copy(x, self.axis, layer, of)
        self.made.append((x, made))
        return made


class DryAsIs(DryCopies):
    """See `keras_tp.copies.AsIs`."""

    def of(self, x: torch.Tensor, layer: str, of: str) -> torch.Tensor:
        return x


class DryShardCall:
    """The call of a layer that computes on shards; see `keras_tp.calls.ShardCall`."""

    def __init__(
        self, owner: Owner, plan: LayerPlan, axes: dict[str, DryAxis], weights: DryWeights
    ):
        self.layer = owner.layer
        self.original = owner.layer.call
        self.ledger = weights.ledger
        self.path = plan.path
        assert plan.computation is not None
        self.computation = plan.computation
        self.variables = {name: getattr(owner.layer, name) for name in plan.computation.weights}
        self.stages = [DryStage(s, axes[s.axis]) for s in plan.styles if s.name != "gathered"]
        self.weights = weights

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.ledger.resting:
            return self.original(inputs, *args, **kwargs)
        if isinstance(self.computation, Contraction):
            return self._contract(inputs, self.computation)
        if is_reverse(args, kwargs) and self.computation.reverse:
            return self._reverse(inputs, self.computation.reverse)
        return self._look_up(inputs)

    def _read(self, name: str) -> torch.Tensor:
        keep = {stage.axis.name for stage in self.stages if name in stage.plan.local}
        return self.weights.read(self.variables[name], keep)

    def _enter(self, stage: DryStage, x: torch.Tensor) -> torch.Tensor:
        if isinstance(stage.plan.input, Shard):
            if stage.given:
                return x
            return split(x, stage.plan.input.dim, stage.axis, self.path, "input gradient")
        if stage.copies is not None:
            return stage.copies.of(x, self.path, "input gradient")
        return copy(x, stage.axis, self.path, "input gradient")

    def _combine(self, stage: DryStage, y: torch.Tensor) -> torch.Tensor:
        if stage.scattered:
            return scatter(y, SEQUENCE, stage.axis, self.path, "output")
        if isinstance(stage.plan.output, Partial):
            return reduce_own(y, stage.axis, self.path, "output")
        return y

    def _leave(self, stage: DryStage, y: torch.Tensor) -> torch.Tensor:
        if isinstance(stage.plan.output, Shard) and not stage.kept:
            return self._join(stage, y, stage.plan.output.dim, "output")
        return y

    def _join(self, stage: DryStage, y: torch.Tensor, dim: int, of: str) -> torch.Tensor:
        if stage.plan.open:
            return ShardedOutput.of(y, dim % y.dim(), DryMeeting(stage.axis, self.path))
        return gather(y, dim, stage.plan.size, stage.axis, self.path, of)

    def _contract(self, x: torch.Tensor, computation: Contraction) -> torch.Tensor:
        for stage in self.stages:
            x = self._enter(stage, x)
        kernel, equation = self._read("kernel"), computation.equation
        y = ops.einsum(equation, x, kernel) if equation else ops.matmul(x, kernel)
        for stage in self.stages:
            y = self._combine(stage, y)
        for stage in self.stages:
            if "bias" not in stage.plan.local:
                y = self._leave(stage, y)
        if "bias" in self.variables:
            y = ops.add(y, self._bias(computation))
        for stage in self.stages:
            if "bias" in stage.plan.local:
                y = self._leave(stage, y)
        return y if self.layer.activation is None else self.layer.activation(y)

    def _bias(self, computation: Contraction) -> torch.Tensor:
        bias = self._read("bias")
        for stage in self.stages:
            if stage.kept and "bias" not in stage.plan.local:
                dim = bias_dim(stage.plan, computation, tuple(bias.shape))
                if dim is None:
                    bias = copy(bias, stage.axis, self.path, "bias gradient")
                else:
                    bias = split(bias, dim, stage.axis, self.path, "bias gradient")
        return bias

    def _look_up(self, inputs: torch.Tensor) -> torch.Tensor:
        table = self._read("embeddings")
        ids = ops.cast(inputs, "int64")
        cut = next((s for s in self.stages if s.plan.name == "vocabulary"), None)
        if cut is None:
            y = ops.take(table, ids, axis=0)
        else:
            ids = torch.where(ids < 0, ids + cut.plan.size, ids)
            start, count = cut.axis.bounds(cut.plan.size)
            mine = (ids >= start) & (ids < start + count)
            if count == 0:
                y = table.sum() + table.new_zeros((*ids.shape, table.shape[1]))
            else:
                rows = torch.nn.functional.embedding(torch.where(mine, ids - start, 0), table)
                y = rows.masked_fill(~mine.unsqueeze(-1), 0)
        y = ops.cast(y, self.layer.compute_dtype)
        for stage in self.stages:
            y = self._leave(stage, self._combine(stage, y))
        if isinstance(self.computation, Lookup) and self.computation.reverse:
            return masked(y, keras.layers.Embedding.compute_mask(self.layer, inputs))
        return y

    def _reverse(self, x: torch.Tensor, name: str) -> torch.Tensor:
        stages = [stage for stage in self.stages if name in stage.plan.local]
        for stage in stages:
            x = self._enter(stage, x)
        kernel = self._read(name)
        kernel = ops.transpose(kernel) if name == "embeddings" else kernel
        y = logits_of(self.layer, x, kernel)
        for stage in stages:
            y = self._join(stage, y, -1, "logits")
        return y


class DryGatheredCall:
    """The layer's own call, around which weights are gathered once; see `calls.GatheredCall`."""

    def __init__(self, original: Call, variables: Sequence[Any], weights: DryWeights):
        self.original, self.variables, self.weights = original, variables, weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.weights.gathered_once(self.variables):
            return self.original(*args, **kwargs)


class DryRegionCall:
    """A layer's call within which some below hand each other shards; see `region_calls`.

    It takes the plan's word for which may, of a call of whatever shape. What is dropped from is
    looked at, to know which of it is cut.
    """

    def __init__(
        self,
        original: Call,
        region: Region,
        axis: DryAxis,
        below: list[Owner],
        members: Sequence[Member],
        stages: Sequence[DryStage],
        summed: Sequence[Any],
        weights: DryWeights,
    ):
        self.original, self.axis = original, axis
        self.below, self.members = below, members
        self.drops = any(drops(owner.layer) for owner in below)
        self.stages, self.summed, self.weights = stages, summed, weights
        by_path = {owner.path: owner.layer for owner in below}
        self.divided = [(by_path[path], name, value) for path, name, value in region.divided]
        self.passed_over = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.weights.ledger.resting or self.passed_over:
            return self.original(*args, **kwargs)
        around, draws = current_parts(), self._draws(args, kwargs)
        parts = DryParts(self.axis.size, self.axis.rank, draws)
        copies = DryCopies(self.axis)
        before = [(vars(layer), name, vars(layer)[name]) for layer, name, _ in self.divided]
        for stage in self.stages:
            stage.copies = copies
        for layer, name, value in self.divided:
            vars(layer)[name] = value
        try:
            with drawing_parts(parts), self.weights.copied_on_read(self.summed, copies.of):
                result = self.original(*args, **kwargs)
            if around is not None:
                around.skip(len(draws))
            return result
        finally:
            for stage in self.stages:
                stage.copies = None
            for attributes, name, value in before:
                attributes[name] = value

    def _draws(self, args: Any, kwargs: Any) -> Sequence[int | None]:
        """For each dropout in turn the dim of which it is given a part."""
        if not self.drops:
            return ()
        cut = frozenset(id(v) for v in variables_of(self.below) if self.weights.cuts(v))
        call = ShownCall(self.below, self.original, args, kwargs, self.members, self.axis.size, cut)
        self.weights.ledger.resting = True
        try:
            return prove(call).draws
        finally:
            self.weights.ledger.resting = False


def drops(layer: Any) -> bool:
    """Whether a layer drops some of what it is given, in training."""
    return any(isinstance(vars(layer).get(name), float) and vars(layer)[name] for name in _RATES)


_RATES = "rate", "dropout", "_dropout"
