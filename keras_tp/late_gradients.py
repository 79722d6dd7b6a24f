"""Gradients of kernels, computed while the gradient of what they multiplied is being summed.

In backward a column layer owes two products: the gradient of its input, which is to be summed over
the ranks, and that of its kernel, for which nobody waits. Megatron-LM begins the
all-reduce after the first and computes the second meanwhile (its asynchronous gradient
all-reduce; Shoeybi et al. 2019 have it one after the other). Here several layers may read one
tensor, and autograd runs the backward of each before it knows the gradient of what they
read. So the kernels go through the node that copies the tensor:

    x, kernels  ->  _Read, one for all  ->  _Product, one per layer  ->  outputs

Backward meets them from the right. `_Product` computes the input's gradient, and leaves behind
what its kernel's takes. The engine adds up the gradients of `x`, then runs `_Read`, which
begins the all-reduce, computes what was left, and waits. Whatever lies beyond it, hooks,
buckets, `torch.autograd.grad`, sees gradients as from any other node.

- *Gradients of gradients* (grad mode is on in backward) are computed at once, and differentiably.
- *Passes* are told apart by the id of the engine's graph task, as in `buckets`: what products have
  left in one that raised is nothing to the next.
- *Memory*: the gradients of the outputs of all layers that read `x` are held until that of `x` is
  known. Where they come of one node, as those of queries, keys and values do, they are held anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch._C import _current_graph_task_id

from keras_tp.collectives import Axis, reduce
from keras_tp.computations import Contraction
from keras_tp.products import contract, of_bias, of_input, of_kernel

R = TypeVar("R")


@dataclass
class _Left:
    """One product: which kernel it is of, and what its backward leaves."""

    kernel: int
    computation: Contraction
    # The backward pass; the input; the gradient of the output.
    factors: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def leave(self, x: torch.Tensor, grad: torch.Tensor) -> None:
        """In the backward pass that goes on."""
        # (With its node, the copy of what was read would lead back to this.)
        self.factors = _current_graph_task_id(), x.detach(), grad

    def gradient(self) -> torch.Tensor | None:
        """Of the kernel, if this pass has left what it takes."""
        factors, self.factors = self.factors, None
        if factors is None or factors[0] != _current_graph_task_id():
            return None
        return of_kernel(*factors[1:], self.computation)


@dataclass
class _State:
    """What the nodes of one reading share. It refers to no tensor of the graph, as in `buckets`."""

    axis: Axis
    left: list[_Left] = field(default_factory=list)
    others: bool = False  # something else reads the copy, whose gradient it may hold on to


class Reading(Generic[R]):
    """A tensor as layers read it that multiply it by kernels of which each has columns.

    Backward: one all-reduce of the tensor's gradient, whoever reads it.

    Args:
        x: replicated over the axis, with a gradient.
        kernels: by reader, what is stored of each kernel.
        axis: along which the kernels are cut.

    Attributes:
        kernels: the same, to be used on the copy of `x`, and on nothing else.
    """

    def __init__(self, x: torch.Tensor, kernels: Mapping[R, torch.Tensor], axis: Axis):
        self._state = _State(axis)
        self._copy, *copies = _Read.apply(x, self._state, *kernels.values())
        self.kernels = dict(zip(kernels, copies, strict=True))

    @property
    def copy(self) -> torch.Tensor:
        """`x`, for other readers as well."""
        self._state.others = True
        return self._copy

    def times(
        self, reader: R, kernel: torch.Tensor, bias: torch.Tensor | None, computation: Contraction
    ) -> torch.Tensor:
        """The contraction of `x` with the reader's kernel, or with what was made of that.

        (A cast to another dtype; its gradient passes that by.) All are of one floating dtype.
        """
        number = list(self.kernels).index(reader)
        if not can_wait(self._copy, kernel, computation):
            return contract(self.copy, kernel, bias, computation)
        left = _Left(number, computation)
        self._state.left.append(left)
        return _Product.apply(self._copy, kernel, bias, left)


def can_wait(x: torch.Tensor, kernel: torch.Tensor, computation: Contraction) -> bool:
    """Whether a kernel's gradient can be computed apart from that of what it multiplies."""
    wanted = kernel.requires_grad and computation.determined
    return wanted and not torch.is_autocast_enabled(x.device.type)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None, left: _Left
    ) -> torch.Tensor:
        ctx.save_for_backward(x, kernel, bias)
        ctx.left = left
        return contract(x, kernel, bias, left.computation)

    @staticmethod
    @torch.compiler.disable  # what is left for later is nothing that a graph could hold
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, kernel, bias = ctx.saved_tensors
        left: _Left = ctx.left
        given = of_input(grad, kernel, left.computation)
        added = None if bias is None else of_bias(grad, bias)
        if torch.is_grad_enabled():
            return given, of_kernel(x, grad, left.computation), added, None
        left.leave(x, grad)
        return given, None, added, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, state: _State, *kernels: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.state = state
        ctx.dtypes = [kernel.dtype for kernel in kernels]
        ctx.set_materialize_grads(False)
        return x.view_as(x), *(kernel.view_as(kernel) for kernel in kernels)

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, grad: torch.Tensor | None, *grads: torch.Tensor | None) -> Any:
        state: _State = ctx.state
        if grad is None or torch.is_grad_enabled():
            return None if grad is None else reduce(grad, state.axis), None, *grads
        # What products give is nobody else's, so that it may be summed in place.
        given = grad.clone() if state.others else grad
        given = given.contiguous()
        work = begin_sum(given, state.axis)
        finished = list(grads)
        for left in state.left:
            learnt = left.gradient()
            if learnt is not None:
                learnt = learnt.to(ctx.dtypes[left.kernel])
                before = finished[left.kernel]
                finished[left.kernel] = learnt if before is None else before + learnt
        finish(work)
        return given, None, *finished


def begin_sum(x: torch.Tensor, axis: Axis) -> dist.Work:
    """Begins to make `x` its sum over the axis. Collective: one all-reduce."""
    return dist.all_reduce(x, group=axis.group, async_op=True)


def finish(work: dist.Work) -> None:
    """Waits for a sum that was begun; the watchdog knows it by this name."""
    work.wait()
