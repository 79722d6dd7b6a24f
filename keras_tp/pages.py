"""Writes a plan as one page of HTML that needs nothing else: no network, no script."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from keras_tp.blocks import Block, Run, Tree, is_shown
from keras_tp.costs import Slots, stored_bytes, whole_bytes
from keras_tp.drawings import Glyphs, axes_list, memory_bars, mesh_drawing, text
from keras_tp.looks import CSS
from keras_tp.plans import Collective, LayerPlan, Plan, VariablePlan
from keras_tp.tables import shapes_text, size_text
from keras_tp.version import __version__

STYLES = {
    "column": "each rank computes some of the outputs",
    "row": "each rank sums over some of the inputs",
    "batched": "each rank computes some of what is computed side by side",
    "vocabulary": "each rank looks up some of the ids",
    "gathered": "stored as shards, whole while the layer runs",
    "replicated": "whole on every rank",
}

# More layers than this are shown closed.
MOST_OPEN = 40


def plan_page(plan: Plan, slots_per_variable: int | Slots = 2) -> str:
    """The page; see `Plan.save`."""
    glyphs = Glyphs()
    tree = Tree(plan)
    shown = _drawn(tree, tree.top)
    layers = _Layers(plan, tree, glyphs, opened=shown <= MOST_OPEN).draw(tree.top)
    name = plan.layers[0].path if plan.layers else "a plan"
    notes = "".join(f"<li>{text(note)}</li>" for note in plan.notes)
    body = [
        f"<header><h1>{text(name)}</h1>{_heading(plan, slots_per_variable)}</header>",
        '<div class="pair"><section><h2>Mesh</h2>',
        f"{mesh_drawing(plan.mesh)}{axes_list(plan)}</section>",
        f"<section><h2>What a rank stores</h2>{memory_bars(plan, slots_per_variable)}",
        f"{_legend_of_bars(slots_per_variable)}</section></div>",
        f"<section><h2>Notes</h2><ul>{notes}</ul></section>" if notes else "",
        f"<section><h2>Layers</h2>{_legend()}{layers}",
        f"{_left_out(plan)}</section>",
        f"<footer>keras_tp {text(__version__)}. Collectives are those of each layer called once; "
        "those of backward given that its input needs a gradient.</footer>",
        glyphs.symbols(),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{text(name)}: the plan</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{chr(10).join(body)}\n</body>\n</html>\n"
    )


def _heading(plan: Plan, slots: int | Slots) -> str:
    rank = plan.mesh.ranks[0]  # by torch.chunk's rule no rank stores more than the first
    most, whole = stored_bytes(plan, rank, slots), whole_bytes(plan, slots)
    sharded = sum(v.sharded for v in plan.variables)
    ranks = "1 rank" if plan.mesh.size == 1 else f"{plan.mesh.size:,} ranks"
    return (
        f'<p class="lead">On <b>{ranks}</b> ({text(plan.mesh)}) the fullest one stores '
        f"<b>{size_text(most.parameters)}</b> of {size_text(whole.parameters)} of variables: "
        f"{sharded} of {len(plan.variables)} are sharded. To train it, with gradients and the "
        f"optimizer's slots, it stores <b>{size_text(most.total)}</b> of "
        f"{size_text(whole.total)}, activations not counted.</p>"
    )


def _left_out(plan: Plan) -> str:
    silent = sum(not is_shown(layer) for layer in plan.layers)
    if not silent:
        return ""
    return f'<p class="say">Not drawn: {silent} without weights, which communicate nothing.</p>'


def _legend_of_bars(slots: int | Slots) -> str:
    said = "as the model's optimizer keeps them"
    if isinstance(slots, int):
        said = f"{slots} for each trained variable" + (", as Adam keeps" if slots == 2 else "")
    return (
        '<p class="say"><span class="key parameters"></span> parameters + <span class="key '
        'gradients"></span> gradients + <span class="key slots"></span> optimizer slots '
        f"({said}).</p>"
    )


def _legend() -> str:
    styles = "".join(f"<li>{_pill(name)} {text(said)}</li>" for name, said in STYLES.items())
    return (
        f'<ul class="legend">{styles}</ul><p class="say"><span class="badge forward">all_gather'
        '</span> in a forward call, <span class="badge backward">all_reduce</span> in a backward '
        "one. In the picture of a weight the first dim goes down, the others across; what is "
        "filled is the first rank's, and a cut into more than 8 is drawn as 8.</p>"
    )


def _pill(style: str) -> str:
    return f'<span class="pill {_color(style)}"><i></i>{text(style)}</span>'


def _color(style: str) -> str:
    return f"s-{style}" if style in STYLES else "s-other"


def _drawn(tree: Tree, blocks: list[Block]) -> int:
    """How many layers are drawn once repeated ones are folded."""
    return sum(
        len(block.layers) + _drawn(tree, list(block.below.values()))
        for run in tree.runs(blocks)
        for block in run.blocks
    )


class _Layers:
    """Draws the tree of layers."""

    def __init__(self, plan: Plan, tree: Tree, glyphs: Glyphs, opened: bool) -> None:
        self._plan = plan
        self._tree = tree
        self._glyphs = glyphs
        self._open = " open" if opened else ""

    def draw(self, blocks: list[Block]) -> str:
        return "".join(self._run(run) for run in self._tree.runs(blocks))

    def _run(self, run: Run) -> str:
        inside = "".join(map(self._block, run.blocks))
        if run.times == 1:
            return inside
        names = ", ".join(block.path for block in run.blocks[:3])
        if len(run.blocks) > 3:
            names += f", \u2026 ({len(run.blocks)} in a row)"
        again = ", ".join(run.again)
        return (
            f'<details class="fold" open><summary><span class="times">\u00d7 {run.times}</span> '
            f"<b>{text(names)}</b> \u2026 {text(run.again[-1])}</summary>"
            f'<details class="again"><summary>{len(run.again)} more, alike but for numbers in '
            f"names and patterns</summary><p>{text(again)}</p></details>{inside}</details>"
        )

    def _block(self, block: Block) -> str:
        own = "".join(self._layer(layer) for layer in block.layers)
        if not block.below:
            return own
        return (
            f'<details class="group" open><summary><b>{text(block.name)}</b></summary>'
            f"{own}{self.draw(list(block.below.values()))}</details>"
        )

    def _layer(self, layer: LayerPlan) -> str:
        variables = [self._plan.variables[i] for i in layer.variables]
        styles = layer.style.split(" + ")
        # What is computed on shards gives the color, whatever is gathered besides.
        color = _color(next((s for s in styles if s != "gathered"), styles[0]))
        badges = [
            f'<span class="badge {phase}">{text(collective.kind)}</span>'
            for phase in ("forward", "backward")
            for collective in getattr(layer, phase)
        ]
        said = [
            ("why not better", layer.reason),
            ("rows", "" if layer.rows == "own" else f"computes with {layer.rows} of all replicas"),
            ("layout of its output", f"{layer.output_layout}" if layer.output_layout else ""),
        ]
        reasons = "".join(f'<p class="why"><b>{k}:</b> {text(v)}</p>' for k, v in said if v)
        name = layer.path.rpartition("/")[2]
        path = f'<p class="path">{text(layer.path)}</p>' if name != layer.path else ""
        return (
            f'<details class="layer {color}"{self._open}><summary><b>'
            f"{text(name)}</b> <i>{text(layer.kind)}</i> "
            f"{''.join(map(_pill, styles))}{''.join(badges)}</summary>"
            f"{path}{self._weights(layer, variables)}{_flow(layer)}{reasons}</details>"
        )

    def _weights(self, layer: LayerPlan, variables: list[VariablePlan]) -> str:
        if not variables:
            return ""
        ranks = [self._plan.mesh.ranks[i] for i in (0, -1)]
        rows = "".join(
            f"<tr><td>{self._glyphs.use(v)}</td>"
            f"<td><b>{text(v.path.removeprefix(f'{layer.path}/'))}</b></td>"
            f"<td>{text(v.shape)}</td><td>\u2192</td>"
            f"<td>{text(shapes_text([v.local_shape(rank) for rank in ranks]))}</td>"
            f"<td>{text(v.dtype)}{'' if v.trainable else ', not trained'}</td>"
            f"<td>{f'<code>{text(v.pattern)}</code>' if v.pattern else 'no pattern'}</td></tr>"
            for v in variables
        )
        return (
            "<table><tr><th></th><th>weight</th><th>full</th><th></th><th>on a rank</th>"
            f"<th>dtype</th><th>pattern</th></tr>{rows}</table>"
        )


def _flow(layer: LayerPlan) -> str:
    """Where each collective sits: before the layer computes or after."""
    lines = []
    for phase, is_late in _LATE.items():
        moves: tuple[Collective, ...] = getattr(layer, phase)
        if not moves:
            continue
        chips = [
            f'<span class="badge {phase}">{text(c)} \u00b7 {text(c.axis)}</span>' for c in moves
        ]
        early = [chip for chip, c in zip(chips, moves, strict=True) if not is_late(c)]
        late = [chip for chip, c in zip(chips, moves, strict=True) if is_late(c)]
        steps = [*early, f'<span class="computes">{text(layer.kind)}</span>', *late]
        arrow = ' <span class="arrow">\u2192</span> '
        lines.append(f'<p class="flow"><b>{phase}</b> {arrow.join(steps)}</p>')
    return "".join(lines)


_LATE: dict[str, Callable[[Collective], bool]] = {
    "forward": lambda c: c.of == "output",
    "backward": lambda c: c.of not in ("output gradient", "statistics"),
}


def write_whole(path: str | os.PathLike[str], content: str) -> Path:
    """Writes a text file beside its place and then moves it there: it is whole, or as it was."""
    place = Path(path)
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)  # a temporary file is for its owner alone
        part.replace(place)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return place
