"""Draws a plan as a table."""

from __future__ import annotations

import io
import shutil
import string
import sys
from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from keras_tp.layouts import Shape
from keras_tp.plans import Collective, LayerPlan, Plan


def render(*parts: RenderableType) -> str:
    """Plain text of rich renderables: as wide as the terminal, or as they need in a file."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    console = Console(file=io.StringIO(), width=max(width, 100), highlight=False, markup=False)
    for part in parts:
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def plain_table(*headers: str) -> Table:
    """An empty table in the house style."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def size_text(count: float) -> str:
    """A number of bytes for people.

    >>> size_text(1536)
    '1.5 KiB'
    """
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if abs(count) < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def shapes_text(shapes: Sequence[Shape]) -> str:
    """The shape all ranks share, or of an uneven cut the first and the last.

    >>> shapes_text([(3,), (3,), (1,)])
    '(3,)..(1,)'
    """
    distinct = list(dict.fromkeys(shapes))
    return "..".join(map(str, distinct[:1] + distinct[1:][-1:]))


def plan_table(plan: Plan) -> str:
    """The plan: a row for each layer with weights, the reasons, and what it adds up to."""
    table = plain_table(
        "layer",
        "style",
        "weight",
        "full",
        "local",
        "pattern",
        "forward",
        "backward",
        "why not better",
    )
    reasons: dict[str, str] = {}
    for layer in plan.layers:
        if layer.variables:
            table.add_row(*_row(plan, layer, reasons))
    why = [f"  {mark}  {reason}" for reason, mark in reasons.items()]
    return render(table, "\n".join(["why not better:", *why, "", *_summary(plan)]))


def _row(plan: Plan, layer: LayerPlan, reasons: dict[str, str]) -> list[str]:
    variables = [plan.variables[i] for i in layer.variables]
    ends = (plan.mesh.ranks[0], plan.mesh.ranks[-1])
    mark = ""
    if layer.reason:
        mark = reasons.setdefault(layer.reason, _mark(len(reasons)))
    return [
        layer.path,
        layer.style,
        "\n".join(v.path.rsplit("/", 1)[-1] for v in variables),
        "\n".join(str(v.shape) for v in variables),
        # By torch.chunk's rule the first rank has the largest shard, the last the smallest.
        "\n".join(shapes_text([v.local_shape(r) for r in ends]) for v in variables),
        "\n".join(v.pattern or "-" for v in variables),
        _collectives(layer.forward),
        _collectives(layer.backward),
        mark,
    ]


def _mark(count: int) -> str:
    letters = string.ascii_lowercase
    return letters[count % 26] * (count // 26 + 1)


def _collectives(collectives: Sequence[Collective]) -> str:
    return "\n".join(f"{c.kind} {c.of}" for c in collectives) or "-"


def _count(counts: Counter[str]) -> str:
    return " + ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "nothing"


def _summary(plan: Plan) -> list[str]:
    sharded = sum(v.sharded for v in plan.variables)
    most = plan.bytes_per_rank(plan.mesh.ranks[0])
    return [
        f"mesh {plan.mesh}: {sharded} of {len(plan.variables)} variables sharded; the fullest rank "
        f"stores {size_text(most)} of {size_text(plan.full_bytes)}.",
        f"communication of a step: forward {_count(plan.collectives('forward'))}; backward at "
        f"most {_count(plan.collectives('backward'))} (less where an input needs no gradient).",
        *(f"note: {note}" for note in plan.notes),
    ]
