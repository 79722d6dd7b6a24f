"""A rehearsal in which layers find out how they would have to be cut to hand each other shards.

A layer that is given a whole tensor starts a shard, along the label that it is asked to
try. One that a shard reaches is cut to match: as rows if it contracts the dim that the shard is
cut along, and if it keeps that dim, as a batched layer that hands the shard on. All else is
as `keras_tp.regions` proves it of layers that are cut already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch

from keras_tp.candidates import Candidate
from keras_tp.layouts import Shape
from keras_tp.rehearsal import Member, Proof, Rehearsal
from keras_tp.shard_runs import Local


@dataclass(frozen=True)
class Paired(Proof):
    """What was proven, and of which cuts.

    Attributes:
        labels: of each layer that took part, the label that it would be cut along.
        sources: of each layer that a shard reached, the layers that handed it on.
    """

    labels: tuple[tuple[int, str | None], ...] = ()
    sources: tuple[tuple[int, frozenset[int]], ...] = ()


@dataclass
class Pairing(Rehearsal):
    """One of the two runs of a call.

    Attributes:
        candidates: the members, by number.
        labels: of each member, the label to start a shard along; is corrected as shards come.
        gathering: whether a batched layer may be the last of those that a shard runs through,
            so that its output is gathered. Else the shard ends in rows, or is none.
    """

    candidates: Mapping[int, Candidate] = field(default_factory=dict)
    starts: Mapping[int, str] = field(default_factory=dict)
    gathering: bool = False
    labels: dict[int, str | None] = field(default_factory=dict)
    sources: dict[int, frozenset[int]] = field(default_factory=dict)

    def passed(
        self, watch: Local, member: Member, x: torch.Tensor, out: Shape, dtype: torch.dtype
    ) -> torch.Tensor:
        """See `Rehearsal.passed`; finds out how the member is cut."""
        flow, number = watch.flow_of(x), member.number
        label = self.starts.get(number)
        if flow.dim is not None:
            label = self.candidates[number].label_at(flow.dim, x.dim()) or label
        if self.labels.setdefault(number, label) != label:
            watch.refuse([flow], f"'{member.layer.path}' would have to be cut in two ways")
            label = self.labels[number]
        as_cut = replace(member, style=self.candidates[number].style(label))
        y = super().passed(watch, as_cut, x, out, dtype)
        if flow.dim is not None and self.taken[number]:
            self.sources[number] = self.sources.get(number, frozenset()) | flow.origins
            if as_cut.style.name == "batched" and number in self.refused and not self.gathering:
                watch.refuse([flow], self.refused[number])
        return y

    def proof(self) -> Paired:
        """See `Rehearsal.proof`."""
        known = super().proof()
        return Paired(
            **{f.name: getattr(known, f.name) for f in fields(known)},
            labels=tuple(self.labels.items()),
            sources=tuple(self.sources.items()),
        )
