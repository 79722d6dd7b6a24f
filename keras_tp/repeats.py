"""Calls of layers within a dry run that are like others before, and need not be made again.

Of a call on the whole it is written down what functions it calls (`keras_tp.dry_runs.Part`), and in
another that is like it the same are called. What a call on shards does follows from what is
handed to it, and from what was decided of layers and weights in it. Whether two layers are alike
is told by all that their code can go by (`keras_tp.seam.likeness`). A call that touches anything
else is made each time: a tensor from elsewhere, a loss, a weight that it writes, what it leaves
in a layer or in what it was given. So is one in which something is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import keras
import torch
from torch.autograd.function import BackwardCFunction

from keras_tp.dry_runs import Event, Frame, Numbers, Part, Whole
from keras_tp.flows import Flow, tensors_in
from keras_tp.seam.likeness import Likeness, Looked
from keras_tp.seam.rehearsals import assigned_so_far, keras_mask
from keras_tp.shard_runs import Local

if TYPE_CHECKING:
    from keras_tp.rehearsal import Rehearsal

# Shape and strides of a tensor, its dtype, and whether there is a gradient.
Look = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]


@dataclass(frozen=True)
class _Result:
    """What a call gave.

    Attributes:
        structure: the nest, of whatever leaves.
        leaves: of each its value; of a tensor its place among those that the call had, or else
            the number that it got in the call, and how it looks.
    """

    structure: Any
    leaves: list[tuple[Any, int | None, int, Look | None]]


@dataclass(frozen=True)
class _Record:
    """A call on the whole."""

    events: list[Event]
    frame: Frame
    count: int
    result: _Result


@dataclass(frozen=True)
class _Effect:
    """What a call on shards has done, where layers and weights are told by their places."""

    result: _Result
    flows: list[Flow | None]
    taken: list[tuple[int, bool]]
    handed: list[int]
    readers: list[tuple[int | None, int, list[int]]]
    draws: list[int | None]
    summed: list[int]
    started: list[int]


@dataclass
class Alike:
    """What is known of calls that are alike, in dry runs of one model."""

    likeness: Likeness
    records: dict[Any, _Record | None] = field(default_factory=dict)
    effects: dict[Any, _Effect] = field(default_factory=dict)


@dataclass
class _Call:
    """A call of a layer, in one run.

    Attributes:
        looked: the layer and all below it.
        kind: what it has in common with all that are alike.
        known: the tensors that it is given, and its weights.
        given: the former.
        members: numbers of those of the rehearsal's members that are in it.
        weights: numbers of its weights.
    """

    looked: Looked
    kind: Any
    given: list[torch.Tensor]
    known: list[torch.Tensor]
    members: list[int]
    weights: list[int]


class Repeats:
    """Takes the place of calls of layers in one dry run.

    Args:
        rehearsal: the run.
        alike: what is known.
        weights: of each variable, by identity, its number and what is read of it.
        losses: that were added so far.
    """

    def __init__(
        self,
        rehearsal: Rehearsal,
        alike: Alike,
        weights: dict[int, tuple[int, torch.Tensor]],
        losses: list[torch.Tensor],
    ):
        self.rehearsal = rehearsal
        self.alike = alike
        self.weights = weights
        self.losses = losses
        self.weight_ids = {id(tensor) for _, tensor in weights.values()}
        self.members = {id(m.layer): m for m in rehearsal.request.members}
        request = rehearsal.request
        self.roles: dict[int, Any] = dict.fromkeys(request.cut, "cut")
        self.roles |= {id(m.layer): (m.style, m.lookup) for m in request.members}

    def gate(self, layer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        """What is to be called in place of a layer's `call`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            watch = self.rehearsal.watch
            if watch.is_resting:
                return original(*args, **kwargs)
            if isinstance(watch, Whole):
                return self._on_the_whole(watch, layer, original, args, kwargs)
            return self._on_shards(watch, layer, original, args, kwargs)

        return call

    def _call_of(self, layer: Any, args: Any, kwargs: Any) -> _Call | None:
        """What a call has to go by; None if that is not all known."""
        looked = self.alike.likeness.of(layer)
        variables = [self.weights.get(id(v)) for v in looked.variables]
        given = with_masks(tensors_in((args, kwargs)))
        if any(v is None for v in variables) or not self.weight_ids.isdisjoint(map(id, given)):
            return None
        written = assigned_so_far()
        if written and not {id(v) for v in looked.variables}.isdisjoint(written):
            return None
        members = [self.members[i].number for i in map(id, looked.owned) if i in self.members]
        tensors = [tensor for _, tensor in variables]  # type: ignore[misc]
        numbers = [number for number, _ in variables]  # type: ignore[misc]
        kind = self._kind_of(looked, args, kwargs), *map(_look_of, given)
        return _Call(looked, kind, given, [*given, *tensors], members, numbers)

    def _kind_of(self, looked: Looked, args: Any, kwargs: Any) -> Any:
        return self.alike.likeness.kind_of_call(
            looked, args, kwargs, lambda value: self.roles.get(id(value))
        )

    def _is_as_before(self, call: _Call, layer: Any, args: Any, kwargs: Any) -> bool:
        looked = self.alike.likeness.of(layer)
        after = self._kind_of(looked, args, kwargs), *map(_look_of, call.given)
        return bool(after == call.kind)

    def _on_the_whole(
        self, watch: Whole, layer: Any, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        call = self._call_of(layer, args, kwargs)
        frame = None if call is None else _frame_of(call, watch.numbers)
        if call is None or frame is None:
            return original(*args, **kwargs)
        record = self.alike.records.get(call.kind)
        if record is None and call.kind in self.alike.records:
            return original(*args, **kwargs)
        if record is not None:
            watch.events.append(_part(layer, record, frame))
            watch.numbers.count += record.count
            return _again(record.result, call, frame, watch)[0]
        before, watch.events = watch.events, []
        state = self._traces(call)
        try:
            result = original(*args, **kwargs)
        finally:
            events, watch.events = watch.events, before
            before += events
        if state == self._traces(call) and self._is_as_before(call, layer, args, kwargs):
            told = _told(result, call, frame, watch)
            if told is not None and events and _keeps_to_itself(events, frame.outer):
                count = watch.numbers.count - frame.first
                record = _Record(events, frame, count, told)
                before[len(before) - len(events) :] = [_part(layer, record, frame)]
        self.alike.records[call.kind] = record
        return result

    def _traces(self, call: _Call) -> Any:
        versions = [tensor._version for tensor in call.known]
        return len(self.losses), len(assigned_so_far()), versions

    def _on_shards(
        self, watch: Local, layer: Any, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        part = watch.next_part()
        if part is None or part.layer is not layer:
            return original(*args, **kwargs)
        call = self._call_of(layer, args, kwargs)
        if call is None:
            return original(*args, **kwargs)
        frame = _frame_of(call, watch.numbers)
        flows = [flow for t in call.given if (flow := watch.flows.get(id(t))) is not None]
        if part.frames[1] != frame or len(flows) < len(call.given):
            return original(*args, **kwargs)
        places = _Places(call, flows)
        key = self._key(watch, call, places)
        effect = self.alike.effects.get(key)
        if effect is not None:
            watch.position += 1
            watch.numbers.count += part.count
            return self._repeated(watch, effect, call, places, frame)
        watch.look_inside()
        after = len(watch.events) - watch.position - len(part.events)
        state, seen = self._traces(call), self._state(watch, call)
        result = original(*args, **kwargs)
        if (
            len(watch.events) - watch.position == after
            and watch.numbers.count == frame.first + part.count
            and state == self._traces(call)
            and self._is_as_before(call, layer, args, kwargs)
        ):
            effect = self._effect(watch, result, call, places, frame, seen)
            if effect is not None:
                self.alike.effects[key] = effect
        return result

    def _key(self, watch: Local, call: _Call, places: _Places) -> Any:
        """All that decides what a call on shards does."""
        run = self.rehearsal
        weights = [*call.weights, *places.weights]
        return (
            call.kind,
            run.request.parts,
            run.divided,
            tuple(map(places.coded, places.flows)),
            tuple(
                (n in run.refused, n in run.handed, n in watch.started, run.taken.get(n))
                for n in call.members
            ),
            tuple((n in run.summed, n in watch.summed, n in watch.mixed) for n in weights),
        )

    def _state(self, watch: Local, call: _Call) -> Any:
        run = self.rehearsal
        flows = [watch.flows.get(id(t)) for t in call.known]
        numbers = [n for n in map(watch.numbers.of, call.known) if n in run.readers]
        return (
            (flows, len(watch.refused), len(watch.mixed)),
            (len(run.draws), len(watch.started), len(run.readers)),
            set(watch.summed),
            {n: list(run.readers[n]) for n in numbers},
        )

    def _effect(
        self,
        watch: Local,
        result: Any,
        call: _Call,
        places: _Places,
        frame: Frame,
        before: Any,
    ) -> _Effect | None:
        """What was done; None if it cannot be told by places."""
        run = self.rehearsal
        unchanged, (draws, started, count), summed, readers = before
        told = _told(result, call, frame, watch)
        if told is None or unchanged != self._state(watch, call)[0]:
            return None
        reading = [(n, run.readers[n]) for n, old in readers.items() if run.readers[n] != old]
        reading += islice(run.readers.items(), count, None)
        place = {number: i for i, number in enumerate(call.members)}
        try:
            return _Effect(
                told,
                [
                    None if look is None else places.coded(watch.flow_of(leaf))
                    for leaf, (*_, look) in zip(_flat(result), told.leaves, strict=True)
                ],
                [(place[n], run.taken[n]) for n in call.members if n in run.taken],
                [place[n] for n in call.members if n in run.handed],
                [(*_place_of(n, frame), [place[m] for m in ms if m in place]) for n, ms in reading],
                list(run.draws[draws:]),
                [places.weight(n) for n in sorted(watch.summed - summed)],
                [place[n] for n in islice(watch.started, started, None)],
            )
        except KeyError:
            return None

    def _repeated(
        self,
        watch: Local,
        effect: _Effect,
        call: _Call,
        places: _Places,
        frame: Frame,
    ) -> Any:
        run, members = self.rehearsal, call.members
        run.taken.update({members[i]: taken for i, taken in effect.taken})
        run.handed.update(members[i] for i in effect.handed)
        watch.started |= dict.fromkeys(members[i] for i in effect.started)
        for given, new, reading in effect.readers:
            number = frame.first + new if given is None else frame.outer[given]
            readers = run.readers.setdefault(number, [])
            readers += [n for n in (members[i] for i in reading) if n not in readers]
        run.draws += effect.draws
        watch.summed |= {places.weight_at(i) for i in effect.summed}
        result, leaves = _again(effect.result, call, frame, watch)
        for tensor, flow in zip(leaves, effect.flows, strict=True):
            if flow is not None:
                watch.flows[id(tensor)] = places.decoded(flow)
        return result


class _Places:
    """What flows of tensors that a call is given come from, by places: 0, 1, ...

    What is in the call has negative ones: -1, -2, ...
    """

    def __init__(self, call: _Call, flows: Sequence[Flow]):
        self.flows = flows
        inside = {n: -1 - i for i, n in enumerate(call.members)}
        weights = {n: -1 - i for i, n in enumerate(call.weights)}
        self.inside, self.own = call.members, call.weights
        origins = {n for flow in self.flows for n in flow.origins} - inside.keys()
        others = {n for flow in self.flows for n in flow.weights or ()} - weights.keys()
        self.origins, self.weights = sorted(origins), sorted(others)
        self._origin = inside | {n: i for i, n in enumerate(self.origins)}
        self._weight = weights | {n: i for i, n in enumerate(self.weights)}

    def coded(self, flow: Flow) -> Flow:
        """A flow by places."""
        weights = flow.weights
        if not flow.origins and not weights:
            return flow
        return replace(
            flow,
            origins=frozenset(self._origin[n] for n in flow.origins),
            weights=None if weights is None else frozenset(self._weight[n] for n in weights),
        )

    def decoded(self, flow: Flow) -> Flow:
        """A flow of this call, of one by places."""
        weights = flow.weights
        if not flow.origins and not weights:
            return flow
        return replace(
            flow,
            origins=frozenset(
                self.origins[i] if i >= 0 else self.inside[-1 - i] for i in flow.origins
            ),
            weights=None if weights is None else frozenset(map(self.weight_at, weights)),
        )

    def weight(self, number: int) -> int:
        """The place of a weight."""
        return self._weight[number]

    def weight_at(self, place: int) -> int:
        """The weight in a place."""
        return self.weights[place] if place >= 0 else self.own[-1 - place]


def name_of_member(number: int) -> str:
    """What a layer is called here that is not computed."""
    return f"layer {number}"


def with_masks(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors, and the masks that Keras has put on them."""
    return [t for tensor in tensors for t in (tensor, keras_mask(tensor)) if t is not None]


def is_plain(result: Any) -> bool:
    """Whether there is nothing in what a call gave but tensors and plain values."""
    return all(isinstance(x, torch.Tensor | bool | int | float | str | None) for x in _flat(result))


def _flat(result: Any) -> list[Any]:
    return list(keras.tree.flatten(result))


def _look_of(tensor: torch.Tensor) -> tuple[Look, bool]:
    look = tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad
    return look, isinstance(tensor.grad_fn, BackwardCFunction)


def _frame_of(call: _Call, numbers: Numbers) -> Frame | None:
    """Where numbers begin; None if not all that a call has has one."""
    known = [numbers.kept.get(id(tensor)) for tensor in call.known]
    outer = [entry[1] for entry in known if entry is not None]
    if len(outer) < len(known):
        return None
    return Frame(numbers.count, outer, [name_of_member(n) for n in call.members])


def _part(layer: Any, record: _Record, frame: Frame) -> Part:
    name = f"the call of a {type(layer).__name__}"
    frames = record.frame, frame
    return Part(name, None, [], [], [], [], [], layer, record.events, frames, record.count)


def _keeps_to_itself(events: Iterable[Event], outer: Iterable[int]) -> bool:
    """Whether functions are given nothing but what a call has, and what they make of it."""
    known = set(outer)
    for event in events:
        if isinstance(event, Part):
            frame = event.frames[1]
            if not known.issuperset(frame.outer):
                return False
            known.update(range(frame.first, frame.first + event.count))
        else:
            if not known.issuperset(event.wiring):
                return False
            known.update(event.made)
    return True


def _told(result: Any, call: _Call, frame: Frame, watch: Whole | Local) -> _Result | None:
    """What a call gave; None if another could not give the same."""
    if not is_plain(result):
        return None
    place = {id(tensor): i for i, tensor in enumerate(call.known)}
    leaves: list[tuple[Any, int | None, int, Look | None]] = []
    for leaf in _flat(result):
        if not isinstance(leaf, torch.Tensor):
            leaves.append((leaf, None, 0, None))
        elif id(leaf) in place:
            leaves.append((None, place[id(leaf)], 0, None))
        else:
            number = watch.numbers.kept.get(id(leaf), (leaf, -1))[1]
            look, own_gradient = _look_of(leaf)
            with watch.resting():
                as_it_lies = leaf.is_meta and _made(look).stride() == leaf.stride()
            if (
                number < frame.first
                or own_gradient
                or keras_mask(leaf) is not None
                or not as_it_lies
            ):
                return None
            leaves.append((None, None, number - frame.first, look))
    return _Result(keras.tree.map_structure(lambda leaf: None, result), leaves)


def _made(look: Look) -> torch.Tensor:
    shape, strides, dtype, gradient = look
    tensor = torch.empty_strided(shape, strides, dtype=dtype, device="meta", requires_grad=gradient)
    return tensor.clone() if gradient else tensor  # not a leaf, so that it may be written into


def _again(
    result: _Result, call: _Call, frame: Frame, watch: Whole | Local
) -> tuple[Any, list[Any]]:
    """What a call gives that is like another, and its leaves."""
    new: dict[int, torch.Tensor] = {}
    leaves = []
    with watch.resting():
        for value, place, number, look in result.leaves:
            if place is not None:
                value = call.known[place]
            elif look is not None:
                if number not in new:
                    new[number] = _made(look)
                    watch.numbers.set(new[number], frame.first + number)
                value = new[number]
            leaves.append(value)
    return keras.tree.pack_sequence_as(result.structure, leaves), leaves


def _place_of(number: int, frame: Frame) -> tuple[int | None, int]:
    """The place of a tensor among those that a call has, or else its number in the call."""
    if number < frame.first:
        return frame.outer.index(number), 0
    return None, number - frame.first
