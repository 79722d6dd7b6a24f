"""Calls of layers within a dry run that are like others before, and need not be made again.

Of a call on the whole it is written down what functions it calls (`keras_tp.dry_runs.Part`), and in
another that is like it the same are called. What a call on shards does follows from what is
handed to it, and from what was decided of layers and weights in it. Whether two layers are alike
is told by all that their code can go by (`keras_tp.seam.likeness`). A call that touches anything
else is made each time: a tensor from elsewhere, a loss, a weight that it writes, what it leaves
in a layer or in what it was given. So is one in which something is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from keras_tp.alike import (
    Alike,
    Effect,
    PartCall,
    Places,
    Record,
    frame_of,
    given_again,
    keeps_to_itself,
    leaves_of,
    look_of,
    part_of,
    place_of,
    told_of,
    with_masks,
)
from keras_tp.dry_runs import Frame, Whole
from keras_tp.flows import tensors_in
from keras_tp.seam.likeness import Looked
from keras_tp.seam.rehearsals import assigned_so_far, times_written
from keras_tp.shard_runs import Local

if TYPE_CHECKING:
    from keras_tp.rehearsal import Rehearsal


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

    def _call_of(self, layer: Any, args: Any, kwargs: Any) -> PartCall | None:
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
        kind = self._kind_of(looked, args, kwargs), *map(look_of, given)
        return PartCall(looked, kind, given, [*given, *tensors], members, numbers)

    def _kind_of(self, looked: Looked, args: Any, kwargs: Any) -> Any:
        return self.alike.likeness.kind_of_call(
            looked, args, kwargs, lambda value: self.roles.get(id(value))
        )

    def _is_as_before(self, call: PartCall, layer: Any, args: Any, kwargs: Any) -> bool:
        looked = self.alike.likeness.of(layer)
        after = self._kind_of(looked, args, kwargs), *map(look_of, call.given)
        return bool(after == call.kind)

    def _on_the_whole(
        self, watch: Whole, layer: Any, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        call = self._call_of(layer, args, kwargs)
        frame = None if call is None else frame_of(call, watch.numbers)
        if call is None or frame is None:
            return original(*args, **kwargs)
        record = self.alike.records.get(call.kind)
        if record is None and call.kind in self.alike.records:
            return original(*args, **kwargs)
        if record is not None:
            watch.events.append(part_of(layer, record, frame))
            watch.numbers.count += record.count
            return given_again(record.result, call, frame, watch)[0]
        before, watch.events = watch.events, []
        state = self._traces(call)
        try:
            result = original(*args, **kwargs)
        finally:
            events, watch.events = watch.events, before
            before += events
        if state == self._traces(call) and self._is_as_before(call, layer, args, kwargs):
            told = told_of(result, call, frame, watch)
            if told is not None and events and keeps_to_itself(events, frame.outer):
                count = watch.numbers.count - frame.first
                record = Record(events, frame, count, told)
                before[len(before) - len(events) :] = [part_of(layer, record, frame)]
        self.alike.records[call.kind] = record
        return result

    def _traces(self, call: PartCall) -> Any:
        return len(self.losses), len(assigned_so_far()), times_written(call.known)

    def _on_shards(
        self, watch: Local, layer: Any, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        part = watch.next_part()
        if part is None or part.layer is not layer:
            return original(*args, **kwargs)
        call = self._call_of(layer, args, kwargs)
        if call is None:
            return original(*args, **kwargs)
        frame = frame_of(call, watch.numbers)
        flows = [flow for t in call.given if (flow := watch.flows.get(id(t))) is not None]
        if part.frames[1] != frame or len(flows) < len(call.given):
            return original(*args, **kwargs)
        places = Places(call, flows)
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

    def _key(self, watch: Local, call: PartCall, places: Places) -> Any:
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

    def _state(self, watch: Local, call: PartCall) -> Any:
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
        call: PartCall,
        places: Places,
        frame: Frame,
        before: Any,
    ) -> Effect | None:
        """What was done; None if it cannot be told by places."""
        run = self.rehearsal
        unchanged, (draws, started, count), summed, readers = before
        told = told_of(result, call, frame, watch)
        if told is None or unchanged != self._state(watch, call)[0]:
            return None
        reading = [(n, run.readers[n]) for n, old in readers.items() if run.readers[n] != old]
        reading += islice(run.readers.items(), count, None)
        place = {number: i for i, number in enumerate(call.members)}
        try:
            return Effect(
                told,
                [
                    None if look is None else places.coded(watch.flow_of(leaf))
                    for leaf, (*_, look) in zip(leaves_of(result), told.leaves, strict=True)
                ],
                [(place[n], run.taken[n]) for n in call.members if n in run.taken],
                [place[n] for n in call.members if n in run.handed],
                [(*place_of(n, frame), [place[m] for m in ms if m in place]) for n, ms in reading],
                list(run.draws[draws:]),
                [places.weight(n) for n in sorted(watch.summed - summed)],
                [place[n] for n in islice(watch.started, started, None)],
            )
        except KeyError:
            return None

    def _repeated(
        self,
        watch: Local,
        effect: Effect,
        call: PartCall,
        places: Places,
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
        result, leaves = given_again(effect.result, call, frame, watch)
        for tensor, flow in zip(leaves, effect.flows, strict=True):
            if flow is not None:
                watch.flows[id(tensor)] = places.decoded(flow)
        return result
