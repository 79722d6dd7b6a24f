"""The module that Keras expects of a backend for `keras.distribution`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from rank_pool import RankPool
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel

import keras_tp
from keras_tp import distribution_lib as library
from keras_tp.addresses import read_job

ROOT = Path(__file__).parent.parent
TensorLayout = keras.distribution.TensorLayout


@pytest.fixture(autouse=True)
def no_job() -> None:
    """What other tests have joined in this process says how many ranks there are."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def enabled() -> Iterator[None]:
    keras_tp.enable()
    yield
    keras_tp.disable()


def mesh_of(sizes: tuple[int, ...], axes: list[str]) -> Any:
    devices = [f"cpu:{rank}" for rank in range(int(np.prod(sizes)))]
    return keras.distribution.DeviceMesh(sizes, axes, devices)


# What needs no process group.


def test_devices_are_those_of_the_job(monkeypatch: pytest.MonkeyPatch, enabled: None) -> None:
    """A rank that lists only its own device makes a mesh of one."""
    assert keras.distribution.list_devices() == ["cpu:0"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert keras.distribution.list_devices() == ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]
    assert keras.distribution.list_devices("CPU") == keras.distribution.list_devices()
    assert library.get_device_count() == library.get_device_count("cpu") == 4
    assert (library.process_id(), library.num_processes()) == (2, 4)
    distribution = keras.distribution.DataParallel()
    assert (distribution._process_id, distribution.device_mesh.shape) == (2, (4,))


@pytest.mark.parametrize("kind", ["tpu", "gpu", "abacus"])
def test_impossible_devices_are_an_error(kind: str) -> None:
    """An empty list would become a mesh of nothing, and an error elsewhere."""
    for function in (library.list_devices, library.get_device_count):
        with pytest.raises(keras_tp.LayoutError, match=f"'{kind}': Keras computes on 'cpu'"):
            function(kind)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("a:1,b:2", 3, 0), "has 2 addresses, but num_processes is 3"),
        (("a:1,b:2", None, 2), "process_id is 2; it is a number from 0 to 1"),
        (("a:1", 2, -1), "process_id is -1"),
        (("a:1", 0, None), "num_processes is 0"),
        (("a,b:2", 2, 0), "address 'a' is not of the form 'host:port'"),
    ],
)
def test_a_job_that_makes_no_sense_is_an_error(given: tuple[Any, ...], words: str) -> None:
    """The ranks would wait for each other, for minutes, and then say something of sockets."""
    with pytest.raises(keras_tp.LayoutError, match=words):
        library.initialize(*given)


def test_what_is_not_said_of_a_job_is_named() -> None:
    """`initialize(num_processes=2)` alone must not become two jobs of one."""
    with pytest.raises(keras_tp.LayoutError, match="KERAS_DISTRIBUTION_JOB_ADDRESSES, KERAS_DIS"):
        library.initialize(None, 2, None)
    with pytest.raises(keras_tp.LayoutError, match="process_id missing"):
        library.initialize("a:1,b:2", None, None)


def test_the_first_address_is_where_all_meet() -> None:
    """Each rank waiting at its own address would wait alone."""
    assert read_job("a:1, b:2,a:3", None, 2).complete() == ("a:1", 3, 2)
    assert read_job("a:1", 2, 1).complete() == ("a:1", 2, 1)


def test_ranks_on_one_host_take_different_gpus() -> None:
    """Two ranks of one host on its first GPU would deadlock in NCCL."""
    addresses = "a:1,a:2,b:1,a:3,b:2"
    assert [read_job(addresses, 5, rank).local_rank for rank in range(5)] == [0, 1, 0, 2, 1]
    assert read_job("a:1", 3, 2).local_rank == 2


def test_layouts_become_placements() -> None:
    """A placement is of a mesh axis, a layout entry of a dim: the two are easily swapped."""
    mesh = mesh_of((2, 4), ["batch", "model"])
    convert = library._to_backend_layout
    assert convert(TensorLayout((None, "model"), mesh)) == (Replicate(), Shard(1))
    assert convert(TensorLayout(("model", None, "batch"), mesh)) == (Shard(2), Shard(0))
    assert convert(TensorLayout((), mesh)) == (Replicate(), Replicate())


def test_wrong_layouts_are_value_errors() -> None:
    """Placements of nothing would replicate in silence."""
    mesh = mesh_of((1, 2), ["batch", "model"])
    with pytest.raises(ValueError, match="has no device mesh"):
        library._to_backend_layout(TensorLayout(("model", None)))
    with pytest.raises(ValueError, match="axis 'model' on 2 dims"):
        library._to_backend_layout(TensorLayout(("model", "model"), mesh))
    unknown = TensorLayout(("model",), mesh)
    unknown._axes = ("rows",)  # Keras finds most of these itself
    with pytest.raises(ValueError, match="names axis 'rows'; the mesh has 'batch', 'model'"):
        library._to_backend_layout(unknown)
    with pytest.raises(
        ValueError, match=r"expected a keras\.distribution\.TensorLayout, got tuple"
    ):
        library.distribute_variable(np.ones(2), ("model",))


