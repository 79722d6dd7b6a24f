"""Real ranks for tests: processes that join one gloo group and then run what they are sent.

Starting a rank costs seconds of imports, so a pool lives for the whole test
run. A function is sent by reference with its arguments, runs on every rank,
and gives a result per rank. When a rank raises, or time runs out, the test
fails with every rank's traceback and the pool starts anew.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START_TIMEOUT = 120.0
# Of Keras's own variables; ours take the keyword.
KERAS_ARRAY_WARNING = "__array__ implementation doesn't accept a copy keyword"
GRACE = 5.0  # for the other ranks, once one has raised


class RankError(AssertionError):
    """A rank raised or hung; the message holds the tracebacks."""


class RankPool:
    """`size` ranks; `pool(function, *args)` gives the list of their results."""

    def __init__(self, size: int):
        self.size = size
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []

    def __call__(
        self, function: Callable[..., Any], *args: Any, timeout: float = 90.0
    ) -> list[Any]:
        if not self.connections:
            self._start()
        task = (function.__module__, function.__qualname__, args)
        for connection in self.connections:
            connection.send(task)
        answers: dict[int, tuple[str, Any]] = {}
        end = time.monotonic() + timeout
        while len(answers) < self.size and time.monotonic() < end:
            pending = [c for r, c in enumerate(self.connections) if r not in answers]
            for connection in wait(pending, timeout=max(0.0, end - time.monotonic())):
                rank = self.connections.index(connection)  # type: ignore[arg-type]
                try:
                    answers[rank] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = ("error", f"rank {rank} died\n{self._log(rank)}")
                if answers[rank][0] == "error":
                    end = min(end, time.monotonic() + GRACE)
        if len(answers) == self.size and all(kind == "result" for kind, _ in answers.values()):
            return [answers[rank][1] for rank in range(self.size)]
        raise self._failure(function, answers, timeout)

    def _failure(
        self, function: Callable[..., Any], answers: dict[int, tuple[str, Any]], timeout: float
    ) -> RankError:
        parts = [f"{function.__qualname__} failed on {self.size} ranks"]
        for rank, process in enumerate(self.processes):
            if rank not in answers:
                process.send_signal(signal.SIGUSR1)  # faulthandler writes where it hangs
                time.sleep(0.3)
                parts.append(f"--- rank {rank} gave no answer in {timeout} s\n{self._log(rank)}")
            elif answers[rank][0] == "error":
                parts.append(f"--- rank {rank} raised\n{answers[rank][1]}")
        self.close()
        return RankError("\n".join(parts))

    def _start(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        folder = Path(self.folder.name)
        address = str(folder / "socket")
        with Listener(address, family="AF_UNIX", backlog=self.size) as listener:
            for rank in range(self.size):
                environment = {
                    **os.environ,
                    "KERAS_BACKEND": "torch",
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": "lo",
                    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
                }
                log = open(folder / f"log{rank}", "wb")  # noqa: SIM115, the process keeps it
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, str(rank), str(self.size), address],
                        env=environment,
                        stdout=log,
                        stderr=log,
                    )
                )
                log.close()
            by_rank = {}
            listener._listener._socket.settimeout(START_TIMEOUT)  # type: ignore[attr-defined]
            while len(by_rank) < self.size:
                connection = listener.accept()
                by_rank[connection.recv()] = connection
        self.connections = [by_rank[rank] for rank in range(self.size)]
        for rank, connection in enumerate(self.connections):
            if not connection.poll(START_TIMEOUT) or connection.recv() != "ready":
                log = self._log(rank)
                self.close()
                raise RankError(f"rank {rank} did not start\n{log}")

    def _log(self, rank: int) -> str:
        return (Path(self.folder.name) / f"log{rank}").read_text(errors="replace")[-6000:]

    def close(self) -> None:
        """Ends the ranks; the next call starts others."""
        for process in self.processes:
            process.kill()
            process.wait()
        for connection in self.connections:
            connection.close()
        self.processes, self.connections = [], []
        if hasattr(self, "folder"):
            self.folder.cleanup()


def _serve(rank: int, size: int, address: str) -> None:
    faulthandler.register(signal.SIGUSR1)
    connection = Client(address, family="AF_UNIX")
    connection.send(rank)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{address}.group", rank=rank, world_size=size
    )
    import keras

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=KERAS_ARRAY_WARNING)
    connection.send("ready")
    while True:
        try:
            module, name, args = connection.recv()
        except EOFError:
            os._exit(0)  # the parent is gone
        try:
            keras.utils.clear_session(free_memory=False)  # see `conftest.clean_keras`
            keras.config.set_floatx("float32")
            function = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            answer: tuple[str, Any] = ("result", function(*args))  # type: ignore[operator]
        except BaseException:
            answer = ("error", traceback.format_exc())
        connection.send(answer)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
