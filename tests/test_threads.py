"""Gloo's threads are batch threads once a model is parallelized, and nobody else's are.

Seen to fail: `take_turns` left out of keras_tp/wrapper.py; without its look at names, or at how
threads are scheduled.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import parity
import pytest
import torch.distributed as dist

import keras_tp
from keras_tp.threads import NAMES, take_turns

pytestmark = pytest.mark.skipif(
    not hasattr(os, "SCHED_BATCH"), reason="batch threads are Linux's alone"
)


def by_name() -> dict[str, Counter[int]]:
    """How threads of this process are scheduled."""
    found: dict[str, Counter[int]] = {}
    for thread in Path("/proc/self/task").glob("*"):
        name = (thread / "comm").read_text().strip()
        found.setdefault(name, Counter())[os.sched_getscheduler(int(thread.name))] += 1
    return found


def scheduled() -> list[dict[str, Counter[int]]]:
    mesh = keras_tp.device_mesh({"model": 2})
    layout = parity.layout_map({".*kernel": (None, "model")}, mesh)
    keras_tp.parallelize(models.dense_stack(), layout)
    made = by_name()
    dist.barrier(dist.new_group(backend="gloo"))
    return [made, by_name()]


def test_threads_of_gloo_let_each_other_finish(ranks: Any) -> None:
    """Messages that take ten times as long, as who receives keeps the one that sends from its
    core. (A group of somebody else's, made after, shows what they are like without.)"""
    for made, later in ranks(2)(scheduled):
        for name in NAMES:
            assert set(made[name]) == {os.SCHED_BATCH}
            assert later[name][os.SCHED_OTHER] > 0
        others = Counter[int]()
        for name in set(made) - set(NAMES):
            others += made[name]
        assert set(others) == {os.SCHED_OTHER}


def scheduling_of(before: Callable[[int], None]) -> int:
    """Of a thread by one of those names that `before` was told the number of."""
    ready, seen, numbers = threading.Event(), threading.Event(), [0]

    def body() -> None:
        Path("/proc/thread-self/comm").write_text(NAMES[0])
        numbers[0] = threading.get_native_id()
        ready.set()
        seen.wait(10)

    thread = threading.Thread(target=body)
    thread.start()
    assert ready.wait(10)
    before(numbers[0])
    take_turns()
    found = os.sched_getscheduler(numbers[0])
    seen.set()
    thread.join()
    return found


def test_what_somebody_has_scheduled_stays() -> None:
    """Who asks for idle threads must not be given more."""
    idle = os.sched_param(0)
    assert scheduling_of(lambda number: None) == os.SCHED_BATCH
    kept = scheduling_of(lambda number: os.sched_setscheduler(number, os.SCHED_IDLE, idle))
    assert kept == os.SCHED_IDLE


def test_a_system_that_allows_it_not_is_only_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that forbids the call, in which nothing would train."""

    def refused(*args: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refused)
    assert scheduling_of(lambda number: None) == os.SCHED_OTHER
