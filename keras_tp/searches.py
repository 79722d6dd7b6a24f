"""Finds how layers could be cut so that they hand each other shards, by trying it.

The model is called once without values. Each layer that has others below it is looked at as
it returns, the innermost first: all layers below it that are not settled are tried as
columns at once, and what a shard then reaches is cut to match (`keras_tp.pairings`). What is
refused is tried along its next label. A set of columns whose shards all end in rows is a group, as
are batched layers (experts) that hand each other shards. It is Megatron-LM's layout (Shoeybi
et al. 2019, section 3), found by what the code does.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras

from keras_tp.candidates import Candidate
from keras_tp.pairings import Paired, Pairing
from keras_tp.regions import prove
from keras_tp.rehearsal import LEAVES, Call, Member
from keras_tp.seam.layers import Owner
from keras_tp.seam.likeness import Likeness

# After so many looks from further and further out a layer is tried as a column no more.
LOOKS = 2


@dataclass(frozen=True)
class Group:
    """Layers that are cut together.

    Attributes:
        labels: what each is cut along, by number.
        handing: those whose output stays a shard.
        taking: those whose input comes as one.
        cost: what they communicate, where an all_gather counts 1 and an all_reduce 2.
    """

    labels: Mapping[int, str]
    handing: frozenset[int]
    taking: frozenset[int]
    cost: int = 0

    def numbered(self, new: Mapping[int, int]) -> Group:
        """The same of layers with other numbers."""
        return Group(
            {new[n]: label for n, label in self.labels.items()},
            frozenset(new[n] for n in self.handing),
            frozenset(new[n] for n in self.taking),
            self.cost,
        )


@dataclass
class Search:
    """The search of a model.

    Attributes:
        model: the model.
        candidates: its layers that could be cut, by number.
        likeness: tells which layers are alike.
        groups: what was found.
        reasons: of candidates in none, why not.
        heads: candidates whose output, or what is made of it, the model gives.
    """

    model: Any
    candidates: Mapping[int, Candidate]
    likeness: Likeness
    groups: list[Group] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    heads: set[int] = field(default_factory=set)
    settled: set[int] = field(default_factory=set)
    tried: set[frozenset[int]] = field(default_factory=set)
    failures: Counter[int] = field(default_factory=Counter)
    known: dict[Any, _Look] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.number_of = {id(c.owner.layer): n for n, c in self.candidates.items()}

    def look_at(
        self, layer: Any, original: Callable[..., Any], args: Any, kwargs: Any, result: Any
    ) -> None:
        """Settles the groups below a layer."""
        below = self.likeness.of(layer).below
        numbers_here = [self.number_of.get(id(owner.layer), -1) for owner in below[1:]]
        inside = {
            n: self.candidates[n] for n in sorted(numbers_here) if n >= 0 and n not in self.settled
        }
        numbers = frozenset(inside)
        if (layer is not self.model and (len(inside) < 2 or numbers in self.tried)) or not inside:
            return
        self.tried.add(numbers)
        open_to = frozenset(n for n in inside if self.failures[n] < LOOKS)
        order = [n for n in numbers_here if n in inside]
        roles = tuple((n in inside) + (n in open_to) for n in numbers_here)
        kind = kind_of(below, args, kwargs), roles
        look = self.known.get(kind)
        if look is None:
            cut = frozenset(id(v) for c in self.candidates.values() for v in c.owner.variables)
            parts = next(iter(inside.values())).parts
            call = Call(below, original, args, kwargs, (), parts, cut)
            look = self.known[kind] = _Look(call, inside, open_to, order)
            look.search()
        # In a block that is like another it is the same; the planner has to confirm it anyway.
        new = dict(zip(look.order, order, strict=True))
        self.groups += [group.numbered(new) for group in look.groups]
        self.settled |= {new[n] for group in look.groups for n in group.labels}
        self.reasons |= {new[n]: reason for n, reason in look.refused.items()}
        self.failures.update(new[n] for n, reason in look.refused.items() if reason != LEAVES)
        if layer is self.model:
            self.heads = {n for n in inside if self.reasons.get(n) == LEAVES} - self.settled


@dataclass
class _Look:
    """One layer that is looked at.

    Attributes:
        call: its call.
        inside: candidates below it that are not settled.
        open_to: those that may start a shard.
        order: numbers of those inside, in the order of the layers.
        groups: what was found.
        refused: those whose output would be gathered, and why.
    """

    call: Call
    inside: Mapping[int, Candidate]
    open_to: Collection[int]
    order: Sequence[int]
    groups: list[Group] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)

    def search(self) -> None:
        """Finds the groups."""
        self.groups = self._columns()
        for experts in self._experts():
            within = [g for g in self.groups if g.labels.keys() & experts.labels.keys()]
            covered = all(g.labels.keys() <= experts.labels.keys() for g in within)
            if covered and (not within or experts.cost <= sum(g.cost for g in within)):
                self.groups = [g for g in self.groups if g not in within] + [experts]

    def _columns(self) -> list[Group]:
        labels = {n: self.inside[n].columns() for n in self.open_to}
        groups: list[Group] = []
        for turn in range(max(map(len, labels.values()), default=0)):
            pinned = {n: label for g in groups for n, label in g.labels.items()}
            new = {n: own[turn] for n, own in labels.items() if turn < len(own) and n not in pinned}
            if not new:
                break
            begun = {n: pinned[n] for g in groups for n in g.handing - g.taking}
            paired = self._tried({**new, **begun})
            if not turn:
                self.refused = dict(paired.refused)
            found = grouped(paired, self.inside)
            if sum(len(g.labels) for g in found) > len(pinned):
                groups = found
        return groups

    def _experts(self) -> list[Group]:
        starts = {n: c.batches()[0] for n, c in self.inside.items() if c.batches()}
        if len(starts) < 2:
            return []
        return grouped(self._tried(starts, gathering=True), self.inside)

    def _tried(self, starts: Mapping[int, str], gathering: bool = False) -> Paired:
        members = [
            Member(n, c.owner.layer, c.style(starts.get(n)), c.is_lookup)
            for n, c in self.inside.items()
        ]
        kind = functools.partial(
            Pairing, candidates=self.inside, starts=starts, gathering=gathering
        )
        paired = prove(replace(self.call, members=members), kind)
        # (Where nothing could be called, it is a mere proof that says so.)
        return paired if isinstance(paired, Paired) else Paired(refused=paired.refused)


def kind_of(below: Sequence[Owner], args: Any, kwargs: Any) -> Any:
    """What is alike in calls of blocks that are alike: layers, their sizes and settings, shapes."""
    layers = tuple(
        (
            type(owner.layer),
            tuple(
                (name, value)
                for name, value in vars(owner.layer).items()
                if type(value) in _SETTINGS and not hasattr(type(owner.layer), name)  # no methods
            ),
            tuple(tuple(v.shape) for v in owner.variables),
        )
        for owner in below
    )
    given = tuple(
        (tuple(leaf.shape), str(leaf.dtype)) if hasattr(leaf, "shape") else repr(leaf)
        for leaf in keras.tree.flatten((args, kwargs))
    )
    return layers, given, tuple(kwargs)


_SETTINGS = {int, float, bool, types.FunctionType, type(None)}


def grouped(paired: Paired, candidates: Mapping[int, Candidate]) -> list[Group]:
    """The layers that shards connect, those that a shard leaves or reaches in vain left out."""
    sets: list[set[int]] = []
    for number, sources in paired.sources:
        joined = {number, *sources}
        apart = [s for s in sets if not s & joined]
        sets = [*apart, joined.union(*(s for s in sets if s & joined))]
    labels = dict(paired.labels)
    groups = []
    for members in sets:
        if any(labels.get(n) is None for n in members):
            continue
        groups.append(
            Group(
                labels={n: str(labels[n]) for n in sorted(members)},
                handing=paired.handed & members,
                taking=paired.taken & members,
                cost=_cost(
                    members, paired, {n: candidates[n].style(labels[n]).name for n in members}
                ),
            )
        )
    return groups


def _cost(members: set[int], paired: Paired, styles: Mapping[int, str]) -> int:
    rows = sum(style == "row" for style in styles.values())
    reading = sum(any(n in members for n in group) for group in paired.readers)
    slicing = sum(styles[n] == "batched" and n not in paired.taken for n in members)
    gathering = sum(styles[n] == "batched" and n not in paired.handed for n in members)
    return 2 * (rows + reading) + slicing + gathering
