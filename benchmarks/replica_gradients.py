"""Three ways to sum replicas' gradients: one by one, in buckets, DistributedDataParallel.

    python benchmarks/replica_gradients.py [--ranks 2] [--layers 12] [--width 1024] [--rows 64]

A stack of linear layers and layer norms, float32, on CPUs. Every rank computes its rows;
a step is forward, backward with the sum, and gradients set to None. The ways take turns, step
by step, in one run, after warm-up; each turn starts together. Printed are the median step of
the slower ranks with its quartiles, the median of the steps' ratios to the first way, and
the most that one step allocates at once (with what the way keeps between steps, without the
weights themselves). Before, all ways' gradients are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import keras_tp  # before keras: picks the torch backend

# isort: split
import keras
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from keras_tp.buckets import Buckets, summed
from keras_tp.collectives import Axis
from keras_tp.layouts import MeshShape
from keras_tp.mesh import torch_mesh
from keras_tp.tables import plain_table, render


class Block(nn.Module):
    """A residual layer that reads its weights when it runs."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)
        self.read: Callable[[Any], Any] = lambda weight: weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.norm, self.linear):
            weights = {name: self.read(weight) for name, weight in layer.named_parameters()}
            x = functional_call(layer, weights, (x,)) + (x if layer is self.linear else 0)
        return x.tanh()


def make(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(options.width) for _ in range(options.layers)))


def ways(
    options: argparse.Namespace, axis: Axis
) -> dict[str, Callable[[], tuple[nn.Module, Callable[..., Any]]]]:
    """Name to a function that makes a module and the function that runs it."""

    def one_by_one() -> Any:
        module = make(options)
        for block in module:
            block.read = lambda weight: summed(weight, axis)
        return module, module

    def buckets() -> Any:
        module = make(options)
        parameters = list(module.parameters())

        def run(x: torch.Tensor) -> torch.Tensor:
            call = Buckets(parameters, axis)
            for block in module:
                block.read = lambda weight: summed(weight, axis, call)
            return module(x)

        return module, run

    def ddp(as_view: bool) -> Any:
        module = make(options)
        return module, DistributedDataParallel(
            module, process_group=axis.group, gradient_as_bucket_view=as_view
        )

    return {
        "one by one": one_by_one,
        "buckets": buckets,
        "DDP": lambda: ddp(False),
        "DDP, gradient_as_bucket_view": lambda: ddp(True),
    }


def step(run: Callable[..., Any], x: torch.Tensor) -> None:
    (run(x) ** 2).mean().backward()


def peak(make_way: Callable[[], Any], x: torch.Tensor) -> float:
    """MiB allocated at most at once by three steps, without the weights."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        module, run = make_way()
        for _ in range(3):
            step(run, x)
            # gloo's threads let go of tensors a little later; what they free is not recorded.
            time.sleep(0.1)
            module.zero_grad()
    now = most = 0
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return (most - sum(p.nbytes for p in module.parameters())) / 2**20


def on_a_rank(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    keras_tp.initialize()
    size = dist.get_world_size()
    mesh = torch_mesh(MeshShape.from_keras(keras_tp.device_mesh({"batch": size})))
    axis = Axis.of(mesh, "batch")
    makers = ways(options, axis)
    x = torch.randn(options.rows, options.width, generator=torch.Generator().manual_seed(axis.rank))

    memory = {name: peak(maker, x) for name, maker in makers.items()}
    made = {name: maker() for name, maker in makers.items()}
    for _, run in made.values():
        step(run, x)
    reference = made["one by one"][0]
    for name, (module, _) in made.items():
        scale = size if name.startswith("DDP") else 1  # it averages
        for one, other in zip(reference.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad * scale)

    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(options.warm_up + options.steps):
        for name, (module, run) in made.items():
            module.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            step(run, x)
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            if turn >= options.warm_up:
                seconds[name].append(float(took))
    if dist.get_rank() == 0:
        megabytes = sum(p.nbytes for p in reference.parameters()) / 2**20
        count = len(list(reference.parameters()))
        print(
            f"{size} ranks, {count} parameters, {megabytes:.1f} MiB, {options.rows} rows per rank, "
            f"{options.steps} steps after {options.warm_up}"
        )
        table = plain_table("way", "ms", "quartiles", "/ one by one", "quartiles", "peak MiB")
        for name, times in seconds.items():
            ratios = [a / b for a, b in zip(times, seconds["one by one"], strict=True)]
            low, middle, high = (1e3 * t for t in statistics.quantiles(times, n=4))
            below, ratio, above = statistics.quantiles(ratios, n=4)
            table.add_row(
                name,
                f"{middle:.1f}",
                f"{low:.1f} .. {high:.1f}",
                f"{ratio:.3f}",
                f"{below:.3f} .. {above:.3f}",
                f"{memory[name]:.1f}",
            )
        print(render(table), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=5)
    options = parser.parse_args()
    if "RANK" in os.environ:
        on_a_rank(options)
        return
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    commit = subprocess.run(
        [*git, "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    print(f"commit {commit}, torch {torch.__version__}, keras {keras.__version__}, ", end="")
    print(f"Python {sys.version.split()[0]}, {time.strftime('%Y-%m-%d')}", flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(options.ranks), __file__, *sys.argv[1:]]
    sys.exit(subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)


if __name__ == "__main__":
    main()
