"""The run on one rank's shards, of two by which `keras_tp.dry_runs` sees what code does."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from keras_tp.dims import RULES, SIZED, UNIFORM
from keras_tp.dry_runs import Event, LostTrack, Numbers, Part, Run, name_of, values_in
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


class Local(Run):
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
        self.numbers = Numbers()
        self.flows: dict[int, Flow] = {}
        self.refused: dict[int, str] = {}
        self.summed: set[int] = set()
        self.mixed: set[int] = set()
        self.started: dict[int, None] = {}  # in their order

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
            self.started |= dict.fromkeys(sorted(flow.origins))

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

    def refuse_last(self, numbers: Set[int], count: int, reason: str) -> None:
        """Has outputs among `numbers` be gathered: the last that became shards, or else all."""
        begun = [number for number in self.started if number in numbers]
        self.refused |= dict.fromkeys(begun[-count:] or numbers, reason)

    def next_event(self, name: str, given: list[torch.Tensor]) -> Event:
        """The event of the other run that this one must be.

        Raises:
            LostTrack: it is another.
        """
        while self.next_part() is not None:
            self.look_inside()
        if self.position == len(self.events):
            raise LostTrack(f"on shards it goes on, with {name}")
        event = self.events[self.position]
        self.position += 1
        if event.name != name or event.wiring != [self.numbers.of(t) for t in given]:
            raise LostTrack(f"on shards it calls {name} where it calls {event.name} on the whole")
        return event

    def next_part(self) -> Part | None:
        """The call of a layer that comes next, if one was written down as such."""
        event = self.events[self.position] if self.position < len(self.events) else None
        return event if isinstance(event, Part) else None

    def look_inside(self) -> None:
        """Has the functions that are called in the next part come next."""
        part, at = self.next_part(), self.position
        assert part is not None
        self.events = [*self.events[:at], *part.expanded(), *self.events[at + 1 :]]

    def seen(self, func: Any, args: Any, kwargs: Any) -> Any:
        """See `Run.seen`."""
        given = tensors_in((args, kwargs))
        failure = None
        try:
            result = self.called(func, args, kwargs)
            out = tensors_in(result)
        except Exception as error:  # what cannot be done on shards is done on the whole
            failure, result, out = error, None, []
        if not out and failure is None:
            local = [flow for flow in map(self.flow_of, given) if flow.local]
            if local:
                self.refuse(local, f"{name_of(func)} cannot be followed")
            return result
        event = self.next_event(name_of(func), given)
        flows = [self.flow_of(t) for t in given]
        self.check_gradients(given)
        if failure is not None:
            if not any(flow.local for flow in flows):
                raise LostTrack(f"{event.name} fails on shards: {failure}") from failure
            self.refuse(flows, f"{event.name} cannot be computed on shards")
            return self._as_on_the_whole(event)
        if _numbers(event.name, values_in((args, kwargs))) != _numbers(event.name, event.values):
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

    def check_gradients(self, given: list[torch.Tensor]) -> None:
        """Refuses shards that come from functions whose gradients are the user's own code."""
        for tensor in given:
            flow = self.flow_of(tensor)
            if flow.local and isinstance(tensor.grad_fn, BackwardCFunction):
                self.refuse([flow], f"{tensor.grad_fn.name()} is a gradient of its own")

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
        if "out" in kwargs:
            raise Unproven(f"{event.name} writes into another tensor")
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
        elif event.name in UNIFORM:
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


def _numbers(name: str, values: Any) -> Any:
    """What of the numbers that a function is given has to be the same on shards."""
    if name == "full":
        positional, named = values
        return positional[1:2] or named.get("fill_value")
    return None if name in SIZED else values


def _is_elementwise(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    with Operations() as seen:
        func(*args, **kwargs)
    return seen.elementwise
