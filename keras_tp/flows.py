"""How torch functions carry a shard through, told by their arguments alone.

A `Flow` says what each rank of an axis holds of a tensor while layers hand each
other shards: a different part along one dim, or the same everywhere. A rule per
function says what its output is then; `keras_tp.dims` has those that are more than
a line. A function without a rule that is made of elementwise operations only
(torch says so of each) is elementwise; any other ends the region.

It is what GSPMD does for XLA (Xu et al. 2021) and DTensor for torch, for one axis and
one question: does this code compute on a shard what it computes on the whole?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _python_dispatch as dispatch

from keras_tp.layouts import Shape


class Unproven(Exception):  # noqa: N818 - it is no error: the shard is gathered instead
    """What a function does with a shard is not known to be right."""


@dataclass(frozen=True)
class Flow:
    """What the ranks of an axis hold of one tensor.

    Attributes:
        dim: the dim of which each rank has a part; None if all hold the same.
        grad: whether a gradient may be wanted of it.
        partial: all ranks hold the same, but the gradient that a rank computes is one
            summand: it came through `keras_tp.collectives.copy`.
        origins: numbers of the layers whose outputs it comes from as a shard.
        weights: numbers of the weights it is computed from, if from nothing else that a
            gradient is wanted of; None if from activations.
    """

    dim: int | None = None
    grad: bool = False
    partial: bool = False
    origins: frozenset[int] = frozenset()
    weights: frozenset[int] | None = frozenset()

    @property
    def local(self) -> bool:
        """Whether ranks compute different things with it."""
        return self.dim is not None or self.partial


@dataclass
class Applied:
    """One function as it is called on a shard, and what is known of the call on the whole.

    Attributes:
        name: the function's name.
        function: the function.
        args, kwargs: what it is given, on a rank.
        flow_of: the flow of a tensor among them.
        full_of: the full shape of a tensor among them.
        out: full shapes of the tensors it gives.
        local: shapes of what it gave on a rank.
    """

    name: str
    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    flow_of: Callable[[torch.Tensor], Flow]
    full_of: Callable[[torch.Tensor], Shape]
    out: list[Shape]
    local: list[Shape]

    def get(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument, by position or by one of its names."""
        if position < len(self.args):
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    def tensors(self) -> list[torch.Tensor]:
        """The tensors it is given, nests of lists and dicts included."""
        return tensors_in((self.args, self.kwargs))

    def dim_of(self, tensor: Any) -> int | None:
        """The sharded dim of an argument; None of what is no tensor."""
        return self.flow_of(tensor).dim if isinstance(tensor, torch.Tensor) else None

    def only(self) -> tuple[torch.Tensor, int]:
        """The one tensor, which must be the shard, and its sharded dim."""
        (tensor, *others) = self.tensors()
        dim = self.dim_of(tensor)
        if dim is None or any(self.dim_of(other) is not None for other in others):
            raise Unproven(f"{self.name} of several shards")
        return tensor, dim


Rule = Callable[[Applied], Sequence[int | None]]


def tensors_in(nest: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists, dicts and slices, in order."""
    found: list[torch.Tensor] = []
    _add_tensors(nest, found)
    return found


def _add_tensors(nest: Any, found: list[torch.Tensor]) -> None:
    if isinstance(nest, torch.Tensor):
        found.append(nest)
    elif isinstance(nest, (tuple, list)):
        for entry in nest:
            _add_tensors(entry, found)
    elif isinstance(nest, dict):
        for entry in nest.values():
            _add_tensors(entry, found)


def along(dim: int | None, ndim: int) -> int | None:
    """A dim counted from the start."""
    return dim if dim is None else dim % ndim


def elementwise(call: Applied) -> list[int | None]:
    """Shards meet along one dim, counted from the end; whole tensors have size 1 there."""
    sharded = {
        call.flow_of(t).dim - t.dim()  # type: ignore[operator]
        for t in call.tensors()
        if call.flow_of(t).dim is not None
    }
    if len(sharded) != 1:
        raise Unproven(f"{call.name} of shards along different dims")
    (dim,) = sharded
    for tensor in call.tensors():
        full = call.full_of(tensor)
        if call.flow_of(tensor).dim is None and len(full) >= -dim and full[dim] != 1:
            raise Unproven(f"{call.name} of a shard and a whole tensor {full}")
    return [dim + len(shape) for shape in call.out]


class Operations(dispatch.TorchDispatchMode):
    """While open, looks whether torch computes element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.elementwise = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        known = torch.Tag.pointwise in func.tags or name in _COPYING
        if not known or torch.Tag.nondeterministic_seeded in func.tags:
            self.elementwise = False
        return func(*args, **(kwargs or {}))


# Copies and values of one kind, in the shape of what is given.
_COPYING = {
    *("_to_copy", "clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "copy_"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "scalar_tensor", "fill_"),
}


def joined(flows: Sequence[Flow], dim: int | None) -> Flow:
    """The flow of what is computed from tensors with these, along `dim`."""
    weights: frozenset[int] | None = frozenset()
    for flow in flows:
        if flow.grad:
            weights = None if weights is None or flow.weights is None else weights | flow.weights
    return Flow(
        dim=dim,
        grad=any(flow.grad for flow in flows),
        partial=dim is None and any(flow.local for flow in flows),
        origins=frozenset().union(*(flow.origins for flow in flows)),
        weights=weights,
    )


def without_gradient(flow: Flow) -> Flow:
    """The same values, of which no gradient is wanted."""
    if flow.dim is None:
        return Flow()
    return replace(flow, grad=False)


def even(shape: Shape, dim: int, parts: int) -> Shape:
    """The shape of one of equal parts along `dim`."""
    if shape[dim] % parts:
        raise Unproven(f"dim {dim} of {shape} is not cut evenly into {parts}")
    return (*shape[:dim], shape[dim] // parts, *shape[dim + 1 :])


def outer(shape: Shape, dim: int) -> int:
    """The product of the sizes before `dim`."""
    return math.prod(shape[:dim])
