"""How long an all-reduce of gloo takes, with its threads as they are and as batch threads.

    python benchmarks/gloo_threads.py [--ranks 2 4] [--kib 64 512 2048] [--rounds 10] [--record]

What `keras_tp.threads` does, measured by itself: the ranks multiply matrices for a while, as in
a layer, and then sum. Printed is how long the sum takes from when the last rank has come to it,
in the middle and on average (which the few that wait for the scheduler make up), and the ratio of
averages. The two ways take turns by rounds of 20 sums in one run, on the same group.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import keras_tp  # before keras: picks the torch backend

# isort: split
import running
import torch
import torch.distributed as dist

from keras_tp.tables import plain_table, render
from keras_tp.threads import take_turns, threads_of_gloo

SUMS = 20
FACTORS = torch.ones(512, 512), torch.ones(512, 512)  # about a millisecond or two


def seconds_of_sums(x: torch.Tensor) -> list[float]:
    """Of each, from when the last rank began until this one has it. All have one clock."""
    began, ended = [], []
    for _ in range(SUMS):
        torch.mm(*FACTORS)
        began.append(time.perf_counter())
        dist.all_reduce(x)
        ended.append(time.perf_counter())
        x.fill_(1.0)
    told: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(told, began)
    return [end - max(starts) for end, starts in zip(ended, zip(*told, strict=True), strict=True)]


def as_they_are() -> None:
    for thread in threads_of_gloo():
        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def on_a_rank(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    keras_tp.initialize()
    ways = {"as they are": as_they_are, "batch": take_turns}
    table = plain_table("KiB", "threads", "median ms", "average ms", "ratio of averages")
    for kib in options.kib:
        x = torch.ones(kib * 256)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            for name, arrange in ways.items():
                arrange()
                found = seconds_of_sums(x)
                seconds[name] += found if turn else []  # the first warms up
        averages = {name: statistics.mean(values) for name, values in seconds.items()}
        for name, average in averages.items():
            middle, ratio = statistics.median(seconds[name]), average / averages["as they are"]
            table.add_row(
                str(kib), name, f"{1e3 * middle:.2f}", f"{1e3 * average:.2f}", f"{ratio:.2f}"
            )
    if dist.get_rank() == 0:
        title = f"{dist.get_world_size()} ranks, {options.rounds} rounds of {SUMS} sums"
        text = f"{title}\n{render(table)}"
        print(text, flush=True)
        with options.found.open("a") as file:
            file.write(f"{text}\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--kib", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)  # given to the ranks
    options = parser.parse_args()
    if not hasattr(os, "SCHED_BATCH"):
        sys.exit("batch threads are Linux's alone")
    if options.found:
        on_a_rank(options)
        return
    ran = running.what_ran()
    print(ran, flush=True)
    text = "".join(running.found_by_ranks(options.ranks, __file__)).rstrip()
    if options.record:
        print(running.write_record("gloo-threads", "Gloo's threads", ran, text))


if __name__ == "__main__":
    main()
