"""Two runs of the same code on tensors without values: on the whole, and on one rank's shards.

`Whole` writes down every torch function that is called and the shapes it gives.
`Local` calls the same code again, in which layers now hand on shards, and follows
them: the same functions have to come in the same order, with the same numbers
and tensors, and each must compute on the shard what it computes on the whole
(`keras_tp.dims`). Whatever the code looks like, layers of Keras's or the user's own
Python, it is seen as it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import torch
from torch.overrides import TorchFunctionMode

from keras_tp.dims import RULES, SIZED
from keras_tp.flows import (
    Applied,
    Flow,
    Operations,
    Unproven,
    elementwise,
    even,
    joined,
    tensors_in,
    without_gradient,
)
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
    """

    name: str
    values: Any
    wiring: list[int]
    given: list[Shape]
    out: list[Shape]
    dtypes: list[torch.dtype]


@dataclass
class _Numbers:
    """Numbers tensors as they are first seen, and keeps them, so that no number comes again."""

    kept: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def of(self, tensor: torch.Tensor) -> int:
        return self.kept.setdefault(id(tensor), (tensor, len(self.kept)))[1]


class _Run(TorchFunctionMode):
    """A run that looks away while it is `resting`."""

    def __init__(self) -> None:
        super().__init__()
        self._resting = False

    def _with_values(self, nest: Any) -> Any:
        """`nest` with what is read of Keras's variables in place of them."""
        if isinstance(nest, keras.Variable):
            with self:  # reading may cast, which is to be seen
                return nest.value
        if type(nest) in (tuple, list):
            return type(nest)(self._with_values(entry) for entry in nest)
        if type(nest) is dict:
            return {name: self._with_values(entry) for name, entry in nest.items()}
        return nest

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


