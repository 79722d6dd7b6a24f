"""What a plan's page draws: the mesh, what ranks store, and how a weight is cut. SVG and HTML."""

from __future__ import annotations

import html
import itertools
import math
from collections import Counter
from collections.abc import Sequence

from keras_tp.costs import Slots, StoredBytes, stored_by_rank, whole_bytes
from keras_tp.layouts import MeshShape
from keras_tp.plans import Plan, VariablePlan
from keras_tp.tables import size_text

# A mesh of more ranks, or of longer lines, is drawn by one line of each axis.
MOST_RANKS, LONGEST_LINE = 64, 16
MOST_BARS = 8

_CELL, _GAP = 34, 4


def text(value: object) -> str:
    """Anything as text of a page: nothing in it is markup."""
    # NUL and lone surrogates are no characters of a page, which is UTF-8.
    plain = str(value).replace("\0", "\ufffd").encode("utf-8", "replace").decode()
    return html.escape(plain)


def mesh_drawing(mesh: MeshShape) -> str:
    """The ranks of a mesh: all in a grid, or where they are many a line along each axis."""
    lines = mesh.size // mesh.sizes[-1]
    if mesh.size <= MOST_RANKS and max(lines, mesh.sizes[-1]) <= LONGEST_LINE:
        return _grid(mesh)
    drawn = [_line(mesh, axis) for axis in range(len(mesh.axes)) if mesh.sizes[axis] > 1]
    return (
        f'<p class="say">{mesh.size:,} ranks are too many to draw: this is one line of each axis, '
        f"the one through rank {mesh.ranks[0]}.</p>{''.join(drawn)}"
    )


def _grid(mesh: MeshShape) -> str:
    columns = mesh.sizes[-1]
    left = 16 + 7 * max((len(_where(mesh, i)) for i in range(0, mesh.size, columns)), default=0)
    parts = [f'<text x="{left}" y="14">{text(mesh.axes[-1])} \u2192</text>']
    y = 22
    for row, start in enumerate(range(0, mesh.size, columns)):
        # A wider gap where an axis before the last but one goes on.
        if row and len(mesh.sizes) > 2 and row % mesh.sizes[-2] == 0:
            y += 10
        parts.append(f'<text x="0" y="{y + 21}">{text(_where(mesh, start))}</text>')
        for column in range(columns):
            parts.append(_cell(left + column * (_CELL + _GAP), y, mesh.ranks[start + column]))
        y += _CELL + _GAP
    width = left + columns * (_CELL + _GAP)
    return _svg(max(width, left + 8 * len(mesh.axes[-1]) + 30), y, parts, f"mesh {mesh}")


def _where(mesh: MeshShape, position: int) -> str:
    """Where a line of the last axis stands along the others, in words."""
    where = mesh.coordinates(mesh.ranks[position])[:-1]
    return ", ".join(f"{a} {i}" for a, i in zip(mesh.axes[:-1], where, strict=True))


def _line(mesh: MeshShape, axis: int) -> str:
    step = math.prod(mesh.sizes[axis + 1 :])
    ranks = [mesh.ranks[i * step] for i in range(mesh.sizes[axis])]
    shown: list[int | None] = list(ranks)
    if len(ranks) > LONGEST_LINE:
        shown = [*ranks[: LONGEST_LINE - 4], None, *ranks[-2:]]
    title = f"{mesh.axes[axis]} \u2192 {len(ranks)} ranks"
    parts = [f'<text x="0" y="14">{text(title)}</text>']
    for column, rank in enumerate(shown):
        x = column * (_CELL + _GAP)
        if rank is None:
            parts.append(f'<text class="mid" x="{x + _CELL / 2:.0f}" y="43">\u2026</text>')
        else:
            parts.append(_cell(x, 22, rank))
    width = max(len(shown) * (_CELL + _GAP), 8 * len(title))
    return _svg(width, 22 + _CELL + _GAP, parts, f"axis {title}")


def _cell(x: int, y: int, rank: int) -> str:
    return (
        f'<rect class="rank" x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" rx="5"/>'
        f'<text class="mid" x="{x + _CELL // 2}" y="{y + 21}">{rank}</text>'
    )


def _svg(width: int, height: int, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg class="mesh" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{text(label)}">{"".join(parts)}</svg>'
    )


