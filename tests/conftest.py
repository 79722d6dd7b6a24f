"""Fixtures: pools of real ranks, a fake group of virtual ones.

Tests of real ranks run on one xdist worker, one after another, so that there is
one pool of each size; the rest runs beside them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(2)(function, *args)` runs a function on two real ranks."""
    pools: dict[int, RankPool] = {}
    yield lambda size: pools.setdefault(size, RankPool(size))
    for pool in pools.values():
        pool.close()


@pytest.fixture
def fake_ranks() -> Iterator[Callable[[int, int], None]]:
    """`fake_ranks(rank, size)` makes this process one of `size` virtual ranks.

    Collectives return at once; shapes and counts are right, values are not.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(rank: int, size: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def clean_keras() -> None:
    """Names count from one in every test, and numbers are float32."""
    keras.utils.clear_session()
    keras.config.set_floatx("float32")
