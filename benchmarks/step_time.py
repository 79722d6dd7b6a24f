"""How long a training step takes: keras_tp beside hand-written Megatron layers, and others.

    python benchmarks/step_time.py [--sizes small medium large] [--rounds 15] [--steps 5]
        [--only NAME ...] [--head whole|columns] [--nightly FOLDER] [--jax FOLDER] [--no-jax]
        [--cores 0 1] [--even] [--print-only]

One pre-LN transformer encoder (`encoder.py`), float32, Adam, on CPUs, by 2 ranks of a thread each:

    torch, by hand             Megatron's layers (`megatron.py`); all else is measured by it
    ... overlapped             the same, communicating while weight gradients are computed
    torch, parallelize_module  torch's own, on DTensors (`dtensors.py`)
    keras_tp                   eager, and with `jit_compile=True`
    Keras nightly              ModelParallel as Keras brings it for torch after 3.15, if --nightly
                               says where it is: pip install --no-deps --target FOLDER keras-nightly
    Keras on JAX               ModelParallel, compiled, one process of 2 virtual devices; --jax
                               says where JAX is, if not in this environment
    Keras                      plain, one process of 1 and of 2 threads; and keras_tp on one rank

Each has processes of its own that sleep while others run (`contestants.py`), all on the same two
cores. (Where cores have hyper-threads, --cores should name two of different cores.) They take
turns: in a round each trains for a few steps, in another order than in the round before. A time
is that of the slowest rank; ratios are of times of the same round, and what is printed are
medians and quartiles over rounds. What is timed of Keras is `model.train_function`, the step
inside of `fit` (`keras_encoder.py`). keras_tp compares its 1st, 2nd, 4th, 8th, ... batch over the
ranks, and does so here as well.

By default the head is whole on every rank, by hand as well, so that nothing is summed but what
blocks sum. --head columns cuts it by classes, everywhere, and by hand the loss, too.

keras_tp multiplies by oneDNN where MKL is slow (`keras_tp.matrices`), and has gloo's threads take
turns (`keras_tp.threads`). Layers by hand would gain by both. --even leaves all products to MKL,
and gives the turns to all that are torch's: what is left is the parallelism.

Before, each trains for 3 steps at a usual rate, from the same weights on the same batch, and
must find the same losses to 1e-4. While it is timed the rate is next to nothing: the
batch does not change, and once it is learned gradients are too small for a full mantissa, which
costs ten times as much.

Memory is the peak of resident memory (VmHWM) since the warm-up, of the fullest rank; beside it,
what is there once packages are imported. Collectives are counted over one step, forward and
backward, with the bytes that a rank gives to them (`traffic.py`); JAX's in the program that XLA
has compiled (`hlo.py`).

The exit status is 1 if a bar (`bars.py`) is missed, or losses differ. What cannot run is left out
and says why. A record and a picture are written by a run of all sizes and contestants.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import keras_tp  # noqa: F401, before keras: picks the torch backend

# isort: split
import numpy as np
import running
from bars import OURS, Result, bars, spread
from contestants import CONTESTANTS, EVEN, SECONDS_TO_BEGIN, Failed, Job, why_not
from encoder import SIZES, Size

from keras_tp.tables import plain_table, render, size_text

STEPS_COMPARED, RATE = 3, 1e-3
TINY_RATE = 1e-7
WARM_UP = 3
ALLOWED = 1e-4  # difference of losses


class Contest:
    """The contestants of one size, alive.

    Args:
        options: of the program.
        size: of the model.
        names: of the contestants to start.

    Attributes:
        out: why contestants are not, or no longer, among them.
        begun: versions and memory of each, before its first step.
        losses: each one's first, those of its first rank.
    """

    def __init__(self, options: argparse.Namespace, size: Size, names: list[str]):
        self.jobs: dict[str, Job] = {}
        self.out: dict[str, str] = {}
        self.begun: dict[str, list[Any]] = {}
        self.losses: dict[str, list[float]] = {}
        folders = {"nightly": options.nightly, "jax": options.jax}
        for name in names:
            folder = folders.get(name)
            reason = why_not(name, folder)
            if name == "jax" and options.no_jax:
                reason = "skipped: --no-jax"
            if reason is not None:
                self.out[name] = reason
                continue
            self.jobs[name] = Job(name, size, folder)
            begun = self.ask(name, "begin", seconds=SECONDS_TO_BEGIN)
            losses = self.ask(name, "losses", STEPS_COMPARED, RATE, seconds=SECONDS_TO_BEGIN)
            self.ask(name, "warm_up", WARM_UP, TINY_RATE, seconds=SECONDS_TO_BEGIN)
            if name in self.jobs:
                self.begun[name], self.losses[name] = begun, losses[0]

    def ask(self, name: str, *question: Any, **how: Any) -> list[Any]:
        """The ranks' answers; of one that fails, or has failed, there are none."""
        if name not in self.jobs:
            return []
        try:
            return self.jobs[name].ask(*question, **how)
        except Failed as error:
            self.out[name] = str(error)
            self.jobs.pop(name).end()
            return []

    def times(self, rounds: int, steps: int) -> dict[str, list[float]]:
        """Seconds a step, of the slowest rank, a number for each round."""
        seconds: dict[str, list[float]] = {name: [] for name in self.jobs}
        order = list(self.jobs)
        for turn in range(rounds):
            first = turn % max(1, len(order))
            for name in order[first:] + order[:first]:
                if answers := self.ask(name, "run", steps):
                    seconds[name].append(max(answers))
        return seconds

    def result(self, name: str, seconds: list[float]) -> Result | None:
        peaks, traffic = self.ask(name, "peak"), self.ask(name, "traffic")
        if not traffic:
            return None
        imports = [told["imports"] for told in self.begun[name]]
        return Result(seconds, max(peaks), max(imports), traffic[0])

    def wrong(self) -> dict[str, float]:
        """How far losses are from those of the first contestant, where that is too far."""
        first = next(iter(self.losses.values()), [])
        gaps = {
            name: float(np.abs(np.subtract(losses, first)).max())  # nan if one is
            for name, losses in self.losses.items()
        }
        return {name: gap for name, gap in gaps.items() if not gap <= ALLOWED}

    def end(self) -> None:
        for job in self.jobs.values():
            job.end()


