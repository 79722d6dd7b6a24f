"""Layers that could compute on shards, and the ways in which each could be cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.distributed.tensor import Replicate

from keras_tp.bases import REPEATING
from keras_tp.computations import Computation, Lookup
from keras_tp.layouts import Layout, Shape
from keras_tp.plans import StylePlan
from keras_tp.rules import Weight, computation_of, style_along
from keras_tp.seam.layers import Owner, captured_views, variables_of, walk_layers

# Labels of a table of embeddings: its words, and the width of each.
WORDS, WIDTH = "v", "w"


@dataclass(frozen=True)
class Candidate:
    """A layer that could be cut along one of its labels.

    Attributes:
        number: its own among the layers of the model.
        owner: the layer.
        computation: what it computes.
        shapes: of the weights that take part, by name.
        axis: the mesh axis that would cut it.
        parts: number of ranks along it.
    """

    number: int
    owner: Owner
    computation: Computation
    shapes: dict[str, Shape]
    axis: str
    parts: int

    @property
    def is_lookup(self) -> bool:
        """Whether it looks up rows of a table."""
        return isinstance(self.computation, Lookup)

    @property
    def main(self) -> str:
        """Name of the kernel, or of the table."""
        return self.computation.weights[0]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size of each label of the kernel, in its order."""
        return dict(zip(self._kernel, self.shapes[self.main], strict=True))

    @property
    def _kernel(self) -> str:
        return WORDS + WIDTH if isinstance(self.computation, Lookup) else self.computation.kernel

    @property
    def inputs(self) -> list[str]:
        """Labels that its input shares with the kernel, in the order of the input."""
        labels = "" if isinstance(self.computation, Lookup) else self.computation.input
        return [x for x in labels if x in self.sizes]

    @property
    def outputs(self) -> list[str]:
        """Labels that its output shares with the kernel, in the order of the output.

        None of a table that is called in reverse as well, which contracts the width.
        """
        if isinstance(self.computation, Lookup):
            return [] if self.computation.reverse else [WIDTH]
        labels = self.computation.output
        return [x for x in labels if x in self.sizes]

    def columns(self) -> list[str]:
        """Labels of the output alone along which it is cut evenly, the outermost first."""
        return [x for x in self.outputs if x not in self.inputs and self._even(x)]

    def batches(self) -> list[str]:
        """Labels that input, kernel and output share, along which it is cut evenly: experts."""
        return [x for x in self.outputs if x in self.inputs and self._even(x)]

    def _even(self, label: str) -> bool:
        return self.sizes[label] % self.parts == 0

    def label_at(self, dim: int, ndim: int) -> str | None:
        """The label that is `dim` of an input of `ndim` dims; None of one the kernel lacks."""
        if isinstance(self.computation, Lookup):
            return None
        labels = self.computation.input
        if labels.startswith("..."):
            labels, dim = labels[3:], dim - ndim
            if -dim > len(labels):
                return None
        return labels[dim] if labels[dim] in self.sizes else None

    def layouts(self, label: str) -> dict[str, Layout]:
        """What cuts it along a label: a layout of each weight, the bias with the kernel."""
        cut = {self.main: tuple(self.axis if x == label else None for x in self.sizes)}
        for name, shape in self.shapes.items():
            if isinstance(self.computation, Lookup):
                if name != self.main:
                    cut[name] = cut[self.main][::-1]
            elif name != self.main:
                labelled = zip(self.computation.bias, shape, strict=True)
                cut[name] = tuple(
                    self.axis if x == label and size == self.sizes[label] else None
                    for x, size in labelled
                )
        return cut

    def style(self, label: str | None) -> StylePlan:
        """How it computes if it is cut along a label; as any other layer without one."""
        if label is None:
            return StylePlan(self.axis, "replicated", Replicate(), Replicate())
        layouts = self.layouts(label)
        weights = {name: Weight(shape, layouts[name]) for name, shape in self.shapes.items()}
        style = style_along(self.axis, self.computation, weights)
        assert style is not None, label
        return style


def candidates_in(
    owners: Sequence[Owner], axis: str, parts: int
) -> tuple[dict[int, Candidate], dict[int, str]]:
    """The layers that could be cut, by number, and of all others with variables why not."""
    holders: dict[int, list[int]] = {}
    for number, owner in enumerate(owners):
        for v in owner.variables:
            holders.setdefault(id(v), []).append(number)
    repeated = {
        id(v): owner.path
        for owner in owners
        if isinstance(owner.layer, REPEATING)
        for v in variables_of(walk_layers(owner.layer))
    }
    viewed = {id(v): name for name, v in captured_views(owners, variables_of(owners))}
    found, reasons = {}, {}
    for number, owner in enumerate(owners):
        if not owner.variables:
            continue
        computation, reason = computation_of(owner.layer)
        weights = {}
        if computation is not None:
            weights = {name: getattr(owner.layer, name) for name in computation.weights}
            reason = _why_not(computation, weights, owner, holders, repeated, viewed)
        if computation is None or reason:
            reasons[number] = reason
            continue
        shapes = {name: tuple(int(n) for n in v.shape) for name, v in weights.items()}
        found[number] = Candidate(number, owner, computation, shapes, axis, parts)
    return found, reasons


def _why_not(
    computation: Computation,
    weights: dict[str, Any],
    owner: Owner,
    holders: dict[int, list[int]],
    repeated: dict[int, str],
    viewed: dict[int, str],
) -> str:
    mine = {id(v) for v in owner.variables}
    for name, v in weights.items():
        if id(v) in repeated:
            return f"'{repeated[id(v)]}' needs it at every time step"
        if id(v) not in mine or len(holders[id(v)]) > 1:
            return f"its {name} belongs to another layer, too"
        if id(v) in viewed:
            return f"operation '{viewed[id(v)]}' of the graph holds a view of its {name}"
        for what in ("regularizer", "constraint"):
            if getattr(v, what, None) is not None:
                return f"its {name} has a {what}, for which it would be gathered in each step"
    if not isinstance(computation, Lookup) and computation.output.endswith("..."):
        return f"which dims it has is not known from its equation {computation.equation!r}"
    return ""
