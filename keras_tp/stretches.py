"""Finds, for a plan, which stretches of a model are computed on shards of the sequence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from keras_tp.gates import CUT, JOIN, SUM, SequencePlan
from keras_tp.handovers import look_at_layers, members_along
from keras_tp.places import FIRST, SIZE, places
from keras_tp.plans import Collective, LayerPlan, Region, VariablePlan
from keras_tp.rehearsal import Call
from keras_tp.seam.layers import Owner, variables_of, walk_layers
from keras_tp.seam.rehearsals import weight_without_values
from keras_tp.sequences import Outer, SequenceProof, prove_sequence

Collectives = list[Collective]


def outer_call(
    owners: Sequence[Owner],
    layers: Sequence[LayerPlan],
    regions: Sequence[Region],
    axis: str,
    parts: int,
) -> Callable[..., Outer]:
    """Makes, of a call of the model, what `prove_sequence` is given.

    Args:
        owners: layers of the model.
        layers: of each, the plan.
        regions: within which layers hand each other shards.
        axis: the mesh axis.
        parts: number of its ranks.
    """
    here = [region for region in regions if region.axis == axis]
    number_of = {id(owner.layer): number for number, owner in enumerate(owners)}
    divided: dict[tuple[int, str], int] = {}
    for region in here:
        below = {owner.path: owner.layer for owner in walk_layers(owners[region.layer].layer)}
        divided |= {(number_of[id(below[p])], n): value for p, n, value in region.divided}
    members = members_along(axis, owners, layers, lookups=True)
    handed = {m.number for m in members if m.style.kept}

    def outer(call: Callable[..., Any], args: Any, kwargs: Any, cut: frozenset[int]) -> Outer:
        return Outer(
            Call(list(owners), call, args, kwargs, members, parts, cut),
            regions=frozenset(region.layer for region in here),
            handed=frozenset(handed),
            divided=tuple((number, name, value) for (number, name), value in divided.items()),
        )

    return outer


def find_sequence(
    model: Any,
    owners: list[Owner],
    layers: list[LayerPlan],
    plans: Sequence[VariablePlan],
    regions: Sequence[Region],
    sizes: dict[str, int],
) -> tuple[SequencePlan | None, list[LayerPlan], list[str]]:
    """Looks at a model, which is as before afterwards.

    Args:
        model: a built model.
        owners: its layers.
        layers: of each, what is planned without.
        plans: of its variables.
        regions: within which layers hand each other shards.
        sizes: ranks along each axis on whose shards layers compute.

    Returns:
        The plan, if there is anything to it, the layers with what they send then, and what the user
        should know.
    """
    counts = {axis: sum(r.axis == axis for r in regions) for axis in sizes}
    axis = max(counts, key=lambda name: counts[name], default="")
    if not axis or not counts[axis]:
        return None, layers, [_nothing("no layers hand each other shards")]
    if sum(map(bool, counts.values())) > 1:
        return None, layers, [_nothing("layers hand each other shards along several axes")]
    variables = variables_of(owners)
    cut = frozenset(id(v) for v, p in zip(variables, plans, strict=True) if p.sharded)
    outer = outer_call(owners, layers, regions, axis, sizes[axis])
    proofs: list[SequenceProof] = []

    def look(layer: Any, original: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        proofs.append(prove_sequence(outer(original, args, kwargs, cut)))

    try:
        look_at_layers(model, owners[:1], look)
    except Exception as error:
        return None, layers, [_nothing(f"the model cannot be called without values ({error})")]
    proof = proofs[-1]
    if proof.reason:
        return None, layers, [_nothing(proof.reason)]
    found = SequencePlan(
        axis,
        scattered=tuple(sorted(proof.scattered)),
        whole=tuple(number for number, _ in proof.whole),
        summed=tuple(sorted(proof.inner.summed)),
    )
    weights = [weight_without_values(variables[i]) for i in found.summed if plans[i].trainable]
    buckets = len(places(weights, FIRST, SIZE)[1])
    said = [
        f"tokens are shared out along axis {axis!r} between the layers that compute on shards: "
        f"the gradients of {len(weights)} weights that are used there are summed (all_reduce, in "
        "buckets). Kinds of calls that cannot be computed so are computed without."
    ]
    alone = {i for r in regions if r.axis == axis for i in r.summed}
    layers_now = [_without_sums(layer, plans, axis, alone) for layer in layers]
    layers_now = _with_sequence(layers_now, proof, axis, buckets)
    return found, layers_now, said + _whole(proof, layers)


def _nothing(reason: str) -> str:
    return f"sequence_parallel has no effect: {reason}. The numbers are the same."


def _whole(proof: SequenceProof, layers: Sequence[LayerPlan]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for number, reason in proof.whole:
        by_reason.setdefault(reason, []).append(layers[number].path)
    return [
        f"tokens are not shared out within '{paths[0]}'"
        + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        + f": {reason}."
        for reason, paths in by_reason.items()
    ]


def _without_sums(
    layer: LayerPlan, plans: Sequence[VariablePlan], axis: str, alone: Collection[int]
) -> LayerPlan:
    """What a layer sends, but for sums of weights' gradients, which buckets have now."""
    names = {plans[i].path.rsplit("/", 1)[-1] for i in layer.variables if i in alone}
    sums = [Collective("all_reduce", axis, f"{name} gradient") for name in names]
    return replace(layer, backward=tuple(c for c in layer.backward if c not in sums))


def _with_sequence(
    layers: Sequence[LayerPlan], proof: SequenceProof, axis: str, buckets: int
) -> list[LayerPlan]:
    """The layers' plans with what is sent for shards of the sequence."""
    forward: list[Collectives] = [list(layer.forward) for layer in layers]
    backward: list[Collectives] = [list(layer.backward) for layer in layers]
    for number in range(len(layers)):
        if number in proof.scattered:
            forward[number].remove(Collective("all_reduce", axis, "output"))
            forward[number].append(Collective("reduce_scatter", axis, "output"))
            backward[number].append(Collective("all_gather", axis, "output gradient"))
        if number in proof.gathered:
            summed = Collective("all_reduce", axis, "input gradient")
            backward[number] = [c for c in backward[number] if c != summed]
    for number, leaving, what in proof.made:
        of = "output" if leaving else "input"
        if what in (SUM, JOIN):
            forward[number].append(Collective("all_gather", axis, of))
        if what == SUM:
            backward[number].append(Collective("reduce_scatter", axis, f"{of} gradient"))
        if what == CUT:
            backward[number].append(Collective("all_gather", axis, f"{of} gradient"))
    backward[0] += [Collective("all_reduce", axis, "gradients, in a bucket")] * buckets
    return [
        replace(layer, forward=tuple(ahead), backward=tuple(back))
        for layer, ahead, back in zip(layers, forward, backward, strict=True)
    ]
