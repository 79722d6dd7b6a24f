"""What it takes to plan models that this machine could not hold, and plans of many ranks.

    python benchmarks/planning.py [--cases llama_70b ranks variables parallelize] [--print-only]

Each case runs in a process of its own, of which the peak of resident memory is told
(getrusage), with what importing Keras takes.

llama_70b  its shape in plain Keras layers, on batch=8, model=8, made without values
hub        the same of KerasHub's Llama backbone, with the layout map that comes with it;
           where KerasHub is installed
ranks      the same model as the first on 1,024 ranks
variables  10,000 variables and 50 patterns, each of which claims 100
flat       as many layers in a functional model without stacks, no two of a kind one after another
deep       10,000 variables in stacks of stacks
parallelize   the model of `variables` made parallel on 1 and on 2 ranks of this machine: the time
           in which it is planned, the weights are moved (broadcast and cut), and all else is done

The exit status is 1 if a model takes more than 30 s or 2 GB in all, a plan more than 2 s, or
`parallelize` more than 2 s beyond moving the weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import keras_tp  # before keras: picks the torch backend

# isort: split
import keras
import torch.distributed as dist
from keras import layers
from running import numbers_of_this_machine, start, what_ran, write_record

from keras_tp import api, wrapper
from keras_tp.costs import stored_by_rank
from keras_tp.examples.llama_shape import llama_70b
from keras_tp.pages import plan_page
from keras_tp.seam.devices import without_values
from keras_tp.tables import plain_table, render

LONGEST, LONGEST_PLAN, MOST = 30.0, 2.0, 2.0  # seconds, seconds, GB
STEPS = "build", "plan", "equal", "bytes", "table", "page", "JSON"


def hub(mesh: Any) -> tuple[Any, Any]:
    from keras_hub.models import LlamaBackbone

    model = LlamaBackbone(
        vocabulary_size=128256,
        num_layers=80,
        num_query_heads=64,
        num_key_value_heads=8,
        hidden_dim=8192,
        intermediate_dim=28672,
        dtype="bfloat16",
    )
    return model, LlamaBackbone.get_layout_map(mesh)


class Stack(layers.Layer):
    """Dense layers one after another, whose names stand for patterns."""

    def __init__(self, size: int, patterns: int, **options: Any) -> None:
        super().__init__(**options)
        self.parts = [layers.Dense(8, name=f"part_{i % patterns}") for i in range(size)]

    def build(self, shape: Any) -> None:
        for part in self.parts:
            part.build(shape)

    def call(self, x: Any) -> Any:
        for part in self.parts:
            x = part(x)
        return x


def variables(mesh: Any) -> tuple[Any, Any]:
    """100 stacks of 50 layers of 2 variables each."""
    inputs = x = keras.Input((8,))
    for i in range(100):
        x = Stack(50, 50, name=f"stack_{i}")(x)
    layout_map = keras.distribution.LayoutMap(mesh)
    for i in range(50):
        layout_map[f".*/part_{i}/kernel"] = (None, "model") if i % 2 else ("model", None)
    return keras.Model(inputs, x), layout_map


def flat(mesh: Any) -> tuple[Any, Any]:
    """10 towers of 500 layers of 2 variables each, of 50 names and 4 activations."""
    inputs, ends = keras.Input((8,)), []
    for tower in range(10):
        x = inputs
        for i in range(500):
            kind = [None, "relu", "tanh", "gelu"][i % 4]
            x = layers.Dense(8, activation=kind, name=f"part_{i % 50}_{tower}_{i // 50}")(x)
        ends.append(x)
    x = layers.add(ends)
    layout_map = keras.distribution.LayoutMap(mesh)
    for i in range(50):
        layout_map[f"part_{i}_.*/kernel"] = ("model", None) if i % 2 else (None, "model")
    return keras.Model(inputs, x), layout_map


class Pile(layers.Layer):
    """Stacks one after another."""

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(**options)
        self.stacks = [Stack(10, 10, name=f"stack_{i}") for i in range(size)]

    def build(self, shape: Any) -> None:
        for stack in self.stacks:
            stack.build(shape)

    def call(self, x: Any) -> Any:
        for stack in self.stacks:
            x = stack(x)
        return x


def deep(mesh: Any) -> tuple[Any, Any]:
    """50 piles of 10 stacks of 10 layers of 2 variables each."""
    inputs = x = keras.Input((8,))
    for i in range(50):
        x = Pile(10, name=f"pile_{i // 10}_{i % 10}")(x)
    layout_map = keras.distribution.LayoutMap(mesh)
    for i in range(5):
        for j in range(10):
            cut = ("model", None) if j % 2 else (None, "model")
            layout_map[f"pile_{i}_.*/part_{j}/kernel"] = cut
    return keras.Model(inputs, x), layout_map


CASES = {
    "llama_70b": (llama_70b, {"batch": 8, "model": 8}),
    "hub": (hub, {"batch": 8, "model": 8}),
    "ranks": (llama_70b, {"batch": 128, "model": 8}),
    "variables": (variables, {"batch": 8, "model": 8}),
    "flat": (flat, {"batch": 8, "model": 8}),
    "deep": (deep, {"batch": 8, "model": 8}),
}


def measure(name: str) -> dict[str, Any]:
    """One case, in this process."""
    make, sizes = CASES[name]
    mesh = keras_tp.device_mesh(sizes)
    seconds: dict[str, float] = {}

    def timed(step: str, what: Any) -> Any:
        start = time.perf_counter()
        made = what()
        seconds[step] = time.perf_counter() - start
        return made

    with without_values():
        model, layout_map = timed("build", lambda: make(mesh))
    plan = timed("plan", lambda: keras_tp.plan(model, layout_map))
    made_again = keras_tp.plan(model, layout_map)
    assert timed("equal", lambda: plan == made_again)
    timed("bytes", lambda: stored_by_rank(plan))
    timed("table", lambda: str(plan))
    timed("page", lambda: plan_page(plan))
    timed("JSON", lambda: json.dumps(plan.to_dict()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"variables": len(plan.variables), "ranks": mesh.devices.size, "peak": peak, **seconds}


def measure_parallelize() -> dict[str, float]:
    """The model of `variables` on the ranks of this job: the seconds that each step takes."""
    keras_tp.initialize()
    numbers_of_this_machine()
    seconds = dict.fromkeys(("plan", "move", "parallelize"), 0.0)

    def timed(step: str, what: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return what(*args, **kwargs)
            finally:
                seconds[step] += time.perf_counter() - start

        return call

    api.make_plan = timed("plan", api.make_plan)
    wrapper._store = timed("move", wrapper._store)
    model, layout_map = variables(
        keras_tp.device_mesh({"batch": 1, "model": dist.get_world_size()})
    )
    dist.barrier()
    timed("parallelize", keras_tp.parallelize)(model, layout_map)
    first = dist.get_rank() == 0
    dist.destroy_process_group()
    return seconds if first else {}


def parallelize(ranks: int) -> tuple[str, list[str]]:
    """What it takes on so many ranks, in words, and what is too much."""
    with tempfile.NamedTemporaryFile() as told:
        os.environ["PLANNING_RANKS"] = told.name
        start(ranks, __file__)
        found = json.load(told)
    beyond = found["parallelize"] - found["move"]
    text = (
        f"parallelize on {ranks} rank(s): {found['parallelize']:.2f} s, of which it plans "
        f"{found['plan']:.2f} and moves weights {found['move']:.2f}: {beyond:.2f} s beyond that."
    )
    over = beyond > LONGEST_PLAN
    return text, [f"{text[: text.index(':')]}: more than {LONGEST_PLAN:.0f} s"] if over else []


def problems(name: str, found: dict[str, Any]) -> list[str]:
    """What takes more than it should."""
    over = []
    if found["plan"] > LONGEST_PLAN:
        over.append(f"{name}: a plan in {found['plan']:.1f} s, more than {LONGEST_PLAN:.0f}")
    if found["build"] + found["plan"] > LONGEST and name not in ("variables", "flat", "deep"):
        over.append(f"{name}: in all more than {LONGEST:.0f} s")
    if found["peak"] > MOST:
        over.append(f"{name}: a peak of {found['peak']:.2f} GB, more than {MOST:.0f}")
    return over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [*CASES, "parallelize"]
    parser.add_argument("--cases", nargs="+", choices=every, default=every)
    parser.add_argument("--print-only", action="store_true", help="write no record")
    options = parser.parse_args()
    if "PLANNING_RANKS" in os.environ:
        if seconds := measure_parallelize():
            Path(os.environ["PLANNING_RANKS"]).write_text(json.dumps(seconds))
        return
    if "PLANNING" in os.environ:
        with redirect_stdout(io.StringIO()):
            found = measure(os.environ["PLANNING"])
        print(json.dumps(found))
        return
    columns = ("model", "variables", "ranks", *(f"{step}, s" for step in STEPS), "peak, GB")
    table, over, said = plain_table(*columns), [], []
    for name in options.cases:
        if name == "parallelize":
            for ranks in (1, 2):
                text, more = parallelize(ranks)
                said.append(text)
                over += more
            continue
        if name == "hub" and importlib.util.find_spec("keras_hub") is None:
            said.append("hub: left out, KerasHub is not installed.")
            continue
        done = subprocess.run(
            [sys.executable, __file__],
            env={**os.environ, "PLANNING": name},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
        over += problems(name, found)
        times = (f"{found[step]:.2f}" for step in STEPS)
        sizes = (f"{found['variables']:,}", f"{found['ranks']:,}")
        table.add_row(name, *sizes, *times, f"{found['peak']:.2f}")
    text = "\n".join([render(table), "", *said, *(over or ["nothing takes more than it should."])])
    ran = what_ran()
    print(f"{ran}\n\n{text}")
    if not options.print_only:
        print(write_record("planning", "Planning what no machine holds", ran, text))
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    main()
