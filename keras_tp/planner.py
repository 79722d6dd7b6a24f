"""Makes the plan: walks the model, matches the layout map, asks the rules, finds every problem."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import keras

from keras_tp.errors import LayoutError, LayoutWarning
from keras_tp.layouts import MeshShape, layout_problems
from keras_tp.patterns import match_paths, nearest
from keras_tp.plans import Collective, Computation, LayerPlan, Plan, StylePlan, VariablePlan
from keras_tp.rules import Weight, collectives_of, computation_of, gathered_along, style_along
from keras_tp.seam.layers import (
    Owner,
    captured_views,
    overrides_build,
    parallelized_part,
    variables_of,
    walk_layers,
)

# These call their cell or layer once per time step: what it gathers is gathered
# once, around all the steps.
_REPEATING = (keras.layers.RNN, keras.layers.TimeDistributed)


def make_plan(model: Any, layout_map: Any, *, strict: bool = False) -> Plan:
    """Decides everything; see `keras_tp.plan`."""
    check_model(model)
    mesh = _read_mesh(layout_map)
    where = f"this layout map (mesh: {mesh})"
    owners = walk_layers(model)
    unbuilt = _unbuilt(model, owners)
    if unbuilt:  # nothing can be said of patterns while variables are missing
        raise LayoutError(unbuilt, where=f"model '{model.name}'")
    variables = variables_of(owners)
    paths = [v.path for v in variables]
    claims = match_paths(list(layout_map), paths)
    unused = [_unused(pattern, paths, owners) for pattern in claims.unused]
    plans = [_plan_variable(v, claims.pattern_of.get(v.path), layout_map, mesh) for v in variables]
    index = {id(v): i for i, v in enumerate(variables)}
    problems = [*claims.problems, *(unused if strict else ())]
    problems += _layout_problems(plans, layout_map, mesh) or [
        *_unshardable(owners, plans, index),
        *_captured(model, variables, plans),
    ]
    if problems:
        raise LayoutError(problems, where=where)
    for sentence in unused:
        warnings.warn(sentence, LayoutWarning, stacklevel=3)
    layers = _plan_layers(owners, plans, index, mesh)
    notes = [*unused, *_idle_axes(plans, mesh), *_full_reads(variables, plans)]
    return Plan(mesh, tuple(plans), tuple(layers), tuple(notes))


def check_model(model: Any) -> None:
    """Raises LayoutError unless `model` is a Keras model or layer, and not parallelized."""
    if not isinstance(model, keras.layers.Layer):
        raise LayoutError(
            f"expected a Keras model, got {type(model).__name__}.", where="the arguments"
        )
    done = parallelized_part(model)
    if done is not None:
        raise LayoutError(
            f"'{done}' is parallelized already, and a weight is sharded once. Plan and parallelize "
            "the outermost model only, or a new model.",
            where=f"model '{model.name}'",
        )


def _read_mesh(layout_map: Any) -> MeshShape:
    make_one = "`keras.distribution.LayoutMap(keras_tp.device_mesh({'model': 2}))` makes one."
    if isinstance(layout_map, Plan):
        raise LayoutError("got a Plan for a layout map. Give it by name: plan=...")
    if not isinstance(layout_map, keras.distribution.LayoutMap):
        found = type(layout_map).__name__
        raise LayoutError(f"expected a keras.distribution.LayoutMap, got {found}. {make_one}")
    if layout_map.device_mesh is None:
        raise LayoutError(f"the LayoutMap has no device mesh. {make_one}")
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
    named = list(match_paths([pattern], outputs).pattern_of)
    if named:
        return (
            f"pattern {pattern!r} names the output of layer '{named[0].removesuffix('/output')}': "
            "layouts of activations are not applied. The numbers are the same without."
        )
    near = ", ".join(map(repr, nearest(pattern, paths)))
    return f"pattern {pattern!r} matches no variable." + (f" Nearest: {near}." if near else "")


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


def _layout_problems(plans: list[VariablePlan], layout_map: Any, mesh: MeshShape) -> list[str]:
    problems = [
        f"pattern {v.pattern!r} gives {v.path!r} {v.shape} a layout {v.layout} {problem}."
        for v in plans
        for problem in layout_problems(v.layout, v.shape, mesh)
    ]
    for pattern, layout in layout_map.items():
        if layout.device_mesh is not None:
            other = MeshShape.from_keras(layout.device_mesh)
            if other != mesh:
                problems.append(
                    f"the layout of pattern {pattern!r} is for another mesh ({other}) than the "
                    "map's. Give the axis names as a tuple."
                )
    return problems


def _unshardable(
    owners: list[Owner], plans: list[VariablePlan], index: dict[int, int]
) -> list[str]:
    return [
        f"pattern {plans[index[id(v)]].pattern!r} shards {v.path!r} of layer '{owner.path}', a "
        "torch module, which reads its weights behind Keras's back. Narrow the pattern."
        for owner in owners
        if isinstance(owner.layer, keras.layers.TorchModuleWrapper)
        for v in owner.variables
        if plans[index[id(v)]].sharded
    ]


def _captured(model: Any, variables: tuple[Any, ...], plans: list[VariablePlan]) -> list[str]:
    sharded = {id(v): plan for v, plan in zip(variables, plans, strict=True) if plan.sharded}
    return [
        f"pattern {sharded[id(v)].pattern!r} shards {v.path!r}, of which operation "
        f"'{operation}' of a functional model holds a view, taken when the graph was made. Read "
        "the weight in the `call` of a layer instead, or narrow the pattern."
        for operation, v in captured_views(model, [v for v in variables if id(v) in sharded])
    ]


def _idle_axes(plans: list[VariablePlan], mesh: MeshShape) -> list[str]:
    used = {axis for v in plans for axis in v.layout}
    return [
        f"nothing is sharded along axis {axis!r}: its {size} ranks all compute the same."
        for axis, size in zip(mesh.axes, mesh.sizes, strict=True)
        if size > 1 and axis not in used
    ]


def _full_reads(variables: Iterable[Any], plans: list[VariablePlan]) -> list[str]:
    return [
        f"the {what} of {plan.path!r} looks at the full weight, which is gathered for it once a "
        "training step."
        for variable, plan in zip(variables, plans, strict=True)
        for what in ("regularizer", "constraint")
        if plan.sharded and getattr(variable, what) is not None
    ]


def _plan_layers(
    owners: list[Owner], plans: list[VariablePlan], index: dict[int, int], mesh: MeshShape
) -> list[LayerPlan]:
    # Variable index -> the layer that gathers it, where that is not its owner.
    gathered_by: dict[int, Owner] = {}
    layers = []
    for owner in owners:
        if isinstance(owner.layer, _REPEATING):
            for variable in variables_of(walk_layers(owner.layer)):
                if plans[index[id(variable)]].sharded:
                    gathered_by.setdefault(index[id(variable)], owner)
        layers.append(_plan_layer(owner, plans, index, gathered_by, mesh))
    return layers


def _plan_layer(
    owner: Owner,
    plans: list[VariablePlan],
    index: dict[int, int],
    gathered_by: dict[int, Owner],
    mesh: MeshShape,
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
        style = style_along(axis, computation, weights) if size > 1 else None
        if style is None and any(axis in plans[i].layout for i in held):
            style = gathered_along(axis)
        if style is not None:
            styles.append(style)
            ahead, back = collectives_of(style, computation, weights)
            forward += ahead
            backward += back
    if all(style.name == "gathered" for style in styles):
        if computation is not None and styles:
            why_not = f"its {computation.weights[0]} is not sharded along that axis"
        computation = None
        mine = [i for i in own if plans[i].sharded and gathered_by.get(i, owner) is owner]
        gathers = mine + held
    else:
        gathers = []
    return LayerPlan(
        path=owner.path,
        kind=type(owner.layer).__name__,
        variables=tuple(own),
        computation=computation,
        styles=tuple(styles),
        gathers=tuple(gathers),
        forward=tuple(forward),
        backward=tuple(backward),
        reason=_reason(styles, [plans[i] for i in own], why_not),
    )


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


def _reason(styles: list[StylePlan], plans: list[VariablePlan], why_not: str) -> str:
    if not any("float" in plan.dtype for plan in plans):
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
        "column": "its output is gathered: layers do not yet hand shards to each other",
        "row": "its input is sliced: layers do not yet hand shards to each other",
        "batched": "input sliced, output gathered: layers do not yet hand shards to each other",
        "gathered": f"gathered on use: {why_not}",
    }
    return "; ".join(reasons[s.name] for s in styles if s.name in reasons)
