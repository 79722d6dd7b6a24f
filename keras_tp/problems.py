"""What can be wrong with a model, a mesh or a layout map: where, and what to do about it."""

from __future__ import annotations

from typing import Any

import keras

from keras_tp.errors import LayoutError
from keras_tp.layouts import MeshShape, layout_problems
from keras_tp.patterns import nearest
from keras_tp.plans import Plan, VariablePlan
from keras_tp.seam.layers import (
    Owner,
    captured_views,
    overrides_build,
    parallelized_part,
)


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


def read_mesh(layout_map: Any) -> MeshShape:
    """The mesh of a layout map; raises LayoutError where there is none to plan for."""
    here = "this layout map"
    make_one = "`keras.distribution.LayoutMap(keras_tp.device_mesh({'model': 2}))` makes one."
    if isinstance(layout_map, Plan):
        raise LayoutError("got a Plan for a layout map. Give it by name: plan=...", where=here)
    if not isinstance(layout_map, keras.distribution.LayoutMap):
        found = type(layout_map).__name__
        raise LayoutError(
            f"expected a keras.distribution.LayoutMap, got {found}. {make_one}", where=here
        )
    if layout_map.device_mesh is None:
        raise LayoutError(f"the LayoutMap has no device mesh. {make_one}", where=here)
    mesh = MeshShape.from_keras(layout_map.device_mesh)
    problems = []
    if len(set(mesh.axes)) < len(mesh.axes):
        problems.append(f"the mesh names an axis twice: {', '.join(mesh.axes)}.")
    if len(set(mesh.ranks)) < len(mesh.ranks):
        names = [str(name) for name in layout_map.device_mesh.devices.flatten()]
        problems.append(f"the mesh names a device twice: {', '.join(names)}.")
    if problems:
        raise LayoutError(problems, where=f"this mesh ({mesh})")
    return mesh


def read_batch_axis(batch_axis: Any, mesh: MeshShape) -> str | None:
    """The axis along which rows are shared out, or None where every rank computes all rows.

    "batch" need not be an axis of the mesh, as it is what nobody has asked for.
    """
    if batch_axis is None or (batch_axis == "batch" and "batch" not in mesh.axes):
        return None
    if batch_axis not in mesh.axes:
        known = ", ".join(map(repr, mesh.axes))
        raise LayoutError(
            f"batch_axis={batch_axis!r} is no axis of the mesh, which has {known}.",
            where="the arguments",
        )
    return batch_axis if mesh.axis_size(batch_axis) > 1 else None


def unbuilt_layers(model: Any, owners: list[Owner]) -> list[str]:
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


def unused_pattern(pattern: str, paths: list[str]) -> str:
    """What a pattern that claims no variable and no output may have meant."""
    near = ", ".join(map(repr, nearest(pattern, paths)))
    return f"pattern {pattern!r} matches no variable." + (f" Nearest: {near}." if near else "")


def wrong_layouts(
    plans: list[VariablePlan], outputs: dict[str, str], layout_map: Any, mesh: MeshShape
) -> list[str]:
    """Layouts that do not fit their variable, their output or the mesh.

    `outputs` is the pattern of each layer output that one claims. How many dims
    an output has is known when the layer is called.
    """
    claimed = [(v.pattern, f"{v.path!r} {v.shape}", v.layout, v.shape) for v in plans]
    for path, pattern in outputs.items():
        layout = tuple(layout_map[pattern].axes)
        claimed.append((pattern, repr(path), layout, (0,) * len(layout)))
    problems = [
        f"pattern {pattern!r} gives {what} a layout {layout} {problem}."
        for pattern, what, layout, shape in claimed
        for problem in layout_problems(layout, shape, mesh)
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


def unshardable_weights(
    owners: list[Owner], plans: list[VariablePlan], index: dict[int, int]
) -> list[str]:
    """Weights that are read in ways that cannot be followed."""
    return [
        f"pattern {plans[index[id(v)]].pattern!r} shards {v.path!r} of layer '{owner.path}', a "
        "torch module, which reads its weights behind Keras's back. Narrow the pattern."
        for owner in owners
        if isinstance(owner.layer, keras.layers.TorchModuleWrapper)
        for v in owner.variables
        if plans[index[id(v)]].sharded
    ]


def captured_weights(
    owners: list[Owner], variables: tuple[Any, ...], plans: list[VariablePlan]
) -> list[str]:
    """Weights of which a functional graph holds a view, which would keep the full, old value."""
    sharded = {id(v): plan for v, plan in zip(variables, plans, strict=True) if plan.sharded}
    return [
        f"pattern {sharded[id(v)].pattern!r} shards {v.path!r}, of which operation "
        f"'{operation}' of a functional model holds a view, taken when the graph was made. Read "
        "the weight in the `call` of a layer instead, or narrow the pattern."
        for operation, v in captured_views(owners, [v for v in variables if id(v) in sharded])
    ]
