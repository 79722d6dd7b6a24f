"""What ranks say of themselves beside the training, and what follows when one does not come.

A rank that waits in a collective cannot know for whom: the others can, if each says where it is.
Their signs are compared once a rank has waited too long, and then the one who kept it waiting can
be named: it gave no sign since, its program has ended, it is busy with something else, or it waits
for the others somewhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself.

    Attributes:
        beat: counts up for as long as the process runs.
        doing: phases and layer, from the outside in; "" where none is known.
        at: the line of the user's program.
        waits: what it waits in, "" if it computes.
        seconds: for how long it has waited there.
        ended: how its program has ended; "" while it runs.
    """

    beat: int
    doing: str
    at: str
    waits: str = ""
    seconds: float = 0.0
    ended: str = ""

    def to_text(self) -> str:
        """As it is kept in the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(kept: str | bytes) -> Sign:
        """What `to_text` made."""
        return Sign(**json.loads(kept))

    @property
    def where(self) -> str:
        """What it does and where, in words."""
        return f"{self.doing} ({self.at})" if self.doing else self.at


# By what keeps the others waiting, what can be done about it; the surest cause first.
_REMEDIES = {
    "silent": "See whether that process still runs, is stopped (state T of `ps`, a debugger) or "
    "was killed (`dmesg` tells of memory), and start the job again: with --max-restarts torchrun "
    "does, and a keras_tp.callbacks.ShardedCheckpoint then goes on where it was.",
    "ended": "Every rank must run the whole program: do not return, break or raise on one alone.",
    "busy": "Every rank must take part: call what others wait for on all ranks, not under "
    "`if rank == 0`. If that rank is right to take so long, allow for it: "
    "keras_tp.initialize(timeout=...), or KERAS_TP_TIMEOUT in seconds.",
    "waits": "The ranks' programs have parted ways: call the same on every rank, in the same order "
    "and as often (nothing under `if rank == 0`, as many batches everywhere).",
}


def state_of(before: Sign | None, after: Sign | None) -> str:
    """`"silent"`, `"ended"`, `"busy"` or `"waits"`: what a rank does that has said this.

    Args:
        before: its sign at one time, None if there was none.
        after: and some beats later.
    """
    if after is not None and after.ended:
        return "ended"
    if after is None or (before is not None and before.beat == after.beat):
        return "silent"
    return "waits" if after.waits else "busy"


def verdict(
    rank: int, mine: Sign, before: Sequence[Sign | None], after: Sequence[Sign | None]
) -> str:
    """What a rank says that has waited too long: for whom, where that one is, and what to do.

    Args:
        rank: the one that speaks.
        mine: its own sign.
        before: each rank's sign.
        after: each rank's sign some beats later.
    """
    states = {r: state_of(before[r], after[r]) for r in range(len(after)) if r != rank}
    kept = [r for r, state in states.items() if state != "waits"] or list(states)
    lines = [
        f"rank {rank} has waited {mine.seconds:.0f} s in {mine.waits}, in {mine.where}, for "
        f"{_ranks(kept)}. The job ends here."
    ]
    lines += _statements(states, after, brief=len(kept) < len(states))
    kinds = [kind for kind in _REMEDIES if any(states[r] == kind for r in kept)]
    return "\n  ".join([*lines, *(_REMEDIES[kind] for kind in kinds)])


def stuck(before: Sign | None, after: Sign | None, seconds: float) -> bool:
    """Whether a rank has ended, or has waited in one place for so many seconds and still does."""
    state = state_of(before, after)
    if state == "ended":
        return True
    same = before is not None and after is not None and before.waits == after.waits
    return state == "waits" and same and after.seconds >= seconds  # type: ignore[union-attr]


def absence(before: Sequence[Sign | None], after: Sequence[Sign | None], ranks: list[int]) -> str:
    """Where those `ranks` are that did not come, in words."""
    return " ".join(_statements({r: state_of(before[r], after[r]) for r in ranks}, after))


def lost(rank: int, before: Sequence[Sign | None], after: Sequence[Sign | None]) -> str:
    """What a rank says whose connection to another broke: which ranks are gone; "" if none is."""
    states = {r: state_of(before[r], after[r]) for r in range(len(after)) if r != rank}
    gone = {r: state for r, state in states.items() if state in ("silent", "ended")}
    if not gone:
        return ""
    lines = [f"rank {rank} has lost its connection to others of the job."]
    return "\n  ".join([*lines, *_statements(gone, after)])


# Nobody reads more lines than that; of 1,024 ranks those that are to blame come first.
_MOST = 8


def _statements(
    states: Mapping[int, str], after: Sequence[Sign | None], brief: bool = False
) -> list[str]:
    """Lines on these ranks, one for all that do the same; of those that wait `brief` says less."""
    said: dict[tuple[str, str, str], list[int]] = {}
    for kind in ("silent", "ended", "busy", "waits"):
        for rank, state in states.items():
            if state == kind:
                one, many = _statement(state, after[rank], brief)
                said.setdefault((kind, one, many), []).append(rank)
    lines = [
        f"{_ranks(ranks).capitalize()} {many if len(ranks) > 1 else one}"
        for (_, one, many), ranks in said.items()
    ]
    left = len(lines) - _MOST
    return lines if left <= 0 else [*lines[:_MOST], f"And {left} more, each somewhere else."]


def _statement(state: str, sign: Sign | None, brief: bool) -> tuple[str, str]:
    """What one rank does, and several do."""
    if sign is None:
        how = (
            "never gave a sign of life: gone, or not yet come to keras_tp.initialize, parallelize."
        )
        return how, how
    if state == "silent":
        how = (
            "no sign of life: stopped, gone with its machine, or in code that holds the "
            f"interpreter. Last seen in {sign.where}."
        )
        return f"gives {how}", f"give {how}"
    if state == "ended":
        how = f"ended: {sign.ended}."
        return f"has {how}", f"have {how}"
    if state == "waits":
        how = f"in {sign.waits}." if brief else f"in {sign.waits}, in {sign.where}."
        return f"waits {how}", f"wait {how}"
    return f"is busy in {sign.where}.", f"are busy in {sign.where}."


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 1`, or `ranks 0 to 3, 7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    named = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(named)}"
