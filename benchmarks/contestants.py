"""Who competes in `step_time.py`, and the processes they live in.

Each contestant has processes of its own, one for each rank, that stay alive and do nothing until
they are told to. So only one of them runs at a time, and its memory is its own.

    python benchmarks/contestants.py NAME SIZE    # with RANK, WORLD_SIZE, ... of torchrun

Such a process reads questions from its standard input, a line of JSON each, and answers with
a line: {"answer": ...}, or {"error": ...} and the end. It exits with the end of its input.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from encoder import Size

# For the first answer, which may have much to compile, and for each after it.
SECONDS_TO_BEGIN, SECONDS = 900, 300


@dataclass(frozen=True)
class Contestant:
    """One way to train the encoder.

    Attributes:
        title: what tables call it.
        ranks, threads: processes, and threads of each.
        package: one that is not in everyone's environment and can be given by its folder.
        environment: what its processes need besides.
    """

    title: str
    ranks: int = 2
    threads: int = 1
    package: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


_JAX = (
    ("KERAS_BACKEND", "jax"),
    ("JAX_PLATFORMS", "cpu"),
    ("XLA_FLAGS", "--xla_force_host_platform_device_count=2"),
)
CONTESTANTS = {
    "hand-written": Contestant("torch, by hand"),
    "overlapped": Contestant("torch, by hand, overlapped"),
    "parallelize_module": Contestant("torch, parallelize_module"),
    "keras_tp": Contestant("keras_tp"),
    "keras_tp-compiled": Contestant("keras_tp, compiled"),
    "nightly": Contestant("Keras nightly, ModelParallel", package="keras"),
    "jax": Contestant("Keras on JAX, compiled", 1, 2, package="jax", environment=_JAX),
    "keras": Contestant("Keras, 1 process", 1),
    "keras-2-threads": Contestant("Keras, 1 process, 2 threads", 1, 2),
    "keras_tp-1-rank": Contestant("keras_tp, 1 rank", 1),
}


class Failed(Exception):  # noqa: N818
    """A contestant that cannot go on; says why, in a line."""


class Job:
    """The processes of one contestant.

    Args:
        name: of CONTESTANTS.
        size: of the model.
        folder: of the contestant's package, or None for that of this environment.
    """

    def __init__(self, name: str, size: Size, folder: Path | None):
        self.contestant = CONTESTANTS[name]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115, `end` closes it
        shared = {**os.environ, **dict(self.contestant.environment)}
        shared.setdefault("KERAS_BACKEND", "torch")
        shared["OMP_NUM_THREADS"] = str(self.contestant.threads)
        if folder is not None:
            others = shared.get("PYTHONPATH")
            shared["PYTHONPATH"] = os.pathsep.join([str(folder), *([others] if others else [])])
        if self.contestant.ranks > 1 or name.startswith("keras_tp"):
            shared |= {"WORLD_SIZE": str(self.contestant.ranks), "MASTER_ADDR": "127.0.0.1"}
            shared["MASTER_PORT"] = str(free_port())
        self.processes = []
        for rank in range(self.contestant.ranks):
            command = [sys.executable, __file__, name, json.dumps(asdict(size))]
            mine = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if "WORLD_SIZE" in shared else {}
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=shared | mine,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.log,
                    text=True,
                    bufsize=1,
                )
            )

    def ask(self, question: str, *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        """Each rank's answer."""
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):  # what it died of is read below
                process.stdin.write(json.dumps([question, *arguments]) + "\n")
                process.stdin.flush()
        end, answers = time.monotonic() + seconds, []
        for process in self.processes:
            ready, _, _ = select.select([process.stdout], [], [], max(0, end - time.monotonic()))
            if not ready:
                raise Failed(f"no answer to {question!r} within {seconds} seconds")
            line = process.stdout.readline()
            told = json.loads(line) if line else {"error": self.last_words()}
            if "error" in told:
                raise Failed(told["error"])
            answers.append(told["answer"])
        return answers

    def last_words(self) -> str:
        """What a process that died has said last."""
        self.log.seek(0)
        lines = [line for line in self.log.read().splitlines() if line.strip()]
        return lines[-1] if lines else "it died in silence"

    def end(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        self.log.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def why_not(name: str, folder: Path | None) -> str | None:
    """Why a contestant cannot be asked at all, or None."""
    if name == "nightly" and folder is None:
        return "skipped: say where keras-nightly is, --nightly FOLDER"
    if name == "jax" and folder is None and importlib.util.find_spec("jax") is None:
        return "skipped: JAX is not installed here; say where it is, --jax FOLDER"
    if folder is not None and not (folder / (CONTESTANTS[name].package or "")).is_dir():
        return f"skipped: no {CONTESTANTS[name].package} in {folder}"
    return None


# In the environment of contestants that use torch's libraries and gloo's threads alike.
EVEN = "STEP_TIME_EVEN"

# What follows runs in the contestants' processes.


class Answers:
    """What a contestant's process can be asked; the methods are the questions."""

    def __init__(self, name: str, size: Size):
        self.name, self.size = name, size
        self.training: Any = None

    def begin(self) -> dict[str, Any]:
        """Makes the model; tells versions and the memory that imports took."""
        make, versions = make_of(self.name)
        before = resident("VmRSS")
        self.training = make(self.size)
        return {"versions": versions, "imports": before}

    def losses(self, steps: int, rate: float) -> list[float]:
        """Those of the next steps."""
        self.training.set_rate(rate)
        return [self.training.loss() for _ in range(steps)]

    def warm_up(self, steps: int, rate: float) -> None:
        """From here on the peak of memory is that of steps like those that are timed."""
        self.training.set_rate(rate)
        self.training.run(steps)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def run(self, steps: int) -> float:
        """Seconds a step."""
        meet()
        start = time.perf_counter()
        self.training.run(steps)
        return (time.perf_counter() - start) / steps

    def peak(self) -> int:
        return resident("VmHWM")

    def traffic(self) -> list[tuple[str, int]]:
        """Kind and bytes of every collective of one step."""
        if self.name == "jax":
            from hlo import collectives_in

            return collectives_in(self.training.compiled_step(), 2)
        from traffic import collectives

        # The rarer step, in which keras_tp compares its batch over the ranks, has one more.
        return min((collectives(lambda: self.training.run(1)) for _ in range(2)), key=len)


def make_of(name: str) -> tuple[Callable[[Size], Any], str]:
    """What makes the training, and the versions it uses."""
    if name == "jax":
        import jax
        import keras
        import keras_encoder

        versions = f"Keras {keras.__version__}, JAX {jax.__version__}"
        return lambda s: keras_encoder.model_parallel(s, keras_encoder.JaxTraining), versions
    import torch
    import torch.distributed as dist

    threads = CONTESTANTS[name].threads
    torch.set_num_threads(threads)
    if EVEN in os.environ:
        torch.backends.mkldnn.set_flags(False)
    torch.set_flush_denormal(True)
    versions = f"torch {torch.__version__}"
    if name in ("hand-written", "overlapped", "parallelize_module"):
        dist.init_process_group("gloo")
        import dtensors
        import megatron

        if EVEN in os.environ:
            from keras_tp.threads import take_turns

            dist.barrier()
            take_turns()
        if name == "parallelize_module":
            return dtensors.parallelized, versions
        return lambda s: megatron.hand_written(s, name == "overlapped"), versions
    if name.startswith("keras_tp"):
        import keras_tp

        keras_tp.initialize()
    import keras
    import keras_encoder

    versions = f"Keras {keras.__version__}, {versions}"
    if name == "nightly":
        keras.distribution.initialize()
        return lambda s: keras_encoder.model_parallel(s, keras_encoder.NightlyTraining), versions
    if name.startswith("keras_tp"):
        return lambda s: keras_encoder.by_keras_tp(s, name.endswith("compiled")), versions
    return keras_encoder.plain, versions


def meet() -> None:
    """Ranks begin to count together."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.barrier()


def resident(name: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(name)]
    return int(line.split()[1]) * 1024


def questions() -> Iterator[Any]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    # Libraries print; the answers have the standard output to themselves.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        answers = Answers(sys.argv[1], Size(**json.loads(sys.argv[2])))
        for question, *arguments in questions():
            try:
                told = {"answer": getattr(answers, question)(*arguments)}
            except Exception as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                told = {"error": f"{type(error).__name__}: {' '.join(lines)[:600]}"}
            print(json.dumps(told), file=out, flush=True)
            if "error" in told:
                os._exit(1)  # other ranks may wait for this one, and torch for them


if __name__ == "__main__":
    main()