def test_device_names_become_torch_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.device("cpu:3")` is a device that no tensor is on."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert library._to_backend_device("cpu:3") == torch.device("cpu")
    assert library._to_backend_device("cpu") == torch.device("cpu")
    for wrong in ("cpu:4", "gpu:0", "cpu:x", ""):
        with pytest.raises(ValueError, match="is not found: the job has cpu:0, cpu:1"):
            library._to_backend_device(wrong)


def test_a_mesh_of_more_ranks_than_the_job_says_how_to_start_them() -> None:
    """Keras on JAX has a process for many devices; here each device is a process of its own."""
    mesh = mesh_of((4,), ["batch"])
    with pytest.raises(keras_tp.LayoutError, match="torchrun --standalone --nproc-per-node 4"):
        library._to_backend_mesh(mesh)
    with pytest.raises(keras_tp.LayoutError, match="the mesh has 4 ranks"):
        library.distribute_tensor(np.ones((4, 2)), TensorLayout(("batch", None), mesh))


def test_symbolic_tensors_pass_through(enabled: None) -> None:
    """Functional models are made of them, also under meshes that are not there."""
    layout = TensorLayout(("batch", None), mesh_of((4,), ["batch"]))
    symbolic = keras.KerasTensor((2, 3))
    assert keras.distribution.distribute_tensor(symbolic, layout) is symbolic
    assert library.distribute_tensor([symbolic], layout)[0] is symbolic
    layer = keras.layers.Lambda(lambda x: library.distribute_tensor(x, layout))
    assert layer(symbolic).shape == (2, 3)  # meta tensors within


def test_activations_stay_whole_and_layouts_are_checked() -> None:
    """A layer that is handed a part of what it computes with gives other numbers."""
    mesh = mesh_of((1, 1), ["batch", "model"])
    tensor = torch.ones(4, 2)
    assert library.distribute_tensor(tensor, TensorLayout(("batch", "model"), mesh)) is tensor
    assert library.distribute_tensor(tensor, TensorLayout(("batch",), mesh)) is tensor
    nest = {"a": tensor, "b": [torch.ones(3)]}
    assert library.distribute_tensor(nest, TensorLayout(("batch",), mesh)) is nest
    scalar = torch.tensor(1.0)
    assert library.distribute_tensor(scalar, TensorLayout((), mesh)) is scalar
    assert library.distribute_tensor(tensor, (Shard(1), Replicate())) is tensor
    with pytest.raises(keras_tp.LayoutError, match="of 3 entries for 2 dims"):
        library.distribute_tensor(tensor, TensorLayout(("batch", None, None), mesh))
    with pytest.raises(keras_tp.LayoutError, match="of 1 entries for 0 dims"):
        library.distribute_tensor(scalar, TensorLayout(("batch",), mesh))
    with pytest.raises(keras_tp.LayoutError, match="that cuts dim 2"):
        library.distribute_tensor(tensor, (Shard(2), Replicate()))
    with pytest.raises(keras_tp.LayoutError, match="has no device mesh"):
        library.distribute_tensor(tensor, TensorLayout((None, None)))


def test_data_of_one_replica_stay_as_they_are() -> None:
    """Rows may be shared out along the batch axis alone."""
    batch = (np.ones((4, 2)), None)
    wide = mesh_of((1, 4), ["batch", "model"])
    layout = TensorLayout(("batch", None), wide)
    assert library.distribute_data_input(batch, layout, "batch") is batch


def data_input() -> tuple[tuple[int, ...], list[float]]:
    rank = library.process_id()
    layout = TensorLayout(("batch", None), mesh_of((2, 1), ["batch", "model"]))
    rows = library.distribute_data_input(np.full((2 + rank, 2), float(rank)), layout, "batch")
    return tuple(rows.shape), rows[:, 0].tolist()


def test_data_of_several_replicas_are_one_batch(ranks: Callable[[int], RankPool]) -> None:
    """A rank's part taken for the whole batch: the mean of a mean."""
    assert ranks(2)(data_input) == [((5, 2), [0.0, 0.0, 1.0, 1.0, 1.0])] * 2


def test_plans_come_from_layout_maps() -> None:
    """The helper's plan is that of the package, not another's idea of it."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6)])
    layout_map = keras.distribution.LayoutMap(mesh_of((2,), ["model"]))
    layout_map[".*kernel"] = (None, "model")
    plan = library.create_tp_plan_from_layout_map(model, layout_map)
    assert plan == keras_tp.plan(model, layout_map)
    assert plan.variables[0].local_shapes == ((4, 3), (4, 3))
    assert library.is_dtensor_available()


# On real ranks.


def on_each_rank() -> dict[str, Any]:
    size, rank = library.num_processes(), library.process_id()
    sizes = (2, size // 2) if size > 1 else (1, 1)
    mesh = keras.distribution.DeviceMesh(sizes, ["batch", "model"], library.list_devices())
    backend = library._to_backend_mesh(mesh)
    again = keras.distribution.DeviceMesh(sizes, ["batch", "model"], library.list_devices())
    value = np.arange(35.0).reshape(5, 7) + 100 * rank  # the first rank's counts
    layout = TensorLayout(("model", "batch"), mesh)
    shard = library.distribute_variable(value, layout)
    with pytest.raises(keras_tp.LayoutError, match="of 1 entries for 2 dims"):
        library.distribute_variable(value, TensorLayout(("model",), mesh))
    tensor = torch.ones(3, 3)
    return {
        "devices": library.list_devices(),
        "rank": rank,
        "mesh": (type(backend) is DeviceMesh, backend.mesh.tolist(), backend.mesh_dim_names),
        "cached": library._to_backend_mesh(again) is backend,
        "shard": shard.numpy(),
        "plain": type(shard) is torch.Tensor,
        "scalar": float(library.distribute_variable(3.0 + rank, TensorLayout((), mesh))),
        "whole": library.distribute_tensor(tensor, TensorLayout(("batch", None), mesh)) is tensor,
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_on_real_ranks(ranks: Callable[[int], RankPool], size: int) -> None:
    """Shards of each rank's own value, in another order than the mesh's, would make no whole."""
    results = ranks(size)(on_each_rank)
    tall, wide = (2, size // 2) if size > 1 else (1, 1)
    full = np.arange(35.0).reshape(5, 7)
    rows = [np.concatenate([r["shard"] for r in results[i::wide]], 1) for i in range(wide)]
    np.testing.assert_array_equal(np.concatenate(rows), full)
    for rank, result in enumerate(results):
        assert result["devices"] == [f"cpu:{i}" for i in range(size)]
        assert result["rank"] == rank
        grid = np.arange(size).reshape(tall, wide).tolist()
        assert result["mesh"] == (True, grid, ("batch", "model"))
        assert result["cached"]
        assert result["plain"]
        assert result["whole"]
        assert result["scalar"] == 3.0


def initialize_again() -> list[Any]:
    size, rank = library.num_processes(), library.process_id()
    keras.utils.set_random_seed(rank)
    library.initialize()
    library.initialize(None, size, rank)
    drawn = [np.random.random(), float(torch.rand(()))]
    errors = []
    for given in ((None, size + 1, None), (None, None, rank + 1), ("a:1,b:1,c:1", None, None)):
        with pytest.raises(keras_tp.LayoutError) as error:
            library.initialize(*given)
        errors.append(str(error.value))
    return [drawn, errors]


def test_initializing_again(ranks: Callable[[int], RankPool]) -> None:
    """Joining twice is an error of torch's; contradictions must not pass for the job there is.

    And unseeded replicas start different, unless all take over one rank's random state.
    """
    (drawn, errors), (other, _) = ranks(2)(initialize_again)
    assert drawn == other
    assert "num_processes is 3, but this job has 2 processes" in errors[0]
    assert "process_id is 1, but this is process 0" in errors[1]
    assert "num_processes is 3, but this job has 2 processes" in errors[2]


def parallelize_a_torch_module() -> list[Any]:
    module = torch.nn.Sequential(torch.nn.Linear(4, 6))
    mesh = keras_tp.device_mesh({"batch": 1, "model": 2})
    library.parallelize_torch_module(module, mesh, {"0": ColwiseParallel()})
    weight = module[0].weight
    return [isinstance(weight, DTensor), tuple(weight.to_local().shape)]


def test_torch_modules_on_keras_meshes(ranks: Callable[[int], RankPool]) -> None:
    """torch wants one axis; that of size 1 would shard nothing."""
    assert ranks(2)(parallelize_a_torch_module) == [[True, (3, 4)]] * 2


def two_axes() -> str:
    mesh = keras_tp.device_mesh({"batch": 2, "model": 2})
    with pytest.raises(keras_tp.LayoutError) as error:
        library.parallelize_torch_module(torch.nn.Linear(2, 2), mesh, ColwiseParallel())
    return str(error.value)


def test_torch_modules_go_along_one_axis(ranks: Callable[[int], RankPool]) -> None:
    """To pick one of two axes would be to guess."""
    assert "along one axis, this mesh has 2" in ranks(4)(two_axes)[3]


PROGRAM = """
import keras_tp, keras
keras_tp.enable()
keras.distribution.initialize()
print(keras.distribution.list_devices(), keras_tp.distribution_lib.process_id())
"""


def test_keras_s_own_environment_variables_start_a_job() -> None:
    """Scripts that are started without torchrun say who they are by KERAS_DISTRIBUTION_*."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment = {
        **kept,
        "PYTHONPATH": str(ROOT),
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{port}",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**environment, "KERAS_DISTRIBUTION_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        done = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [out for out, _ in done] == [f"['cpu:0', 'cpu:1'] {rank}\n" for rank in range(2)], done
