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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from keras_tp.candidates import Candidate
from keras_tp.pairings import Paired, Pairing
from keras_tp.regions import prove
from keras_tp.rehearsal import LEAVES, Call, Member
from keras_tp.seam.layers import walk_layers


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


@dataclass
class Search:
    """The search of a model.

    Attributes:
        model: the model.
        candidates: its layers that could be cut, by number.
        groups: what was found.
        reasons: of candidates in none, why not.
        heads: candidates whose output, or what is made of it, the model gives.
    """

    model: Any
    candidates: Mapping[int, Candidate]
    groups: list[Group] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    heads: set[int] = field(default_factory=set)
    settled: set[int] = field(default_factory=set)
    tried: set[frozenset[int]] = field(default_factory=set)

    def look_at(self, layer: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Settles the groups below a layer."""
        below = walk_layers(layer)
        ids = {id(owner.layer) for owner in below[1:]}
        inside = {
            n: c
            for n, c in self.candidates.items()
            if n not in self.settled and id(c.owner.layer) in ids
        }
        numbers = frozenset(inside)
        if (layer is not self.model and (len(inside) < 2 or numbers in self.tried)) or not inside:
            return
        self.tried.add(numbers)
        cut = frozenset(id(v) for c in self.candidates.values() for v in c.owner.variables)
        parts = next(iter(inside.values())).parts

        def tried(starts: Mapping[int, str], gathering: bool) -> Paired:
            members = [
                Member(n, c.owner.layer, c.style(starts.get(n)), c.is_lookup)
                for n, c in inside.items()
            ]
            call = Call(below, original, args, kwargs, members, parts, cut)
            kind = functools.partial(Pairing, candidates=inside, starts=starts, gathering=gathering)
            paired = prove(call, kind)
            if not isinstance(paired, Paired):  # nothing could be called
                paired = Paired(refused=paired.refused)
            return paired

        groups = self._columns(inside, tried)
        for experts in self._experts(inside, tried):
            within = [g for g in groups if g.labels.keys() & experts.labels.keys()]
            covered = all(g.labels.keys() <= experts.labels.keys() for g in within)
            if covered and (not within or experts.cost <= sum(g.cost for g in within)):
                groups = [g for g in groups if g not in within] + [experts]
        self.groups += groups
        self.settled |= {n for group in groups for n in group.labels}
        if layer is self.model:
            self.heads = {n for n in inside if self.reasons.get(n) == LEAVES} - self.settled

    def _columns(
        self, inside: Mapping[int, Candidate], tried: Callable[..., Paired]
    ) -> list[Group]:
        labels = {n: c.columns() for n, c in inside.items()}
        groups: list[Group] = []
        for turn in range(max(map(len, labels.values()))):
            pinned = {n: g.labels[n] for g in groups for n in g.labels}
            new = {n: own[turn] for n, own in labels.items() if turn < len(own) and n not in pinned}
            if not new:
                break
            begun = {n for g in groups for n in g.handing - g.taking}
            paired = tried({**new, **{n: pinned[n] for n in begun}}, False)
            if not turn:
                self.reasons |= dict(paired.refused)
            found = grouped(paired, inside)
            if sum(len(g.labels) for g in found) > len(pinned):
                groups = found
        return groups

    def _experts(
        self, inside: Mapping[int, Candidate], tried: Callable[..., Paired]
    ) -> list[Group]:
        starts = {n: c.batches()[0] for n, c in inside.items() if c.batches()}
        if len(starts) < 2:
            return []
        return grouped(tried(starts, True), inside)


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
