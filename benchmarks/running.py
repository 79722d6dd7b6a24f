"""What the benchmarks share: starting ranks, and saying what was run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import keras
import torch

HERE = Path(__file__).parent


def start(ranks: int, script: str, *arguments: str) -> None:
    """Runs `script` on `ranks` ranks of this machine; ends the program if one of them fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), script, *arguments]
    if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
        sys.exit(f"failed on {ranks} ranks, see above")


def found_by_ranks(numbers: Iterable[int], script: str) -> list[str]:
    """Runs `script` again on each number of ranks, as this program was; the lines that its ranks
    have written into the file that they are given by `--found`.
    """
    with tempfile.NamedTemporaryFile("r") as found:
        for ranks in numbers:
            start(ranks, script, *sys.argv[1:], "--found", found.name)
        return found.readlines()


def numbers_of_this_machine() -> None:
    """One core a rank. Numbers too small for a full mantissa cost a hundred times as much."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def what_ran() -> str:
    """Commit, versions, machine."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return (
        f"Commit {commit}; Keras {keras.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.release()}, "
        f"{os.cpu_count()} cores."
    )


def write_record(name: str, title: str, ran: str, text: str) -> Path:
    """Writes what a run has printed, and what ran, into `records/` under today's date."""
    today = time.strftime("%Y-%m-%d")
    path = HERE / "records" / f"{today}-{name}.md"
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    path.write_text(f"# {title}, {today}\n\n{ran}\n\n```\n{command}\n```\n\n```\n{text}\n```\n")
    return path
