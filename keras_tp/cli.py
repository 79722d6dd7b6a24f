"""The command: plans a model that need not fit on this machine, nor on any.

    keras-tp plan module:function --mesh batch=8,model=8 --html plan.html

`function(mesh)` returns the model and its layout map; `mesh` is a Keras device mesh of the
size that was asked for, as `keras_tp.device_mesh` makes it:

    def llama(mesh):
        model = ...  # built; its weights get shapes and no memory
        layout_map = keras.distribution.LayoutMap(mesh)
        layout_map[".*kernel"] = (None, "model")
        return model, layout_map

Instead of the layout map it may return a dict of patterns and layouts, and then needs no mesh:
`function()`. One that makes a mesh of its own is run without --mesh.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from keras_tp.api import plan as make_plan
from keras_tp.arguments import file_with, mesh_of, number_of, shapes_of
from keras_tp.costs import slots_of, stored_bytes
from keras_tp.errors import LayoutError, LayoutWarning
from keras_tp.layouts import MeshShape
from keras_tp.mesh import device_mesh
from keras_tp.plans import Plan
from keras_tp.price_tables import cost_table
from keras_tp.seam.devices import without_values
from keras_tp.tables import size_text, summary
from keras_tp.version import __version__

_VALUES = (
    "keras-tp builds the model without values. If that is what fails here, --allocate builds it "
    "with all its weights."
)


_CALLED = (
    "keras-tp called the model, its loss and its metrics without values, on --batch and --targets "
    "of these shapes. Of several inputs or outputs give 64,1024:64,16."
)
_WANTS = {"bandwidth": "batch", "targets": "batch", "compute": "bandwidth"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and ends the program.

    The exit status is 0 where there is a plan, 1 where the model or the layout map has
    problems, which are all printed, and 2 where the command was not understood.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        model, layout_map = _model_of(options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LayoutWarning)  # each is a note, which is printed
            plan = make_plan(
                model, layout_map, strict=options.strict, batch_axis=options.batch_axis
            )
        for name, other in _WANTS.items():
            if getattr(options, name) is not None and getattr(options, other) is None:
                raise _UsageError(f"--{name} is for the price of a step: give --{other}.")
    except _UsageError as error:
        parser.error(str(error))
    except LayoutError as error:
        sys.exit(f"keras-tp: {error}")
    slots = None
    try:
        slots = slots_of(model)
    except ValueError as error:
        print(f"note: {error} Counted are two slots for each variable.")
    files = [(options.html, ".html"), (options.json, ".json")]
    print("\n".join(summary(plan)) if any(path for path, _ in files) else plan)
    stored = stored_bytes(plan, plan.mesh.ranks[0], 2 if slots is None else slots)
    print(
        f"to train, the fullest rank stores {size_text(stored.total)}: parameters "
        f"{size_text(stored.parameters)}, gradients {size_text(stored.gradients)}, "
        f"{'two slots each' if slots is None else 'slots'} {size_text(stored.slots)}."
    )
    if options.batch is not None:
        _print_cost(plan, model, options)
    for path, ending in files:
        if path:
            _write(plan, path, ending, slots)


def _print_cost(plan: Plan, model: Any, options: argparse.Namespace) -> None:
    bandwidth = None if options.bandwidth is None else options.bandwidth * 1e9
    compute = None if options.compute is None else options.compute * 1e12
    batch, targets = (
        shapes[0] if shapes is not None and len(shapes) == 1 else shapes
        for shapes in (options.batch, options.targets)
    )
    try:
        cost = plan.cost(model, batch, targets=targets)
    except ValueError as error:
        sys.exit(f"keras-tp: the price of a step: {error}")
    except Exception as error:
        error.add_note(_CALLED)
        raise
    print(f"\n{cost_table(cost, bandwidth, compute)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-tp",
        description="Tensor-parallel Keras: looks before you launch.",
    )
    parser.add_argument("--version", action="version", version=f"keras_tp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="plan")
    plan = commands.add_parser(
        "plan",
        help="plan a model for any number of ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("target", help="module:function, or path/to/file.py:function")
    plan.add_argument(
        "--mesh", type=mesh_of, metavar="AXIS=N,...", help="axes and ranks along each"
    )
    plan.add_argument("--html", metavar="FILE", type=file_with(".html"), help="write a page")
    plan.add_argument("--json", metavar="FILE", type=file_with(".json"), help="write JSON")
    plan.add_argument(
        "--strict", action="store_true", help="a pattern that matches nothing is an error"
    )
    plan.add_argument(
        "--batch-axis",
        metavar="NAME",
        default="batch",
        help="axis along which replicas share out rows (default: batch)",
    )
    plan.add_argument(
        "--allocate", action="store_true", help="build the model with all its weights"
    )
    plan.add_argument(
        "--batch",
        type=shapes_of,
        metavar="SHAPE",
        help="print what a training step costs on a whole batch of inputs of this shape, such as "
        "64,1024; of several inputs 64,1024:64,16",
    )
    plan.add_argument(
        "--targets",
        type=shapes_of,
        metavar="SHAPE",
        help="shapes of what outputs are compared with, by the loss and metrics that the model is "
        "compiled with: these are then part of the price",
    )
    plan.add_argument(
        "--bandwidth",
        type=number_of("GB/s"),
        metavar="GB/s",
        help="bytes that a rank can send (a network of 400 Gbit/s: 50), to tell how long a step "
        "communicates",
    )
    plan.add_argument(
        "--compute",
        type=number_of("TFLOP/s"),
        metavar="TFLOP/s",
        help="what a rank computes (not at best: as it trains), to tell the share of communication",
    )
    return parser


class _UsageError(Exception):
    """What was asked for makes no sense, in a sentence."""


def _model_of(options: argparse.Namespace) -> tuple[Any, Any]:
    """Calls the function; gives the model and a layout map."""
    with contextlib.nullcontext() if options.allocate else without_values():
        # A module may make the model as it is imported.
        function = _function_of(options.target)
        mesh = None if options.mesh is None else device_mesh(options.mesh)
        arguments = _arguments_for(function, mesh, options.target)
        try:
            made = function(*arguments)
        except Exception as error:
            if not options.allocate:
                error.add_note(_VALUES)
            raise
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise _UsageError(
            f"{options.target} returned {type(made).__name__}, not (model, layout_map)."
        )
    model, layouts = made
    if not isinstance(layouts, keras.distribution.LayoutMap):
        layouts = _layout_map(layouts, mesh, options.target)
    elif mesh is not None and layouts.device_mesh is not None:
        asked, found = MeshShape.from_keras(mesh), MeshShape.from_keras(layouts.device_mesh)
        if asked != found:
            raise _UsageError(
                f"--mesh asks for {asked}, and {options.target} returned a layout map for {found}: "
                "have it take the mesh as its argument, or leave out --mesh."
            )
    return model, layouts


def _layout_map(layouts: Any, mesh: Any, target: str) -> Any:
    if not isinstance(layouts, dict):
        raise _UsageError(
            f"{target} returned {type(layouts).__name__} for a layout map: a "
            "keras.distribution.LayoutMap is wanted, or a dict of patterns."
        )
    if mesh is None:
        raise _UsageError(f"{target} returned patterns for no mesh: give --mesh.")
    made = keras.distribution.LayoutMap(mesh)
    problems = []
    for pattern, layout in layouts.items():
        try:
            made[pattern] = layout
        except ValueError as error:
            problems.append(f"pattern {pattern!r}: {error}")
    if problems:
        raise LayoutError(problems, where=f"the patterns of {target}")
    return made


def _function_of(target: str) -> Any:
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise _UsageError(f"{target!r} is not module:function.")
    sys.path.insert(0, os.getcwd())
    try:
        module = _file_module(Path(place)) if place.endswith(".py") else _module(place)
    except Exception as error:
        error.add_note(_VALUES)
        raise
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise _UsageError(f"{place!r} has no function {name!r}.")
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # That a module of this name imports another that is not there is an error of its own.
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise _UsageError(f"there is no module {name!r} here.") from None
        raise


def _file_module(path: Path) -> Any:
    if not path.is_file():
        raise _UsageError(f"there is no file {str(path)!r}.")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _arguments_for(function: Any, mesh: Any, target: str) -> tuple[Any, ...]:
    """The mesh, for a function that takes an argument."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [p for p in inspect.signature(function).parameters.values() if p.kind in kinds]
    needed = [p.name for p in taken if p.default is inspect.Parameter.empty]
    if len(needed) > 1:
        raise _UsageError(
            f"{target} wants {len(needed)} arguments ({', '.join(needed)}): it is given the mesh."
        )
    if needed and mesh is None:
        raise _UsageError(f"{target} wants the mesh: give --mesh, as in --mesh model=8.")
    return (mesh,) if taken and mesh is not None else ()


def _write(plan: Plan, path: str, ending: str, slots: Any) -> None:
    try:
        plan.save(path, slots_per_variable=2 if slots is None else slots)
    except OSError as error:
        sys.exit(f"keras-tp: {ending} was not written: {error}")
    print(f"wrote {path}")
