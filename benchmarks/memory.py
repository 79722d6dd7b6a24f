"""What a rank's memory holds while it trains, against what it should, and whether it grows.

    python benchmarks/memory.py [--width 256] [--blocks 4] [--rows 16] [--steps 20] [--print-only]

The demo's transformer, 20 steps of Adam, on the meshes of MESHES. What should be there:

    parameters, gradients, slots    replicated + sharded / n, by the plan
    activations                     as many as one process needs for the rows of a replica: each
                                    rank measures it first, with plain Keras
    temporaries of the update       as many times the parameters as in one process, and the
                                    model's outputs for all rows, which are still there

Activations are what the peak of forward and backward has beyond the first line. (The last
step's gradients are there until forward is done: only then does Keras let go of them.)
Lines that start with ">" say what the peak is made of. All is counted in bytes of
live storages (`live.py`) over steps 5 to 20, 8 and 16 of which also check the ranks and rows.

Weights that are gathered on use are keras_tp's own: autograd holds on to them from their layer's
call to its backward, so that in the end of forward all are there. (To gather them a second time,
in backward, would take less memory and more communication.) A row says what the peak is without.

Growth is what the end of step 20 has more than that of step 5; of resident memory (RSS) as
well, now and at most, which the allocator and Python decide. What gloo's threads let go of
a moment late is counted, what awaits Python's garbage collector is not. (Keras walks nests
with local functions that refer to themselves, and so holds on to what layers were given, with
keras_tp and without.)

The exit status is 1 if parameters, gradients or slots are not what they should be, if live bytes
grow, or if a peak is more than 5 % too high without gathered weights. One that is with them is
marked.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras_tp  # before keras: picks the torch backend

# isort: split
import keras
import numpy as np
import running
import torch.distributed as dist
from live import GATHERED, Live

from keras_tp.examples.train_transformer import BYTES, layout_map, transformer
from keras_tp.seam.variables import local_tensor
from keras_tp.tables import plain_table, render, size_text

EARLY = 5  # the first step that is looked at
TOLERANCE = 0.05
KEPT_TOLERANCE = 0.001  # a bucket has a flag for each gradient, an optimizer some numbers

# By number of ranks: a title, the mesh, and whether weights are cut along "batch" besides.
MESHES = {
    2: [
        ("model=2", {"batch": 1, "model": 2}, False),
        ("batch=2, weights whole", {"batch": 2, "model": 1}, False),
        ("batch=2, weights cut along it", {"batch": 2, "model": 1}, True),
    ],
    4: [("batch=2, model=2", {"batch": 2, "model": 2}, False)],
}


# Names of rows to attributes of `Memory`.
OVER_STEPS = {
    f"growth since step {EARLY}": "growth",
    "growth of RSS": "resident",
    "growth of the peak of RSS": "resident_peak",
}


def layout_over(mesh: dict[str, int], cut_along_batch: bool) -> Any:
    """The demo's layout, or every kernel by its first dim along "batch"."""
    layout = keras.distribution.LayoutMap(keras_tp.device_mesh(mesh))
    for pattern, entry in layout_map(1).items():
        axes = entry.axes
        layout[pattern] = ("batch", *(None for _ in axes[1:])) if cut_along_batch else axes
    return layout


@dataclass
class Memory:
    """Bytes of one training on one rank.

    Attributes:
        kept: between steps: parameters, gradients, slots.
        peak, update: at most, in forward and backward, and in the optimizer's update.
        made: what there is at the first of these peaks, by who made it.
        outputs: those of the model, for all rows.
        growth: of live bytes from step EARLY to the last.
        resident, resident_peak: growth of RSS, and of its peak.
    """

    kept: dict[str, int]
    peak: int
    update: int
    made: Counter[str]
    outputs: int
    growth: int
    resident: int
    resident_peak: int

    @property
    def activations(self) -> int:
        return self.peak - sum(self.kept.values())

    @property
    def temporaries(self) -> int:
        return self.update - sum(self.kept.values())


class AfterSteps(keras.callbacks.Callback):
    """Calls a function after each training step."""

    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.function(batch)


def train(options: argparse.Namespace, model: Any, rows: int) -> Memory:
    """Trains for all steps and measures from EARLY on. Collective where it is parallelized."""
    ids = np.arange(options.steps * rows * (options.tokens + 1)) * 7919 // 13 % BYTES
    ids = ids.reshape(options.steps * rows, options.tokens + 1).astype("int32")
    x, y = ids[:, :-1], ids[:, 1:]
    first = (EARLY - 1) * rows
    fit = {"batch_size": rows, "shuffle": False, "verbose": 0}
    model.fit(x[:first], y[:first], **fit)
    parameters = [local_tensor(v) for v in model.variables]
    slots = [local_tensor(v) for v in model.optimizer.variables]
    seen: list[tuple[int, int, int]] = []

    def look(step: int) -> None:
        if step in (0, options.steps - EARLY):
            time.sleep(0.3)  # gloo's threads let go of what they have sent a moment later
        gc.collect()
        live.note(gradients_of(parameters), "gradients")  # they were made in backward
        seen.append((live.now(), resident("VmRSS"), resident("VmHWM")))

    live = Live(parameters=parameters, gradients=gradients_of(parameters), slots=slots)
    with live:
        model.fit(x[first:], y[first:], callbacks=[AfterSteps(look)], **fit)
    kept = {
        "parameters": bytes_of(parameters),
        "gradients": bytes_of(gradients_of(parameters)),
        "Adam slots": bytes_of(slots),
    }
    outputs = 4 * rows * options.tokens * BYTES
    growth = [b - a for a, b in zip(seen[0], seen[-1], strict=True)]
    return Memory(
        kept, live.peaks["step"], live.peaks["update"], live.at_peak["step"], outputs, *growth
    )