class Whole(_Run):
    """The run on the whole; see the module.

    Attributes:
        events: what was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.numbers = _Numbers()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._resting:
            return func(*args, **kwargs)
        args, kwargs = self._with_values((args, kwargs))
        given = tensors_in((args, kwargs))
        before = [tuple(t.shape) for t in given]
        result = func(*args, **kwargs)
        out = tensors_in(result)
        if out:
            self.note(_name(func), _values((args, kwargs)), given, out, before)
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
        wiring = [self.numbers.of(t) for t in given]
        self.events.append(
            Event(
                name,
                values,
                wiring,
                [tuple(t.shape) for t in given] if shapes is None else shapes,
                [tuple(t.shape) for t in out],
                [t.dtype for t in out],
            )
        )
        for tensor in out:
            self.numbers.of(tensor)


class Local(_Run):
    """The run on one rank's shards; see the module.

    Args:
        events: of the run on the whole.
        parts: number of ranks.

    Attributes:
        refused: numbers of layers whose output has to be gathered, each with the reason.
        summed: numbers of weights whose gradients have to be summed over the ranks.
        mixed: numbers of weights that are used on shards and on whole tensors alike.
    """

    def __init__(self, events: list[Event], parts: int):
        super().__init__()
        self.events = events
        self.parts = parts
        self.position = 0
        self.numbers = _Numbers()
        self.flows: dict[int, Flow] = {}
        self.refused: dict[int, str] = {}
        self.summed: set[int] = set()
        self.mixed: set[int] = set()
        self.started: set[int] = set()

    def flow_of(self, tensor: torch.Tensor) -> Flow:
        """What is known of a tensor; one from elsewhere is a constant, if it has values.

        Raises:
            LostTrack: it was made where nobody looked.
        """
        flow = self.flows.get(id(tensor))
        if flow is None:
            if tensor.is_meta:
                raise LostTrack("a tensor comes from a place that cannot be followed")
            flow = Flow(grad=tensor.requires_grad, weights=None)
        return flow

    def set_flow(self, tensor: torch.Tensor, flow: Flow) -> None:
        """Says what the ranks hold of a tensor."""
        self.numbers.of(tensor)
        self.flows[id(tensor)] = flow
        if flow.dim is not None:
            self.started |= flow.origins

    def refuse(self, flows: list[Flow], reason: str) -> None:
        """Has the outputs be gathered that shards with these flows come from."""
        partial = [flow for flow in flows if flow.partial]
        for flow in partial:
            self.mixed |= flow.weights or frozenset()
        origins = {o for flow in flows for o in flow.origins}
        if not origins and not partial:  # what shards have led to it is not known
            origins = set(self.started)
            if not origins:
                raise LostTrack(reason)
        for origin in origins:
            self.refused.setdefault(origin, reason)

    def next_event(self, name: str, given: list[torch.Tensor]) -> Event:
        """The event of the other run that this one must be.

        Raises:
            LostTrack: it is another.
        """
        if self.position == len(self.events):
            raise LostTrack(f"on shards it goes on, with {name}")
        event = self.events[self.position]
        self.position += 1
        if event.name != name or event.wiring != [self.numbers.of(t) for t in given]:
            raise LostTrack(f"on shards it calls {name} where it calls {event.name} on the whole")
        return event

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._resting:
            return func(*args, **kwargs)
        args, kwargs = self._with_values((args, kwargs))
        given = tensors_in((args, kwargs))
        failure = None
        try:
            result = func(*args, **kwargs)
            out = tensors_in(result)
        except Exception as error:  # what cannot be done on shards is done on the whole
            failure, result, out = error, None, []
        if not out and failure is None:
            return result
        event = self.next_event(_name(func), given)
        flows = [self.flow_of(t) for t in given]
        if failure is not None:
            if not any(flow.local for flow in flows):
                raise LostTrack(f"{event.name} fails on shards: {failure}") from failure
            self.refuse(flows, f"{event.name} cannot be computed on shards")
            return self._as_on_the_whole(event)
        if event.name not in SIZED and _values((args, kwargs)) != event.values:
            reason = f"{event.name} is given other numbers on shards"
            self.refuse([f for f in flows if f.local], reason)
        try:
            new = self._follow(func, args, kwargs, given, flows, out, event)
        except Unproven as reason:
            self.refuse(flows, str(reason))
            return self._as_on_the_whole(event, result)
        for tensor, flow in zip(out, new, strict=True):
            self.set_flow(tensor, flow)
        return result

    def _follow(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        given: list[torch.Tensor],
        flows: list[Flow],
        out: list[torch.Tensor],
        event: Event,
    ) -> list[Flow]:
        local = [tuple(t.shape) for t in out]
        if any(flow.local for flow in flows):
            self._sum_gradients(flows)
        dims: list[int | None] = [None] * len(out)
        if any(flow.dim is not None for flow in flows):
            full = dict(zip(map(id, given), event.given, strict=True))
            call = Applied(
                event.name,
                func,
                args,
                kwargs,
                self.flow_of,
                lambda t: full[id(t)],
                event.out,
                local,
            )
            rule = RULES.get(event.name)
            if rule is None:
                if not _is_elementwise(func, args, kwargs):
                    raise Unproven(f"{event.name} is not known to keep shards apart")
                rule = elementwise
            dims = list(rule(call))
        elif event.name in ("expand", "broadcast_to", "ones", "zeros", "full", "empty"):
            dims = [self._uniform(event, given, flows, local)]
        for dim, whole, part in zip(dims, event.out, local, strict=True):
            if part != (whole if dim is None else even(whole, dim, self.parts)):
                raise Unproven(f"{event.name} gives {part} where {whole} is cut")
        new = [joined(flows, dim) for dim in dims]
        no_gradient = event.name == "detach"
        return [
            without_gradient(flow) if no_gradient or not t.is_floating_point() else flow
            for flow, t in zip(new, out, strict=True)
        ]

    def _uniform(
        self, event: Event, given: list[torch.Tensor], flows: list[Flow], local: list[Shape]
    ) -> int | None:
        """Of what is the same all along a dim each rank may have its part."""
        (part,), (whole,) = local, event.out
        if part == whole or len(part) != len(whole):
            return None
        differing = [i for i, (p, w) in enumerate(zip(part, whole, strict=True)) if p != w]
        if len(differing) != 1:
            raise Unproven(f"{event.name} gives {part} for {whole}")
        if given:
            at = differing[0] - len(whole)
            if given[0].dim() >= -at and given[0].shape[at] != 1:
                raise Unproven(f"{event.name} of a whole tensor to a shard")
            if any(flow.grad for flow in flows):
                raise Unproven(f"{event.name} of what a gradient is wanted of")
        return differing[0]

    def _sum_gradients(self, flows: list[Flow]) -> None:
        """A whole tensor that meets shards has a gradient that is to be summed: a weight's can."""
        for flow in flows:
            if flow.grad and not flow.local:
                if not flow.weights or flow.weights & self.mixed:
                    raise Unproven("a shard meets a whole tensor whose gradient is not its own")
                self.summed |= flow.weights

    def _as_on_the_whole(self, event: Event, result: Any = None) -> Any:
        """What the function gives on the whole, to find what else is in the way."""
        made = [
            torch.empty(shape, dtype=dtype, device="meta")
            for shape, dtype in zip(event.out, event.dtypes, strict=True)
        ]
        for tensor in made:
            self.set_flow(tensor, Flow(grad=tensor.is_floating_point(), weights=None))
        if len(made) == 1 and not isinstance(result, tuple | list):
            return made[0]
        if result is None or len(made) != len(result):
            raise LostTrack(f"{event.name} cannot be computed on shards")
        return type(result)(made)


def _is_elementwise(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    with Operations() as seen:
        func(*args, **kwargs)
    return seen.elementwise


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _values(nest: Any) -> Any:
    """`nest` with all tensors alike, to compare the rest."""
    if isinstance(nest, torch.Tensor):
        return "tensor"
    if isinstance(nest, tuple | list):
        return tuple(_values(entry) for entry in nest)
    if isinstance(nest, dict):
        return {name: _values(entry) for name, entry in nest.items()}
    return nest
