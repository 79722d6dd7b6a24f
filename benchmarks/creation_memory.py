"""What a process needs to make, or load, a 1 GB model of which it keeps a shard, on two ranks.

    python benchmarks/creation_memory.py [--ranks 2] [--models equal] [--made scope]

Each model is made in four ways, in processes of their own: under a ModelParallel (scope); whole,
then parallelized; by `load_weights` into a model that is parallelized (of which the shards are
there before); by `keras.saving.load_model` under a ModelParallel. Of each rank, in MB: what it
stores in the end, and the peak of its resident memory (VmHWM of /proc/self/status, from just
before on) above what the process held before.

A full value exists for one variable at a time, so that the peak should be what is newly stored
and the largest variable. It is reached where the largest is the last; "equal" is such a model. The
exit status is 1 if a peak is more than 1 % above, but for models that are made whole.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import keras_tp  # before keras: picks the torch backend

# isort: split
import keras
import torch
import torch.distributed as dist
from keras import layers
from running import what_ran, write_record

from keras_tp.seam.variables import local_tensor
from keras_tp.tables import plain_table, render

MB = 1e6


def embedding_first(initializer: str, scale: int = 1) -> Any:
    """An embedding of 262 MB, then twelve kernels of 67 MB."""
    width = 2048 // scale
    sizes = [4 * width if i % 2 == 0 else width for i in range(12)]
    return keras.Sequential(
        [
            keras.Input((8,), dtype="int32"),
            layers.Embedding(32000 // scale, width, embeddings_initializer=initializer),
            *(layers.Dense(size, kernel_initializer=initializer) for size in sizes),
        ]
    )


def equal(initializer: str, scale: int = 1) -> Any:
    """Eight kernels of 134 MB."""
    width = 4096 // scale
    sizes = [2 * width if i % 2 == 0 else width for i in range(8)]
    return keras.Sequential(
        [keras.Input((width,)), *(layers.Dense(n, kernel_initializer=initializer) for n in sizes)]
    )


MODELS = {"embedding_first": embedding_first, "equal": equal}
INITIALIZERS = "glorot_uniform", "he_normal"


def memory(name: str) -> float:
    """`VmRSS` or `VmHWM` of this process, in MB of 1e6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(name)]
    return int(line.split()[1]) * 1024 / MB


def layout_map(name: str, ranks: int) -> Any:
    """Kernels by columns, and the embedding, which only one model has, by rows."""
    made = keras.distribution.LayoutMap(keras_tp.device_mesh({"batch": 1, "model": ranks}))
    made[".*kernel"] = (None, "model")
    if name == "embedding_first":
        made[".*embeddings"] = ("model", None)
    return made


# How a model is made: whether what it stores is new then.
WAYS = {"scope": True, "whole": True, "load_weights": False, "load_model": True}


def make(name: str, initializer: str, in_scope: bool, scale: int = 1) -> Any:
    layout = layout_map(name, dist.get_world_size())
    if not in_scope:
        return keras_tp.parallelize(MODELS[name](initializer, scale), layout)
    with keras.distribution.ModelParallel(layout_map=layout).scope():
        return MODELS[name](initializer, scale)


def load(made: Any, path: str, name: str, how: str) -> Any:
    """Into `made`, or as another."""
    if how == "load_weights":
        made.load_weights(path)
        return made
    layout = layout_map(name, dist.get_world_size())
    with keras.distribution.ModelParallel(layout_map=layout).scope():
        return keras.saving.load_model(path)


def on_a_rank(name: str, initializer: str, how: str, folder: str) -> None:
    """One rank's part; rank 0 prints what every rank has seen, a line each."""
    torch.set_num_threads(1)
    keras_tp.enable()
    keras.distribution.initialize()
    keras.utils.set_random_seed(0)
    # Connects the ranks, and loads what is loaded once.
    small = make(name, initializer, how == "scope", scale=32)
    suffix = ".keras" if how == "load_model" else ".weights.h5"
    model, path = None, os.path.join(folder, f"model{suffix}")
    if how.startswith("load"):
        (small.save if suffix == ".keras" else small.save_weights)(path)
        load(small, path, name, how)
        model = make(name, initializer, True)
        (model.save if suffix == ".keras" else model.save_weights)(path)
        model = model if how == "load_weights" else None
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory("VmRSS")
    if how.startswith("load"):
        model = load(model, path, name, how)
    else:
        model = make(name, initializer, how == "scope")
    peak = memory("VmHWM") - before
    sizes = [local_tensor(v).untyped_storage().nbytes() / MB for v in model.variables]
    largest = max(4 * math.prod(v.shape) for v in model.variables) / MB
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (before, sum(sizes), largest, peak))
    if dist.get_rank() == 0:
        for numbers in everywhere:
            print(*numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--made", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--record", action="store_true", help="write a dated record")
    options = parser.parse_args()
    if "RANK" in os.environ:
        on_a_rank(*os.environ["CREATION_MEMORY"].split())
        return
    ran = what_ran()
    columns = ("model", "initializer", "made", "rank", "base", "stored", "largest", "peak", "bound")
    table = plain_table(*columns)
    over = 0
    for name in options.models:
        for initializer in INITIALIZERS:
            for how in options.made:
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                command += ["--nproc-per-node", str(options.ranks), __file__]
                with tempfile.TemporaryDirectory(prefix="creation-") as folder:
                    done = subprocess.run(
                        command,
                        env={
                            **os.environ,
                            "OMP_NUM_THREADS": "1",
                            "CREATION_MEMORY": f"{name} {initializer} {how} {folder}",
                        },
                        stdout=subprocess.PIPE,
                        text=True,
                        check=True,
                    )
                for rank, line in enumerate(done.stdout.splitlines()):
                    base, stored, largest, peak = map(float, line.split())
                    bound = largest + (stored if WAYS[how] else 0)
                    over += how != "whole" and peak > 1.01 * bound
                    numbers = (f"{n:,.0f}" for n in (base, stored, largest, peak, bound))
                    table.add_row(name, initializer, how, str(rank), *numbers)
    text = render(table) + "\n\nIn MB of 1e6 bytes."
    print(f"{ran}\n\n{text}")
    if options.record:
        write_record("creation-memory", "Memory of making and loading a model", ran, text)
    sys.exit(f"{over} peaks are above their bound" if over else 0)


if __name__ == "__main__":
    main()
