"""Gradients of replicated weights, summed over replicas while backward goes on.

Replicas compute different rows of one batch, and so each holds a part of every
weight's gradient. The plain way is one all-reduce per weight, as its gradient
appears (`keras_tp.collectives.copy`). Here gradients are copied into flat buckets, each
summed by one asynchronous all-reduce as soon as it is full, while autograd computes
the gradients of earlier layers (Li et al. 2020, PyTorch Distributed, section 3.2).

Autograd itself waits for the end. Every weight of a model call goes through two nodes:

    weights  ->  _Finish, one for all  ->  _Arrive, one per weight, at its first read  ->  layers

Backward meets them from the right. `_Arrive` copies the gradient into its bucket and
sends the bucket if that was the last one missing. `_Finish` sends what is left, waits
for all, and hands the sums on to the weights. The engine runs a node when all the
nodes before it have run, and so runs `_Finish` after every `_Arrive` that it will run:
whatever is downstream of it, `.grad` or what is already in it, hooks, the result of
`torch.autograd.grad`, sees sums and nothing else, by the rules that hold for any node.
No gradient is handed out early and mended later.

- *Which bucket, and when.* Weights have fixed places: the reverse of the order given,
  expected to be the order of use. Buckets are sent in that fixed order, each once
  its predecessor is, however the gradients arrive, and all of them in every pass that
  reaches one weight of the call. So ranks that meet the weights in different orders still send
  the same. A wrong order costs overlap, nothing else.
- *A weight without a gradient* on this rank stands in its bucket as zeros, with a
  flag. If some other rank has one, the sum is its gradient here as well; if none has,
  it has none, as in one process. Should replicas differ in this, they must have no other
  collectives of the same axis in their backward, whose order would differ then. And a
  backward of which one replica reaches no weight at all hangs, as any
  collective does that one rank does not call: replicas run the same program.
- *Passes* are told apart by the id of the engine's graph task. One that raised leaves
  its buckets behind under an id that never comes again, until its graph is freed. A
  backward within a backward (reentrant checkpointing) is a pass of its own that sums what
  it found; as every pass sends every bucket, that is right but slow.
- *Gradients of gradients* (grad mode is on in backward) are summed one by one by
  `_Finish`, differentiably.
- *Other axes' collectives* run in between, on groups of their own; within a group gloo and
  NCCL keep the order of calls, which is that of the engine, the same for the same graph.

Memory: a weight's gradient *is* its place in the bucket, `.grad` shares the bucket's
memory. Held at most: every gradient once, the one being copied, and, if there was an
earlier `.grad` to add to, that one. A bucket lives as long as any of its gradients.

A weight with hooks when it is read goes the plain way. (A hook registered later, on a weight
that gets no gradient in a backward that reaches others, is called with None, as torch does.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _current_graph_task_id

from keras_tp.collectives import Axis, copy, reduce
from keras_tp.places import FIRST, SIZE, Bucket, Place, places


def summed(parameter: torch.Tensor, axis: Axis, buckets: Buckets | None = None) -> torch.Tensor:
    """`parameter` for use on this replica's rows: its gradient is summed over the axis.

    The communication is in backward: one all-reduce per bucket, or one for this
    parameter if there are no buckets, it is not in them, it has hooks, or the code is
    being compiled. None where no gradient is wanted.

    Call it where the weight is used: of weights that are all read before the layers run,
    autograd takes the gradients to their buckets after the layers' backward, with no overlap.

    Args:
        parameter: a leaf, any shape, the same on every rank of the axis.
        axis: the axis along which ranks compute different rows.
        buckets: those of this call of the model, over the same axis.

    Returns:
        A view of `parameter`; itself, where no gradient is wanted.
    """
    if axis.size == 1 or not (parameter.requires_grad and torch.is_grad_enabled()):
        return parameter
    if buckets is None or torch.compiler.is_compiling():
        return copy(parameter, axis)
    assert buckets.axis == axis, (buckets.axis, axis)
    return buckets.read(parameter)


class Buckets:
    """The gradient buckets of one call of a model. They know their weights' sizes, not values.

    Cheap to make: it touches no weight before the first is read. Make one per call and
    let go of it after; the graph keeps what backward needs.

    Args:
        parameters: leaves, in the order in which the call is expected to use them,
            the same on every rank. Those without `requires_grad` are ignored, those on another
            device than the first go the plain way.
        axis: the axis along which ranks compute different rows.
        first: bytes after which the first bucket of a dtype is full.
        size: bytes after which a later one is.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        axis: Axis,
        first: int = FIRST,
        size: int = SIZE,
    ):
        self.axis = axis
        self._parameters = tuple(parameters)
        self._limits = first, size
        self._call: _Call | None = None
        self._views: dict[int, tuple[int, torch.Tensor]] = {}
        self._read: dict[int, torch.Tensor] = {}

    def read(self, parameter: torch.Tensor) -> torch.Tensor:
        """What `summed` gives, with grad mode on; the same tensor at every read of a parameter."""
        if id(parameter) not in self._read:
            self._read[id(parameter)] = self._first_read(parameter)
        return self._read[id(parameter)]

    def _first_read(self, parameter: torch.Tensor) -> torch.Tensor:
        if self._call is None:
            self._call = self._open()
        if id(parameter) not in self._views:
            return copy(parameter, self.axis)
        number, view = self._views[id(parameter)]
        # Made at the first read and not before: of the nodes that are ready the engine
        # runs the youngest first, and this one should run right after the read's.
        return _Arrive.apply(view, self._call, number)

    def _open(self) -> _Call:
        mine: list[torch.Tensor] = []
        for parameter in dict.fromkeys(self._parameters):
            wanted = parameter.requires_grad and not _has_hooks(parameter)
            if wanted and (not mine or parameter.device == mine[0].device):
                mine.append(parameter)
        where, buckets = places(mine, *self._limits)
        call = _Call(self.axis, where, buckets)
        if mine:
            views = _Finish.apply(call, *mine)
            self._views = {
                id(p): (i, view) for i, (p, view) in enumerate(zip(mine, views, strict=True))
            }
        return call


