"""The page `tests/layers.md`: what the matrix of `test_layers.py` found, cell by cell."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).with_name("layers.md")

MESHES: dict[str, dict[str, int]] = {
    "model=2": {"model": 2},
    "model=4": {"model": 4},
    "batch=2 x model=2": {"batch": 2, "model": 2},
}

# On four ranks, which take longest on a small machine, `make test` shards all weights at once, in
# one of three ways, and no weight alone: what a dim does is seen on two ranks, what four add (ranks
# without a row, chunks of three sizes, two axes) shows in any layout. But layers that compute on
# their shards do so along one axis and gather along the other in their own way: of them all ways
# are looked at, and on two axes each of their dims.
SHARDING = re.compile(
    r"Dense(, (softmax|.*units))?|EinsumDense .*|(Reversible)?Embedding, [mu].*|(Multi|Group)\w+"
)


def alone_on(name: str, mesh: str) -> bool:
    """Whether `make test` shards each weight of a layer alone on a mesh."""
    if mesh == "batch=2 x model=2":  # attention is made of EinsumDense
        return SHARDING.fullmatch(name) is not None and "Attention" not in name
    return mesh != "model=4"


WAYS = ("first", "last", "mixed")


def ways_on(name: str, mesh: str) -> tuple[str, ...]:
    """In which ways `make test` shards all weights of a layer at once on a mesh."""
    if mesh == "model=2" or SHARDING.fullmatch(name) is not None:
        return WAYS
    if mesh == "model=4":
        return ()
    return (WAYS[zlib.crc32(f"{name} {mesh}".encode()) % len(WAYS)],)


def looked_at(row: list[str], ways: Sequence[str]) -> list[str]:
    """A row of the page, of *all* what is sharded in these ways."""
    if row[0] != "all":
        return row
    entries = dict(zip(WAYS, row[1].split(" · "), strict=True))
    return [row[0], " · ".join(entries[way] for way in ways), row[2]]


HEAD = """\
# Every dim of every weight

Written by `make layers`; `make test` fails where a word of it is no longer true. (Of `model=4` it
looks at the rows *all*, of `batch=2 x model=2` as well, but for `Dense`, `EinsumDense` and
`Embedding`; of layers besides these and attention at one of the three ways of *all* there, and at
none on `model=4`.)

A row is a weight of a layer, a column a mesh. An entry stands for one training: the weight's dims
one after another, each sharded alone (on `batch=2 x model=2` that dim along `model` and the next
along `batch`, so that every dim is cut along both; a vector along `batch`). *all* shards every
weight of the layer at once: on its first dim, on its last, and on mixed ones.

**Every entry is exact**: outputs, losses, input gradients, the gradient of every weight, every
weight and every optimizer slot after 2 steps of SGD with momentum equal those of one process to
1e-10 in float64, on every rank. The word says how the layer then computes: *column*, *row*,
*batched* and *vocabulary* on its shards, *gathered* with the whole weight. Along `batch` two
replicas share out the rows of each batch, so that what is cut along it is always gathered.
*refused* is an error before anything is sharded; its reason stands below the table.
"""


@dataclass(frozen=True)
class Cell:
    """One training of the matrix.

    Attributes:
        weight: path, or "all".
        what: the dim, or which dims of all.
        outcome: the styles of the layers that are sharded, or "refused".
        difference: the largest, relative.
        reason: why refused.
    """

    weight: str
    what: str
    outcome: str
    difference: float
    reason: str


def rows_of(cells: Iterable[Cell]) -> list[list[str]]:
    """For each weight: its path, its entries in the order of its dims, why it is refused."""
    entries: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for cell in cells:
        entries.setdefault(cell.weight, []).append(cell.outcome)
        if cell.weight != "all":  # whose reasons are those of its weights
            text = re.sub(r"^\d+ problems? in .*\n", "", cell.reason)
            reasons.setdefault(cell.weight, " ".join(text.split()))
    return [[w, " · ".join(found), reasons.get(w, "")] for w, found in entries.items()]


def page(results: dict[str, dict[str, list[list[str]]]]) -> str:
    """The page, from rows by mesh by layer."""
    lines = [HEAD, f"| layer | weight | {' | '.join(MESHES)} |", f"|{'---|' * (2 + len(MESHES))}"]
    reasons: dict[str, None] = {}
    for name, by_mesh in results.items():
        label = name
        for rows in zip(*(by_mesh[mesh] for mesh in MESHES), strict=True):
            weight = rows[0][0]
            lines.append(f"| {label} | {weight} | {' | '.join(row[1] for row in rows)} |")
            reasons |= {f"- {name}, `{weight}`: {row[2]}": None for row in rows if row[2]}
            label = ""
    return "\n".join([*lines, "", *reasons]) + "\n"


def on_page(name: str, mesh: str) -> list[list[str]]:
    """The rows of a layer and a mesh as they stand on the page."""
    column = 2 + list(MESHES).index(mesh)
    found, here = [], False
    text = PAGE.read_text() if PAGE.exists() else ""
    for line in text.splitlines():
        fields = [part.strip() for part in line.split(" | ")]
        if not line.startswith("| ") or len(fields) != 2 + len(MESHES):
            continue
        label = fields[0].removeprefix("|").strip()
        here = label == name if label else here
        if here:
            reason = re.search(rf"^- {re.escape(name)}, `{fields[1]}`: (.*)$", text, re.MULTILINE)
            entry = fields[column].removesuffix("|").strip()
            found.append([fields[1], entry, reason.group(1) if reason else ""])
    return found


def summary(results: dict[str, dict[str, list[list[str]]]]) -> list[list[str]]:
    """A line for each layer: how many trainings were exact, how many refused."""
    lines = []
    for name, by_mesh in results.items():
        line = [name]
        for mesh in MESHES:
            entries = [e for row in by_mesh.get(mesh, ()) for e in row[1].split(" · ")]
            refused = entries.count("refused")
            text = f"{len(entries) - refused} exact" if entries else "not run"
            line.append(text + (f", {refused} refused" if refused else ""))
        lines.append(line)
    return lines
