"""Whether another layout of the layers that a plan cuts would have them send less."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.distributed.tensor import Shard

from keras_tp.automatic import make_layout_map
from keras_tp.errors import LayoutError
from keras_tp.families import patterns_for
from keras_tp.garbage import uncollected
from keras_tp.layouts import Layout
from keras_tp.planner import make_plan
from keras_tp.plans import Plan, StylePlan
from keras_tp.proposals import Proposal
from keras_tp.seam.likeness import Likeness

# More patterns than these are not named.
NAMED = 6


@uncollected()
def better_layout(
    plan: Plan, model: Any, mesh: Any, batch_axis: str | None, likeness: Likeness
) -> str:
    """What to cut otherwise and what that saves, in words; empty if nothing is known to be better.

    Of the layers that `plan` cuts are considered those that could hand each other shards
    (`keras_tp.auto_layout_map`), with those that they would do so with. What it leaves whole
    otherwise stays whole, and no rank stores more.

    Args:
        plan: of the model.
        model: as it was planned.
        mesh: of the layout map.
        batch_axis: as it was planned with.
        likeness: tells which layers of the model are alike.
    """
    if not any(_costs(style, plan) for layer in plan.layers for style in layer.styles):
        return ""
    try:
        found = _other_plan(plan, model, mesh, batch_axis, likeness)
    except LayoutError:  # no pattern tells its variables apart
        return ""
    if found is None:
        return ""
    other, changed = found
    fewer = sum(_collectives(other).values()) < sum(_collectives(plan).values())
    rank = plan.mesh.ranks[0]
    if not fewer or other.bytes_per_rank(rank) > plan.bytes_per_rank(rank):
        return ""
    named = [f"'{pattern}': {layout}" for pattern, layout in changed.items()]
    if len(named) > NAMED:
        named[NAMED:] = ["..."]
    return (
        f"a better layout: {', '.join(named)}. With it layers communicate, each called once, by "
        f"{_in_words(other)}, instead of {_in_words(plan)}; keras_tp.auto_layout_map proposes one "
        "for the whole model."
    )


def _costs(style: StylePlan, plan: Plan) -> bool:
    """Whether a layer does more along an axis than Megatron-LM's would."""
    if style.axis == plan.batch_axis:
        return False
    gathers = isinstance(style.output, Shard) and not (style.kept or style.open)
    slices = isinstance(style.input, Shard) and not style.given
    return style.name == "gathered" or gathers or slices


def _other_plan(
    plan: Plan, model: Any, mesh: Any, batch_axis: str | None, likeness: Likeness
) -> tuple[Plan, dict[str, Layout]] | None:
    """The plan with the proposed layout of layers that are cut, and what it has otherwise."""
    proposed = make_layout_map(model, mesh, batch_axis, likeness).plan
    assert proposed is not None
    layouts = {v.path: v.layout for v in plan.variables}
    changed: dict[str, Layout] = {}
    for region in proposed.regions:
        numbers = [i for member in region.members for i in plan.layers[member].variables]
        if any(plan.variables[i].sharded for i in numbers):
            for i in numbers:
                v = proposed.variables[i]
                if layouts[v.path] != v.layout:
                    changed[v.path] = v.layout
    if not changed:
        return None
    layouts |= changed
    named = patterns_for(changed, list(layouts))
    if all(layouts[v.path] == v.layout for v in proposed.variables):
        return proposed, named
    paths = list(layouts)
    made = Proposal(mesh)
    cut = {path: layout for path, layout in layouts.items() if any(layout)}
    for pattern, layout in patterns_for(cut, paths).items():
        made[pattern] = layout
    return make_plan(model, made, batch_axis=batch_axis, likeness=likeness), named


def _collectives(plan: Plan) -> Counter[str]:
    return plan.collectives("forward") + plan.collectives("backward")


def _in_words(plan: Plan) -> str:
    counts = _collectives(plan)
    return " + ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "nothing"
