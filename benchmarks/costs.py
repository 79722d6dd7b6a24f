"""The price of a training step, as `plan.cost` has it before, against what ranks do.

    python benchmarks/costs.py [--width 256] [--tokens 64] [--rows 16] [--print-only]

The demo's transformer on the meshes of `memory.py`, which also measures: bytes of live
storages over steps of `fit` (`live.py`). The price is that of each rank; the table has the
rank where it is furthest off.

    parameters, gradients, slots    what stays from step to step
    activations                     what the peak of forward and backward has beyond these
    collectives, bytes given        of one step, by torch's profiler

Where layers compute on shards it is measured with `sequence_parallel=True` as well.

The exit status is 1 if a memory is more than 5 % off, or a collective or a byte is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import keras_tp  # before keras: picks the torch backend

# isort: split
import keras
import memory
import numpy as np
import running
import torch.distributed as dist
from traffic import collectives

from keras_tp.examples.train_transformer import BYTES, transformer
from keras_tp.prices import Cost
from keras_tp.tables import plain_table, render, size_text

ACTIVATIONS = 3  # the row of them


def on_gloo(cost: Cost) -> tuple[Counter[str], Counter[str]]:
    """How many collectives gloo makes of a step's, and the bytes that a rank gives to them.

    A rank gives its part to an all-gather. Of a reduce-scatter gloo makes all-reduces, one
    for the part of each rank.
    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for traffic in cost.traffic:
        scatters = traffic.kind == "reduce_scatter"
        kind = "all_reduce" if scatters else traffic.kind
        counts[kind] += traffic.count * (traffic.ranks if scatters else 1)
        sizes[kind] += traffic.bytes // (traffic.ranks if kind == "all_gather" else 1)
    return counts, sizes


def profiled(model: Any, x: Any, y: Any) -> tuple[Counter[str], Counter[str]]:
    """How many collectives of each kind a step makes, and the bytes this rank gives to them."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for _ in range(2):  # in which rows are compared
        model.train_on_batch(x, y)
    for kind, size in collectives(lambda: model.train_on_batch(x, y)):
        counts[kind] += 1
        sizes[kind] += size
    return counts, sizes


def measure(
    options: argparse.Namespace, mesh: dict[str, int], cut: bool, sequence: bool = False
) -> list[tuple[Any, ...]]:
    """Rows of what is compared: name, planned, measured. Collective."""
    sizes = (options.tokens, options.width, options.heads, options.blocks)
    keras.utils.set_random_seed(0)
    keras.utils.clear_session()
    model = transformer(*sizes, dropout=options.dropout)
    plan = keras_tp.plan(model, memory.layout_over(mesh, cut), sequence_parallel=sequence)
    ids = np.zeros((options.rows, options.tokens), "int32")
    cost = plan.cost(model, ids, targets=ids, rank=dist.get_rank())
    keras_tp.parallelize(model, plan=plan, check_batches=False)
    found = memory.train(options, model, options.rows)
    stored = cost.stored
    rows: list[tuple[Any, ...]] = [
        ("parameters", stored.parameters, found.kept["parameters"]),
        ("gradients", stored.gradients, found.kept["gradients"]),
        ("optimizer slots", stored.slots, found.kept["Adam slots"]),
        ("activations", cost.activations, found.activations),
        ("peak of forward and backward", cost.peak, found.peak),
    ]
    ids = ids % BYTES
    counts, given = on_gloo(cost)
    found_counts, found_given = profiled(model, ids, ids)
    for kind in sorted({*counts, *found_counts}):
        rows.append((f"{kind}, number", counts[kind], found_counts[kind]))
        rows.append((f"{kind}, bytes given", given[kind], found_given[kind]))
    return rows


def report(title: str, everywhere: list[list[tuple[Any, ...]]]) -> tuple[str, list[str]]:
    """The table of one mesh, and what is wrong."""
    table = plain_table(title, "planned", "measured", "measured / planned")
    wrong = []
    for same in zip(*everywhere, strict=True):
        name, planned, measured = max(same, key=lambda row: abs(row[2] / max(row[1], 1) - 1))
        ratio = measured / max(planned, 1)
        text = str if name.endswith("number") else size_text
        table.add_row(name, text(planned), text(measured), f"{ratio:.4f}")
        allowed = 0.0 if "," in name else memory.TOLERANCE
        if abs(ratio - 1) > allowed:
            wrong.append(f"{title}: {name}")
    return render(table), wrong


def against(without: list[list[tuple[Any, ...]]], everywhere: list[list[tuple[Any, ...]]]) -> str:
    """What sharing out tokens saves of activations, on the fullest rank."""
    most = [max(rows[ACTIVATIONS][2] for rows in ranks) for ranks in (without, everywhere)]
    sizes = " of ".join(map(size_text, reversed(most)))
    return f"\nactivations are {sizes} without: {most[1] / most[0]:.3f}"


def on_a_rank(options: argparse.Namespace) -> None:
    """Measures every mesh of this number of ranks; rank 0 writes a line for each to the file."""
    running.numbers_of_this_machine()
    keras_tp.initialize()
    for title, mesh, cut in memory.MESHES[dist.get_world_size()]:
        before: list[list[tuple[Any, ...]]] = []
        for sequence in [False, True] if mesh["model"] > 1 else [False]:
            everywhere: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, measure(options, mesh, cut, sequence))
            if dist.get_rank() == 0:
                name = f"{title}, tokens shared out" if sequence else title
                table, wrong = report(name, everywhere)
                table += against(before, everywhere) if sequence else ""
                with options.found.open("a") as file:
                    file.write(json.dumps((table, wrong)) + "\n")
            before = everywhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16, help="of a whole batch")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ranks", type=int, nargs="+", choices=memory.MESHES, default=[2, 4])
    parser.add_argument("--print-only", action="store_true", help="no record")
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)  # given to the ranks
    options = parser.parse_args()
    if options.found:
        on_a_rank(options)
        return
    ran = running.what_ran()
    results = [json.loads(line) for line in running.found_by_ranks(options.ranks, __file__)]
    tables = "\n\n".join(table for table, _ in results)
    print(f"{ran}\n\n{tables}\n")
    if not options.print_only:
        print(running.write_record("costs", "A step's price and what it was", ran, tables))
    wrong = [problem for _, problems in results for problem in problems]
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")
    print("collectives and bytes are those planned, memory is within 5 %")


if __name__ == "__main__":
    main()