def gradients_of(parameters: list[Any]) -> list[Any]:
    return [p.grad for p in parameters if p.grad is not None]


def bytes_of(tensors: list[Any]) -> int:
    """Of the storages that these tensors keep alive; a bucket of gradients is one."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def resident(name: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(name)]
    return int(line.split()[1]) * 1024


def should_keep(plan: keras_tp.Plan, rank: int) -> dict[str, int]:
    """Bytes by the plan; every variable of the model is float32 and trained."""
    stored = sum(4 * math.prod(v.local_shape(rank)) for v in plan.variables)
    return {"parameters": stored, "gradients": stored, "Adam slots": 2 * stored}


def measure(options: argparse.Namespace, mesh: dict[str, int], cut: bool) -> tuple[Any, ...]:
    """What this rank should hold, what it holds, and what one process holds. Collective."""
    sizes = (options.tokens, options.width, options.heads, options.blocks)
    keras.utils.set_random_seed(0)
    keras.utils.clear_session()
    plain = train(options, transformer(*sizes), options.rows // mesh["batch"])
    keras.utils.clear_session()
    model = transformer(*sizes)
    plan = keras_tp.plan(model, layout_over(mesh, cut))
    keras_tp.parallelize(model, plan=plan)
    return should_keep(plan, dist.get_rank()), train(options, model, options.rows), plain


def report(title: str, everywhere: list[tuple[Any, ...]]) -> tuple[str, list[str]]:
    """The table of one mesh, and what is wrong of what is kept or grows."""
    ranks = range(len(everywhere))
    headers = ("one process", "should", *(f"rank {rank}" for rank in ranks), "largest / should")
    table = plain_table(title, *headers)
    plain = everywhere[0][2]

    def row(name: str, one: int, should: list[float], found: list[int]) -> None:
        ratio = max(f / s for f, s in zip(found, should, strict=True))
        over = " OVER" if ratio > 1 + TOLERANCE else ""
        sizes = (one, max(should), *found)
        table.add_row(name, *map(size_text, sizes), f"{ratio:.3f}{over}")

    wrong = []
    for kind in plain.kept:
        should = [s[kind] for s, _, _ in everywhere]
        found = [m.kept[kind] for _, m, _ in everywhere]
        row(kind, plain.kept[kind], should, found)
        if any(abs(f - s) > KEPT_TOLERANCE * s for f, s in zip(found, should, strict=True)):
            wrong.append(f"{title}: {kind}")
    activations = [p.activations for _, _, p in everywhere]
    row("activations", plain.activations, activations, [m.activations for _, m, _ in everywhere])
    should = [sum(s.values()) + a for (s, _, _), a in zip(everywhere, activations, strict=True)]
    row("peak of forward and backward", plain.peak, should, [m.peak for _, m, _ in everywhere])
    for kind in dict.fromkeys([*plain.made, *(k for _, m, _ in everywhere for k in m.made)]):
        found = [size_text(m.made[kind]) for _, m, _ in everywhere]
        table.add_row(f"> {kind}", size_text(plain.made[kind]), "", *found)
    found = [m.peak - m.made[GATHERED] for _, m, _ in everywhere]
    row("peak without gathered weights", plain.peak, should, found)
    if any(f > (1 + TOLERANCE) * s for f, s in zip(found, should, strict=True)):
        wrong.append(f"{title}: peak")
    should = [
        (p.temporaries - p.outputs) * s["parameters"] / p.kept["parameters"] + m.outputs
        for s, m, p in everywhere
    ]
    found = [m.temporaries for _, m, _ in everywhere]
    row("temporaries of the update", plain.temporaries, should, found)
    should = [sum(s.values()) + t for (s, _, _), t in zip(everywhere, should, strict=True)]
    row("peak of the update", plain.update, should, [m.update for _, m, _ in everywhere])
    for name, what in OVER_STEPS.items():
        found = [getattr(m, what) for _, m, _ in everywhere]
        table.add_row(name, *map(size_text, (getattr(plain, what), 0, *found)))
        if what == "growth" and max(found) > 0:
            wrong.append(f"{title}: growth")
    return render(table), wrong


def on_a_rank(options: argparse.Namespace) -> None:
    """Measures every mesh of this number of ranks; rank 0 writes a line for each to the file."""
    running.numbers_of_this_machine()
    keras_tp.initialize()
    for title, mesh, cut in MESHES[dist.get_world_size()]:
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, measure(options, mesh, cut))
        if dist.get_rank() == 0:
            with options.found.open("a") as file:
                file.write(json.dumps(report(title, everywhere)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16, help="of a whole batch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", choices=MESHES, default=list(MESHES))
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
        print(running.write_record("memory", "What ranks hold while they train", ran, tables))
    wrong = [problem for _, problems in results for problem in problems]
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")
    print("every rank keeps exactly what it should, and nothing grows")


if __name__ == "__main__":
    main()
