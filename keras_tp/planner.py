"""Makes the plan: walks the model, matches the layout map, asks the rules, finds every problem."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from keras_tp.errors import LayoutError, LayoutWarning
from keras_tp.layouts import MeshShape, layout_problems
from keras_tp.patterns import Claims, match_paths, nearest
from keras_tp.plans import Collective, LayerPlan, Plan, StylePlan, VariablePlan
from keras_tp.rules import (
    Description,
    Weight,
    collectives_of,
    describe,
    gathered_along,
    style_along,
)
from keras_tp.variables import Owner, overrides_build, walk_layers

# These call their cell or layer once per time step: what it gathers is gathered
# once, around all the steps.
_REPEATING = (keras.layers.RNN, keras.layers.TimeDistributed)


def make_plan(model: Any, layout_map: Any, *, strict: bool = False) -> Plan:
    """Decides everything; see `keras_tp.plan`."""
    mesh = _read_mesh(layout_map)
    owners = walk_layers(model)
    problems = _unbuilt(model, owners)
    variables = list({id(v): v for owner in owners for v in owner.variables}.values())
    paths = [v.path for v in variables]
    claims = match_paths(list(layout_map), paths)
    problems += claims.problems
    notes = []
    for pattern in claims.unused:
        sentence = _unused(pattern, paths, owners)
        if strict:
            problems.append(sentence)
        else:
            notes.append(sentence)
    plans = [_plan_variable(v, claims, layout_map, mesh, problems) for v in variables]
    problems += _unshardable(owners, dict(zip(map(id, variables), plans, strict=True)))
    if problems:
        raise LayoutError(problems, where=f"this layout map (mesh: {mesh})")
    for note in notes:
        warnings.warn(note, LayoutWarning, stacklevel=3)
    layers = _plan_layers(owners, list(zip(variables, plans, strict=True)), mesh)
    return Plan(mesh, tuple(plans), tuple(layers), tuple(notes))


def _read_mesh(layout_map: Any) -> MeshShape:
    if not isinstance(layout_map, keras.distribution.LayoutMap):
        raise LayoutError(
            f"expected a keras.distribution.LayoutMap, got {type(layout_map).__name__}. Make one "
            "with `keras.distribution.LayoutMap(keras_tp.device_mesh({'model': 2}))`."
        )
    if layout_map.device_mesh is None:
        raise LayoutError(
            "the LayoutMap has no device mesh. Make it with "
            "`keras.distribution.LayoutMap(keras_tp.device_mesh({'model': 2}))`."
        )
    mesh = MeshShape.from_keras(layout_map.device_mesh)
    problems = []
    if len(set(mesh.axes)) < len(mesh.axes):
        problems.append(f"the mesh names an axis twice: {', '.join(mesh.axes)}.")
    if len(set(mesh.ranks)) < len(mesh.ranks):
        names = [str(name) for name in layout_map.device_mesh.devices.flatten()]
        problems.append(f"the mesh names a device twice: {', '.join(names)}.")
    if "batch" in mesh.axes and mesh.axis_size("batch") > 1:
        problems.append(
            f"axis 'batch' has size {mesh.axis_size('batch')}: data parallelism is not there yet. "
            "Use batch=1 and give the ranks to the other axis."
        )
    if problems:
        raise LayoutError(problems, where=f"this mesh ({mesh})")
    return mesh


def _unbuilt(model: Any, owners: list[Owner]) -> list[str]:
    """A layer that is not built has no variables yet, so no pattern could claim them."""
    if not model.built:
        return [
            f"model '{model.name}' is not built: it has no variables yet. Call it on a batch once "
            "or `model.build(input_shape)`, e.g. `model.build((None, 128))`."
        ]
    return [
        f"layer '{owner.path}' ({type(owner.layer).__name__}) is not built: its variables do not "
        "exist yet. Call the model on a batch once, or remove the layer if no call uses it."
        for owner in owners
        if not owner.layer.built and overrides_build(owner.layer)
    ]


def _unused(pattern: str, paths: list[str], owners: list[Owner]) -> str:
    outputs = [f"{owner.path}/output" for owner in owners]
    named = list(match_paths([pattern], outputs).of)
    if named:
        return (
            f"pattern {pattern!r} names the output of layer '{named[0].removesuffix('/output')}': "
            "layouts of activations are not applied. The numbers are the same without."
        )
    near = ", ".join(map(repr, nearest(pattern, paths)))
    return f"pattern {pattern!r} matches no variable." + (f" Nearest: {near}." if near else "")


def _plan_variable(
    variable: Any, claims: Claims, layout_map: Any, mesh: MeshShape, problems: list[str]
) -> VariablePlan:
    pattern = claims.of.get(variable.path)
    shape = tuple(int(size) for size in variable.shape)
    layout: tuple[Any, ...] = (None,) * len(shape)
    if pattern is not None:
        axes = tuple(layout_map[pattern].axes)
        wrong = layout_problems(axes, shape, mesh)
        problems += [
            f"pattern {pattern!r} gives {variable.path!r} {shape} a layout {axes} {problem}."
            for problem in wrong
        ]
        layout = layout if wrong else axes
    return VariablePlan(
        path=variable.path,
        shape=shape,
        dtype=keras.backend.standardize_dtype(variable.dtype),
        trainable=bool(variable.trainable),
        layout=layout,
        pattern=pattern,
        mesh=mesh,
    )


def _unshardable(owners: list[Owner], plan_of: dict[int, VariablePlan]) -> list[str]:
    return [
        f"{v.path!r} is a weight of a torch module, which reads it behind Keras's back; it cannot "
        "be sharded. Let no pattern match it."
        for owner in owners
        if isinstance(owner.layer, keras.layers.TorchModuleWrapper)
        for v in owner.variables
        if plan_of[id(v)].sharded
    ]


def _plan_layers(
    owners: list[Owner], variables: list[tuple[Any, VariablePlan]], mesh: MeshShape
) -> list[LayerPlan]:
    """`variables` pairs each Keras variable with its plan, in plan order."""
    index = {id(variable): i for i, (variable, _) in enumerate(variables)}
    plans = [plan for _, plan in variables]
    holder: dict[int, Owner] = {}  # variable index -> the layer that gathers it for its cell
    layers = []
    for owner in owners:
        if isinstance(owner.layer, _REPEATING):
            for below in walk_layers(owner.layer):
                for variable in below.variables:
                    if plans[index[id(variable)]].sharded:
                        holder.setdefault(index[id(variable)], owner)
        own = {index[id(v)]: v for v in owner.variables}
        held = [i for i, by in holder.items() if by is owner and i not in own]
        layers.append(_plan_layer(owner, own, held, holder, plans, mesh))
    return layers


def _plan_layer(
    owner: Owner,
    own: dict[int, Any],
    held: list[int],
    holder: dict[int, Owner],
    plans: list[VariablePlan],
    mesh: MeshShape,
) -> LayerPlan:
    description, why_not = describe(owner.layer)
    names = _names(owner, own, description)
    if description is not None and not set(description.weights) <= set(names):
        description, why_not = None, "its weights belong to another layer"
    held_by = next((holder[i] for i in own if i in holder), None)
    if held_by is not None and held_by is not owner:
        description, why_not = None, f"once for all the steps of '{held_by.path}'"
    weights = {name: Weight(plans[i].shape, plans[i].layout) for name, i in names.items()}
    styles: list[StylePlan] = []
    forward: list[Collective] = []
    backward: list[Collective] = []
    for axis, size in zip(mesh.axes, mesh.sizes, strict=True):
        style = style_along(axis, description, weights) if size > 1 else None
        if style is None and any(axis in plans[i].layout for i in held):
            style = gathered_along(axis)
        if style is not None:
            styles.append(style)
            ahead, back = collectives_of(style, description, weights)
            forward += ahead
            backward += back
    gathers = []
    if styles and all(style.name == "gathered" for style in styles):
        gathers = [i for i in own if plans[i].sharded and holder.get(i, owner) is owner] + held
    return LayerPlan(
        path=owner.path,
        kind=type(owner.layer).__name__,
        variables=tuple(own),
        styles=tuple(styles),
        gathers=tuple(gathers),
        forward=tuple(forward),
        backward=tuple(backward),
        reason=_reason(styles, [plans[i] for i in own], why_not),
    )


def _names(owner: Owner, own: dict[int, Any], description: Description | None) -> dict[str, int]:
    """Names the layer's own variables: as its description does, else by the variable's name."""
    position = {id(variable): i for i, variable in own.items()}
    names = {}
    for name in description.weights if description else ():
        i = position.pop(id(getattr(owner.layer, name)), None)
        if i is not None:
            names[name] = i
    for i in position.values():
        name = own[i].name
        names[name if name not in names else f"{name}_{i}"] = i
    return names


def _reason(styles: list[StylePlan], plans: list[VariablePlan], why_not: str) -> str:
    if not plans:
        return ""
    if not styles:
        claimed = [plan for plan in plans if plan.pattern is not None]
        if not claimed:
            return "no pattern claims it"
        axes = {axis for plan in claimed for axis in plan.layout if axis is not None}
        if not axes:
            return "its layout shards nothing"
        return f"one rank along {', '.join(sorted(axes))}"
    reasons = {
        "column": "output gathered: its readers are not proven to take shards",
        "row": "input sliced: it arrives replicated",
        "batched": "input sliced, output gathered: its neighbours are not proven to take shards",
        "gathered": f"gathered on use: {why_not}",
    }
    return "; ".join(reasons[s.name] for s in styles if s.name in reasons)
