"""The benchmarks that look at training, small and short."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from keras_tp.examples.train_transformer import transformer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# Step 8 looks at how rows are treated, which a model as small as this takes more for than to train.
SMALL = argparse.Namespace(tokens=8, width=32, heads=2, blocks=1, rows=8, steps=6)


def memory_benchmark() -> Any:
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    import memory

    return memory


@pytest.mark.slow
def test_parity_compares_runs_that_train() -> None:
    """Curves that lie on top of each other show nothing if they are one run, or of no training.

    In float64, too, where Keras by itself computes in float32.
    """
    command = [sys.executable, BENCHMARKS / "parity.py", "--print-only", "--ranks", "2"]
    command += ["--steps", "4", "--dropout", "0.1", "--float64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    row = r"(1, nudged|model=2|batch=2) +([\d.]+) +([\d.]+) +([-\d.e+]+) "
    found = re.findall(row, done.stdout)
    assert [mesh for mesh, *_ in found] == 2 * ["1, nudged", "model=2", "batch=2"], done.stdout
    for number, (_, first, last, difference) in enumerate(found):
        assert float(last) < float(first) - 0.1
        assert float(difference) < (1e-5 if number < 3 else 1e-13), done.stdout
    assert max(float(difference) for *_, difference in found[3:]) > 0


def memory_of_ranks() -> list[tuple[str, list[str]]]:
    memory = memory_benchmark()
    found = []
    for title, mesh, cut in memory.MESHES[2][::2]:  # all but the one whose weights are whole
        measured = memory.measure(SMALL, mesh, cut)
        found.append(memory.report(title, [measured]))
        should, ranks, plain = measured
        assert ranks.peak > sum(ranks.kept.values()) > 0.99 * sum(should.values())
        assert ranks.kept["Adam slots"] < 0.6 * plain.kept["Adam slots"]
    return found


def test_memory_finds_shards_and_no_growth(ranks: Any) -> None:
    """A rank that keeps full weights, or gradients of them, has nothing to gain from ranks."""
    for found in ranks(2)(memory_of_ranks):
        # (The peak of so small a model is made of its outputs.)
        problems = [p for _, told in found for p in told if not p.endswith(": peak")]
        assert problems == [], "\n".join(t for t, _ in found)
        assert "> weights, gathered" in found[1][0]


def test_memory_finds_growth() -> None:
    """A measure that sees nothing finds no growth, either."""
    model = transformer(SMALL.tokens, SMALL.width, SMALL.heads, SMALL.blocks)
    kept, update = [], model.optimizer.apply

    def apply(*args: Any) -> None:
        kept.append(torch.ones(1000))
        update(*args)

    model.optimizer.apply = apply
    steps = SMALL.steps - memory_benchmark().EARLY
    assert memory_benchmark().train(SMALL, model, 4).growth == steps * 4000


@pytest.mark.slow
def test_step_time_compares_what_computes_the_same() -> None:
    """Two ranks by hand, by torch and by keras_tp: their losses, and what they communicate.

    (How long they take is nothing to go by here, nor is the exit status.)
    """
    command = [sys.executable, BENCHMARKS / "step_time.py", "--sizes", "32,64,2,8,4,2"]
    command += ["--rounds", "1", "--steps", "1", "--print-only"]
    command += ["--only", "hand-written", "parallelize_module", "keras_tp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "the same for all" in done.stdout, done.stdout + done.stderr
    row = r"^(torch, by hand|torch, parallelize_module|keras_tp) +[\d.]+ .* (\d+) all_reduce"
    found = dict(re.findall(row, done.stdout, re.MULTILINE))
    assert set(found) == {"torch, by hand", "torch, parallelize_module", "keras_tp"}, done.stdout
    # Megatron's count: two forward and two backward a block.
    assert int(found["torch, by hand"]) == 8
    assert int(found["keras_tp"]) == 8
    assert re.search(r"keras_tp +torch, by hand +<= 1.1 +[\d.]+ +(yes|NO)", done.stdout)


def test_step_time_finds_other_losses() -> None:
    """A contestant that computes something else has won nothing."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    import step_time

    contest = object.__new__(step_time.Contest)
    contest.losses = {"hand-written": [2.0, 1.0], "keras_tp": [2.0, 1.0], "jax": [2.0, 1.001]}
    assert list(contest.wrong()) == ["jax"]
    contest.losses["keras_tp"] = [2.0, float("nan")]
    assert list(contest.wrong()) == ["keras_tp", "jax"]