def quartiles(values: list[float], digits: int) -> tuple[str, str]:
    """Median and quartiles, as text."""
    low, middle, high = spread(values)
    return f"{middle:.{digits}f}", f"{low:.{digits}f} .. {high:.{digits}f}"


def table_of(results: dict[str, Result]) -> str:
    table = plain_table(
        *("contestant", "ms", "quartiles", "/ by hand", "quartiles"),
        *("peak RSS", "imports", "collectives", "bytes"),
    )
    for name, result in results.items():
        ratio = ("-", "")
        if "hand-written" in results:
            ratio = quartiles(result.ratios(results["hand-written"]), 2)
        table.add_row(
            CONTESTANTS[name].title,
            *quartiles([1e3 * seconds for seconds in result.seconds], 1),
            *ratio,
            size_text(result.peak),
            size_text(result.imports),
            *traffic_text(result.traffic),
        )
    return render(table)


def traffic_text(traffic: list[tuple[str, int]]) -> tuple[str, str]:
    kinds = Counter(kind for kind, _ in traffic)
    text = " + ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return text or "none", size_text(sum(count for _, count in traffic))


def lost_to_one_process(results: dict[str, Result]) -> list[str]:
    """A line for each way of one process that is faster than keras_tp on two ranks."""
    there = [results[name] for name in OURS if name in results]
    lines = []
    for name in ("keras", "keras-2-threads"):
        if there and name in results:
            ratio = statistics.median(min(there, key=lambda r: r.median).ratios(results[name]))
            if ratio > 1:
                lines.append(f"loses to one process: {ratio:.2f} x {CONTESTANTS[name].title}")
    return lines


