"""Follows shards of the sequence: the second of the two runs of `keras_tp.sequences`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from keras_tp.dry_runs import Event, LostTrack
from keras_tp.flows import Flow
from keras_tp.shard_runs import Local

# How a layer is called: its code sees shards of the sequence; is given whole tensors, to use on
# shards of weights; is given whole tensors and computes what every rank does alike.
LOCAL, REGION, WHOLE = "local", "region", "whole"

# Where a shard comes from: a layer was called with it, has returned it, or what it has returned was
# cut; a member has scattered it; what is not one any more, a layer has gathered.
ENTERED, LEFT, STARTED, SCATTERED, GATHERED = "entered", "left", "started", "scattered", "gathered"


@dataclass
class Decisions:
    """What has turned out so far; it only grows.

    Attributes:
        given: layers that are given whole tensors to use on shards of weights, with the reason.
        whole: layers that are given whole tensors for what every rank does alike.
        gives: layers whose shards are gathered as they return.
        uncut: layers of which what they return whole stays so; of the outermost what it is given.
        unscattered: members whose output is a sum on every rank, with the reason.
    """

    given: dict[int, str] = field(default_factory=dict)
    whole: dict[int, str] = field(default_factory=dict)
    gives: set[int] = field(default_factory=set)
    uncut: set[int] = field(default_factory=set)
    unscattered: dict[int, str] = field(default_factory=dict)

    def copy(self) -> Decisions:
        """As it is now."""
        return Decisions(
            dict(self.given),
            dict(self.whole),
            set(self.gives),
            set(self.uncut),
            dict(self.unscattered),
        )


class Tokens(Local):
    """The run on one rank's shards of the sequence, and of features in between.

    Args:
        events: of the run on the whole.
        parts: number of ranks.
        decisions: what is in the way is added to them.
        regions: layers within which shards of features are handed on.

    Attributes:
        stack: the layers that are being called, and how.
        used: identities of the tensors that functions were given as they are.
    """

    def __init__(
        self, events: list[Event], parts: int, decisions: Decisions, regions: frozenset[int]
    ):
        super().__init__(events, parts)
        self.decisions = decisions
        self.regions = regions
        self.stack: list[tuple[int, str]] = []
        self.used: set[int] = set()
        self._failed: tuple[int, str] | None = None
        # Negative, so that they are no numbers of members, which hand on shards of features.
        self._codes: dict[tuple[str, int], int] = {}

    @property
    def mode(self) -> str:
        """How the innermost layer is called."""
        return self.stack[-1][1] if self.stack else LOCAL

    def origin(self, what: str, number: int) -> frozenset[int]:
        """What `Flow.origins` has for a shard of the sequence."""
        return frozenset([self._codes.setdefault((what, number), -1 - len(self._codes))])

    def is_sequence(self, flow: Flow) -> bool:
        """Whether a tensor is a shard of the sequence."""
        return flow.dim is not None and all(origin < 0 for origin in flow.origins)

    def is_gathered(self, flow: Flow) -> bool:
        """Whether a tensor was one, and its gradient is a summand for all who were."""
        return flow.partial and any(what == GATHERED for what, _ in self._from([flow]))

    def _from(self, flows: list[Flow]) -> list[tuple[str, int]]:
        origins = {origin for flow in flows if flow.local for origin in flow.origins}
        return [meaning for meaning, code in self._codes.items() if code in origins]

    def moved(self, tensor: torch.Tensor, what: str, number: int) -> Flow:
        """Says anew where a shard comes from; gives what was known of it."""
        before = self.flow_of(tensor)
        self.set_flow(tensor, replace(before, origins=self.origin(what, number)))
        return before

    def refuse(self, flows: list[Flow], reason: str) -> None:
        """Has what these flows come from be gathered, or not cut in the first place."""
        found = self._from(flows)
        if not found and any(flow.origins for flow in flows if flow.local):
            super().refuse(flows, reason)
            return
        weights = {w for flow in flows if flow.partial for w in flow.weights or ()}
        self.mixed |= weights
        decisions = self.decisions
        for what, number in found:
            if what == SCATTERED:
                decisions.unscattered.setdefault(number, reason)
            elif what == LEFT:
                decisions.gives.add(number)
            elif what == STARTED:
                decisions.uncut.add(number)
            else:
                self._blame(number, LOCAL if what == ENTERED else REGION, reason)
        if not found and not weights:
            self._blame(*self._innermost(), reason)

    def _innermost(self) -> tuple[int, str]:
        regions = [(number, mode) for number, mode in self.stack if mode == REGION]
        local = [(number, mode) for number, mode in self.stack if mode == LOCAL]
        return regions[0] if regions else local[-1] if local else (0, LOCAL)

    def _blame(self, number: int, mode: str, reason: str) -> None:
        """Has a layer, which is called in this way now, be called in another."""
        if not number:
            raise LostTrack(reason)
        if mode == LOCAL and number in self.regions:
            self.decisions.given.setdefault(number, reason)
        else:
            self.decisions.whole.setdefault(number, reason)

    def note_error(self) -> None:
        """An error comes by the innermost layer; the first time it is the one that made it."""
        if self._failed is None:
            self._failed = self._innermost()

    def blame_last(self, reason: str) -> None:
        """Has the layer that made an error be given whole tensors.

        Raises:
            LostTrack: it is the outermost, or was given them already.
        """
        before = self.decisions.copy()
        self._blame(*(self._failed or (0, LOCAL)), reason)
        if self.decisions == before:
            raise LostTrack(reason)

    def next_event(self, name: str, given: list[torch.Tensor]) -> Event:
        """See `Local.next_event`."""
        self.used |= set(map(id, given))
        return super().next_event(name, given)
