"""Proves which layers may hand each other shards while a layer above them is called.

A column layer need not gather its output if all that is done with it, up to a row layer
that wants just this shard, computes on a shard what it computes on the whole. That is
decided for one call of the layer above both, by running it twice without values
(`keras_tp.dry_runs`): never by the names of layers, and for the very shapes and arguments
of that call. What is not proven is gathered, which is right for any code.

The pairing of columns and rows is Megatron-LM's (Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed.tensor import Shard

from keras_tp.dry_runs import LostTrack, Whole
from keras_tp.rehearsal import Call, Member, Proof, Rehearsal
from keras_tp.seam.layers import Owner, walk_layers
from keras_tp.seam.rehearsals import is_computed_again
from keras_tp.shard_runs import Local


def prove(call: Call, kind: Callable[..., Rehearsal] = Rehearsal) -> Proof:
    """Finds the most that may stay sharded in a call of a layer.

    Args:
        call: the call.
        kind: what makes a rehearsal of it.
    """
    if any(is_computed_again(owner.layer) for owner in call.owners[1:]):
        reason = "layers are computed again in backward (RematScope), one by one"
        return Proof(refused=tuple((m.number, reason) for m in call.members))
    attempts: list[tuple[tuple[int, str, int], ...]] = [(), *_divisions(call)]
    proofs = []
    for divided in attempts:
        proofs.append(_prove(call, divided, kind))
        if not proofs[-1].refused:
            break
    return max(proofs, key=lambda proof: (len(proof.taken), -len(proof.refused)))


def _divisions(call: Call) -> list[tuple[tuple[int, str, int], ...]]:
    """Attributes that say how many heads there are, if heads are what is sharded."""
    sizes = {member.style.size for member in call.members}
    mine = {id(member.layer) for member in call.members}
    found = tuple(
        (number, name, value // call.parts)
        for number, owner in enumerate(call.owners)
        for name, value in vars(owner.layer).items()
        if type(value) is int
        and "heads" in name
        and value
        and id(owner.layer) not in mine
        and value % call.parts == 0
        and any(size % value == 0 for size in sizes)
    )
    return [found] if found else []


def _prove(
    call: Call, divided: tuple[tuple[int, str, int], ...], kind: Callable[..., Rehearsal]
) -> Proof:
    refused = {
        m.number: f"{m.style.size} are not cut evenly into {call.parts}"
        for m in call.members
        if m.style.size % call.parts
    }
    summed: set[int] = set()
    mixed: set[int] = set()
    try:
        whole = kind(call, Whole(), (), refused, summed)
        whole.run()
    except Exception as error:
        reason = f"it cannot be called without values ({shortened(error)})"
        return Proof(refused=tuple((m.number, reason) for m in call.members))
    everyone = {m.number for m in call.members if isinstance(m.style.output, Shard)}
    count = 1  # of shards that may have led astray: the last, the last two before, four, ...
    while True:
        local = Local(whole.watch.events, call.parts)
        local.mixed |= mixed
        rehearsal = kind(call, local, divided, refused, summed)
        try:
            rehearsal.run()
        except LostTrack as lost:
            local.refuse_last(everyone - refused.keys(), count, str(lost))
            count *= 2
        except Exception as error:
            reason = f"it cannot be called on shards ({shortened(error)})"
            local.refuse_last(everyone - refused.keys(), count, reason)
            count *= 2
        new = {n: reason for n, reason in local.refused.items() if n not in refused}
        sums = (summed | local.summed) - local.mixed
        if not new and sums == summed and local.mixed == mixed:
            break
        refused, summed, mixed = refused | new, sums, mixed | local.mixed
    return rehearsal.proof()


def shortened(error: Exception) -> str:
    """An error in a line, the same on every rank."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"0x[0-9a-f]+", "0x", lines[0][:120] if lines else "")
    return f"{type(error).__name__}: {text}"


def members_below(layer: Any, members: Sequence[Member]) -> tuple[list[Owner], list[Member]]:
    """A layer and all below it, and the members among them."""
    owners = walk_layers(layer)
    below = {id(owner.layer) for owner in owners[1:]}
    return owners, [member for member in members if id(member.layer) in below]
