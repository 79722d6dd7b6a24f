"""What a `keras.distribution.Distribution` says of variables: their layouts, and a model's plan."""

from __future__ import annotations

from typing import Any

import keras

from keras_tp.errors import LayoutError
from keras_tp.layouts import Layout, MeshShape, layout_problems
from keras_tp.patterns import match_paths
from keras_tp.planner import make_plan
from keras_tp.plans import Plan
from keras_tp.problems import read_mesh
from keras_tp.seam.distribution import layout_map_of, layout_of
from keras_tp.seam.layers import variables_of, walk_layers


def layout_map_for(distribution: Any) -> Any:
    """The LayoutMap a distribution stands for: a `DataParallel`'s is empty.

    Raises:
        LayoutError: a distribution with rules of its own.
    """
    rule = type(distribution).get_variable_layout
    if rule is keras.distribution.ModelParallel.get_variable_layout:
        return layout_map_of(distribution)
    if rule is keras.distribution.DataParallel.get_variable_layout:
        return keras.distribution.LayoutMap(distribution.device_mesh)
    raise LayoutError(
        f"{type(distribution).__name__} decides by itself where variables go. Use a "
        "keras.distribution.DataParallel, or a ModelParallel with a LayoutMap.",
        where="this distribution",
    )


def claimed_layout(distribution: Any, path: str, shape: tuple[int, ...]) -> Any:
    """The `TensorLayout` of a new variable of a model: its pattern's, else one that shards nothing.

    Args:
        distribution: a `DataParallel` or `ModelParallel`.
        path: the variable's path.
        shape: its full shape.

    Raises:
        LayoutError: several patterns claim it, or the layout does not fit it.
    """
    layout_map = layout_map_for(distribution)
    mesh = read_mesh(layout_map)
    claims = match_paths(list(layout_map), [path])
    problems = claims.problems
    pattern = claims.pattern_of.get(path)
    if pattern is None:
        layout = whole_layout(distribution.device_mesh, shape)
    else:
        layout = layout_map[pattern]
        problems = [
            *problems,
            *(
                f"pattern {pattern!r} gives {path!r} {shape} a layout {layout.axes} {problem}."
                for problem in layout_problems(layout.axes, shape, mesh)
            ),
        ]
        if MeshShape.from_keras(layout.device_mesh) != mesh:
            problems.append(
                f"the layout of pattern {pattern!r} is for another mesh "
                f"({MeshShape.from_keras(layout.device_mesh)}) than the map's. Give the axis names "
                "as a tuple."
            )
    if problems:
        raise LayoutError(problems, where=f"this layout map (mesh: {mesh})")
    return layout


def given_layout(layout: Any, device_mesh: Any, path: str, shape: tuple[int, ...]) -> Any:
    """The `TensorLayout` of a variable that was made with `layout=`, on `device_mesh` if on none.

    Raises:
        LayoutError: no mesh, or a layout that does not fit.
    """
    if not isinstance(layout, keras.distribution.TensorLayout):
        problem = f"{path!r} is given a {type(layout).__name__} for a layout, not a TensorLayout."
        raise LayoutError(problem, where="this variable")
    if layout.device_mesh is None:
        if device_mesh is None:
            problem = f"{path!r} is given a layout {layout.axes} without a device mesh."
            raise LayoutError(problem, where="this variable")
        layout = keras.distribution.TensorLayout(layout.axes, device_mesh)
    mesh = MeshShape.from_keras(layout.device_mesh)
    problems = layout_problems(layout.axes, shape, mesh)
    if problems:
        raise LayoutError(
            [f"{path!r} {shape} is given a layout {layout.axes} {p}." for p in problems],
            where=f"this variable (mesh: {mesh})",
        )
    return layout


def whole_layout(device_mesh: Any, shape: tuple[int, ...]) -> Any:
    """The `TensorLayout` of a tensor of which every rank stores everything."""
    return keras.distribution.TensorLayout((None,) * len(shape), device_mesh)


def plan_of(model: Any, distribution: Any) -> Plan:
    """The plan of a model under a distribution. No communication, and nothing is touched.

    The model was built in the distribution's scope, or in none.

    Args:
        model: a built model that is not parallelized.
        distribution: a `DataParallel`, which shards nothing, or a `ModelParallel`.

    Raises:
        LayoutError: as for `keras_tp.plan`; also every variable that was made
            under another distribution, on another mesh or with another layout.
    """
    plan = make_plan(model, layout_map_for(distribution), batch_axis=distribution.batch_dim_name)
    problems = []
    for variable, planned in zip(variables_of(walk_layers(model)), plan.variables, strict=True):
        made = layout_of(variable)
        if made is None:
            continue
        mesh = MeshShape.from_keras(made.device_mesh)
        if mesh != plan.mesh:
            problems.append(f"{planned.path!r} lies on another mesh ({mesh}).")
        elif _cuts(made.axes, mesh) not in (_cuts(planned.layout, mesh), ()):
            problems.append(f"{planned.path!r} is stored by {made.axes}, not {planned.layout}.")
    if problems:
        problems[-1] += (
            " Build the model in the scope of the distribution that it is used under, or after "
            "keras.distribution.set_distribution(...)."
        )
        raise LayoutError(
            problems,
            where=f"model '{model.name}': it was made under another distribution (this one has "
            f"mesh: {plan.mesh})",
        )
    return plan


def differences(plan: Plan, distribution: Any) -> list[str]:
    """In what a plan that was carried out is not what `distribution` asks for, in words."""
    layout_map = layout_map_for(distribution)
    mesh = read_mesh(layout_map)
    if mesh != plan.mesh:
        return [f"it lies on a mesh {plan.mesh}, the distribution on {mesh}."]
    claims = match_paths(list(layout_map), [v.path for v in plan.variables])
    problems = []
    for variable in plan.variables:
        pattern = claims.pattern_of.get(variable.path)
        layout = tuple(layout_map[pattern].axes) if pattern else ()
        if _cuts(layout, mesh) != _cuts(variable.layout, mesh):
            problems.append(
                f"{variable.path!r} is stored by {variable.layout}, the distribution has "
                f"{layout or 'no layout'} for it."
            )
    return problems


def _cuts(layout: Layout, mesh: MeshShape) -> Layout:
    cuts = tuple(axis if axis and mesh.axis_size(axis) > 1 else None for axis in layout)
    return cuts if any(cuts) else ()
