"""Kills ranks of a small job anywhere, starts it again, and compares with a job that nobody killed.

    python benchmarks/faults.py --trials 60

A job trains with dropout, Adam, shuffled data and a `ShardedCheckpoint` written beside it. Its
ranks tell when a step, a save or a restore begins; one of these is drawn, and so is a moment
within it, at which a rank gets SIGKILL (or all of them do), or SIGSTOP. The others of one that is
killed are ended as `torchrun` ends them; those of one that is stopped must end by themselves, and
say which it was. The job begins anew, until it comes to its end. Then its weights and slots must be
those of the undisturbed job, to the bit, on every rank; and after each death every folder that is
called a checkpoint must be whole. Ranks are forked, for what they import takes longer than they.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
sys.path.insert(0, str(Path(__file__).parent.parent))

import keras_tp  # isort: skip, it picks Keras's backend
import keras
import numpy as np
import torch
import torch.distributed as dist
from running import numbers_of_this_machine, what_ran, write_record

from keras_tp import checkpoints, savings
from keras_tp.archives import Archive
from keras_tp.manifests import Manifest
from keras_tp.tables import plain_table, render

RANKS, EPOCHS, EVERY = 2, 3, 2
PHASES = ("step", "save", "restore")
FAULTS = (
    "one rank killed",
    "one rank stopped",
    "all ranks killed",
    "one killed, newest file cut off",
)
LIMIT = 300.0  # seconds for one life of a job
PATIENCE = 5.0  # that ranks wait for one that does not come


def work(rank: int, folder: Path, life: int, tell: Callable[[str], None]) -> None:
    """What a rank does, from its beginning or from the newest checkpoint."""
    numbers_of_this_machine()
    os.environ["KERAS_TP_TIMEOUT"] = str(PATIENCE)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{life}", rank=rank, world_size=RANKS
    )
    keras.utils.set_random_seed(1)  # a job that has saved nothing yet begins anew
    layers = [keras.layers.Dense(64, "relu"), keras.layers.Dropout(0.3), keras.layers.Dense(16)]
    model = keras.Sequential([keras.Input((32,)), *layers])
    layout_map = keras.distribution.LayoutMap(keras_tp.device_mesh({"model": RANKS}))
    layout_map[".*dense/kernel"] = (None, "model")
    layout_map[".*dense_1/kernel"] = ("model", None)
    keras_tp.parallelize(model, layout_map)
    model.compile("adam", "mse", metrics=["mae"])
    _announce(tell)
    data = np.random.default_rng(0)
    x, y = data.standard_normal((44, 32)), data.standard_normal((44, 16))
    model.fit(
        x,
        y,
        batch_size=8,
        epochs=EPOCHS,
        verbose=0,
        callbacks=[
            keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: tell("step")),
            keras_tp.callbacks.ShardedCheckpoint(
                folder / "run", every=EVERY, unit="steps", fall_back=True
            ),
        ],
    )
    everything = [v.numpy() for v in (*model.variables, *model.optimizer.variables)]
    np.savez(folder / f"end{rank}.npz", *everything)
    dist.barrier()
    tell("end")


def _announce(tell: Callable[[str], None]) -> None:
    def told(original: Any, phase: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tell(phase)
            try:
                return original(*args, **kwargs)
            finally:
                tell(f"after {phase}")

        return call

    savings.Work.write = told(savings.Work.write, "save")  # type: ignore[method-assign]
    checkpoints.Contents = told(checkpoints.Contents, "prepare")  # type: ignore[misc]
    from keras_tp import resumption

    resumption.load = told(resumption.load, "restore")


class Life:
    """The ranks of a job, from a start to its end or to their death."""

    def __init__(self, folder: Path, number: int):
        self.pids, self.pipes = [], []
        for rank in range(RANKS):
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                _live(rank, folder, number, writing)
            os.close(writing)
            self.pids.append(pid)
            self.pipes.append(reading)
        self.heard: list[list[tuple[float, str]]] = [[] for _ in range(RANKS)]

    def listen(self, until: Callable[[], bool]) -> None:
        """Hears what the ranks tell, until then, or until all are silent."""
        open_pipes, end = list(self.pipes), time.monotonic() + LIMIT
        while open_pipes and not until():
            if time.monotonic() > end:
                for pid in self.pids:
                    os.kill(pid, signal.SIGKILL)
                raise RuntimeError(f"a job hung for {LIMIT} s; it told {self.heard}")
            for pipe in select.select(open_pipes, [], [], 0.5)[0]:
                content = os.read(pipe, 4096).decode()
                if not content:
                    open_pipes.remove(pipe)
                words = content.splitlines()
                self.heard[self.pipes.index(pipe)] += [(time.monotonic(), word) for word in words]

    def times(self, rank: int, phase: str) -> int:
        """How often a rank has told of a phase."""
        return sum(word == phase for _, word in self.heard[rank])

    def end(self, signals: list[int]) -> list[int]:
        """Sends each rank its signal, if it is there still; gives how they ended."""
        for pid, number in zip(self.pids, signals, strict=True):
            if number:
                os.kill(pid, number)
        return self.wait()

    def wait(self) -> list[int]:
        """How each rank ended."""
        statuses = [os.waitpid(pid, 0)[1] for pid in self.pids]
        for pipe in self.pipes:
            os.close(pipe)
        return statuses


def _live(rank: int, folder: Path, number: int, writing: int) -> None:
    status = 1
    try:
        log = os.open(folder / f"log{number}.{rank}", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work(rank, folder, number, lambda word: os.write(writing, f"{word}\n".encode()) and None)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def undisturbed(folder: Path) -> dict[str, float]:
    """Runs a job that nobody kills; gives how long its phases take."""
    folder.mkdir()
    life = Life(folder, 0)
    life.listen(lambda: False)
    if any(life.wait()):
        sys.exit("the undisturbed job failed:\n" + _logs(folder))
    lasting: dict[str, list[float]] = collections.defaultdict(list)
    begun: dict[str, float] = {}
    for when, word in life.heard[0]:
        if word == "step" and "step" in begun:
            lasting["step"].append(when - begun["step"])
        if word.startswith("after ") and word[6:] in begun:
            lasting[word[6:]].append(when - begun[word[6:]])
        begun[word] = when
    return {phase: float(np.median(times)) for phase, times in lasting.items()}


def trial(
    folder: Path, fault: str, phase: str, lasting: dict[str, float], draw: random.Random
) -> tuple[float, int, bool]:
    """One job that is killed; how far its end is off, how often it died, and whether it resumed."""
    folder.mkdir()
    deaths = ["step", phase] if phase == "restore" else [phase]
    resumed, spoilt, died = False, None, 0
    for number in range(10):
        life = Life(folder, number)
        if number < len(deaths):
            # So late, if one is to be restored, that there is a checkpoint.
            _kill(life, deaths[number], fault, lasting, draw, 10 if len(deaths) > 1 else 1)
        life.listen(lambda: False)
        statuses = life.wait()
        resumed |= life.times(0, "restore") > 0
        died += any(os.WIFSIGNALED(s) and os.WTERMSIG(s) == signal.SIGKILL for s in statuses)
        _check_checkpoints(folder / "run", spoilt)
        if "stopped" in fault and number + 1 == len(deaths):
            _check_told(folder, number, statuses)
        if not any(statuses):
            return _distance(folder), died, resumed
        if number >= len(deaths):
            raise RuntimeError("a job failed that nobody killed:\n" + _logs(folder))
        if "cut off" in fault and number + 1 == len(deaths):
            spoilt = _cut_off_newest(folder / "run")
    raise RuntimeError("a job does not come to its end")


def _kill(
    life: Life, phase: str, fault: str, lasting: dict[str, float], draw: random.Random, first: int
) -> None:
    victim, steps = draw.randrange(RANKS), 6 * EPOCHS
    number = {
        "step": draw.randint(first, steps),
        "save": draw.randint(1, steps // EVERY),
        "restore": 1,
    }
    life.listen(lambda: life.times(victim, phase) >= number[phase])
    time.sleep(draw.uniform(0, lasting.get(phase, lasting["save"])))
    if "stopped" in fault:
        os.kill(life.pids[victim], signal.SIGSTOP)
        life.listen(lambda: _ended(life, victim))
        os.kill(life.pids[victim], signal.SIGKILL)
        return
    everyone = fault.startswith("all")
    for rank, pid in enumerate(life.pids):
        if everyone or rank == victim:
            os.kill(pid, signal.SIGKILL)
    if not everyone:  # as torchrun does, once it has looked
        time.sleep(draw.uniform(0, 0.1))
        for rank, pid in enumerate(life.pids):
            if rank != victim:
                os.kill(pid, signal.SIGTERM)


def _check_told(folder: Path, number: int, statuses: list[int]) -> None:
    told = "".join((folder / f"log{number}.{rank}").read_text() for rank in range(RANKS))
    ended = any(os.WIFEXITED(status) and os.WEXITSTATUS(status) for status in statuses)
    if ended and "gives no sign of life: stopped" not in told:
        raise RuntimeError("nobody said which rank was stopped:\n" + _logs(folder))


def _ended(life: Life, victim: int) -> bool:
    """Whether all but the one that is stopped have."""
    others = [pid for rank, pid in enumerate(life.pids) if rank != victim]
    return all(os.waitid(os.P_PID, p, os.WEXITED | os.WNOHANG | os.WNOWAIT) for p in others)


def _check_checkpoints(directory: Path, spoilt: int | None) -> None:
    archive = Archive(directory)
    for step in archive.steps():
        if step == spoilt:
            continue
        damages = list(archive.damages(Manifest.from_json(archive.read(step))))
        if damages:
            raise RuntimeError(f"half a checkpoint: {damages}")


def _cut_off_newest(directory: Path) -> int | None:
    steps = Archive(directory).steps()
    if len(steps) < 2:  # without another to fall back to, that is an error
        return None
    file = next(Archive(directory).folder(steps[0]).glob("*.distcp"))
    os.truncate(file, file.stat().st_size // 2)
    return steps[0]


def _distance(folder: Path) -> float:
    gaps = []
    for rank in range(RANKS):
        one = np.load(folder.parent / "undisturbed" / f"end{rank}.npz")
        many = np.load(folder / f"end{rank}.npz")
        for name in one.files:
            gaps.append(float(np.abs(one[name].astype("f8") - many[name].astype("f8")).max()))
    return max(gaps)


def _logs(folder: Path) -> str:
    return "\n".join(f"{p.name}:\n{p.read_text()[-3000:]}" for p in sorted(folder.glob("log*")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=9, help="in all, shared out over the faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write a dated record")
    options = parser.parse_args()
    ran, draw = what_ran(), random.Random(options.seed)
    cases = [(fault, phase) for fault in FAULTS for phase in PHASES]
    found: dict[tuple[str, str], list[tuple[float, int, bool]]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        lasting = undisturbed(folder / "undisturbed")
        for number in range(options.trials):
            fault, phase = cases[number % len(cases)]
            where = folder / f"trial{number}"
            found[fault, phase].append(trial(where, fault, phase, lasting, draw))
            shutil.rmtree(where)
    table = plain_table(
        "fault", "during", "trials", "deaths", "resumed", "equal to the bit", "difference"
    )
    for (fault, phase), outcomes in found.items():
        equal = sum(gap == 0.0 for gap, _, _ in outcomes)
        table.add_row(
            fault,
            phase,
            str(len(outcomes)),
            str(sum(died for _, died, _ in outcomes)),
            str(sum(resumed for _, _, resumed in outcomes)),
            str(equal),
            f"{max(gap for gap, _, _ in outcomes):.1e}",
        )
    took = ", ".join(f"{phase} {1000 * seconds:.0f} ms" for phase, seconds in lasting.items())
    failed = sum(gap > 0.0 for outcomes in found.values() for gap, _, _ in outcomes)
    text = render(table) + (
        f"\n\n{RANKS} ranks, {6 * EPOCHS} steps, a checkpoint every {EVERY}; undisturbed: {took}."
        f"\n{options.trials - failed} of {options.trials} trials end with the weights and slots of "
        "the undisturbed job, on every rank."
    )
    print(f"{ran}\n\n{text}")
    if options.record:
        write_record("faults", "Ranks killed anywhere", ran, text)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
