"""The example for `keras.distribution`, in jobs that are started in every way there is.

It compares with one process by itself, and its exit status says what it found.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ("-m", "keras_tp.examples.distribution_api")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
# Who a process is must be said by the test, not by what the tests were started in.
SAID = re.compile(r"KERAS_BACKEND|KERAS_DISTRIBUTION_.*|(LOCAL_)?RANK|WORLD_SIZE|MASTER_.*")


def run(
    folder: Path, *jobs: tuple[tuple[str, ...], dict[str, str]], timeout: float = 240
) -> list[str]:
    """Runs commands side by side, each with its environment; what each printed.

    Fails unless all of them end with 0 in time. None is left running: torchrun is
    asked to end first, for only it knows its ranks.
    """
    kept = {name: value for name, value in os.environ.items() if not SAID.fullmatch(name)}
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    logs = [folder / f"log{i}" for i in range(len(jobs))]
    end = time.monotonic() + timeout
    try:
        for log, (command, environment) in zip(logs, jobs, strict=True):
            with log.open("wb") as file:
                processes.append(
                    subprocess.Popen(
                        command,
                        env={**kept, **common, **environment},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        for process in processes:
            process.wait(timeout=max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail(f"no end in {timeout} s\n" + "\n---\n".join(log.read_text() for log in logs))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    printed = [log.read_text() for log in logs]
    assert [process.returncode for process in processes] == [0] * len(jobs), "\n---\n".join(printed)
    return printed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check(printed: str, ranks: int) -> None:
    """The verdict, once, for all the ranks, and that they shared the work."""
    devices = ", ".join(f"cpu:{rank}" for rank in range(ranks))
    verdict = f"losses and weights are equal to float32 rounding on {devices}\n"
    assert printed.count(verdict) == 1, printed
    plan = re.sub(" +", " ", printed)
    assert f"mesh batch={ranks // 2}, model=2: 2 of 10 variables sharded" in plan
    assert "up column kernel (32, 128) (32, 64) up/kernel all_gather output" in plan
    assert f"DataParallel: this process read {500 // ranks} of 500 rows" in printed
    assert f"ModelParallel: this process read {1000 // ranks} of 500 rows" in printed
    assert "predict gives every process all outputs: (500, 8)" in printed


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_script_for_keras_distribution_trains_as_one_process_does(
    tmp_path: Path, ranks: int
) -> None:
    """Replicas that average gradients train another model, ones that read all rows do others' work.

    Seen to fail with gradients divided by the number of replicas ("the runs differ"), and
    with loaders that every replica reads whole (the rows).
    """
    job = (*TORCHRUN, "--standalone", "--nproc-per-node", str(ranks), *EXAMPLE)
    check(run(tmp_path, (job, {}))[0], ranks)


def test_two_hosts_that_torchrun_joins(tmp_path: Path) -> None:
    """Ranks of two hosts have the same LOCAL_RANK: one taken for the rank makes two first ones.

    Seen to fail with a verdict of each host's first rank.
    """
    where = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    here = ("--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1")
    job = (*TORCHRUN, *here, *where, *EXAMPLE)
    check("".join(run(tmp_path, (job, {}), (job, {}))), 2)


def test_two_hosts_that_keras_s_variables_join(tmp_path: Path) -> None:
    """Processes that torchrun did not start must find each other, and leave without it.

    Seen to fail with every process waiting at its own address.
    """
    said = {"KERAS_DISTRIBUTION_NUM_PROCESSES": "2"}
    addresses = f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}"
    said["KERAS_DISTRIBUTION_JOB_ADDRESSES"] = addresses
    jobs = [
        ((sys.executable, *EXAMPLE), {**said, "KERAS_DISTRIBUTION_PROCESS_ID": str(rank)})
        for rank in range(2)
    ]
    first, second = run(tmp_path, *jobs)
    check(first, 2)
    assert "equal" not in second
