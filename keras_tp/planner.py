"""Makes the plan: walks the model, matches the layout map, asks the rules."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import keras

from keras_tp.bases import Basis, bases_of
from keras_tp.errors import LayoutError, LayoutWarning
from keras_tp.garbage import uncollected
from keras_tp.handovers import find_regions
from keras_tp.layouts import MeshShape
from keras_tp.optimizers import price_of
from keras_tp.patterns import match_paths
from keras_tp.plans import Collective, LayerPlan, Plan, StylePlan, VariablePlan
from keras_tp.problems import (
    captured_weights,
    check_model,
    read_batch_axis,
    read_mesh,
    unbuilt_layers,
    unshardable_weights,
    unused_pattern,
    wrong_layouts,
)
from keras_tp.reasons import reason_of
from keras_tp.recollection import Found
from keras_tp.rules import (
    collectives_of,
    collectives_of_rows,
    gathered_along,
    rows_of,
    style_along,
)
from keras_tp.seam.layers import variables_of, walk_layers
from keras_tp.seam.likeness import Likeness
from keras_tp.stretches import find_sequence


@uncollected()
def make_plan(
    model: Any,
    layout_map: Any,
    *,
    strict: bool = False,
    batch_axis: str | None = "batch",
    sequence_parallel: bool = False,
    likeness: Likeness | None = None,
) -> Plan:
    """Decides everything; see `keras_tp.plan`. What is known of likeness is added to."""
    check_model(model)
    mesh = read_mesh(layout_map)
    replicas = read_batch_axis(batch_axis, mesh)
    where = f"this layout map (mesh: {mesh})"
    owners = walk_layers(model)
    unbuilt = unbuilt_layers(model, owners)
    if unbuilt:  # nothing can be said of patterns while variables are missing
        raise LayoutError(unbuilt, where=f"model '{model.name}'")
    variables = variables_of(owners)
    paths = [v.path for v in variables]
    claims = match_paths(list(layout_map), paths)
    outputs = match_paths(claims.unused, [f"{owner.path}/output" for owner in owners])
    unused = [unused_pattern(pattern, paths) for pattern in outputs.unused]
    plans = [_plan_variable(v, claims.pattern_of.get(v.path), layout_map, mesh) for v in variables]
    index = {id(v): i for i, v in enumerate(variables)}
    problems = [*claims.problems, *outputs.problems, *(unused if strict else ())]
    problems += wrong_layouts(plans, outputs.pattern_of, layout_map, mesh) or [
        *unshardable_weights(owners, plans, index),
        *captured_weights(owners, variables, plans),
    ]
    if problems:
        raise LayoutError(problems, where=where)
    bases = bases_of(owners, plans, index)
    layers = _plan_layers(bases, plans, mesh, replicas, Found())
    computing = {
        axis: size
        for axis, size in zip(mesh.axes, mesh.sizes, strict=True)
        if size > 1 and axis != replicas
    }
    found = find_regions(model, owners, layers, plans, computing, likeness or Likeness())
    if found != Found():
        layers = _plan_layers(bases, plans, mesh, replicas, found)
    sequence, notes = None, list[str]()
    if sequence_parallel:
        sequence, layers, notes = find_sequence(
            model, owners, layers, plans, found.regions, computing
        )
    layers, said = _name_outputs(layers, outputs.pattern_of, layout_map, mesh)
    for sentence in (*unused, *said):
        warnings.warn(sentence, LayoutWarning, stacklevel=4)
    notes = [*unused, *said, *notes, *_axes_in_words(plans, mesh, replicas)]
    notes += _full_reads(variables, plans)
    notes += [found.note] if found.note else []
    notes += [
        f"the output of '{layer.path}' stays a shard in fit() and evaluate(): losses and metrics "
        "are computed on shards where that is known, cross-entropy of labels with 2 all_reduces "
        "of one and two numbers for each row. Elsewhere it is gathered (1 all_gather)."
        for layer in layers
        if any(style.open for style in layer.styles)
    ]
    if getattr(model, "optimizer", None) is not None and any(v.sharded for v in plans):
        notes += [sentence for sentence in (price_of(model.optimizer),) if sentence]
    regions = tuple(found.regions)
    return Plan(mesh, tuple(plans), tuple(layers), tuple(notes), replicas, regions, sequence)


def _plan_variable(
    variable: Any, pattern: str | None, layout_map: Any, mesh: MeshShape
) -> VariablePlan:
    shape = tuple(int(size) for size in variable.shape)
    return VariablePlan(
        path=variable.path,
        shape=shape,
        dtype=keras.backend.standardize_dtype(variable.dtype),
        trainable=bool(variable.trainable),
        layout=tuple(layout_map[pattern].axes) if pattern else (None,) * len(shape),
        pattern=pattern,
        mesh=mesh,
    )


def _axes_in_words(plans: list[VariablePlan], mesh: MeshShape, replicas: str | None) -> list[str]:
    used = {axis for v in plans for axis in v.layout}
    notes = []
    for axis, size in zip(mesh.axes, mesh.sizes, strict=True):
        if axis == replicas:
            whole = [v for v in plans if v.trainable and axis not in v.layout]
            notes.append(
                f"rows of the batch are shared out along axis {axis!r}: each of its {size} "
                "replicas computes its own, then outputs are gathered (1 all_gather each). "
                f"Backward sums the gradients of {len(whole)} variables over them (all_reduce, "
                "in buckets)."
            )
            if mesh.axes == (axis,) and axis in used:
                notes.append(
                    f"axis {axis!r} shares out rows, so that weights cut along it are gathered. "
                    "For layers that compute on shards give them an axis of their own."
                )
        elif size > 1 and axis not in used:
            notes.append(
                f"nothing is sharded along axis {axis!r}: its {size} ranks all compute the same."
            )
    return notes


def _full_reads(variables: Iterable[Any], plans: list[VariablePlan]) -> list[str]:
    return [
        f"the {what} of {plan.path!r} looks at the full weight, which is gathered for it in each "
        "training step."
        for variable, plan in zip(variables, plans, strict=True)
        for what in ("regularizer", "constraint")
        if plan.sharded and getattr(variable, what) is not None
    ]


def _plan_layers(
    bases: list[Basis],
    plans: list[VariablePlan],
    mesh: MeshShape,
    replicas: str | None,
    found: Found,
) -> list[LayerPlan]:
    return [_plan_layer(n, basis, plans, mesh, replicas, found) for n, basis in enumerate(bases)]


def _plan_layer(
    number: int,
    basis: Basis,
    plans: list[VariablePlan],
    mesh: MeshShape,
    replicas: str | None,
    found: Found,
) -> LayerPlan:
    computation, weights, why_not = basis.computation, basis.weights, basis.why_not
    styles: list[StylePlan] = []
    forward: list[Collective] = []
    backward: list[Collective] = []
    for axis, size in zip(mesh.axes, mesh.sizes, strict=True):
        # Replicas compute other rows, so that no sum or join of theirs is a layer's output.
        known = None if axis == replicas else computation
        style = style_along(axis, known, weights) if size > 1 else None
        if style is None and any(axis in plans[i].layout for i in basis.held):
            style = gathered_along(axis)
        if style is not None:
            style = found.styled(number, style)
            styles.append(style)
            ahead, back = collectives_of(
                style,
                known,
                weights,
                of_rows=axis == replicas,
                reversed_too=number in found.reversed,
            )
            if not found.wants_gradient(number, style):
                back = tuple(c for c in back if c.of != "input gradient")
            forward += ahead
            backward += back
    for axis, i in found.summed(basis.own):
        backward.append(Collective("all_reduce", axis, f"{_name_of(plans[i].path)} gradient"))
    gathers: tuple[int, ...] = ()
    if all(style.name == "gathered" for style in styles):
        if computation is not None and styles:
            why_not = f"its {computation.weights[0]} is not sharded along that axis"
            if any(style.axis == replicas for style in styles):
                why_not = f"each replica along '{replicas}' needs it for its own rows"
        computation, gathers = None, basis.gathers
    rows = "own"
    if replicas is not None:
        rows = rows_of(basis.owner.layer)
        ahead, back = collectives_of_rows(rows, replicas)
        forward += ahead
        backward += back
    return LayerPlan(
        path=basis.owner.path,
        kind=type(basis.owner.layer).__name__,
        variables=tuple(basis.own),
        computation=computation,
        styles=tuple(styles),
        gathers=gathers,
        forward=tuple(forward),
        backward=tuple(backward),
        rows=rows,
        reason=reason_of(
            styles, [plans[i] for i in basis.own], weights, why_not, found.reasons.get(number, "")
        ),
    )


def _name_outputs(
    layers: list[LayerPlan], pattern_of: dict[str, str], layout_map: Any, mesh: MeshShape
) -> tuple[list[LayerPlan], list[str]]:
    """The layers with the layouts that the map has for their outputs, and what is said of them."""
    named, said = [], []
    for layer in layers:
        pattern = pattern_of.get(f"{layer.path}/output")
        layout = tuple(layout_map[pattern].axes) if pattern else ()
        if any(axis is not None and mesh.axis_size(axis) > 1 for axis in layout):
            layer = replace(layer, output_layout=layout)
            said.append(
                f"pattern {pattern!r} gives the output of layer '{layer.path}' a layout {layout}: "
                "what layers hand each other as shards is decided by what they compute, so that it "
                "changes nothing. The numbers are the same."
            )
        named.append(layer)
    return named, said


def _name_of(path: str) -> str:
    return path.rsplit("/", 1)[-1]
