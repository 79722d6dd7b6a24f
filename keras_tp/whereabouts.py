"""Where a thread is, read off its stack from another: phases, layer, line, what it waits in.

So nothing need be noted as the training goes on, and it costs nothing until somebody asks.
"""

from __future__ import annotations

import itertools
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import keras

# Where collectives wait for other ranks, by module. Those of torch by any of its names.
_COLLECTIVES = ("torch.distributed.distributed_c10d", "torch.distributed._functional_collectives")
_WAITS = {
    ("keras_tp.late_gradients", "finish"): "all_reduce of an input's gradient",
    ("keras_tp.buckets", "finish"): "all_reduce of gradients in buckets",
    ("keras_tp.joins", "result"): "all_gather of a weight",
    ("keras_tp.savings", "wait"): "a checkpoint that is being written",
    ("keras_tp.roll_calls", "call_roll"): "a roll call",
}
# How deep a wait may lie below the innermost frame: torch wraps its collectives.
_DEEP = 5

# Functions that say which phase a rank is in; "Model.fit" is what people know as fit.
_PHASES = {
    "keras": {
        *("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch"),
        *("train_step", "test_step", "predict_step", "save", "save_weights", "load_weights"),
        *("load_model", "save_model", "apply", "compute_loss"),
    },
    "torch": {"backward"},
    "keras_tp": {
        *("initialize", "parallelize", "verify", "full_weights", "save_checkpoint"),
        *("load_checkpoint", "check", "lead"),
    },
}
_WORDS = {
    "apply": "optimizer",
    "check": "comparison of batches",
    "lead": "what the first rank does alone",
}
# Whose lines are not the user's.
_LIBRARIES = ("keras", "keras_tp", "torch", "numpy", "threading", "importlib", "runpy", "optree")


@dataclass(frozen=True)
class Whereabouts:
    """See `keras_tp.signs.Sign`."""

    doing: str
    at: str
    waits: str


def waits_in(thread: int) -> str:
    """The collective in which that thread waits, or "". Cheap: looks at the innermost frames."""
    return _waits_in(frame for frame, _ in _stack(thread))


def whereabouts(thread: int, layers: bool = True) -> Whereabouts:
    """Where that thread is.

    Args:
        thread: its `ident`.
        layers: whether to name the innermost layer. That keeps what it is given until its call
            ends, for which a look at its local variables makes a copy of them.
    """
    return _describe(list(_stack(thread)), layers)


def where_raised(trace: TracebackType | None) -> Whereabouts:
    """Where an error was raised."""
    return _describe(list(traceback.walk_tb(trace))[::-1], True)


def _stack(thread: int) -> Iterator[tuple[FrameType, int]]:
    innermost = sys._current_frames().get(thread)
    try:
        return iter(()) if innermost is None else traceback.walk_stack(innermost)
    finally:
        # It may be the frame of this call: one that holds itself would keep all that is outside
        # of it, with their tensors, until a garbage collection.
        del innermost


def _describe(stack: list[tuple[FrameType, int]], layers: bool) -> Whereabouts:
    """Of frames and their lines, from the innermost outwards."""
    phases: list[str] = []
    layer, at = "", "its end"
    for frame, line in reversed(stack):
        package, name = _module(frame).partition(".")[0], frame.f_code.co_name
        if name in _PHASES.get(package, ()) and _WORDS.get(name, name) not in phases:
            phases.append(_WORDS.get(name, name))
        if layers and package == "keras" and name == "__call__":
            called = frame.f_locals.get("self")
            if isinstance(called, keras.layers.Layer):
                layer = f"layer '{called.path or called.name}'"
        if package not in _LIBRARIES:
            at = f"{Path(frame.f_code.co_filename).name}:{line}, {name}"
    doing = ", ".join([*phases, layer] if layer else phases)
    return Whereabouts(doing, at, _waits_in(frame for frame, _ in stack))


def _waits_in(outwards: Iterator[FrameType]) -> str:
    for frame in itertools.islice(outwards, _DEEP):
        module, name = _module(frame), frame.f_code.co_name
        if (module, name) in _WAITS:
            return _WAITS[module, name]
        if module in _COLLECTIVES and name != "wrapper":
            return name
    return ""


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
