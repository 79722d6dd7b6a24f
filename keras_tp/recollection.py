"""What was found in the call of a layer, for layers whose calls are alike.

A model's blocks mostly run the same code on the same shapes with the same settings. Of the first
it is proven what its layers may hand each other; of another it is known then, and need not be
called, as what it gives has the same shapes. Whether two are alike is asked of all that their
code can go by (`keras_tp.seam.likeness`). Whatever it has gone by besides (its own name, something
global) shows on the ranks, which look at each block's call themselves (`keras_tp.region_calls`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.tensor import Shard

from keras_tp.alike import is_plain, with_masks
from keras_tp.flows import tensors_in
from keras_tp.plans import Region, StylePlan
from keras_tp.rehearsal import Proof
from keras_tp.seam.layers import Owner, variables_of
from keras_tp.seam.likeness import Likeness, Looked
from keras_tp.seam.rehearsals import without_values


@dataclass
class Found:
    """What was found in a model.

    Attributes:
        regions: in the order in which they were found.
        proofs: of each, what was proven.
        heads: numbers of column layers whose output may stay a shard until the loss.
        reversed: numbers of tables that are called in reverse, for logits.
        reasons: for members that are in none, why not, by number.
        note: what the user should know; empty if nothing.
        settled: members of regions.
        tried: members that were looked at together.
        looked_at: members that were looked at.
    """

    regions: list[Region] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    heads: frozenset[int] = frozenset()
    reversed: frozenset[int] = frozenset()
    reasons: dict[int, str] = field(default_factory=dict)
    note: str = ""
    settled: set[int] = field(default_factory=set)
    tried: set[frozenset[int]] = field(default_factory=set)
    looked_at: set[int] = field(default_factory=set)
    _places: dict[tuple[str, int], Proof] = field(default_factory=dict)
    _leading: set[tuple[str, int]] = field(default_factory=set)
    _summed: dict[int, list[tuple[int, str]]] = field(default_factory=dict)

    def begin(self, numbers: frozenset[int]) -> bool:
        """Says that these members are looked at; False if they have been."""
        if numbers in self.tried:
            return False
        self.tried.add(numbers)
        self.looked_at |= numbers
        return True

    def add(self, region: Region, proof: Proof) -> None:
        """One more."""
        for number in region.members:
            self._places.setdefault((region.axis, number), proof)
        groups = [[n for n in group if n in region.members] for group in proof.readers]
        self._leading |= {(region.axis, group[0]) for group in groups if group}
        for i in region.summed:
            self._summed.setdefault(i, []).append((len(self.regions), region.axis))
        self.regions.append(region)
        self.proofs.append(proof)
        self.settled |= set(region.members)

    def styled(self, number: int, style: StylePlan) -> StylePlan:
        """A layer's style with what is handed to it and by it."""
        if number in self.heads and style.name in ("column", "vocabulary"):
            return replace(style, open=True)
        proof = self._places.get((style.axis, number))
        if proof is None:
            return style
        return replace(style, given=number in proof.taken, kept=number in proof.handed)

    def wants_gradient(self, number: int, style: StylePlan) -> bool:
        """Whether the gradient of what a column layer reads is summed by this layer.

        Where several read the same, the first does it for all.
        """
        if isinstance(style.input, Shard):
            return True  # what each slices off for itself has a gradient for each
        place = style.axis, number
        return place not in self._places or place in self._leading

    def summed(self, variables: Sequence[int]) -> list[tuple[str, int]]:
        """Axes along which gradients of weights are summed, with the weight."""
        found = [(n, i, axis) for i in variables for n, axis in self._summed.get(i, ())]
        return [(axis, i) for _, i, axis in sorted(found)]


@dataclass(frozen=True)
class _Known:
    """A call of a layer, and what was found in it."""

    below: list[Owner]
    given: list[torch.Tensor]
    result: Any
    places: list[int]  # in the model, of the layers below
    weights: list[int]
    found: list[tuple[Region, Proof]]
    reasons: dict[int, str]
    tried: list[frozenset[int]]


