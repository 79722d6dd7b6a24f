"""Finds, for a plan, which layers of a model hand each other shards.

The model is called once without values. Each layer that has others below it is looked at
as it returns, the innermost first: what is proven there (`keras_tp.regions`) is
settled, what is not may be proven within a layer above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.tensor import Shard

from keras_tp.alike import Alike
from keras_tp.computations import Computation, Lookup
from keras_tp.heads import Head, Recorder, gives_columns
from keras_tp.plans import LayerPlan, Region, StylePlan, VariablePlan
from keras_tp.recollection import Found, Recollection
from keras_tp.regions import members_below, prove, shortened
from keras_tp.rehearsal import Call, Member, Proof
from keras_tp.seam.layers import Owner, variables_of
from keras_tp.seam.likeness import Likeness
from keras_tp.seam.rehearsals import rehearse_model

# What an unknown number of rows, and any other unknown size, is taken to be.
SIZES = (2, 8)


def candidate(style: StylePlan, computation: Computation | None) -> bool:
    """Whether a layer could hand on, or take, a shard along the axis of this style."""
    if computation is None or not style.size:
        return False
    if not isinstance(computation, Lookup) and computation.output.endswith("..."):
        return False  # which dims its bias has is not known from the labels
    return isinstance(style.input, Shard) or isinstance(style.output, Shard)


def members_along(
    axis: str, owners: Sequence[Owner], layers: Sequence[LayerPlan], *, lookups: bool = False
) -> list[Member]:
    """The layers that could hand each other shards along an axis, numbered as in the plan.

    With `lookups` also those that look up rows of a table of which each rank has some (and are
    not called in reverse besides, which is another computation).
    """

    def is_lookup(layer: LayerPlan, style: StylePlan) -> bool:
        return lookups and style.name == "vocabulary" and layer.computation == Lookup()

    return [
        Member(number, owner.layer, style, isinstance(layer.computation, Lookup))
        for number, (owner, layer) in enumerate(zip(owners, layers, strict=True))
        for style in layer.styles
        if style.axis == axis and (candidate(style, layer.computation) or is_lookup(layer, style))
    ]


def can_pair(members: Sequence[Member]) -> bool:
    """Whether there is one that could hand on a shard, and one that could take it."""
    hands = [m.number for m in members if isinstance(m.style.output, Shard)]
    takes = [m.number for m in members if isinstance(m.style.input, Shard)]
    return bool(hands and takes) and len({*hands, *takes}) > 1


def find_regions(
    model: Any,
    owners: Sequence[Owner],
    layers: Sequence[LayerPlan],
    plans: Sequence[VariablePlan],
    sizes: dict[str, int],
    likeness: Likeness,
) -> Found:
    """Looks at all layers of a model, which is as before afterwards.

    Args:
        model: a built model.
        owners: its layers.
        layers: of each, what is planned while all hand each other whole activations.
        plans: of its variables.
        sizes: ranks along each axis on whose shards layers compute.
        likeness: tells which layers are alike.
    """
    found = Found()
    along = {axis: members_along(axis, owners, layers) for axis in sizes}
    heads = [
        Head(number, owner.layer, style, layer.computation)
        for number, (owner, layer) in enumerate(zip(owners, layers, strict=True))
        for style in layer.styles
        if style.axis in sizes and gives_columns(style, layer.computation)
    ]
    along = {axis: members for axis, members in along.items() if can_pair(members)}
    if not along and not heads:
        return found
    variables = variables_of(owners)
    cut = frozenset(id(v) for v, p in zip(variables, plans, strict=True) if p.sharded)
    everywhere = {id(v): number for number, v in enumerate(variables)}
    marks: dict[int, Any] = dict.fromkeys(cut, "cut")
    for axis, members in along.items():
        for member in members:
            marks[id(member.layer)] = (*marks.get(id(member.layer), ()), axis, member.style)
    for head in heads:
        marks[id(head.layer)] = (*marks.get(id(head.layer), ()), "head", head.style)
    recollection = Recollection(owners, found, marks, likeness)
    recorder = Recorder()
    search = _Search(found, owners, along, sizes, cut, everywhere, recorder, Alike(likeness))

    def around(layer: Any, args: Any, kwargs: Any, looked: Callable[[], Any]) -> Any:
        called = False

        def look() -> Any:
            nonlocal called
            called = True
            return looked()

        result = recollection.call(layer, args, kwargs, look)
        if not called:
            recorder.take((args, kwargs))
        return result

    try:
        with recorder:
            look_at_layers(model, owners, search.look_at, recorder.calls_of(heads), around)
        found.heads = recorder.heads(search.result, sizes)
        found.reversed = frozenset(recorder.reversed)
    except Exception as error:
        found.note = (
            f"the model could not be called without values ({shortened(error)}), so that it is not "
            "known which layers after that could hand each other shards: they are given, and "
            "give, whole activations."
        )
    return found


# Is given a layer, its `call`, what that was called with, and what it gave.
Look = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], None]


# Is given a layer, what that was called with, and what calls it, unless it is given a result, and
# looks at it: what it gives.
Around = Callable[[Any, tuple[Any, ...], dict[str, Any], Callable[..., Any]], Any]


def look_at_layers(
    model: Any,
    owners: Sequence[Owner],
    look: Look,
    calls: Iterable[tuple[Any, Callable[..., Any]]] = (),
    around: Around = lambda layer, args, kwargs, looked: looked(),
) -> None:
    """Calls a model without values, and has each layer above others looked at as it returns.

    Args:
        model: a built model, which is as before afterwards.
        owners: its layers.
        look: may call the layer again, which is not looked at.
        calls: layers, and what is called in place of their `call`.
        around: may know without a call what a layer gives, and what a look at it would find.

    Raises:
        Exception: whatever the model raises, or if what it takes is not known.
    """
    looking = False

    def watched(layer: Any) -> Callable[..., Any]:
        original = layer.call

        def call(*args: Any, **kwargs: Any) -> Any:
            def looked(*known: Any) -> Any:
                nonlocal looking
                (result,) = known or [original(*args, **kwargs)]
                looking = True
                try:
                    look(layer, original, args, kwargs, result)
                finally:
                    looking = False
                return result

            return original(*args, **kwargs) if looking else around(layer, args, kwargs, looked)

        return call

    above = [owner.layer for owner in owners if owner.has_layers]
    rehearse_model(model, SIZES, [*((layer, watched(layer)) for layer in above), *calls])


@dataclass
class _Search:
    found: Found
    owners: Sequence[Owner]
    along: dict[str, list[Member]]
    sizes: dict[str, int]
    cut: frozenset[int]
    everywhere: dict[int, int]  # numbers of variables, by identity
    recorder: Recorder
    alike: Alike
    result: Any = None  # what the model gave

    def look_at(
        self, layer: Any, original: Callable[..., Any], args: Any, kwargs: Any, result: Any
    ) -> None:
        """Settles what is proven of a call of a layer."""
        if layer is self.owners[0].layer:
            self.result = result
        for axis, members in self.along.items():
            below, inside = members_below(layer, members)
            inside = [m for m in inside if m.number not in self.found.settled]
            numbers = frozenset(m.number for m in inside)
            if not can_pair(inside) or not self.found.begin(numbers):
                continue
            parts = self.sizes[axis]
            call = Call(below, original, args, kwargs, inside, parts, self.cut, self.alike)
            with self.recorder.resting():
                proof = prove(call)
            self.found.reasons |= dict(proof.refused)
            if proof.taken:
                self._settle(layer, axis, below, proof)

    def _settle(self, layer: Any, axis: str, below: list[Owner], proof: Proof) -> None:
        self.recorder.forget(proof.handed | proof.taken)
        here = variables_of(below)
        self.found.add(
            Region(
                layer=next(i for i, o in enumerate(self.owners) if o.layer is layer),
                axis=axis,
                members=tuple(sorted(proof.handed | proof.taken)),
                summed=tuple(sorted(self.everywhere[id(here[n])] for n in proof.summed)),
                divided=tuple((below[n].path, name, value) for n, name, value in proof.divided),
            ),
            proof,
        )
