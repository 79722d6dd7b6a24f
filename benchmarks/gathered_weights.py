"""Weights gathered on use: ahead of it, while earlier layers compute, or as they are read.

    python benchmarks/gathered_weights.py [--ranks 2] [--rate 2gbit] [--print-only]

Stacks of dense layers, and the demo's transformer, float32, on CPUs, every kernel cut along the
axis of replicas (ZeRO, stage 3), biases and norms whole. What is timed is one step of training
(`train_on_batch`), and one of inference (`predict_on_batch`), of each way of gathering in turn,
in one run, of one model; each step starts together, and the slower rank's time counts. Printed
are the medians with quartiles, and the median and quartiles of the steps' ratios, with over
without. A third turn is without again: its ratio to the first is what two equal things
differ by on this machine.

Ranks of one machine send through its memory, by the cores that compute: what travels then
takes as much from what is computed meanwhile. With `--rate` (as root, on Linux) the ranks run in a
network namespace of their own, in which `tc` lets so many bits a second through, those of all
ranks together, as between machines: a rank waits, and its core is free.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras_tp  # before keras: picks the torch backend

# isort: split
import keras
import numpy as np
import running
import torch
import torch.distributed as dist

from keras_tp.examples.train_transformer import BYTES, transformer
from keras_tp.prefetch import gathering_at_once
from keras_tp.tables import plain_table, render

WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "as read": gathering_at_once,
    "ahead": contextlib.nullcontext,
    "as read, again": gathering_at_once,
}

LIMITED = "GATHERED_WEIGHTS_LIMITED"  # set where the network is


def stack(depth: int, width: int, rows: int) -> tuple[Any, Any, Any]:
    """Dense layers, and a batch."""
    model = keras.Sequential(
        [keras.Input((width,)), *(keras.layers.Dense(width, "tanh") for _ in range(depth))]
    )
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    x = np.random.default_rng(0).standard_normal((2, rows, width)).astype("float32")
    return model, x[0], x[1]


def demo(tokens: int, width: int, blocks: int, rows: int) -> tuple[Any, Any, Any]:
    """The demo's transformer, and a batch."""
    model = transformer(tokens, width, 4, blocks)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-3), loss)
    ids = np.random.default_rng(0).integers(0, BYTES, (rows, tokens + 1)).astype("int32")
    return model, ids[:, :-1], ids[:, 1:]


CASES: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "12 dense layers of 1024, 128 rows": lambda: stack(12, 1024, 128),
    "12 dense layers of 1024, 1024 rows": lambda: stack(12, 1024, 1024),
    "24 dense layers of 256, 256 rows": lambda: stack(24, 256, 256),
    "demo: 4 blocks of 256, 16 rows of 64 tokens": lambda: demo(64, 256, 4, 16),
}


def fully_sharded(model: Any) -> None:
    """Cuts every kernel and table by its first dim along "batch"."""
    mesh = keras_tp.device_mesh({"batch": dist.get_world_size()})
    layout = keras.distribution.LayoutMap(mesh)
    for variable in model.trainable_variables:
        if len(variable.shape) > 1:
            layout[f"{variable.path}"] = ("batch", *(None for _ in variable.shape[1:]))
    keras_tp.parallelize(model, layout, check_batches=False)


def slowest(step: Callable[[], Any]) -> float:
    """Seconds of the slower ranks, which start together. Collective."""
    dist.barrier()
    start = time.perf_counter()
    step()
    took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def measure(options: argparse.Namespace, make: Callable[[], tuple[Any, Any, Any]]) -> Any:
    """Seconds of each step, by what is done and the way. Collective."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model, x, y = make()
    fully_sharded(model)
    steps = {
        "training": lambda: model.train_on_batch(x, y),
        "inference": lambda: model.predict_on_batch(x),
    }
    seconds: dict[str, dict[str, list[float]]] = {}
    for name, step in steps.items():
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(options.warm_up + options.steps):
            # Which way comes after which changes, lest one always pays for what another left.
            ways = list(WAYS)[turn % len(WAYS) :] + list(WAYS)[: turn % len(WAYS)]
            for way in ways:
                with WAYS[way]():
                    took = slowest(step)
                if turn >= options.warm_up:
                    times[way].append(took)
        seconds[name] = times
    return seconds


def report(title: str, seconds: dict[str, dict[str, list[float]]]) -> str:
    """The table of one case."""
    table = plain_table(title, "ms", "quartiles", "/ as read", "quartiles")
    for name, times in seconds.items():
        for way, taken in times.items():
            low, middle, high = (1e3 * t for t in statistics.quantiles(taken, n=4))
            ratios = [a / b for a, b in zip(taken, times["as read"], strict=True)]
            below, ratio, above = statistics.quantiles(ratios, n=4)
            table.add_row(
                f"{name}, {way}",
                f"{middle:.1f}",
                f"{low:.1f} .. {high:.1f}",
                f"{ratio:.3f}",
                f"{below:.3f} .. {above:.3f}",
            )
    return render(table)


def on_a_rank(options: argparse.Namespace) -> None:
    running.numbers_of_this_machine()
    keras_tp.initialize()
    for title, make in [list(CASES.items())[number] for number in options.cases]:
        seconds = measure(options, make)
        if dist.get_rank() == 0:
            print(title, flush=True)
            with options.found.open("a") as file:
                file.write(report(title, seconds) + "\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--rate", help="of the network between the ranks, in tc's words")
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--print-only", action="store_true", help="no record")
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)  # given to the ranks
    options = parser.parse_args()
    if options.found:
        on_a_rank(options)
        return
    if options.rate and LIMITED not in os.environ:
        limit = f"tc qdisc add dev lo root tbf rate {options.rate} burst 256kb latency 400ms"
        shell = f'ip link set lo up && {limit} && exec "$@"'
        command = ["unshare", "-n", "sh", "-c", shell, "sh", sys.executable, *sys.argv]
        os.execvpe(command[0], command, {**os.environ, LIMITED: "1"})
    ran = running.what_ran()
    tables = "".join(running.found_by_ranks([options.ranks], __file__)).rstrip()
    print(f"{ran}\n\n{tables}\n")
    if not options.print_only:
        title = "Weights gathered ahead of their use"
        name = f"gathered-weights-{options.rate}" if options.rate else "gathered-weights"
        print(running.write_record(name, title, ran, tables))


if __name__ == "__main__":
    main()
