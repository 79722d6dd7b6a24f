"""Finds layers whose output may stay a shard until the loss: those of large vocabularies.

While a model is called without values, the torch functions between a layer and what the model
gives are written down. Afterwards they are made again of a sharded output
(`keras_tp.outputs`): if none of them gathers it, the layer is a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from keras import ops
from torch.distributed.tensor import Shard
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from keras_tp.computations import Computation, Lookup
from keras_tp.dry_collectives import DryAxis, DryMeeting
from keras_tp.flows import even, tensors_in
from keras_tp.ledger import Ledger
from keras_tp.outputs import ShardedOutput, is_sharded
from keras_tp.plans import StylePlan
from keras_tp.seam.rehearsals import bare_call

# Fewer classes are gathered: a loss on shards sends two messages where a gather sends one.
FEWEST = 256


@dataclass(frozen=True)
class Head:
    """A layer that may be one.

    Attributes:
        number: its own in the plan.
        layer: the layer.
        style: how it computes along an axis.
        computation: what it computes.
    """

    number: int
    layer: Any
    style: StylePlan
    computation: Computation | None

    def dim(self, ndim: int) -> int:
        """Dim of its output along which it is cut."""
        of_output = isinstance(self.style.output, Shard)
        return (self.style.output.dim if of_output else -1) % ndim  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Function:
    func: Callable[..., Any]
    args: Any
    kwargs: Any
    out: list[torch.Tensor]
    origins: frozenset[int]


class Recorder(TorchFunctionMode):
    """Writes down what is computed of the outputs of some layers."""

    def __init__(self) -> None:
        super().__init__()
        self._functions: list[_Function] = []
        self._origins: dict[int, frozenset[int]] = {}  # of tensors, by identity
        self._kept: list[Any] = []  # so that no identity is given again
        self.given: dict[int, tuple[Head, torch.Tensor]] = {}
        self.reversed: set[int] = set()
        self._taken: frozenset[int] = frozenset()  # what other layers take whole
        self._resting = False

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Looks away while open."""
        before, self._resting = self._resting, True
        try:
            yield
        finally:
            self._resting = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._resting or not self._origins:
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        found = [self._origins.get(id(t)) for t in tensors_in((args, kwargs))]
        origins = frozenset().union(*(f for f in found if f))
        if origins:
            out = tensors_in(result)
            self._functions.append(_Function(func, args, kwargs, out, origins))
            self._origins |= {id(t): origins for t in out}
        return result

    def take(self, nest: Any) -> None:
        """What is in it is taken by code that is not called."""
        for tensor in tensors_in(nest):
            self._taken |= self._origins.get(id(tensor), frozenset())

    def calls_of(self, heads: Iterable[Head]) -> list[tuple[Any, Callable[..., torch.Tensor]]]:
        """Layers, and what is to be called in place of their `call`: of that a record begins."""
        return [(head.layer, self._call_of(head)) for head in heads]

    def _call_of(self, head: Head) -> Callable[..., torch.Tensor]:
        looks_up = isinstance(head.computation, Lookup)
        bare = head.layer.call if looks_up else bare_call(head.layer)
        activation = None if looks_up else head.layer.activation

        def call(inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            with self.resting():
                y = bare(inputs, *args, **kwargs)
            if not self._resting:
                self.take(inputs)
                if not looks_up or is_reverse(args, kwargs):
                    self._begin(head, y)
            return y if activation is None else activation(y)

        return call

    def _begin(self, head: Head, y: torch.Tensor) -> None:
        again = head.number in self.given  # called twice, it is none
        if isinstance(head.computation, Lookup):
            self.reversed.add(head.number)
        if again:
            self.forget([head.number])
        self._kept.append(y)
        if not again:
            self.given[head.number] = head, y
            self._origins[id(y)] = frozenset([head.number])

    def forget(self, numbers: Collection[int]) -> None:
        """These layers are none: what was written down of them alone is not needed."""
        for number in numbers:
            self.given.pop(number, None)
        settled = frozenset(numbers)
        self._functions = [f for f in self._functions if not f.origins <= settled]
        gone = [t for t, origins in self._origins.items() if origins <= settled]
        for tensor in gone:
            del self._origins[tensor]

    def heads(self, result: Any, sizes: dict[str, int]) -> frozenset[int]:
        """Numbers of the layers whose outputs are sharded still in what the model gives.

        Args:
            result: what the model gave.
            sizes: number of ranks along each axis.
        """
        ledger = Ledger()
        made: dict[int, Any] = {}
        origins: list[tuple[Any, frozenset[int]]] = []
        for number, (head, y) in self.given.items():
            dim, parts = head.dim(y.dim()), sizes[head.style.axis]
            if not stays_open(head.style.size, parts):
                continue
            meeting = DryMeeting(DryAxis(head.style.axis, parts, 0, ledger), "")
            part = torch.empty(even(tuple(y.shape), dim, parts), dtype=y.dtype, device=y.device)
            made[id(y)] = ShardedOutput.of(part, dim, meeting)
            origins.append((made[id(y)], frozenset([number])))

        def again(tensor: torch.Tensor) -> Any:
            return made.get(id(tensor), tensor)

        for function in self._functions:
            args, kwargs = tree_map_only(torch.Tensor, again, (function.args, function.kwargs))
            out = tensors_in(function.func(*args, **kwargs))
            made.update({id(old): new for old, new in zip(function.out, out, strict=True)})
            origins += [(new, function.origins) for new in out]
        ends = [id(made.get(id(leaf))) for leaf in tree_leaves(result)]
        found: frozenset[int] = frozenset()
        lost = self._taken
        for output, numbers in origins:
            if is_sharded(output) and id(output) in ends:
                found |= numbers
            if isinstance(output, ShardedOutput) and not is_sharded(output):
                lost |= numbers
        return found - lost


def gives_columns(style: StylePlan, computation: Computation | None) -> bool:
    """Whether a layer gives, or may give, columns of which a rank computes some."""
    if isinstance(computation, Lookup):
        return computation.reverse in style.local
    return style.name == "column"


def stays_open(columns: int, parts: int) -> bool:
    """Whether an output of so many columns is worth keeping a shard, and can be one."""
    return columns >= FEWEST and columns % parts == 0


def is_reverse(args: Any, kwargs: Any) -> bool:
    """Whether a table of embeddings is called in reverse, for logits."""
    return bool(kwargs.get("reverse", args[0] if args else False))


def logits_of(layer: Any, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """The logits of a `ReversibleEmbedding` for `kernel`, of shape (width, words)."""
    if layer.reverse_dtype is not None:
        x, kernel = ops.cast(x, layer.reverse_dtype), ops.cast(kernel, layer.reverse_dtype)
    logits = ops.matmul(x, kernel)
    if layer.logit_soft_cap is None:
        return logits
    return ops.multiply(ops.tanh(ops.divide(logits, layer.logit_soft_cap)), layer.logit_soft_cap)
