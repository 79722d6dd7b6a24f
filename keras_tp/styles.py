"""Torch parallel styles that know Keras layers.

Each class carries out the `StylePlan` of the same name along one mesh axis:
`parallelize_module(layer, mesh[axis], style)` puts a call on shards in place of
the layer's own. Torch's styles of the same names accept `nn.Linear` and
`nn.Embedding`, whose kernels are transposed against Keras's, and work through
DTensors; these work on plain local tensors, and are torch's only so that
whoever asks with isinstance gets the true answer.

By then the weights are shards: storage is decided for a variable over all axes
at once, computation for a layer along each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import style as torch_style

from keras_tp.calls import GatheredCall, Stage, shard_call
from keras_tp.collectives import Axis, copy, gather, reduce_own, split
from keras_tp.computations import Computation
from keras_tp.copies import Reader, read_by
from keras_tp.gates import SEQUENCE
from keras_tp.late_gradients import Reading
from keras_tp.meetings import AxisMeeting
from keras_tp.outputs import ShardedOutput
from keras_tp.plans import StylePlan
from keras_tp.row_collectives import scatter
from keras_tp.seam.contexts import in_step
from keras_tp.seam.variables import ShardedVariable


class _ShardStyle(Stage):
    def __init__(self, plan: StylePlan, computation: Computation):
        super().__init__(plan)
        self.computation = computation

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> Any:
        self.axis = Axis.of(device_mesh, self.plan.axis)
        shard_call(module, self.computation).stages.append(self)
        return module

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.plan.input, Shard)
        if self.given:
            return x
        dim = self.plan.input.dim
        if x.shape[dim] != self.plan.size:
            # A slice of another dim may fit this rank's shard of the kernel by accident.
            raise ValueError(
                f"an input of shape {tuple(x.shape)} has {x.shape[dim]} in dim {dim}, where the "
                f"layer's kernel has {self.plan.size}."
            )
        return split(x, dim, self.axis)

    def _joined(self, y: torch.Tensor, dim: int) -> torch.Tensor:
        if self.plan.open and in_step():
            return ShardedOutput.of(y, dim % y.dim(), AxisMeeting(self.axis))
        return gather(y, dim, self.plan.size, self.axis)

    def _sum(self, y: torch.Tensor) -> torch.Tensor:
        return scatter(y, SEQUENCE, self.axis) if self.scattered else reduce_own(y, self.axis)


class ColwiseParallel(_ShardStyle, torch_style.ColwiseParallel):
    """Output dim sharded: replicated input, gathered output.

    Forward one all-gather of the output, none where it is kept as a shard, or in one of Keras's
    steps is left open for the loss (`keras_tp.outputs`); backward one
    all-reduce of the input's gradient (none for a lookup), for all that read the same together,
    beside which the kernels' gradients are computed (`keras_tp.late_gradients`).
    """

    def __init__(self, plan: StylePlan, computation: Computation):
        _ShardStyle.__init__(self, plan, computation)
        torch_style.ColwiseParallel.__init__(
            self, input_layouts=Replicate(), output_layouts=Replicate()
        )

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return copy(x, self.axis) if self.copies is None else self.copies.of(x)

    def reading(self, x: torch.Tensor, call: Reader) -> Reading[Reader] | None:
        if self.copies is None:
            return read_by((call,), x, self.axis)
        return self.copies.reading(x, call)

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.plan.output, Shard)
        return y if self.kept else self._joined(y, self.plan.output.dim)


class RowwiseParallel(_ShardStyle, torch_style.RowwiseParallel):
    """Contracted dim sharded: the input is sliced, the output summed.

    Forward one all-reduce of the output, before bias and activation; backward
    one all-gather of the input's gradient, none where it is given as a shard. Where the output
    is a shard of the sequence, a reduce-scatter, and an all-gather of its gradient.
    """

    def __init__(self, plan: StylePlan, computation: Computation):
        _ShardStyle.__init__(self, plan, computation)
        torch_style.RowwiseParallel.__init__(
            self, input_layouts=Replicate(), output_layouts=Replicate()
        )

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return self._split(x)

    def combine(self, y: torch.Tensor) -> torch.Tensor:
        return self._sum(y)


class BatchedParallel(_ShardStyle, torch_style.ParallelStyle):
    """A dim of input, kernel and output alike is sharded, such as experts.

    Forward one all-gather of the output, backward one of the input's gradient; neither
    where it is kept, or given, as a shard.
    """

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return self._split(x)

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.plan.output, Shard)
        return y if self.kept else self._joined(y, self.plan.output.dim)


class VocabularyParallel(_ShardStyle, torch_style.ParallelStyle):
    """Rows of an embedding table sharded: forward one all-reduce of the output, backward none.

    In reverse it is a column layer, whose output `leave` gathers.
    """

    def combine(self, y: torch.Tensor) -> torch.Tensor:
        return self._sum(y)

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        return self._joined(y, -1)


class GatheredOnUse(torch_style.ParallelStyle):
    """Full weights for the call, whatever the layer does with them, along all axes at once.

    Forward one all-gather per axis of each sharded weight that the call reads,
    backward none: every rank computes the same, so the slice of the full
    gradient that belongs to a rank is right.

    Args:
        variables: the sharded variables to gather.
    """

    def __init__(self, variables: list[ShardedVariable]):
        self.variables = variables

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> Any:
        module.call = GatheredCall(module, self.variables)
        return module


_STYLES: dict[str, Callable[[StylePlan, Computation], torch_style.ParallelStyle]] = {
    "column": ColwiseParallel,
    "row": RowwiseParallel,
    "batched": BatchedParallel,
    "vocabulary": VocabularyParallel,
}


def make_style(plan: StylePlan, computation: Computation) -> torch_style.ParallelStyle:
    """The style that carries out `plan`, for one layer. Not for `"gathered"`."""
    return _STYLES[plan.name](plan, computation)
