"""Jobs of two ranks in which something goes wrong: run as a program, it tells how each has ended.

    python tests/mishaps.py folder stopped busy ...

Keras is imported once; each rank is a fork of that process, and all jobs go on side by side, as
they mostly wait. Prints JSON: of each mishap, of each rank, the exit status (negative for a signal,
None if it did not end), the seconds it took and what it wrote.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import keras_tp  # noqa: I001, first: it picks torch

import keras
import numpy as np
import torch
import torch.distributed as dist

LIMIT = 8.0  # seconds that the jobs allow a collective
OVER = 70.0  # and that the slowest may take
NEVER_END = {("stopped", 1), ("busy", 1), ("saved_while_busy", 1)}  # by themselves


def trained(callback: Callable[[int], None], sharded: bool = True) -> Any:
    """A model after some steps on two ranks, before each of which `callback(step)` is called."""
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="dense")])
    layout_map = keras.distribution.LayoutMap(keras_tp.device_mesh({"model": 2}))
    layout_map[".*dense/kernel"] = (None, "model") if sharded else (None, None)
    keras_tp.parallelize(model, layout_map)
    model.compile("sgd", "mse")
    told = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda step, logs: callback(step))
    model.fit(np.ones((80, 8)), np.ones((80, 8)), batch_size=8, callbacks=[told], verbose=0)
    return model


def on_rank_1(act: Callable[[], Any]) -> Callable[[int], None]:
    """A callback by which the second rank acts otherwise before the fourth step."""
    return lambda step: act() if step == 3 and dist.get_rank() == 1 else None


def stopped(folder: Path) -> None:
    def stop() -> None:
        time.sleep(3)  # so that others have seen where it is
        os.kill(os.getpid(), signal.SIGSTOP)

    trained(on_rank_1(stop))


def busy(folder: Path) -> None:
    trained(on_rank_1(lambda: time.sleep(1000)))


def late(folder: Path) -> None:
    trained(on_rank_1(lambda: time.sleep(LIMIT / 2)))


def parted(folder: Path) -> None:
    trained(on_rank_1(dist.barrier))


def branches(folder: Path) -> None:
    model = trained(lambda step: None)
    x = np.ones((8, 8))
    if dist.get_rank() == 0:
        model.predict(x, verbose=0)
    else:
        model.fit(x, x, verbose=0)


def raises(folder: Path) -> None:
    def burn() -> None:
        raise RuntimeError("the disk of rank one is on fire")

    trained(on_rank_1(burn))


def returns(folder: Path) -> None:
    trained(on_rank_1(lambda: sys.exit(0)))


def saved_alone(folder: Path) -> None:
    model = trained(lambda step: None)
    if dist.get_rank() == 0:
        model.save_weights(folder / "saved_alone.weights.h5")
    model.evaluate(np.ones((8, 8)), np.ones((8, 8)), verbose=0)


def saved_while_busy(folder: Path) -> None:
    model = trained(lambda step: None)
    if dist.get_rank() == 0:
        model.save_weights(folder / "saved_while_busy.weights.h5")
    time.sleep(1000)


def replica_saved_alone(folder: Path) -> None:
    model = trained(lambda step: None, sharded=False)
    if dist.get_rank() == 0:
        model.save_weights(folder / "replica.weights.h5")
    model.evaluate(np.ones((8, 8)), np.ones((8, 8)), verbose=0)


def loaded_alone(folder: Path) -> None:
    model = trained(lambda step: None)
    model.save_weights(folder / "loaded.weights.h5")
    if dist.get_rank() == 1:
        model.load_weights(folder / "loaded.weights.h5")
    model.evaluate(np.ones((8, 8)), np.ones((8, 8)), verbose=0)


def absent(folder: Path) -> None:
    if os.environ["RANK"] == "0":
        keras_tp.initialize(timeout=LIMIT)  # in which it must also reach the store


def rank(number: int, port: int, mishap: str, folder: Path) -> None:
    """What a fork does: it is a rank until its program ends, in whatever way."""
    log = os.open(folder / f"{mishap}{number}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(number), WORLD_SIZE="2", LOCAL_RANK=str(number))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", KERAS_TP_TIMEOUT=str(LIMIT))
    globals()[mishap](folder)


def _keep_stores(number: int) -> tuple[int, list[int]]:
    """A process that keeps stores in which jobs meet, as torchrun does, and their ports.

    Not this one: stores have threads, and a fork of a process with threads may wait for one.
    """
    reading, writing = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        stores = [dist.TCPStore("127.0.0.1", 0, is_master=True) for _ in range(number)]
        os.write(writing, json.dumps([store.port for store in stores]).encode())
        os.close(writing)
        signal.pause()
    os.close(writing)
    with open(reading) as ports:
        return keeper, json.load(ports)


def _live(program: Callable[[], None]) -> None:
    """Ends this fork as Python ends a program, but for what belongs to the process it came from."""
    status = 1
    try:
        program()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    folder, mishaps = Path(sys.argv[1]), sys.argv[2:]
    keeper, ports = _keep_stores(len(mishaps))
    began = time.monotonic()
    running: dict[int, tuple[str, int]] = {}
    for mishap, port in zip(mishaps, ports, strict=True):
        for number in range(2):
            process = os.fork()
            if process == 0:
                _live(functools.partial(rank, number, port, mishap, folder))
            running[process] = mishap, number
    ended: dict[str, list[Any]] = {mishap: [None, None] for mishap in mishaps}
    while set(running.values()) - NEVER_END and time.monotonic() - began < OVER:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            mishap, number = running.pop(process)
            seconds = time.monotonic() - began
            ended[mishap][number] = os.waitstatus_to_exitcode(status), seconds
        else:
            time.sleep(0.05)
    for process in (*running, keeper):
        os.kill(process, signal.SIGKILL)
    told = {
        mishap: [
            {
                "status": how and how[0],
                "seconds": how and how[1],
                "said": (folder / f"{mishap}{number}").read_text(errors="replace"),
            }
            for number, how in enumerate(ends)
        ]
        for mishap, ends in ended.items()
    }
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
