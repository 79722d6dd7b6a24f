"""Makes the plan: walks the model, matches the layout map, asks the rules."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import keras

from keras_tp.computations import Computation
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
    Weight,
    collectives_of,
    collectives_of_rows,
    computation_of,
    gathered_along,
    rows_of,
    style_along,
)
from keras_tp.seam.layers import Owner, variables_of, walk_layers
from keras_tp.seam.likeness import Likeness
from keras_tp.stretches import find_sequence

# These call their cell or layer once per time step: what it gathers is gathered
# once, around all the steps.
REPEATING = (keras.layers.RNN, keras.layers.TimeDistributed)


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
    layers = _plan_layers(owners, plans, index, mesh, replicas, Found())
    computing = {
        axis: size
        for axis, size in zip(mesh.axes, mesh.sizes, strict=True)
        if size > 1 and axis != replicas
    }
    found = find_regions(model, owners, layers, plans, computing, likeness or Likeness())
    if found != Found():
        layers = _plan_layers(owners, plans, index, mesh, replicas, found)
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
    owners: list[Owner],
    plans: list[VariablePlan],
    index: dict[int, int],
    mesh: MeshShape,
    replicas: str | None,
    found: Found,
) -> list[LayerPlan]:
    # Variable index -> the layer that gathers it, where that is not its owner.
    gathered_by: dict[int, Owner] = {}
    layers = []
    for number, owner in enumerate(owners):
        if isinstance(owner.layer, REPEATING):
            for variable in variables_of(walk_layers(owner.layer)):
                if plans[index[id(variable)]].sharded:
                    gathered_by.setdefault(index[id(variable)], owner)
        layer = _plan_layer(number, owner, plans, index, gathered_by, mesh, replicas, found)
        layers.append(layer)
    return layers


def _plan_layer(
    number: int,
    owner: Owner,
    plans: list[VariablePlan],
    index: dict[int, int],
    gathered_by: dict[int, Owner],
    mesh: MeshShape,
    replicas: str | None,
    found: Found,
) -> LayerPlan:
    own = [index[id(v)] for v in owner.variables]
    computation, why_not = computation_of(owner.layer)
    names = _names(owner, index, computation)
    if computation is not None and not set(computation.weights) <= set(names):
        computation, why_not = None, "its weights belong to another layer"
    above = next((gathered_by[i] for i in own if i in gathered_by), owner)
    if above is not owner:
        computation = None
        why_not = f"every time step needs it, so '{above.path}' gathers it once around them all"
    weights = {name: Weight(plans[i].shape, plans[i].layout) for name, i in names.items()}
    # What this layer gathers for the cell below it.
    held = [i for i, by in gathered_by.items() if by is owner and i not in own]
    styles: list[StylePlan] = []
    forward: list[Collective] = []
    backward: list[Collective] = []
    for axis, size in zip(mesh.axes, mesh.sizes, strict=True):
        # Replicas compute other rows, so that no sum or join of theirs is a layer's output.
        known = None if axis == replicas else computation
        style = style_along(axis, known, weights) if size > 1 else None
        if style is None and any(axis in plans[i].layout for i in held):
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
    for axis, i in found.summed(own):
        backward.append(Collective("all_reduce", axis, f"{_name_of(plans[i].path)} gradient"))
    if all(style.name == "gathered" for style in styles):
        if computation is not None and styles:
            why_not = f"its {computation.weights[0]} is not sharded along that axis"
            if any(style.axis == replicas for style in styles):
                why_not = f"each replica along '{replicas}' needs it for its own rows"
        computation = None
        mine = [i for i in own if plans[i].sharded and gathered_by.get(i, owner) is owner]
        gathers = mine + held
    else:
        gathers = []
    rows = "own"
    if replicas is not None:
        rows = rows_of(owner.layer)
        ahead, back = collectives_of_rows(rows, replicas)
        forward += ahead
        backward += back
    return LayerPlan(
        path=owner.path,
        kind=type(owner.layer).__name__,
        variables=tuple(own),
        computation=computation,
        styles=tuple(styles),
        gathers=tuple(gathers),
        forward=tuple(forward),
        backward=tuple(backward),
        rows=rows,
        reason=reason_of(
            styles, [plans[i] for i in own], weights, why_not, found.reasons.get(number, "")
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


def _names(owner: Owner, index: dict[int, int], computation: Computation | None) -> dict[str, int]:
    """Names the layer's own variables: as its computation does, else by the variable's name."""
    left = {id(variable): variable for variable in owner.variables}
    names = {}
    for name in computation.weights if computation else ():
        variable = left.pop(id(getattr(owner.layer, name)), None)
        if variable is not None:
            names[name] = index[id(variable)]
    for variable in left.values():
        i = index[id(variable)]
        names[variable.name if variable.name not in names else f"{variable.name}_{i}"] = i
    return names


def _name_of(path: str) -> str:
    return path.rsplit("/", 1)[-1]
