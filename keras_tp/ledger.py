"""What ranks would send each other, written down as it comes up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

PHASES = ("forward", "backward", "optimizer", "metrics")

# What each rank of a ring of n sends of a tensor, in (n - 1) / n of its bytes.
_TIMES_AROUND = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind that one thing causes in one phase of a training step.

    Attributes:
        kind: `"all_reduce"`, `"all_gather"` or `"reduce_scatter"`.
        axis: the mesh axis whose ranks take part; `"all"` for all ranks of the job.
        ranks: how many take part.
        layer: path of the layer that causes it; of the model for what concerns all of it.
        of: what travels, e.g. `"output"`, `"input gradient"`, or a weight's name.
        phase: `"forward"` (with the loss), `"backward"`, `"optimizer"` or `"metrics"`.
        count: how many there are in a step.
        bytes: of all of them together, each counted as the largest tensor in it: what an
            all-reduce sums, what an all-gather gives, what a reduce-scatter takes (with the
            zeros that fill up an uneven cut).
    """

    kind: str
    axis: str
    ranks: int
    layer: str
    of: str
    phase: str
    count: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, if the ranks stand in a ring.

        2 (n - 1) / n of an all-reduce's, (n - 1) / n of a gather's or a scatter's (Patarasuk
        and Yuan 2009): no algorithm that uses each link alike sends less.
        """
        return _TIMES_AROUND[self.kind] * (self.ranks - 1) / self.ranks * self.bytes


class Ledger:
    """Adds up traffic.

    Attributes:
        phase: of the step, just now.
        layer: path of the layer whose call runs, just now.
        resting: whether what is called just now is only looked at, and is no part of the step.
    """

    def __init__(self) -> None:
        self.phase = PHASES[0]
        self.layer = ""
        self.resting = False
        self._counts: Counter[tuple[str, str, int, str, str, str]] = Counter()
        self._bytes: Counter[tuple[str, str, int, str, str, str]] = Counter()

    def note(self, kind: str, axis: str, ranks: int, layer: str, of: str, size: int) -> None:
        """Writes down one collective, of so many bytes."""
        key = kind, axis, ranks, layer, of, self.phase
        self._counts[key] += 1
        self._bytes[key] += size

    def traffic(self) -> tuple[Traffic, ...]:
        """All of it, by phase, in the order in which it first came up."""
        found = [Traffic(*key, n, self._bytes[key]) for key, n in self._counts.items()]
        return tuple(sorted(found, key=lambda traffic: PHASES.index(traffic.phase)))
