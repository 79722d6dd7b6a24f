"""Two runs of the same code on tensors without values: on the whole, and on one rank's shards.

`Whole` writes down every torch function that is called and the shapes it gives.
`Local` (`keras_tp.shard_runs`) calls the same code again, in which layers now hand on
shards, and follows them: the same functions have to come in the same order, with the same
numbers and tensors, and each must compute on the shard what it computes on the whole
(`keras_tp.dims`). Whatever the code looks like, layers of Keras's or the user's own
Python, it is seen as it runs.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import torch
from torch.overrides import TorchFunctionMode

from keras_tp.flows import tensors_in
from keras_tp.layouts import Shape


class LostTrack(Exception):  # noqa: N818 - not an error either
    """The code runs differently on shards."""


@dataclass
class Event:
    """A function that was called on the whole.

    Attributes:
        name: its name, or what a layer or a random draw is called here.
        values: what it was given besides tensors.
        wiring: for each tensor it was given, its number; each gets one as it is first seen.
        given: full shapes of the tensors.
        out: full shapes of the tensors it gave.
        dtypes: their dtypes.
        made: their numbers.
    """

    name: str
    values: Any
    wiring: list[int]
    given: list[Shape]
    out: list[Shape]
    dtypes: list[torch.dtype]
    made: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Frame:
    """What tells a call from others that are like it.

    Attributes:
        first: of the numbers that tensors get in it.
        outer: numbers of the tensors that it is given, and of its weights.
        names: by which layers in it are written down that are not computed.
    """

    first: int
    outer: list[int]
    names: list[str]


@dataclass
class Part(Event):
    """A call of a layer, in place of the functions that it calls.

    Attributes:
        layer: the layer.
        events: what was called in it, or in another that is like it.
        frames: where that was recorded, and here.
        count: how many numbers tensors get in it.
    """

    layer: Any = None
    events: list[Event] = field(default_factory=list)
    frames: tuple[Frame, Frame] = (Frame(0, [], []),) * 2
    count: int = 0

    def expanded(self) -> list[Event]:
        """The functions, with the numbers that tensors have here."""
        there, here = self.frames
        if there == here:
            return self.events
        known = dict(zip(there.outer, here.outer, strict=True))
        named = dict(zip(there.names, here.names, strict=True))

        def number(n: int) -> int:
            return known[n] if n in known else n - there.first + here.first

        def moved(event: Event) -> Event:
            if isinstance(event, Part):
                recorded, inner = event.frames
                inner = Frame(
                    inner.first - there.first + here.first,
                    [*map(number, inner.outer)],
                    [named[name] for name in inner.names],
                )
                return replace(event, frames=(recorded, inner))
            return replace(
                event,
                name=named.get(event.name, event.name),
                wiring=[*map(number, event.wiring)],
                made=[*map(number, event.made)],
            )

        return [*map(moved, self.events)]


@dataclass
class Numbers:
    """Numbers tensors as they are first seen, and keeps them, so that no number comes again."""

    kept: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)
    count: int = 0

    def of(self, tensor: torch.Tensor) -> int:
        """The number of a tensor."""
        if id(tensor) not in self.kept:
            self.kept[id(tensor)] = tensor, self.count
            self.count += 1
        return self.kept[id(tensor)][1]

    def set(self, tensor: torch.Tensor, number: int) -> None:
        """Gives a tensor, which is new, a number of those that a part has."""
        self.kept[id(tensor)] = tensor, number

    def same(self, tensor: torch.Tensor, other: torch.Tensor) -> None:
        """Gives a tensor, which is new, the number of another that it stands for."""
        self.kept[id(tensor)] = tensor, self.of(other)


# What most functions are given.
_LEAVES = {torch.Tensor, torch.dtype, torch.device, int, float, bool, str, type(None)}


# What only looks at a tensor, mostly: numbers made of sizes are compared where they are used.
LOOKING = {
    *("__get__", "size", "dim", "numel", "nelement", "stride", "__len__", "ndimension"),
    *("is_floating_point", "is_complex", "is_contiguous", "get_device", "element_size"),
}


class Run(TorchFunctionMode, ABC):
    """A run that looks away while it is `resting`."""

    def __init__(self) -> None:
        super().__init__()
        self._resting = False

    def with_values(self, nest: Any) -> Any:
        """`nest` with what is read of Keras's variables in place of them."""
        kind = type(nest)
        if kind in _LEAVES:
            return nest
        if kind is tuple or kind is list:
            return kind([self.with_values(entry) for entry in nest])
        if kind is dict:
            return {name: self.with_values(entry) for name, entry in nest.items()}
        if isinstance(nest, keras.Variable):
            with self:  # reading may cast, which is to be seen
                return nest.value
        return nest

    def called(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the function gives, which is another tensor on shards where it is on the whole."""
        result = func(*args, **kwargs)
        if name_of(func) == "contiguous" and result is args[0]:
            return result.view_as(result)  # whether it is depends on sizes of 1
        return result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._resting:
            return func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in LOOKING:  # nine of ten calls
            looked = func(*args, **(kwargs or {}))
            if not tensors_in(looked):
                return looked
        return self.seen(func, *self.with_values((args, kwargs or {})))

    @abstractmethod
    def seen(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls a function, and looks at it."""

    @property
    def is_resting(self) -> bool:
        """Whether it looks away."""
        return self._resting

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """While open, nothing is looked at."""
        before, self._resting = self._resting, True
        try:
            yield
        finally:
            self._resting = before


class Whole(Run):
    """The run on the whole; see the module.

    Attributes:
        events: what was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.numbers = Numbers()

    def seen(self, func: Any, args: Any, kwargs: Any) -> Any:
        """See `Run.seen`."""
        given = tensors_in((args, kwargs))
        before = [tuple(t.shape) for t in given]
        result = self.called(func, args, kwargs)
        out = tensors_in(result)
        if out:
            self.note(name_of(func), values_in((args, kwargs)), given, out, before)
        return result

    def note(
        self,
        name: str,
        values: Any,
        given: list[torch.Tensor],
        out: list[torch.Tensor],
        shapes: list[Shape] | None = None,
    ) -> None:
        """Writes down one function."""
        self.events.append(
            Event(
                name,
                values,
                [self.numbers.of(t) for t in given],
                [tuple(t.shape) for t in given] if shapes is None else shapes,
                [tuple(t.shape) for t in out],
                [t.dtype for t in out],
                [self.numbers.of(t) for t in out],
            )
        )


def name_of(func: Any) -> str:
    """What torch calls a function."""
    return str(getattr(func, "__name__", func))


def values_in(nest: Any) -> Any:
    """`nest` with all tensors alike, to compare the rest."""
    if isinstance(nest, torch.Tensor):
        return "tensor"
    if isinstance(nest, tuple | list):
        return tuple(values_in(entry) for entry in nest)
    if isinstance(nest, dict):
        return {name: values_in(entry) for name, entry in nest.items()}
    return nest
