"""The plan: everything that will be done to a model, decided, as frozen values.

`keras_tp.planner` makes a plan, `keras_tp.wrapper` obeys it, and nothing in
between changes it. Two plans of the same model and layout map compare equal,
on whichever process they were made.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch.distributed.tensor.placement_types import Placement

from keras_tp.computations import Computation
from keras_tp.gates import SequencePlan
from keras_tp.layouts import Layout, MeshShape, Shape, local_shape, local_shapes, placements_of


@dataclass(frozen=True)
class Collective:
    """One communication that a layer causes each time it is called.

    Attributes:
        kind: `"all_reduce"`, `"all_gather"` or `"reduce_scatter"`.
        axis: the mesh axis whose ranks take part.
        of: what travels: `"output"`, `"input gradient"`, `"statistics"`, or a variable's name.
    """

    kind: str
    axis: str
    of: str

    def __str__(self) -> str:
        return f"{self.kind} {self.of}"


@dataclass(frozen=True)
class StylePlan:
    """How one layer computes along one mesh axis.

    Attributes:
        axis: the mesh axis.
        name: `"column"`, `"row"`, `"batched"`, `"vocabulary"` or `"gathered"`;
            the class of the same name in `keras_tp.styles` carries it out.
        input: placement the computation wants of its input. A `Shard` is sliced off
            what arrives replicated, unless it is `given`.
        output: placement of the bare result: `Shard` for column, `Partial` for
            row. It leaves the layer replicated, unless it is `kept`.
        local: names of the layer's weights that the computation uses as this
            rank's shard along the axis. Every other weight sharded along it is
            gathered for the call.
        size: full size of the dim that is sharded; 0 for gathered.
        given: whether the input arrives as the shard that is wanted.
        kept: whether the output leaves the layer as a shard.
        open: whether it does so in Keras's own steps of `fit` and `evaluate`, for the loss.
    """

    axis: str
    name: str
    input: Placement
    output: Placement
    local: tuple[str, ...] = ()
    size: int = 0
    given: bool = False
    kept: bool = False
    open: bool = False


@dataclass(frozen=True)
class VariablePlan:
    """Where one variable lives.

    Attributes:
        path: the Keras path, e.g. `"dense/kernel"`.
        shape: full shape.
        dtype: Keras dtype name, e.g. `"float32"`.
        trainable: whether it gets a gradient and optimizer slots.
        layout: one mesh axis or None per dim.
        pattern: the LayoutMap key that claimed it, or None.
        mesh: the mesh the layout refers to.
    """

    path: str
    shape: Shape
    dtype: str
    trainable: bool
    layout: Layout
    pattern: str | None
    mesh: MeshShape = field(repr=False)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """One torch placement per mesh axis."""
        return placements_of(self.layout, self.mesh)

    @property
    def sharded(self) -> bool:
        """Whether some rank stores less than the full tensor."""
        return any(axis is not None and self.mesh.axis_size(axis) > 1 for axis in self.layout)

    def local_shape(self, rank: int) -> Shape:
        """Shape of what `rank` stores."""
        return local_shape(self.shape, self.layout, self.mesh, rank)

    @property
    def local_shapes(self) -> tuple[Shape, ...]:
        """Local shape of every rank, rank 0 first."""
        shapes = local_shapes(self.shape, self.layout, self.mesh)
        return tuple(s for _, s in sorted(zip(self.mesh.ranks, shapes, strict=True)))


@dataclass(frozen=True)
class LayerPlan:
    """What happens in one layer.

    Attributes:
        path: the layer's path; a layer without one is called by its name.
        kind: class name of the layer.
        variables: indices into `Plan.variables` of the variables it owns.
        computation: what it computes on shards; None if it computes in full.
        styles: one per mesh axis along which something happens.
        gathers: indices of the sharded variables that are gathered at most once
            during a call of the layer: its own, or those of the cell it calls
            for every time step.
        forward: collectives of each forward call; of a cell, of each call of
            the layer that steps it.
        backward: collectives of each backward call, given that the layer's
            input needs a gradient.
        output_layout: what the layout map asks for the layer's output, if it
            does and would cut it; else empty. What stays a shard is
            decided by what layers compute, so that it changes nothing.
        rows: how it computes where replicas share out rows: `"own"`, each its own
            rows; `"statistics"`, its own with statistics of all; `"all"`, each all rows.
        reason: why the row is not better, in words; empty when it is best.
    """

    path: str
    kind: str
    variables: tuple[int, ...]
    computation: Computation | None = None
    styles: tuple[StylePlan, ...] = ()
    gathers: tuple[int, ...] = ()
    forward: tuple[Collective, ...] = ()
    backward: tuple[Collective, ...] = ()
    output_layout: Layout = ()
    rows: str = "own"
    reason: str = ""

    @property
    def style(self) -> str:
        """The styles in words, each once, e.g. `"column"` or `"row + gathered"`."""
        return " + ".join(dict.fromkeys(style.name for style in self.styles)) or "replicated"


@dataclass(frozen=True)
class Region:
    """Layers that hand each other shards while a layer above them is called.

    What is in between was seen to compute on a shard what it computes on the whole, in a call
    as the model was built for. Other calls are looked at as they come.

    Attributes:
        layer: index into `Plan.layers` of the layer above.
        axis: the mesh axis.
        members: indices into `Plan.layers` of layers that hand on their output as a shard, or
            take their input as one.
        summed: indices into `Plan.variables` of weights that are used on shards in between: their
            gradients are summed over the axis.
        divided: attributes that count what is sharded (heads), with the values that they have
            during the call: path of the layer, name, value.
    """

    layer: int
    axis: str
    members: tuple[int, ...]
    summed: tuple[int, ...] = ()
    divided: tuple[tuple[str, str, int], ...] = ()


@dataclass(frozen=True)
class Plan:
    """All of it, decided: printable, comparable, ready for JSON.

    Attributes:
        mesh: the mesh it is made for.
        variables: one entry for every variable of the model, in its order.
        layers: one entry for every layer, in the order of a depth-first walk.
        notes: sentences for the user that are no errors, such as of a pattern
            that matches nothing.
        batch_axis: the mesh axis along which the rows of a batch are shared out,
            if there is one of more than one rank; else every rank computes all rows.
        regions: within which layers hand each other shards.
        sequence: what is computed on shards of the sequence; None if nothing is.
    """

    mesh: MeshShape
    variables: tuple[VariablePlan, ...]
    layers: tuple[LayerPlan, ...]
    notes: tuple[str, ...] = ()
    batch_axis: str | None = None
    regions: tuple[Region, ...] = ()
    sequence: SequencePlan | None = None

    def bytes_per_rank(self, rank: int) -> int:
        """Bytes of variables that `rank` stores (gradients and slots not counted)."""
        return sum(math.prod(v.local_shape(rank)) * itemsize(v.dtype) for v in self.variables)

    @cached_property
    def full_bytes(self) -> int:
        """Bytes of all variables in one process."""
        return sum(math.prod(v.shape) * itemsize(v.dtype) for v in self.variables)

    def collectives(self, phase: str) -> Counter[str]:
        """How many collectives of each kind the layers cause in `phase`.

        Args:
            phase: `"forward"` or `"backward"`; each layer is called once.
        """
        return Counter(c.kind for layer in self.layers for c in getattr(layer, phase))

    def to_dict(self) -> dict[str, Any]:
        """The plan in lists, dicts, strings and numbers, ready for `json.dumps`."""
        return {
            "mesh": _plain(self.mesh),
            "batch_axis": self.batch_axis,
            "variables": [
                {
                    **_plain(v, leave_out="mesh"),
                    "placements": [str(p) for p in v.placements],
                    "local_shapes": [list(shape) for shape in v.local_shapes],
                }
                for v in self.variables
            ],
            "layers": [{**_plain(layer), "style": layer.style} for layer in self.layers],
            "regions": [_plain(region) for region in self.regions],
            "sequence": _plain(self.sequence),
            "notes": list(self.notes),
        }

    def save(self, path: str | os.PathLike[str], *, slots_per_variable: Any = 2) -> None:
        """Writes the plan as a page to look at (`.html`), or as JSON (`.json`).

        The page is one file that needs nothing else. A file of that name is replaced
        once the new one is whole.

        Args:
            path: where to.
            slots_per_variable: what the optimizer keeps of each trained variable, for the
                page's memory; see `keras_tp.costs.stored_bytes`.

        Raises:
            ValueError: another ending.
        """
        from keras_tp.pages import plan_page, write_whole

        ending = os.path.splitext(path)[1].lower()
        if ending in (".html", ".htm"):
            write_whole(path, plan_page(self, slots_per_variable))
        elif ending == ".json":
            write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")
        else:
            raise ValueError(f"a plan is saved as .html or .json, not as {str(path)!r}.")

    def cost(self, model: Any, batch: Any, **options: Any) -> Any:
        """What one training step of `model` costs by this plan; see `keras_tp.prices.price`."""
        from keras_tp.prices import price

        return price(self, model, batch, **options)

    def __str__(self) -> str:
        from keras_tp.tables import plan_table

        return plan_table(self)


def _plain(value: Any, leave_out: str = "") -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, Placement):
        names = [f.name for f in dataclasses.fields(value) if f.name != leave_out]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, str | int) else str(value)


def itemsize(dtype: str) -> int:
    """Bytes of one element of a Keras dtype as torch stores it."""
    if dtype == "bool":
        return 1
    if dtype in ("uint16", "uint32"):  # torch has neither; Keras stores the next wider
        return {"uint16": 4, "uint32": 8}[dtype]
    digits = "".join(c for c in dtype.split("_")[0] if c.isdigit())
    return int(digits) // 8
