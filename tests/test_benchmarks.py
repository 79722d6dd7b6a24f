"""The benchmarks that look at training, on two ranks, small and short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, "--ranks", "2", "--print-only", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_parity_draws_runs_that_are_equal_and_are_runs() -> None:
    """A picture of curves on top of each other shows nothing if they are the same run.

    Nor if nothing is trained. Float64, as rounding alone may be zero over three steps.
    """
    printed = run("parity.py", "--steps", "3", "--dropout", "0.1", "--float64")
    found = re.findall(r"(1, nudged|model=2|batch=2) +([\d.]+) +([\d.]+) +([\d.e+-]+) ", printed)
    assert [mesh for mesh, *_ in found] == 2 * ["1, nudged", "model=2", "batch=2"], printed
    for number, (_, first, last, difference) in enumerate(found):
        assert float(last) < float(first) - 0.01
        assert 0 < float(difference) < (1e-5 if number < 3 else 1e-13), printed


def test_memory_sees_shards_and_growth() -> None:
    """A measure that counted full weights, or nothing, would print as calmly.

    Seen to fail with a callback that keeps the outputs of every step.
    """
    size = ("--tokens", "8", "--width", "32", "--blocks", "1", "--rows", "4")
    printed = run("memory.py", *size)
    assert printed.endswith("every rank keeps exactly what it should, and nothing grows\n")
    tables = printed.split("largest / should")[1:]
    assert len(tables) == 3
    rows = [re.search(r"^parameters +(.*?)  +(.*?)  +(.*?)  +(.*?)  +1.000$", t, re.M) for t in tables]
    one, should, *ranks = rows[0].groups()
    assert should == ranks[0] == ranks[1] != one
