"""What every rank stores, against the ideal, on 1, 2 and 4 ranks.

    python benchmarks/local_shapes.py [--ranks 1 2 4]

For a stack of Dense layers and for the demo's transformer, after parallelizing
and a training step with Adam: path, full shape and local shape on each rank, and
the bytes of parameters, gradients and optimizer slots each rank holds. The bytes
are those of the live tensors' storages, not of their shapes.

The ideal is (replicated + sharded / ranks). A dim that the ranks do not divide
is cut by torch.chunk's rule, so that the first ranks may hold a little more: what
a rank *should* hold is that. The exit status is 1 if a rank holds more.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from typing import Any

import keras_tp  # before keras: picks the torch backend

# isort: split
import keras
import numpy as np
import torch
import torch.distributed as dist
from keras import layers

from keras_tp.examples.train_transformer import BYTES, layout_map, transformer
from keras_tp.seam.variables import local_tensor
from keras_tp.tables import plain_table, render, shapes_text, size_text


def dense_stack(ranks: int) -> tuple[Any, Any, Any, Any]:
    """Dense 512, 256, 128 and 10 on 128 inputs, kernels sharded by columns."""
    model = keras.Sequential([keras.Input((128,)), *(layers.Dense(n) for n in (512, 256, 128, 10))])
    model.compile("adam", loss="mse")
    mesh = keras_tp.device_mesh({"batch": 1, "model": ranks})
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*dense.*kernel"] = (None, "model")
    return model, layout, np.ones((4, 128), "float32"), np.ones((4, 10), "float32")


def demo_transformer(ranks: int) -> tuple[Any, Any, Any, Any]:
    """The demo's transformer and layout."""
    ids = np.arange(2 * 65).reshape(2, 65) % BYTES
    return transformer(64, 128, 4, 2), layout_map(ranks), ids[:, :-1], ids[:, 1:]


def held(tensor: torch.Tensor | None) -> int:
    """Bytes of the storage a tensor keeps alive."""
    return 0 if tensor is None else tensor.untyped_storage().nbytes()


def measure(model: Any) -> dict[str, Any]:
    """Local shapes and live bytes on this rank."""
    parameters = [local_tensor(v) for v in model.variables]
    slots = [local_tensor(v) for v in model.optimizer.variables]
    return {
        "shapes": keras_tp.local_shapes(model),
        "parameters": sum(held(p) for p in parameters),
        "gradients": sum(held(p.grad) for p in parameters),
        "slots": sum(held(s) for s in slots if s.ndim > 0),
    }


def report(title: str, plan: keras_tp.Plan, everywhere: list[dict[str, Any]]) -> bool:
    """Prints the tables of one model; returns whether every rank holds what it should."""
    ranks = len(everywhere)
    shapes = plain_table("variable", "full", *(f"rank {i}" for i in range(ranks)))
    for v in plan.variables:
        shapes.add_row(v.path, str(v.shape), *(str(r["shapes"][v.path]) for r in everywhere))

    trained = [v for v in plan.variables if v.trainable]
    amounts = {"parameters": (plan.variables, 1), "gradients": (trained, 1), "slots": (trained, 2)}
    bytes_table = plain_table("bytes", "rank", "held", "should", "ideal", "held / ideal", "")
    fine = True
    for kind, (variables, copies) in amounts.items():
        ideal = copies * sum(_bytes(v.shape) / (ranks if v.sharded else 1) for v in variables)
        for rank, result in enumerate(everywhere):
            should = copies * sum(_bytes(v.local_shape(rank)) for v in variables)
            right = result[kind] == should
            fine = fine and right
            bytes_table.add_row(
                kind,
                str(rank),
                f"{result[kind]:,}",
                f"{should:,}",
                f"{ideal:,.0f}",
                f"{result[kind] / ideal:.3f}",
                "" if right else "WRONG",
            )
    uneven = [v for v in plan.variables if len(set(v.local_shapes)) > 1]
    print(f"\n== {title} on {ranks} rank{'s' * (ranks > 1)}\n")
    print(render(shapes) + "\n\n" + render(bytes_table))
    for v in uneven:
        print(f"uneven: {v.path} {v.shape} is cut into {shapes_text(v.local_shapes)}")
    total = sum(everywhere[0][kind] for kind in amounts)
    print(f"rank 0 holds {size_text(total)} in all", flush=True)
    return fine


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)  # both models are float32


def on_a_rank() -> None:
    """One rank's part: builds, parallelizes and trains each model, reports from rank 0."""
    torch.set_num_threads(1)
    keras_tp.initialize()
    fine = True
    for make in (dense_stack, demo_transformer):
        keras.utils.clear_session()
        model, layout, x, y = make(dist.get_world_size())
        plan = keras_tp.plan(model, layout)
        keras_tp.parallelize(model, plan=plan)
        model.train_on_batch(x, y)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, measure(model))
        if dist.get_rank() == 0:
            fine = report(make.__name__, plan, everywhere) and fine
    sys.exit(0 if fine else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    if "RANK" in os.environ:
        on_a_rank()
    failed = []
    for ranks in options.ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), __file__]
        if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
            failed.append(ranks)
    if failed:
        sys.exit(f"wrong amounts or a failure, see above, on {failed} ranks")
    print("\nevery rank holds exactly what it should")


if __name__ == "__main__":
    main()
