"""Draws a plan as a table."""

from __future__ import annotations

import io
import itertools
import shutil
import string
import sys
from collections import Counter
from collections.abc import Collection, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from keras_tp.layouts import Shape
from keras_tp.plans import LayerPlan, Plan


def render(*parts: RenderableType) -> str:
    """Plain text of rich renderables: as wide as the terminal, in a file 200 columns at most."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    console = Console(file=io.StringIO(), width=max(width, 100), highlight=False, markup=False)
    for part in parts:
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def plain_table(*headers: str, whole: Collection[str] = ()) -> Table:
    """An empty table in the house style; the columns named in `whole` are folded last."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(header, overflow="fold", no_wrap=header in whole)
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
        whole=("style", "full", "local"),
    )
    marks: dict[str, str] = {}
    for layer in plan.layers:
        for row in _rows(plan, layer, marks):
            table.add_row(*row)
    lines = summary(plan)
    if marks:
        lines = [
            "why not better:",
            *(f"  {m}  {reason}" for reason, m in marks.items()),
            "",
            *lines,
        ]
    return render(table, "\n".join(lines))


def _rows(plan: Plan, layer: LayerPlan, marks: dict[str, str]) -> list[list[str]]:
    """A line for each weight; what concerns the whole layer stands on the first lines."""
    variables = [plan.variables[i] for i in layer.variables]
    mark = marks.setdefault(layer.reason, _mark(len(marks))) if layer.reason else ""
    columns = [
        [layer.path],
        [layer.style],
        [v.path.removeprefix(f"{layer.path}/") for v in variables],
        [str(v.shape) for v in variables],
        # By torch.chunk's rule the first rank has the largest shard, the last the smallest.
        [shapes_text([v.local_shape(plan.mesh.ranks[i]) for i in (0, -1)]) for v in variables],
        [v.pattern or "-" for v in variables],
        [str(c) for c in layer.forward] or ["-"],
        [str(c) for c in layer.backward] or ["-"],
        [mark],
    ]
    if not variables and not layer.forward:
        return []
    return [list(row) for row in itertools.zip_longest(*columns, fillvalue="")]


def _mark(count: int) -> str:
    letters = string.ascii_lowercase
    return letters[count % 26] * (count // 26 + 1)


def _count(counts: Counter[str]) -> str:
    return " + ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "nothing"


def summary(plan: Plan) -> list[str]:
    """What a plan adds up to, and its notes, a sentence each."""
    sharded = sum(v.sharded for v in plan.variables)
    most = plan.bytes_per_rank(plan.mesh.ranks[0])
    lines = [
        f"mesh {plan.mesh}: {sharded} of {len(plan.variables)} variables sharded; the fullest rank "
        f"stores {size_text(most)} of {size_text(plan.full_bytes)} of variables.",
        f"layers communicate, each called once: forward {_count(plan.collectives('forward'))}; "
        f"backward {_count(plan.collectives('backward'))}, less where an input needs no gradient.",
    ]
    first, last = plan.mesh.ranks[0], plan.mesh.ranks[-1]
    if any(v.local_shape(first) != v.local_shape(last) for v in plan.variables):
        lines.append("local shapes (a)..(b): uneven, the first rank stores (a) and the last (b).")
    return lines + [f"note: {note}" for note in plan.notes]
