"""Fixtures: pools of real ranks, a fake group of virtual ones.

Tests of real ranks run in two groups, each on one xdist worker and one after another: the matrix
of layers with some others, and the rest, which takes as long. So there are two pools of each size
at most; a pool that waits for its ranks' messages leaves the cores to the other. What needs no
ranks runs where there is room. (Dealt out by file, two pools of four ranks were at work for longer,
and all took longer.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import features
import keras
import matrix
import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool

from keras_tp.tables import plain_table, render

torch.set_num_threads(1)

BESIDE_LAYERS = ("test_layers", "test_updates", "test_losses")


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            group = "layers" if item.path.stem in BESIDE_LAYERS else "ranks"
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-layers", action="store_true", help="write the page of the layers' matrix"
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Draws what the tests that passed have shown, and writes the matrix's page where asked to."""
    noted = [
        value
        for report in terminalreporter.getreports("passed")
        for key, value in report.user_properties
        if key == "feature"
    ]
    if noted:
        terminalreporter.write_line(features.draw(noted))
    results: dict[str, dict[str, list[list[str]]]] = {}
    for report in terminalreporter.getreports("passed"):
        for key, value in report.user_properties:
            if key == "matrix":
                name, mesh, rows = value
                results.setdefault(name, {})[mesh] = rows
    if not results:
        return
    table = plain_table("every dim of every weight", *matrix.MESHES)
    for line in matrix.summary(results):
        table.add_row(*line)
    terminalreporter.write_line(render(table))
    if config.getoption("--write-layers"):
        from layer_cases import CASES

        # Of what was not run, as with -k, the rows stay.
        before = {
            name: {mesh: matrix.on_page(name, mesh) for mesh in matrix.MESHES} for name in CASES
        }
        matrix.PAGE.write_text(
            matrix.page({n: rows | results.get(n, {}) for n, rows in before.items()})
        )


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
    """Names count from one in every test, and numbers are float32.

    Garbage is what Python finds by itself: to look for all of it here took a quarter of a second
    of each of more than a thousand tests.
    """
    keras.utils.clear_session(free_memory=False)
    keras.config.set_floatx("float32")