def memory_bars(plan: Plan, slots: int | Slots) -> str:
    """What ranks store, beside one process with all of the model; equal ranks share a bar."""
    whole = whole_bytes(plan, slots)
    ranks_of: dict[StoredBytes, list[int]] = {}
    for rank, stored in zip(plan.mesh.ranks, stored_by_rank(plan, slots), strict=True):
        ranks_of.setdefault(stored, []).append(rank)
    groups = sorted(ranks_of.items(), key=lambda group: -group[0].total)
    rows = [_bar("one process, all of it", whole, whole)]
    for stored, ranks in groups[: MOST_BARS - 1]:
        rows.append(_bar(ranks_text(ranks), stored, whole))
    left = groups[MOST_BARS - 1 :]
    if left:
        among = sum(len(ranks) for _, ranks in left)
        rows.append(
            f'<p class="say">{among} more ranks store {len(left)} other sizes, down to '
            f"{size_text(left[-1][0].total)}.</p>"
        )
    return "".join(rows)


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks in words, runs of them joined.

    >>> ranks_text([0, 1, 2, 7])
    '4 ranks: 0\u20132, 7'
    """
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    said = ["\u2013".join(map(str, run)) for run in runs]
    if len(said) > 6:
        said = [*said[:5], "\u2026", said[-1]]
    count = "1 rank" if len(ranks) == 1 else f"{len(ranks)} ranks"
    return f"{count}: {', '.join(said)}"


def _bar(label: str, stored: StoredBytes, whole: StoredBytes) -> str:
    kinds = ("parameters", "gradients", "slots")
    parts = "".join(
        f'<span class="{kind}" style="width:{100 * getattr(stored, kind) / max(whole.total, 1):.3f}'
        f'%" title="{kind} {size_text(getattr(stored, kind))}"></span>'
        for kind in kinds
    )
    said = " + ".join(size_text(getattr(stored, kind)) for kind in kinds)
    return (
        f'<div class="bar"><span class="who">{text(label)}</span><span class="track">{parts}</span>'
        f'<span class="sum"><b>{size_text(stored.total)}</b> = {said}</span></div>'
    )


class Glyphs:
    """Small pictures of how weights are cut, each drawn once a page.

    The first dim goes down, all others go across; a cut into more than 8 is drawn as 8. What
    the first rank stores is filled.
    """

    def __init__(self) -> None:
        self._names: dict[tuple[bool, int, int], str] = {}

    def use(self, v: VariablePlan) -> str:
        """The picture of one variable."""
        pieces = [1 if axis is None else v.mesh.axis_size(axis) for axis in v.layout]
        flat = len(pieces) < 2
        down = 1 if flat else min(pieces[0], 8)
        across = min(math.prod(pieces if flat else pieces[1:]), 8)
        name = self._names.setdefault((flat, down, across), f"cut{len(self._names)}")
        return f'<svg class="glyph" width="34" height="26"><use href="#{name}"/></svg>'

    def symbols(self) -> str:
        """What the pictures in use refer to."""
        made = "".join(
            f'<symbol id="{name}" viewBox="0 0 34 26">{_cuts(*key)}</symbol>'
            for key, name in self._names.items()
        )
        return f'<svg width="0" height="0" class="defs">{made}</svg>'


def _cuts(flat: bool, down: int, across: int) -> str:
    top, height = (9, 8) if flat else (1, 24)
    part_width, part_height = 32 / across, height / down
    lines = [
        f'<rect class="part" x="1" y="{top}" width="{part_width:.2f}" height="{part_height:.2f}"/>',
        f'<rect class="all" x="1" y="{top}" width="32" height="{height}"/>',
    ]
    across_at = ((1 + part_width * i, top, 0.0, float(height)) for i in range(1, across))
    down_at = ((1.0, top + part_height * i, 32.0, 0.0) for i in range(1, down))
    for x, y, dx, dy in itertools.chain(across_at, down_at):
        lines.append(f'<path class="cut" d="M{x:.2f} {y:.2f}l{dx:.2f} {dy:.2f}"/>')
    return "".join(lines)


def axes_list(plan: Plan) -> str:
    """For each mesh axis what it cuts and what travels along it."""
    items = []
    for axis, size in zip(plan.mesh.axes, plan.mesh.sizes, strict=True):
        cut = sum(axis in v.layout for v in plan.variables) if size > 1 else 0
        does = [f"cuts {cut} of {len(plan.variables)} variables"] if cut else []
        if axis == plan.batch_axis:
            does.insert(0, "shares out the rows of each batch")
        for phase in ("forward", "backward"):
            kinds = Counter(
                c.kind for layer in plan.layers for c in getattr(layer, phase) if c.axis == axis
            )
            if kinds:
                said = " + ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
                does.append(f"{phase} {said}")
        ranks = "1 rank" if size == 1 else f"{size} ranks"
        said = text("; ".join(does) or "nothing happens along it")
        items.append(f"<li><b>{text(axis)}</b>, {ranks}: {said}</li>")
    return f'<ul class="axes">{"".join(items)}</ul>'