class Recollection:
    """Calls that have been looked at.

    Args:
        owners: the layers of the model.
        found: what is found, and added to.
        marks: what decides besides, of layers and variables, by identity.
        likeness: tells which are alike.
    """

    def __init__(
        self, owners: Sequence[Owner], found: Found, marks: Mapping[int, Any], likeness: Likeness
    ):
        self.found = found
        self.marks = marks
        self.likeness = likeness
        self.outermost = owners[0].layer
        self.place_of = {id(owner.layer): number for number, owner in enumerate(owners)}
        self.weight_of = {id(v): number for number, v in enumerate(variables_of(owners))}
        self.known: dict[Any, _Known] = {}

    def call(self, layer: Any, args: Any, kwargs: Any, look: Callable[[], Any]) -> Any:
        """What a call of a layer gives, which is looked at unless one like it has been.

        Args:
            layer: below the model, or the model.
            args, kwargs: of the call, without values.
            look: calls the layer, and adds to what is found.
        """
        if layer is self.outermost:
            return look()
        looked = self.likeness.of(layer)
        below = looked.below
        places = [self.place_of[id(owner.layer)] for owner in below]
        if not self.found.looked_at.isdisjoint(places):
            return look()
        kind = self._kind_of(looked, args, kwargs)
        known = self.known.get(kind)
        given = with_masks(tensors_in((args, kwargs)))
        weights = [self.weight_of[id(v)] for v in looked.variables]
        if known is not None:
            self._add(known, below, places, weights)
            return without_values(known.result, dict(zip(map(id, known.given), given, strict=True)))
        count = len(self.found.regions)
        result = look()
        # What leaves a trace, in a layer or in what it is given, has to be called each time.
        if is_plain(result) and kind == self._kind_of(self.likeness.of(layer), args, kwargs):
            new = zip(self.found.regions[count:], self.found.proofs[count:], strict=True)
            reasons = {n: self.found.reasons[n] for n in places if n in self.found.reasons}
            tried = [numbers for numbers in self.found.tried if numbers <= set(places)]
            self.known[kind] = _Known(
                below, given, result, places, weights, list(new), reasons, tried
            )
        return result

    def _kind_of(self, looked: Looked, args: Any, kwargs: Any) -> Any:
        return self.likeness.kind_of_call(
            looked, args, kwargs, lambda value: self.marks.get(id(value))
        )

    def _add(
        self, known: _Known, below: list[Owner], places: list[int], weights: list[int]
    ) -> None:
        number = dict(zip(known.places, places, strict=True))
        weight = dict(zip(known.weights, weights, strict=True))
        path = {a.path: b.path for a, b in zip(known.below, below, strict=True)}
        for region, proof in known.found:
            self.found.add(
                replace(
                    region,
                    layer=number[region.layer],
                    members=tuple(sorted(number[n] for n in region.members)),
                    summed=tuple(sorted(weight[n] for n in region.summed)),
                    divided=tuple((path[p], name, value) for p, name, value in region.divided),
                ),
                replace(
                    proof,
                    handed=frozenset(number[n] for n in proof.handed),
                    taken=frozenset(number[n] for n in proof.taken),
                    readers=tuple(tuple(number[n] for n in group) for group in proof.readers),
                    refused=tuple((number[n], _told(r, path, number)) for n, r in proof.refused),
                ),
            )
        for n, reason in known.reasons.items():
            self.found.reasons[number[n]] = _told(reason, path, number)
        for numbers in known.tried:
            self.found.begin(frozenset(number[n] for n in numbers))


class Outcomes:
    """What calls of layers give, so that those that are alike need not be made to look at them.

    Of a layer with others below it that are looked at as well there is no call to be left out.
    """

    def __init__(self, likeness: Likeness):
        self.likeness = likeness
        self.known: dict[Any, tuple[list[torch.Tensor], Any]] = {}

    def call(self, layer: Any, args: Any, kwargs: Any, look: Callable[..., Any]) -> Any:
        """What a call of a layer gives; for the arguments see `Recollection.call`.

        `look` may be given the result.
        """
        looked = self.likeness.of(layer)
        if any(owner.has_layers for owner in looked.below[1:]):
            return look()
        kind = self.likeness.kind_of_call(looked, args, kwargs, lambda value: None)
        given = with_masks(tensors_in((args, kwargs)))
        if kind in self.known:
            old, result = self.known[kind]
            return look(without_values(result, dict(zip(map(id, old), given, strict=True))))
        result = look()
        after = self.likeness.of(layer)
        same = kind == self.likeness.kind_of_call(after, args, kwargs, lambda value: None)
        if same and is_plain(result):
            self.known[kind] = given, result
        return result


def _told(reason: str, path: Mapping[str, str], number: Mapping[int, int]) -> str:
    """A reason in which layers are named, of the layers in their places."""
    reason = re.sub(r"'([^']*)'", lambda m: f"'{path.get(m[1], m[1])}'", reason)
    return re.sub(r"\blayer (\d+)\b", lambda m: f"layer {number.get(int(m[1]), int(m[1]))}", reason)