@dataclass
class _Call:
    # What the nodes of one call share. It refers to no tensor of the graph: a cycle
    # through the graph's nodes would never be freed.
    axis: Axis
    places: list[Place]
    buckets: list[Bucket]
    passes: dict[int, _Pass] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reads = [0] * len(self.buckets)  # how many members were read


class _Pass:
    # One backward pass over a call's graph.
    def __init__(self, call: _Call):
        self.call = call
        self.flats: list[torch.Tensor | None] = [None] * len(call.buckets)
        self.arrived: list[set[int]] = [set() for _ in call.buckets]
        self.works: list[Any] = []

    def add(self, number: int, grad: torch.Tensor) -> None:
        """Copies a gradient to its place and sends what is full. Collective, asynchronous."""
        place = self.call.places[number]
        assert place.bucket >= len(self.works), "a gradient for a bucket that is on its way"
        place.within(self._flat(place.bucket)).copy_(grad)
        self.arrived[place.bucket].add(number)
        # What was not read, or not reached, is not waited for: it is zeros.
        while self._sending() and len(self.arrived[self._next]) == self.call.reads[self._next]:
            self._send()

    def finish(self) -> Iterator[torch.Tensor | None]:
        """Sends the rest, waits, and gives the sum for every place. Collective."""
        while self._sending():
            self._send()
        for work in self.works:
            work.wait()
        there = [self._flags(index) for index in range(len(self.works))]
        for number, place in enumerate(self.call.places):
            flat = self._flat(place.bucket)
            yield place.within(flat) if number in there[place.bucket] else None

    @property
    def _next(self) -> int:
        return len(self.works)

    def _sending(self) -> bool:
        return self._next < len(self.call.buckets)

    def _flat(self, index: int) -> torch.Tensor:
        flat = self.flats[index]
        if flat is None:
            flat = self.flats[index] = self.call.buckets[index].empty()
        return flat

    def _send(self) -> None:
        index, flat = self._next, self._flat(self._next)
        bucket = self.call.buckets[index]
        flat[bucket.numel :] = 1
        for number in bucket.members:
            if number not in self.arrived[index]:
                place = self.call.places[number]
                place.within(flat).zero_()
                flat[place.flag] = 0
        self.works.append(dist.all_reduce(flat, group=self.call.axis.group, async_op=True))

    def _flags(self, index: int) -> Collection[int]:
        # Which members have a gradient on some rank. On a GPU, looking waits for it.
        bucket = self.call.buckets[index]
        if len(self.arrived[index]) == len(bucket.members):
            return set(bucket.members)
        flags = self._flat(index)[bucket.numel :].tolist()
        return {number for number, flag in zip(bucket.members, flags, strict=True) if flag}


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            return None, *(None if grad is None else reduce(grad, ctx.call.axis) for grad in grads)
        return None, *ctx.call.passes.pop(_current_graph_task_id()).finish()


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, view: torch.Tensor, call: _Call, number: int) -> torch.Tensor:
        ctx.call, ctx.number = call, number
        ctx.set_materialize_grads(False)
        call.reads[call.places[number].bucket] += 1
        return view.view_as(view)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            return grad, None, None
        passes, task = ctx.call.passes, _current_graph_task_id()
        if task not in passes:
            passes[task] = _Pass(ctx.call)
        if grad is not None:
            passes[task].add(ctx.number, grad)
        # `_Finish` takes the sum from the bucket.
        return None, None, None


def _has_hooks(parameter: torch.Tensor) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
