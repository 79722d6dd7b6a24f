"""Weights that are gathered on use, on their way before it: while earlier layers compute.

The calls of a model leave a trail (`keras_tp.trails`): which weights were gathered, and in which
order. A later call follows it. When a weight is gathered, those that come next are begun; when
it is their turn, the rank waits for what is left of them. Each is gathered once, as without, unless
the call goes where none has gone yet: then what was begun is forgotten, and gathered as it is read.

- *All ranks begin the same.* What is begun, used and forgotten along an axis follows from the
  gathers along it alone, which are the same on all its ranks. So there is a trail for each axis,
  nothing is begun before the first gather of a call (a call that gathers nothing may be one
  rank's own), and a call leaves no mark if it has gathered nothing.
- *Nothing old is used.* What was begun is of the value that was there then: one that is assigned
  meanwhile is gathered again, and from then on not begun ahead. At the end of the call all is
  forgotten, so that an optimizer never comes between.
- *Elsewhere nothing looks ahead*: in what the first rank does alone while others follow
  (`keras_tp.leading`), in a comparison (`keras_tp.verification`), in compiled code, in what is
  computed again within backward, and where a layer is called by itself.

Of the backward only reduce-scatters are left, as each weight is whole from its layer's call on.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

import torch

from keras_tp.collectives import Axis, Joining, join
from keras_tp.joins import Join
from keras_tp.seam.contexts import (
    current_reads,
    followed_by,
    is_stateless,
    is_symbolic,
    is_training,
)
from keras_tp.seam.variables import local_tensor
from keras_tp.seam.weights import state_of
from keras_tp.trails import Step, Trail


class PrefetchedCall:
    """A model's `call`, in which weights are gathered ahead of their use."""

    def __init__(self, model: Any):
        self.original = model.call
        self.trails: dict[tuple[bool, str], Trail[_Source]] = defaultdict(Trail)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or is_symbolic() or is_stateless():
            return self.original(*args, **kwargs)
        if current_reads() is not None:  # it is called within another, or by one that compares
            return self.original(*args, **kwargs)
        reads = Reads(self.trails, is_training())
        try:
            with followed_by(reads):
                result = self.original(*args, **kwargs)
            reads.end()
            return result
        finally:
            reads.forget()


@dataclass(frozen=True)
class _Source:
    # One that may be begun at any time.
    variable: Any
    dtype: torch.dtype
    dim: int
    sizes: tuple[int, ...]
    axis: Axis

    def begin(self) -> _Begun:
        local = local_tensor(self.variable).detach()
        # The value as it is now, in the dtype in which the layer that reads it computes.
        whole = Join(local.to(self.dtype), self.dim, self.sizes, self.axis)
        return _Begun(local, state_of(local_tensor(self.variable)), whole)

    @property
    def key(self) -> Any:
        return id(self.variable), self.dtype, self.dim

    def bytes_of(self, x: torch.Tensor) -> int:
        """What a gather of `x` gives, with what fills up an uneven cut: alike on all ranks."""
        others = math.prod(n for dim, n in enumerate(x.shape) if dim != self.dim)
        return max(self.sizes) * len(self.sizes) * others * x.itemsize


@dataclass(frozen=True)
class _Begun:
    local: torch.Tensor  # holds the memory that `state` tells of
    state: tuple[int, int]
    whole: Join


class _Walk:
    # Of one call along one axis.
    def __init__(self, trail: Trail[_Source]):
        self.trail = trail
        self.at: Step[_Source] | None = trail.start
        self.begun: deque[tuple[Step[_Source], _Begun]] = deque()

    def read(self, source: _Source, x: torch.Tensor, early: bool) -> torch.Tensor:
        """What `join` gives of `x`, this rank's part. Collective."""
        if self.at is not None:
            self.at = self.trail.go(self.at, (source.key, early), source, source.bytes_of(x), early)
        whole = self._begun_before(source)
        if whole is None:
            whole = join(x, source.dim, source.sizes, source.axis)
        under_way = {step for step, _ in self.begun}
        for step in self.at.ahead() if self.at is not None else ():
            if step not in under_way and step.what is not None:
                self.begun.append((step, step.what.begin()))
        return whole

    def _begun_before(self, source: _Source) -> torch.Tensor | None:
        if not self.begun:
            return None
        step, begun = self.begun.popleft()
        if step is not self.at:  # the call goes another way
            begun.whole.forget()
            self.forget()
            return None
        if begun.state != state_of(local_tensor(source.variable)):
            begun.whole.forget()
            step.early = False
            return None
        return begun.whole.result()

    def forget(self) -> None:
        while self.begun:
            self.begun.popleft()[1].whole.forget()


class Reads:
    """The gathers of one call of a model.

    Args:
        trails: those of the model, by whether it trains and by axis.
        training: whether this call does.
    """

    def __init__(self, trails: dict[tuple[bool, str], Trail[_Source]], training: bool):
        self.trails = trails
        self.training = training
        self.walks: dict[str, _Walk] = {}

    def joining(self, variable: Any) -> Joining:
        """See `keras_tp.seam.contexts.Reads`."""
        first = True

        def joined(x: torch.Tensor, dim: int, sizes: tuple[int, ...], axis: Axis) -> torch.Tensor:
            nonlocal first
            if axis.name not in self.walks:
                self.walks[axis.name] = _Walk(self.trails[self.training, axis.name])
            walk = self.walks[axis.name]
            # Of a weight that is cut along several axes a gather takes what the one before gives.
            # (A tensor made for inference does not tell what is written into it.)
            early, first = first and not local_tensor(variable).is_inference(), False
            return walk.read(_Source(variable, x.dtype, dim, sizes, axis), x, early)

        return joined

    def end(self) -> None:
        """The call has come to its end."""
        for walk in self.walks.values():
            if walk.at is not None:
                walk.at.ended = True

    def forget(self) -> None:
        """Lets go of what was begun."""
        for walk in self.walks.values():
            walk.forget()


class _AtOnce:
    def joining(self, variable: Any) -> Joining:
        return join


def gathering_at_once() -> contextlib.AbstractContextManager[None]:
    """While open, calls of models gather each weight when it is read, and leave no trail."""
    return followed_by(_AtOnce())
