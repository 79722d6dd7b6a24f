"""What takes the place of a layer's `call` once its weights are shards.

Keras's `Layer.__call__` goes on as ever (masks, dtypes, autocast, losses) and
ends in one of these instead of the class's own `call`; where nothing is to be done on
the way, it is a short one (`keras_tp.seam.shortcuts`). Where Keras only asks
for shapes, or computes with values it was handed (`stateless_call`), the class's
own `call` runs.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from typing import Any

import keras
import torch
from keras import ops
from torch.distributed.tensor import Partial

from keras_tp.collectives import Axis, copy, split
from keras_tp.computations import Computation, Contraction, Lookup
from keras_tp.copies import Reader, SharedCopies
from keras_tp.errors import LayoutWarning
from keras_tp.heads import is_reverse, logits_of
from keras_tp.late_gradients import Reading
from keras_tp.layouts import chunk_bounds
from keras_tp.plans import StylePlan
from keras_tp.products import contract, is_plain
from keras_tp.rules import bias_dim
from keras_tp.seam.contexts import is_stateless, is_symbolic, reading_shards
from keras_tp.seam.masks import masked
from keras_tp.seam.variables import ShardedVariable, gathered_once, sharding_of


class Stage:
    """What a style does along one axis to a `ShardCall`; here nothing, in each place.

    Attributes:
        axis: where, set when the style is applied.
        plan: what was decided.
        given, kept: whether, in the call that goes on, the input arrives and the output
            leaves as a shard.
        scattered: whether, in that call, the output is a shard of the sequence of what is summed.
        copies: of what the layers of that call read; None if each makes its own.
    """

    axis: Axis
    given = False
    kept = False
    scattered = False
    copies: SharedCopies | None = None

    def __init__(self, plan: StylePlan):
        self.plan = plan

    def open(self, copies: SharedCopies, given: bool, kept: bool, scattered: bool = False) -> None:
        """A call begins in which layers hand each other shards."""
        self.copies, self.given, self.kept, self.scattered = copies, given, kept, scattered

    def close(self) -> None:
        """It has ended."""
        self.copies, self.given, self.kept, self.scattered = None, False, False, False

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The input as the computation wants it."""
        return x

    def reading(self, x: torch.Tensor, call: Reader) -> Reading[Reader] | None:
        """The input as it is read by all whose kernels' gradients can be computed while its own
        is summed; None if `enter` gives all that there is.
        """
        return None

    def combine(self, y: torch.Tensor) -> torch.Tensor:
        """The bare result, before bias and activation, made a value from summands."""
        return y

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """The output as the next layer wants it."""
        return y


