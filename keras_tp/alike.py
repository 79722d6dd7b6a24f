"""Calls of layers that are alike, in dry runs: what they have, and what they give, by places.

Tensors, layers and weights of a call are told by their places in it, so that what is known of one
call is known of another that is like it (`keras_tp.repeats`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import torch
from torch.autograd.function import BackwardCFunction

from keras_tp.dry_runs import Event, Frame, Numbers, Part, Whole
from keras_tp.flows import Flow
from keras_tp.seam.likeness import Likeness, Looked
from keras_tp.seam.masks import keras_mask
from keras_tp.shard_runs import Local

# Shape and strides of a tensor, its dtype, and whether there is a gradient.
Look = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]


@dataclass(frozen=True)
class Result:
    """What a call gave.

    Attributes:
        structure: the nest, of whatever leaves.
        leaves: of each its value; of a tensor its place among those that the call had, or else
            the number that it got in the call, and how it looks.
    """

    structure: Any
    leaves: list[tuple[Any, int | None, int, Look | None]]


@dataclass(frozen=True)
class Record:
    """A call on the whole."""

    events: list[Event]
    frame: Frame
    count: int
    result: Result


@dataclass(frozen=True)
class Effect:
    """What a call on shards has done, where layers and weights are told by their places."""

    result: Result
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
    records: dict[Any, Record | None] = field(default_factory=dict)
    effects: dict[Any, Effect] = field(default_factory=dict)


@dataclass
class PartCall:
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


class Places:
    """What flows of tensors that a call is given come from, by places: 0, 1, ...

    What is in the call has negative ones: -1, -2, ...
    """

    def __init__(self, call: PartCall, flows: Sequence[Flow]):
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
    return all(
        isinstance(x, torch.Tensor | bool | int | float | str | None) for x in leaves_of(result)
    )


def leaves_of(result: Any) -> list[Any]:
    """What is in a nest."""
    return list(keras.tree.flatten(result))


def look_of(tensor: torch.Tensor) -> tuple[Look, bool]:
    """How a tensor looks, and whether its gradient is the user's own code."""
    look = tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad
    return look, isinstance(tensor.grad_fn, BackwardCFunction)


def frame_of(call: PartCall, numbers: Numbers) -> Frame | None:
    """Where numbers begin; None if not all that a call has has one."""
    known = [numbers.kept.get(id(tensor)) for tensor in call.known]
    outer = [entry[1] for entry in known if entry is not None]
    if len(outer) < len(known):
        return None
    return Frame(numbers.count, outer, [name_of_member(n) for n in call.members])


def part_of(layer: Any, record: Record, frame: Frame) -> Part:
    """A call of a layer that is known."""
    name = f"the call of a {type(layer).__name__}"
    frames = record.frame, frame
    return Part(name, None, [], [], [], [], [], layer, record.events, frames, record.count)


def keeps_to_itself(events: Iterable[Event], outer: Iterable[int]) -> bool:
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


def told_of(result: Any, call: PartCall, frame: Frame, watch: Whole | Local) -> Result | None:
    """What a call gave; None if another could not give the same."""
    if not is_plain(result):
        return None
    place = {id(tensor): i for i, tensor in enumerate(call.known)}
    leaves: list[tuple[Any, int | None, int, Look | None]] = []
    for leaf in leaves_of(result):
        if not isinstance(leaf, torch.Tensor):
            leaves.append((leaf, None, 0, None))
        elif id(leaf) in place:
            leaves.append((None, place[id(leaf)], 0, None))
        else:
            number = watch.numbers.kept.get(id(leaf), (leaf, -1))[1]
            look, own_gradient = look_of(leaf)
            with watch.resting():
                as_it_lies = leaf.is_meta and made_like(look).stride() == leaf.stride()
            if (
                number < frame.first
                or own_gradient
                or keras_mask(leaf) is not None
                or not as_it_lies
            ):
                return None
            leaves.append((None, None, number - frame.first, look))
    return Result(keras.tree.map_structure(lambda leaf: None, result), leaves)


def made_like(look: Look) -> torch.Tensor:
    """A new tensor that looks so."""
    shape, strides, dtype, gradient = look
    tensor = torch.empty_strided(shape, strides, dtype=dtype, device="meta", requires_grad=gradient)
    return tensor.clone() if gradient else tensor  # not a leaf, so that it may be written into


def given_again(
    result: Result, call: PartCall, frame: Frame, watch: Whole | Local
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
                    new[number] = made_like(look)
                    watch.numbers.set(new[number], frame.first + number)
                value = new[number]
            leaves.append(value)
    return keras.tree.pack_sequence_as(result.structure, leaves), leaves


def place_of(number: int, frame: Frame) -> tuple[int | None, int]:
    """The place of a tensor among those that a call has, or else its number in the call."""
    if number < frame.first:
        return frame.outer.index(number), 0
    return None, number - frame.first
