"""The collectives that really run, blocking, functional, compiled or of DTensors, and their bytes.

torch's profiler sees what gloo is asked to do, whoever asks. A mode of torch's dispatcher, as in
`tests/counting.py`, would see DTensors before they are taken apart, and keeps torch from compiling.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

# torch's names of dtypes in a profile.
_BYTES = {"float": 4, "double": 8, "int": 4, "long int": 8, "c10::Half": 2, "c10::BFloat16": 2}


def collectives(function: Callable[[], None]) -> list[tuple[str, int]]:
    """Kind, and bytes that this rank gives to it, of each collective that `function` starts."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        function()
    found = []
    for event in trace.profiler.kineto_results.events():
        backend, _, kind = event.name().partition(":")
        if backend == "gloo" and event.shapes():
            given = zip(event.shapes(), event.dtypes(), strict=True)
            found.append((kind, sum(math.prod(s) * _BYTES.get(d, 1) for s, d in given if s)))
    return found