class ShardCall(ABC):
    """A layer's computation on shards, with one stage per mesh axis.

    Args:
        layer: a built layer whose class's `call` is still its own.
        computation: what that `call` computes.
    """

    def __init__(self, layer: Any, computation: Computation):
        self.layer = layer
        self.computation = computation
        self.original = layer.call
        self.weights = {name: getattr(layer, name) for name in computation.weights}
        self.stages: list[Stage] = []

    @property
    def style(self) -> str:
        """The styles along the axes on whose shards it computes, in words."""
        return " + ".join(dict.fromkeys(stage.plan.name for stage in self.stages))

    @property
    def as_planned(self) -> bool:
        """Whether the layer still computes with the weights it was planned with."""
        return all(getattr(self.layer, name) is v for name, v in self.weights.items())

    def read(self, name: str, own: torch.Tensor | None = None) -> torch.Tensor:
        """The weight as the computation wants it: a shard along some axes, full along others.

        Args:
            name: of `weights`.
            own: stands for what this rank stores of it.
        """
        variable = self.weights[name]
        if not isinstance(variable, ShardedVariable):
            return variable.value
        return variable.full(self.kept_along(name), own)

    def kept_along(self, name: str) -> set[str]:
        """The axes along which the computation wants a shard of the weight."""
        return {stage.axis.name for stage in self.stages if name in stage.plan.local}

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if is_symbolic() or is_stateless():
            return self.original(inputs, *args, **kwargs)
        if not self.as_planned:
            # LoRA or quantization came after the plan. The class's own call is
            # right, because sharded weights read inside it are gathered.
            warnings.warn(
                f"'{self.layer.path}' computes with other weights than it was planned with; they "
                "are gathered for each call. Change a layer before keras_tp.parallelize.",
                LayoutWarning,
                stacklevel=2,
            )
            return self.original(inputs, *args, **kwargs)
        return self.compute(inputs, *args, **kwargs)

    @abstractmethod
    def compute(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output, replicated, of its replicated input, and what else it is told."""


class ContractionCall(ShardCall):
    """`activation(contract(x, kernel) + bias)`."""

    computation: Contraction
    takes_tensor = True  # and nothing else that it would go by

    def compute(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer, y = self.layer, self._product(inputs)
        for stage in self.stages:
            y = stage.combine(y)
        # A bias that is sharded like the output is added to the shard, another to
        # the gathered output; either way once, and after the reduction. The
        # activation sees what leaves the layer, so that it may be any (softmax).
        for stage in self.stages:
            if "bias" not in stage.plan.local:
                y = stage.leave(y)
        if "bias" in self.weights and not self.adds_bias:
            y = torch.add(y, self._bias(y))
        for stage in self.stages:
            if "bias" in stage.plan.local:
                y = stage.leave(y)
        return y if layer.activation is None else layer.activation(y)

    def own_kernel(self) -> torch.Tensor | None:
        """See `keras_tp.copies.Reader`."""
        kernel = self.weights["kernel"]
        sharding = sharding_of(kernel)
        whole = sharding is None or not sharding.cut_only_along(self.kept_along("kernel"))
        return None if whole else kernel.own()

    @functools.cached_property
    def adds_bias(self) -> bool:
        """Whether the bias is added to the product itself, of which each rank has columns."""
        return "bias" in self.weights and all(
            "bias" in stage.plan.local and not isinstance(stage.plan.output, Partial)
            for stage in self.stages
        )

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        reading = self.stages[0].reading(x, self) if len(self.stages) == 1 else None
        if reading is None:
            for stage in self.stages:
                x = stage.enter(x)
        kernel = self.read("kernel", None if reading is None else reading.kernels[self])
        bias = self.read("bias") if self.adds_bias else None
        if is_plain(x, kernel, bias, self.computation):
            if reading is not None:
                return reading.times(self, kernel, bias, self.computation)
            return contract(x, kernel, bias, self.computation)
        x, equation = x if reading is None else reading.copy, self.computation.equation
        y = ops.einsum(equation, x, kernel) if equation else ops.matmul(x, kernel)
        return y if bias is None else torch.add(y, bias)

    def _bias(self, y: torch.Tensor) -> torch.Tensor:
        """The bias, or where the output stays a shard, what of it belongs to that."""
        bias = self.read("bias")
        for stage in self.stages:
            if stage.kept and "bias" not in stage.plan.local:
                dim = bias_dim(stage.plan, self.computation, tuple(bias.shape))
                bias = copy(bias, stage.axis) if dim is None else split(bias, dim, stage.axis)
        return bias


class LookupCall(ShardCall):
    """`take(embeddings, ids, axis=0)`.

    Along an axis that cuts the vocabulary a rank looks up the ids it has and
    puts zeros for the others, so that the sum over the ranks is the lookup
    (Megatron-LM's vocabulary-parallel embedding).
    """

    def compute(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        table = self.read("embeddings")
        ids = ops.cast(inputs, "int64")
        cut = next((s for s in self.stages if s.plan.name == "vocabulary"), None)
        y = ops.take(table, ids, axis=0) if cut is None else self._take_shard(table, ids, cut)
        # Cast before the reduction: all but one summand are zeros, so it stays exact.
        y = ops.cast(y, self.layer.compute_dtype)
        for stage in self.stages:
            y = stage.combine(y)
            y = y if stage is cut else stage.leave(y)
        return y

    def _take_shard(self, table: torch.Tensor, ids: torch.Tensor, cut: Stage) -> torch.Tensor:
        total = cut.plan.size
        ids = torch.where(ids < 0, ids + total, ids)
        torch._assert_async(
            ((ids >= 0) & (ids < total)).all(),
            f"'{self.layer.path}' was given an id outside its vocabulary of {total}",
        )
        start, count = chunk_bounds(total, cut.axis.size, cut.axis.rank)
        mine = (ids >= start) & (ids < start + count)
        if count == 0:  # nothing to look up; the table still takes part in the gradient
            return table.sum() + table.new_zeros((*ids.shape, table.shape[1]))
        rows = torch.nn.functional.embedding(torch.where(mine, ids - start, 0), table)
        return rows.masked_fill(~mine.unsqueeze(-1), 0)


class ReversibleCall(LookupCall):
    """`take(embeddings, ids, axis=0)`, or in reverse `matmul(x, kernel)` for logits.

    Along an axis that cuts the vocabulary the kernel is this rank's columns, so that in reverse
    it is a column layer.
    """

    computation: Lookup

    def compute(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not is_reverse(args, kwargs):
            mask = keras.layers.Embedding.compute_mask(self.layer, inputs)
            return masked(super().compute(inputs), mask)
        x, layer, name = inputs, self.layer, self.computation.reverse
        stages = [stage for stage in self.stages if name in stage.plan.local]
        for stage in stages:
            x = copy(x, stage.axis) if stage.copies is None else stage.copies.of(x)
        kernel = self.read(name)
        kernel = ops.transpose(kernel) if name == "embeddings" else kernel
        y = logits_of(layer, x, kernel)
        for stage in stages:
            y = stage.leave(y)
        return y


class GatheredCall:
    """The class's own `call`, around which each sharded weight is gathered at most once."""

    style = "gathered"

    def __init__(self, layer: Any, variables: list[ShardedVariable]):
        self.original = layer.call
        self.variables = variables

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_symbolic():
            return self.original(*args, **kwargs)
        # Whole even in a call that an optimizer makes.
        with reading_shards(False), gathered_once(self.variables):
            return self.original(*args, **kwargs)


def shard_call(layer: Any, computation: Computation) -> ShardCall:
    """The layer's computation on shards, put in place of its `call` on first use."""
    if not isinstance(layer.call, ShardCall):
        if isinstance(computation, Contraction):
            layer.call = ContractionCall(layer, computation)
        else:
            layer.call = (ReversibleCall if computation.reverse else LookupCall)(layer, computation)
    return layer.call
