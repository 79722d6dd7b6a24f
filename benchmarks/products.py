"""How fast one thread multiplies float32 matrices: torch's own product, its oneDNN, and JAX.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/products.py [--jax FOLDER]

It tells how much of a difference in `step_time.py` is the libraries', and of no parallelism.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

SHAPES = (512, 256, 512), (1024, 512, 1024), (512, 1024, 2048)
TIMES = 30


def rate(multiply: Callable[[], Any], flops: int) -> str:
    multiply(), multiply()
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - start)
    return f"{flops / statistics.median(seconds) / 1e9:.0f} GFLOP/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jax", metavar="FOLDER", help="where JAX is, if not installed here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    sys.path += [options.jax] if options.jax else []
    try:
        import jax
    except ImportError:
        jax = None
    linear = torch.ops.mkldnn._linear_pointwise
    for rows, inner, columns in SHAPES:
        a, b = torch.randn(rows, inner), torch.randn(columns, inner)
        flops, found = 2 * rows * inner * columns, {}
        found["torch"] = rate(lambda a=a, b=b: a @ b.T, flops)
        found["oneDNN"] = rate(lambda a=a, b=b: linear(a, b, None, "none", [], ""), flops)
        if jax is not None:
            one, two = jax.numpy.asarray(a.numpy()), jax.numpy.asarray(b.T.numpy())
            product = jax.jit(jax.numpy.matmul)
            found["JAX"] = rate(lambda: product(one, two).block_until_ready(), flops)  # noqa: B023
        print((rows, inner, columns), ", ".join(f"{who} {what}" for who, what in found.items()))


if __name__ == "__main__":
    main()
