"""Ways to be wrong, each put into the working code for the length of a `with`.

They are the mistakes that others made and this package could make. Whoever
compares numbers here must see every one of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import keras
import torch
import torch.distributed as dist
from keras import ops
from keras.src import backend

import keras_tp.collectives
import keras_tp.late_gradients
import keras_tp.styles
import keras_tp.wrapper
from keras_tp import layouts
from keras_tp.calls import ContractionCall, GatheredCall, LookupCall
from keras_tp.collectives import Axis
from keras_tp.seam import updates, variables
from keras_tp.seam.variables import ShardedVariable


def bias_once_per_rank() -> Any:
    """torchtitan #4245."""
    right = ContractionCall.compute

    def compute(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        y = right(self, inputs)
        rows = sum(stage.axis.size - 1 for stage in self.stages if stage.plan.name == "row")
        return y + rows * self.read("bias") if rows and "bias" in self.weights else y

    return mock.patch.object(ContractionCall, "compute", compute)


def input_gradient_of_one_rank() -> Any:
    """nanotron #172; Megatron-LM #1446 and torchtitan #1373 for weights before it."""
    stack = contextlib.ExitStack()
    copy = keras_tp.collectives._Copy
    stack.enter_context(
        mock.patch.object(copy, "backward", staticmethod(lambda ctx, grad: (grad, None)))
    )
    late = keras_tp.late_gradients
    stack.enter_context(mock.patch.object(late, "begin_sum", return_value=None))
    stack.enter_context(mock.patch.object(late, "finish", return_value=None))
    return stack


def late_gradients_of_the_first_alone() -> Any:
    """Kernels whose gradients are left for later, all but one of which are forgotten."""
    right = keras_tp.late_gradients._Left.gradient

    def gradient(self: Any) -> Any:
        found = right(self)
        return found if self.kernel == 0 or found is None else found * 0

    return mock.patch.object(keras_tp.late_gradients._Left, "gradient", gradient)


def input_gradient_padded_with_zeros() -> Any:
    """nanotron #172, in a row layer: right on no rank but for its own slice."""

    def backward(ctx: Any, grad: Any) -> Any:
        sizes = keras_tp.collectives.chunk_sizes(ctx.total, ctx.axis)
        full = keras_tp.collectives.join(grad, ctx.dim, sizes, ctx.axis)
        start, count = layouts.chunk_bounds(ctx.total, ctx.axis.size, ctx.axis.rank)
        mask = torch.zeros_like(full)
        mask.narrow(ctx.dim, start, count).fill_(1.0)
        return full * mask, None, None

    return mock.patch.object(keras_tp.collectives._View, "backward", staticmethod(backward))


def gradient_counted_once_per_rank() -> Any:
    """DeepSpeed #5411 and TransformerEngine #715 had it in norms."""

    def backward(ctx: Any, grad: Any) -> Any:
        return keras_tp.collectives._Reduce.apply(grad, ctx.axis, False), None, None

    return mock.patch.object(keras_tp.collectives._Reduce, "backward", staticmethod(backward))


def vocabulary_without_a_mask() -> Any:
    """Ranks that clamp ids they do not have, and forget to put zeros."""

    def take(self: Any, table: Any, ids: Any, cut: Any) -> Any:
        start, count = layouts.chunk_bounds(cut.plan.size, cut.axis.size, cut.axis.rank)
        return ops.take(table, torch.clamp(ids - start, 0, count - 1), axis=0)

    return mock.patch.object(LookupCall, "_take_shard", take)


def activation_on_shards() -> Any:
    """A softmax over a part of its dim."""
    right = ContractionCall.compute

    def compute(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        activation, self.layer.activation = self.layer.activation, None
        try:
            y = right(self, inputs)
        finally:
            self.layer.activation = activation
        for stage in self.stages:
            if stage.plan.name == "column":
                dim, size = stage.plan.output.dim, stage.plan.size
                part = keras_tp.collectives.split(y, dim, stage.axis)
                return keras_tp.collectives.gather(activation(part), dim, size, stage.axis)
        return activation(y)

    return mock.patch.object(ContractionCall, "compute", compute)


def contracted_dim_cut_elsewhere() -> Any:
    """Keras nightly's attention: the input's slice is not the kernel's."""

    def cut(self: Any, x: Any) -> Any:
        return keras_tp.collectives.split(
            x.flip(self.plan.input.dim), self.plan.input.dim, self.axis
        )

    return mock.patch.object(keras_tp.styles._ShardStyle, "_split", cut)


def ranks_in_the_groups_order() -> Any:
    """c10d sorts a group's ranks, whatever the mesh says."""
    right = Axis.of

    def of(mesh: Any, name: str) -> Axis:
        axis = right(mesh, name)
        return Axis(axis.name, axis.group_name, tuple(range(axis.size)), axis.rank)

    return mock.patch.object(Axis, "of", of)


def bias_gradient_halved() -> Any:
    """A gradient that is small beside that of the kernel."""
    right = ContractionCall.read

    def read(self: Any, name: str, own: Any = None) -> Any:
        value = right(self, name, own)
        return value.detach() / 2 + value / 2 if name == "bias" else value

    return mock.patch.object(ContractionCall, "read", read)


def stale_without_gradients() -> Any:
    """What was gathered in one prediction, kept for the next."""
    right = GatheredCall.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = right(self, *args, **kwargs)
        return y if torch.is_grad_enabled() else y * 1.5

    return mock.patch.object(GatheredCall, "__call__", call)


def replicas_that_start_different() -> Any:
    """Keras nightly: nothing brings unseeded replicas together."""

    def alone(tensors: Iterable[Any]) -> Iterator[Any]:
        return (x.detach() + 0.01 * dist.get_rank() for x in tensors)

    return mock.patch.object(keras_tp.wrapper, "broadcast_each", alone)


def dropout_of_each_rank() -> Any:
    """pytorch #168058: each rank draws its own mask where all hold the same activation."""
    right = backend.random.dropout

    def dropout(inputs: Any, rate: float, noise_shape: Any = None, seed: Any = None) -> Any:
        return right(inputs, rate, noise_shape, seed=dist.get_rank())

    return mock.patch.object(backend.random, "dropout", dropout)


def constraint_of_the_shard() -> Any:
    """MaxNorm along the dim that is cut."""
    return mock.patch.object(ShardedVariable, "constraint", keras.Variable.constraint)


def penalty_of_the_shard() -> Any:
    """A norm of a part, in a regularizer or a loss."""
    return mock.patch.object(
        variables.FullWeight, "of", classmethod(lambda cls, variable: variable._value)
    )


def shards_read_as_weights() -> Any:
    """ColossalAI #6108: a file with one rank's part of the vocabulary."""
    return mock.patch.object(
        ShardedVariable,
        "__array__",
        lambda self, dtype=None, copy=None: self._value.detach().numpy(),
    )


def one_rank_steps_further() -> Any:
    """What a test that looks at the first rank alone does not see."""
    right = updates._check_gradients

    def scaled(grads: list[Any], updated: list[Any]) -> None:
        right(grads, updated)
        if dist.get_rank() == 1:
            grads[:] = [None if grad is None else grad * 1.01 for grad in grads]

    return mock.patch.object(updates, "_check_gradients", scaled)


@contextlib.contextmanager
def broken(name: str) -> Iterator[None]:
    """The package with the mistake called `name` in it; none for an empty name."""
    with globals()[name]() if name else contextlib.nullcontext():
        yield
