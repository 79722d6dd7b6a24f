"""Do 2 and 4 ranks train as one process does? Their losses, drawn on top of each other.

    python benchmarks/parity.py [--steps 300] [--dropout 0 0.1] [--float64] [--print-only]

A small language model learns sentences that a grammar here makes up: as plain Keras in one
process, which no `parallelize` has seen, and on every mesh of MESHES. Printed is the largest
difference of a loss from that of one process, over all steps and ranks, and of a weight at the
end; `parity.png` shows the curves, and `records/` keeps the numbers.

Ranks add in another order than one process does, and training makes more of rounding with every
step. How much is measured: one process trains once more from weights that are nudged by up
to one unit of rounding ("1, nudged"). A mesh that differs by much more than that has a
mistake, and the exit status is 1. In float64 a unit is 5e-10 of that in float32, and so should
be the differences.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras_tp  # before keras: picks the torch backend

# isort: split
import keras
import numpy as np
import running
import torch
import torch.distributed as dist
from keras.src.backend.common import dtypes

from keras_tp.examples.train_transformer import layout_map, train, transformer, worst_weight
from keras_tp.rounding import Nudge
from keras_tp.tables import plain_table, render

# By number of ranks. One process trains plain Keras.
MESHES = {
    2: [{"batch": 1, "model": 2}, {"batch": 2, "model": 1}],
    4: [{"batch": 2, "model": 2}],
}
PLAIN, NUDGED = "1", "1, nudged"
# Times the difference that nudges make. Seen: see `records/`.
BOUND = 10
TOKENS, BATCH, WIDTH, HEADS, BLOCKS = 64, 8, 64, 4, 2

GRAMMAR = {
    "SENTENCE": ("ONE VERBs MANY. ", "MANY VERB ONE. ", "if ONE VERBs MANY, then MANY VERB ONE. "),
    "ONE": ("the NOUN", "the NOUN", "a WHICH NOUN", "the NOUN of MANY"),
    "MANY": ("NOUNs", "all NOUNs", "the WHICH NOUNs", "NOUNs that ONE VERBs"),
    "NOUN": ("rank", "shard", "kernel", "row", "replica", "layer", "gradient", "column"),
    "VERB": ("gather", "reduce", "split", "await", "count", "follow"),
    "WHICH": ("local", "full", "first", "last", "small", "partial"),
}


def text(count: int) -> np.ndarray:
    """`count` bytes of sentences, the same ones everywhere."""
    draw = random.Random(0)

    def expand(word: re.Match[str]) -> str:
        return re.sub("[A-Z]+", expand, draw.choice(GRAMMAR[word[0]]))

    made: list[str] = []
    length = 0
    while length < count:
        made.append(re.sub("[A-Z]+", expand, "SENTENCE"))
        length += len(made[-1])
    return np.frombuffer("".join(made).encode()[:count], dtype="uint8").astype("int32")


@contextlib.contextmanager
def computing_in(dtype: str) -> Iterator[None]:
    """Makes Keras compute in `dtype`, which for float64 takes more than to set it.

    On torch `keras.backend.result_type("float64", "float64")` is "float32", so that much of a
    float64 model is computed in float32, with keras_tp and without.
    """
    before = dtypes.BIT64_TO_BIT32_DTYPE["float64"]
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    keras.config.set_floatx(dtype)
    try:
        yield
    finally:
        dtypes.BIT64_TO_BIT32_DTYPE["float64"] = before
        keras.config.set_floatx("float32")


@dataclass
class Run:
    """One training.

    Attributes:
        dtype, dropout: what was trained.
        on: the mesh, or PLAIN or NUDGED.
        losses: of every step, as each rank saw them.
        weights: name of the file with the weights at the end.
    """

    dtype: str
    dropout: float
    on: str
    losses: list[list[float]]
    weights: str


def train_once(options: argparse.Namespace, dtype: str, dropout: float, on: Any) -> Run:
    """Trains on a mesh, or in one process; `on` is the mesh, PLAIN or NUDGED."""
    rows = options.steps * BATCH
    data = text(rows * TOKENS + 1)
    x, y = data[:-1].reshape(rows, TOKENS), data[1:].reshape(rows, TOKENS)
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)  # initial weights and dropout masks
    with computing_in(dtype):
        model = transformer(TOKENS, WIDTH, HEADS, BLOCKS, dropout)
        if on == NUDGED:
            nudge = Nudge(torch.finfo(getattr(torch, dtype)).eps, seed=0)
            model.set_weights([nudge(torch.tensor(w)).numpy() for w in model.get_weights()])
        if isinstance(on, dict):
            keras_tp.parallelize(model, layout_over(on))
        losses = train(model, x, y, BATCH, show=False)
        weights = keras_tp.full_weights(model)
    everywhere: list[Any] = [losses]
    if isinstance(on, dict):
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, losses)
        on = ", ".join(f"{axis}={size}" for axis, size in on.items() if size > 1)
    file = f"{dtype}-{dropout}-{on}.npz".replace(" ", "")
    if not dist.is_initialized() or dist.get_rank() == 0:
        np.savez(options.folder / file, **weights)
    return Run(dtype, dropout, on, everywhere, file)


def layout_over(mesh: dict[str, int]) -> Any:
    """The demo's layout, over another mesh."""
    layout = keras.distribution.LayoutMap(keras_tp.device_mesh(mesh))
    for pattern, entry in layout_map(1).items():
        layout[pattern] = entry.axes
    return layout


