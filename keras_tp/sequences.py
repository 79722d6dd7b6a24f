"""Proves what of a call may be computed on shards of the sequence, by two runs without values.

Between the parts of a model that compute on shards of weights, norms, dropout and residuals treat
each token alone (Korthikanti et al. 2022, section 4.2.2). So a row layer's output need not be
the same on every rank: each may have the sum of its own tokens, until a column layer
reads all. Here one call of the outermost layer is run on the whole, and then again with such
shards, which are followed function by function (`keras_tp.tokens`). What stands in the way of
one is looked for among the layers that are called: it is given whole tensors the next time, or
gives them (`keras_tp.gates`). The runs are repeated until nothing stands in the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import keras
import numpy as np

from keras_tp.dry_runs import LostTrack, Whole
from keras_tp.gates import JOIN, Passage, gated
from keras_tp.regions import shortened
from keras_tp.rehearsal import Call, Proof
from keras_tp.seam.rehearsals import is_computed_again
from keras_tp.token_runs import TokenRun
from keras_tp.tokens import Decisions, Tokens


@dataclass(frozen=True)
class Outer:
    """A call of the outermost layer, and what is known of it.

    Attributes:
        call: the call; its members are all along the axis.
        regions: numbers of layers within which members hand each other shards of features.
        handed: members that do so.
        divided: attributes that count what is sharded there; see `Proof.divided`.
    """

    call: Call
    regions: frozenset[int]
    handed: frozenset[int]
    divided: tuple[tuple[int, str, int], ...]


@dataclass(frozen=True)
class SequenceProof:
    """What of a call is computed on shards of the sequence.

    Attributes:
        inner: what layers hand each other besides, along features.
        passages: what goes through gates, in order.
        made: what gates make of tensors, in order: the layer, whether it is leaving, and what is
            made. (Who is given the same tensor shares it.)
        scattered: members that scatter the sum that is their output.
        gathered: members whose input was gathered for them.
        whole: layers that are given whole tensors, with the reason.
        reason: why nothing is computed so; else empty.
    """

    inner: Proof = field(default_factory=Proof)
    passages: tuple[Passage, ...] = ()
    made: tuple[tuple[int, bool, str], ...] = ()
    scattered: frozenset[int] = frozenset()
    gathered: frozenset[int] = frozenset()
    whole: tuple[tuple[int, str], ...] = ()
    reason: str = ""


def prove_sequence(outer: Outer) -> SequenceProof:
    """Finds the most that may be computed on shards of the sequence in a call."""
    call = outer.call
    if any(is_computed_again(owner.layer) for owner in call.owners):
        return SequenceProof(reason="layers are computed again in backward (RematScope)")
    refused = {m.number: "it is gathered" for m in call.members if m.number not in outer.handed}
    whole = Whole()
    try:
        TokenRun(call, whole, (), refused, set()).run()
    except Exception as error:
        return SequenceProof(reason=f"it cannot be called without values ({shortened(error)})")
    decisions = Decisions(whole=_heavy(outer))
    if any(isinstance(leaf, np.ndarray) for leaf in keras.tree.flatten((call.args, call.kwargs))):
        decisions.uncut.add(0)  # the first layers that can do so cut it
    summed: set[int] = set()
    mixed: set[int] = set()
    while True:
        before = decisions.copy()
        watch = Tokens(whole.events, call.parts, decisions, outer.regions)
        watch.mixed |= mixed
        run = TokenRun(call, watch, outer.divided, refused, summed)
        try:
            run.run()
        except Exception as error:
            reason = str(error) if isinstance(error, LostTrack) else shortened(error)
            try:
                if decisions == before:
                    watch.blame_last(reason)
            except LostTrack:
                return SequenceProof(reason=reason)
            continue
        if decisions != before:
            continue
        new = [reason for number, reason in watch.refused.items() if number not in refused]
        if new:
            return SequenceProof(reason=new[0])
        sums = (summed | watch.summed) - watch.mixed
        if sums != summed or watch.mixed != mixed:
            summed, mixed = sums, mixed | watch.mixed
        elif not run.prune():
            return _shown(run, outer, decisions)


def _heavy(outer: Outer) -> dict[int, str]:
    # To sum these gradients would cost as much as to gather activations, or more.
    mine = {id(member.layer) for member in outer.call.members}
    return {
        number: f"the gradient of its {v.name}, {tuple(v.shape)}, would have to be summed"
        for number, owner in enumerate(outer.call.owners)
        for v in owner.variables
        if number and id(owner.layer) not in mine and v.trainable and len(v.shape) > 1
    }


def _shown(run: TokenRun, outer: Outer, decisions: Decisions) -> SequenceProof:
    """What a run, in which nothing was in the way, has shown."""
    scattered = frozenset(number for number, yes in run.scattered.items() if yes)
    lookups = {m.number for m in run.request.members if m.lookup}
    joining = {number for number, leaving, what in run.made if what == JOIN and not leaving}
    heavy = _heavy(outer)
    whole = {n: r for n, r in decisions.whole.items() if n in joining or n not in heavy}
    if not scattered - lookups:
        light = [reason for number, reason in whole.items() if number not in heavy]
        reasons = [*light, *decisions.unscattered.values(), *whole.values()]
        return SequenceProof(reason=(reasons or ["no layer's output is summed"])[0])
    layers = set(gated(run.passages))
    return SequenceProof(
        inner=run.proof(),
        passages=tuple(p for p in run.passages if p.layer in layers),
        made=tuple(run.made),
        scattered=scattered,
        gathered=frozenset(number for number, yes in run.gathered.items() if yes),
        whole=tuple(sorted(whole.items())),
    )