def measure(options: argparse.Namespace, title: str, size: Size) -> Any:
    """What is printed of one size, what was measured, and what is wrong."""
    names = [name for name in CONTESTANTS if not options.only or name in options.only]
    contest = Contest(options, size, names)
    try:
        seconds = contest.times(options.rounds, options.steps)
        found = {name: contest.result(name, seconds[name]) for name in list(contest.jobs)}
    finally:
        contest.end()
    results = {name: result for name, result in found.items() if result is not None}
    lines = [
        f"{title}: width {size.width}, hidden {size.hidden}, {size.heads} heads, {size.tokens} "
        f"tokens, {size.rows} rows, {size.blocks} blocks, head {size.head_layout}; an activation "
        f"is {size_text(size.one_activation)}; {options.rounds} rounds of {options.steps} steps",
        table_of(results),
    ]
    lines += [f"{CONTESTANTS[name].title}: {why}" for name, why in contest.out.items()]
    lines += lost_to_one_process(results)
    differ = [f"{CONTESTANTS[name].title} by {gap:.1e}" for name, gap in contest.wrong().items()]
    if contest.losses:
        values = ", ".join(f"{loss:.5f}" for loss in next(iter(contest.losses.values())))
        same = "the same for all" if not differ else f"not so: {', '.join(differ)}"
        lines.append(f"losses of the first steps: {values}, {same}")
    versions = {told[0]["versions"] for told in contest.begun.values()}
    return "\n".join(lines), results, versions, [f"losses differ, {title}"] if differ else []


def bars_of(results: dict[str, dict[str, Result]]) -> tuple[str, list[str]]:
    """The table of bars, and those that are missed. By size and contestant."""
    table = plain_table("size", "who", "beside", "bar", "measured", "met")
    missed = []
    for title, of_size in results.items():
        for bar in bars(title):
            found = bar.measured(of_size)
            who, ratio = found or (bar.ours[0], None)
            said = "-" if ratio is None else "yes" if bar.met(ratio) else "NO"
            names = CONTESTANTS[who].title, CONTESTANTS[bar.other].title
            table.add_row(title, *names, str(bar), "-" if ratio is None else f"{ratio:.3f}", said)
            if said == "NO":
                missed.append(f"{names[1]} at {title}")
    return render(table), missed


def size_of(name: str) -> tuple[str, Size]:
    """By name, or as `width,hidden,heads,tokens,rows,blocks`."""
    return name, SIZES[name] if name in SIZES else Size(*map(int, name.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", type=size_of, help="small medium large, or numbers: 64,256,2,16,4,2"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="of each contestant in a round")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS)
    parser.add_argument("--head", choices=["whole", "columns"], default="whole")
    parser.add_argument("--nightly", type=Path, help="the folder of keras-nightly")
    parser.add_argument("--jax", type=Path, help="the folder of JAX, if not in this environment")
    parser.add_argument("--no-jax", action="store_true")
    parser.add_argument("--cores", type=int, nargs=2, help="their numbers; else the first two")
    parser.add_argument("--even", action="store_true", help="libraries and threads alike for all")
    parser.add_argument("--print-only", action="store_true", help="no picture, no record")
    options = parser.parse_args()
    whole_run = not (options.sizes or options.only or options.print_only or options.even)
    if options.even:
        os.environ[EVEN] = "1"
    if whole_run:
        from step_time_picture import draw  # now, as it needs matplotlib, which not everyone has
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, options.cores or sorted(os.sched_getaffinity(0))[:2])
    ran = running.what_ran()
    print(ran, flush=True)
    texts, results, versions, wrong = [], {}, set(), []
    for title, size in options.sizes or SIZES.items():
        size = Size(**{**vars(size), "head_layout": options.head})
        text, results[title], used, problems = measure(options, title, size)
        print(f"\n{text}", flush=True)
        texts.append(text)
        versions |= used
        wrong += problems
    text, missed = bars_of(results)
    texts += [text, f"versions: {'; '.join(sorted(versions))}"]
    print("", *texts[-2:], sep="\n")
    if whole_run:
        picture = running.HERE / "step_time.png"
        draw(picture, results)
        written = running.write_record(
            "step-time", "Time of a training step", ran, "\n\n".join(texts)
        )
        print(f"\n{written}\n{picture}")
    if wrong or missed:
        sys.exit("; ".join(wrong + [f"bar missed: {name}" for name in missed]))


if __name__ == "__main__":
    main()