def train_all(options: argparse.Namespace, ons: list[Any]) -> list[Run]:
    return [
        train_once(options, dtype, dropout, on)
        for dtype in dtypes_of(options)
        for dropout in options.dropout
        for on in ons
    ]


def on_a_rank(options: argparse.Namespace) -> None:
    """All trainings of this number of ranks; rank 0 writes them into the folder."""
    keras_tp.initialize()
    ranks = dist.get_world_size()
    runs = train_all(options, MESHES[ranks])
    if dist.get_rank() == 0:
        (options.folder / f"{ranks}.json").write_text(json.dumps([asdict(run) for run in runs]))


def dtypes_of(options: argparse.Namespace) -> list[str]:
    return ["float32", "float64"] if options.float64 else ["float32"]


def differences(run: Run, plain: Run) -> np.ndarray:
    """How far each step's loss is from that of one process, on the rank where it is farthest."""
    return np.abs(np.subtract(run.losses, plain.losses)).max(axis=0)


def of(runs: list[Run], dtype: str, dropout: float) -> dict[str, Run]:
    return {run.on: run for run in runs if (run.dtype, run.dropout) == (dtype, dropout)}


def report(options: argparse.Namespace, runs: list[Run]) -> tuple[str, list[str]]:
    """The table, and which meshes differ by more than rounding."""
    table = plain_table(
        *("dtype", "dropout", "mesh", "loss at first", "at last"),
        *("largest difference", "at step", "/ nudged", "of a weight, in the end"),
    )
    wrong = []
    for dtype in dtypes_of(options):
        for dropout in options.dropout:
            mine = of(runs, dtype, dropout)
            plain = mine.pop(PLAIN)
            row = [dtype, f"{dropout:g}", PLAIN, *(f"{plain.losses[0][i]:.6f}" for i in (0, -1))]
            table.add_row(*row)
            unit = np.finfo(dtype).eps * np.max(plain.losses)  # what a loss can differ by at least
            nudged = differences(mine[NUDGED], plain).max()
            for run in mine.values():
                gap = differences(run, plain)
                weight, path = worst_weight(
                    *(dict(np.load(options.folder / r.weights)) for r in (plain, run))
                )
                table.add_row(
                    *("", "", run.on, *(f"{run.losses[0][i]:.6f}" for i in (0, -1))),
                    *(
                        f"{gap.max():.1e}",
                        str(gap.argmax() + 1),
                        f"{gap.max() / nudged:.2g}" if nudged else "-",
                    ),
                    f"{weight:.1e} ({path})",
                )
                if not gap.max() <= BOUND * max(nudged, unit):  # neither is nan
                    wrong.append(f"{run.on} in {dtype} with dropout {dropout:g}")
    return render(table), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, nargs="+", choices=MESHES, default=list(MESHES))
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--float64", action="store_true", help="in float64 as well")
    parser.add_argument("--print-only", action="store_true", help="no picture, no record")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # given to the ranks
    options = parser.parse_args()
    running.numbers_of_this_machine()
    if options.folder:
        on_a_rank(options)
        return
    if not options.print_only:
        from parity_picture import draw  # now, as it needs matplotlib, which not everyone has
    ran = running.what_ran()
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        runs = train_all(options, [PLAIN, NUDGED])
        for ranks in options.ranks:
            running.start(ranks, __file__, *sys.argv[1:], "--folder", folder)
            written = (options.folder / f"{ranks}.json").read_text()
            runs += [Run(**run) for run in json.loads(written)]
        table, wrong = report(options, runs)
    print(f"{ran}\n\n{options.steps} steps\n\n{table}")
    if not options.print_only:
        picture = running.HERE / "parity.png"
        draw(picture, {d: of(runs, d, options.dropout[-1]) for d in dtypes_of(options)})
        title = "Training equals one process"
        print(f"\n{running.write_record('parity', title, ran, table)}\n{picture}")
    if wrong:
        sys.exit(f"more than rounding: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
