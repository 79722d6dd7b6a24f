"""A proposed layout map: what is cut, what is left whole on every rank, and why."""

from __future__ import annotations

import math
from typing import Any

import keras
from rich.table import Table

from keras_tp.families import patterns_for
from keras_tp.patterns import match_paths
from keras_tp.plans import Plan, itemsize
from keras_tp.tables import plain_table, render, size_text, summary


class Proposal(keras.distribution.LayoutMap):
    """A layout map as `keras_tp.auto_layout_map` proposes it; `print` it to see why.

    It is a `keras.distribution.LayoutMap` in all respects, and can be changed as one. What it says
    besides is of the map as it was proposed.

    Attributes:
        axis: the mesh axis along which it cuts; None if there is none to cut along.
        left: for each variable of floating point that is left whole on every rank, by
            path, the reason.
        plan: what `keras_tp.plan` makes of the map, which `keras_tp.parallelize` obeys, too.
        notes: what else there is to know, a sentence each.
    """

    def __init__(self, device_mesh: Any) -> None:
        super().__init__(device_mesh)
        self.axis: str | None = None
        self.left: dict[str, str] = {}
        self.plan: Plan | None = None
        self.notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.plan is None:
            return repr(self)
        tables = [table for table in (self._cut(self.plan), self._left(self.plan)) if table.rows]
        lines = [*summary(self.plan), *(f"note: {note}" for note in self.notes)]
        return render(*(part for table in tables for part in (table, "")), "\n".join(lines))

    def _cut(self, plan: Plan) -> Table:
        table = plain_table("cut", "layout", "how", "variables", "bytes", "of each rank")
        how = {i: layer.style for layer in plan.layers for i in layer.variables}
        claimed: dict[str, list[int]] = {}
        for i, v in enumerate(plan.variables):
            if v.pattern is not None:
                claimed.setdefault(v.pattern, []).append(i)
        for pattern, numbers in claimed.items():
            variables = [plan.variables[i] for i in numbers]
            shapes = [(v.shape, v.local_shape(plan.mesh.ranks[0])) for v in variables]
            sizes = [itemsize(v.dtype) for v in variables]
            table.add_row(
                pattern,
                str(variables[0].layout),
                ", ".join(dict.fromkeys(how[i] for i in numbers)),
                str(len(numbers)),
                *(
                    size_text(sum(math.prod(s[k]) * n for s, n in zip(shapes, sizes, strict=True)))
                    for k in (0, 1)
                ),
            )
        return table

    def _left(self, plan: Plan) -> Table:
        table = plain_table("left whole", "variables", "bytes", "why")
        patterns = patterns_for(self.left, [v.path for v in plan.variables])
        claims = match_paths(list(patterns), list(self.left))
        sizes: dict[str, list[int]] = {}
        for v in plan.variables:
            if v.path in self.left:
                size = math.prod(v.shape) * itemsize(v.dtype)
                sizes.setdefault(claims.pattern_of[v.path], []).append(size)
        for pattern, reason in patterns.items():
            counted = sizes[pattern]
            table.add_row(pattern, str(len(counted)), size_text(sum(counted)), reason)
        return table
