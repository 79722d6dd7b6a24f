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
from torch.distributed.tensor import Shard
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from keras_tp.dry_collectives import DryAxis, DryMeeting
from keras_tp.flows import even, tensors_in
from keras_tp.ledger import Ledger
from keras_tp.outputs import ShardedOutput, is_sharded
from keras_tp.rehearsal import Member
from keras_tp.seam.rehearsals import bare_call

# Fewer classes are gathered: a loss on shards sends two messages where a gather sends one.
FEWEST = 256


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
        self.given: dict[int, tuple[Member, torch.Tensor]] = {}
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
        result = func(*args, **kwargs)
        if self._resting or not self._origins:
            return result
        found = [self._origins.get(id(t)) for t in tensors_in((args, kwargs))]
        origins = frozenset().union(*(f for f in found if f))
        if origins:
            out = tensors_in(result)
            self._functions.append(_Function(func, args, kwargs, out, origins))
            self._origins |= {id(t): origins for t in out}
        return result

    def calls_of(self, members: Iterable[Member]) -> list[tuple[Any, Callable[..., torch.Tensor]]]:
        """Layers, and what is to be called in place of their `call`: of that a record begins."""
        return [(member.layer, self._call_of(member)) for member in members]

    def _call_of(self, member: Member) -> Callable[..., torch.Tensor]:
        bare = bare_call(member.layer)

        def call(inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            with self.resting():
                y = bare(inputs, *args, **kwargs)
            if not self._resting:
                self._taken |= self._origins.get(id(inputs), frozenset())
                again = member.number in self.given  # called twice, it is none
                self.forget([member.number])
                self._kept.append(y)
                if not again:
                    self.given[member.number] = member, y
                    self._origins[id(y)] = frozenset([member.number])
            return y if member.layer.activation is None else member.layer.activation(y)

        return call

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
        for number, (member, y) in self.given.items():
            assert isinstance(member.style.output, Shard)
            dim = member.style.output.dim % y.dim()
            parts = sizes[member.style.axis]
            meeting = DryMeeting(DryAxis(member.style.axis, parts, 0, ledger), "")
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


def may_be_head(member: Member, parts: int) -> bool:
    """Whether the output of a layer is worth keeping a shard, and can be one."""
    style = member.style
    column = style.name == "column" and isinstance(style.output, Shard) and not member.lookup
    return column and style.size >= FEWEST and style.size % parts == 0
