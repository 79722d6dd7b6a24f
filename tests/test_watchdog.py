"""Jobs in which a rank does not come: they end in time, and say who, where and what to do."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import mishaps
import pytest
from keras import layers

import keras_tp
from keras_tp.job import initialize
from keras_tp.whereabouts import whereabouts

MISHAPS = [
    *("stopped", "busy", "late", "parted", "branches", "raises", "returns"),
    *("saved_alone", "saved_while_busy", "replica_saved_alone", "loaded_alone", "absent"),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """How each rank of each job has ended. All of them are run once, side by side."""
    folder = tmp_path_factory.mktemp("mishaps")
    command = [sys.executable, mishaps.__file__, str(folder), *MISHAPS]
    job = subprocess.run(
        command, capture_output=True, text=True, timeout=mishaps.OVER + 60, check=False
    )
    assert job.returncode == 0, job.stdout + job.stderr
    found = json.loads(job.stdout.splitlines()[-1])
    found["files"] = [path.name for path in folder.iterdir()]
    return found


def _said(job: list[dict[str, Any]], rank: int, *words: str) -> None:
    for part in words:
        assert part in job[rank]["said"], job


def test_a_stopped_rank_ends_the_others(ended: dict[str, Any]) -> None:
    """torch waits half an hour, and says "Timed out waiting 1800000ms for recv operation"."""
    job = ended["stopped"]
    assert [rank["status"] for rank in job] == [1, None]  # the tests kill the stopped one
    _said(job, 0, "rank 0 has waited ", "in fit, ", "for rank 1. The job ends here")
    _said(job, 0, "Rank 1 gives no sign of life: stopped", "Last seen in fit")
    assert job[0]["said"].count("keras_tp:") == 1


def test_a_rank_that_never_comes_is_told_from_a_stopped_one(ended: dict[str, Any]) -> None:
    """Both keep the others waiting; what to do about it is another thing."""
    job = ended["busy"]
    assert job[0]["status"] == 1
    _said(job, 0, "rank 0 has waited ", "Rank 1 is busy in fit (mishaps.py:", "KERAS_TP_TIMEOUT")
    assert "no sign of life" not in job[0]["said"]


def test_a_rank_that_is_late_is_waited_for(ended: dict[str, Any]) -> None:
    """A watchdog that counts from anything but the last progress would end a good job."""
    assert [rank["status"] for rank in ended["late"]] == [0, 0], ended["late"]
    assert not any("keras_tp:" in rank["said"] for rank in ended["late"])


def test_ranks_that_wait_for_each_other_in_different_places(ended: dict[str, Any]) -> None:
    """Mismatched collectives: nobody is missing, and nobody can go on. One message, of one rank."""
    job = ended["parted"]
    assert [rank["status"] for rank in job] == [1, 1]
    told = "".join(rank["said"] for rank in job)
    assert told.count("The job ends here") == 1, told
    assert "barrier" in told
    assert "programs have parted ways" in told


def test_ranks_that_do_different_things_are_told_at_once(ended: dict[str, Any]) -> None:
    """One trains where another predicts: their collectives are alike, and meet in silence."""
    job = ended["branches"]
    assert [rank["status"] for rank in job] == [1, 1]
    for rank in range(2):
        _said(job, rank, "LayoutError", "rank 0 predicts where rank 1 trains")
    assert not any("The job ends here" in rank["said"] for rank in job)


def test_the_others_of_a_rank_that_raised_say_so(ended: dict[str, Any]) -> None:
    """They end with "Connection closed by peer" and an address, without a word of why."""
    job = ended["raises"]
    assert all(rank["status"] == 1 for rank in job)
    _said(job, 1, "RuntimeError: the disk of rank one is on fire")
    _said(job, 0, "rank 0 has lost its connection", "Rank 1 has ended: RuntimeError: the disk of")
    assert "lost its connection" not in job[1]["said"]


def test_the_others_of_a_rank_that_ended_early_say_so(ended: dict[str, Any]) -> None:
    """It ends well, with status 0: under torchrun nobody else would tell of it."""
    job = ended["returns"]
    assert [rank["status"] for rank in job] == [1, 0]
    _said(job, 0, "Rank 1 has ended: its program came to its end")


def test_saving_on_one_rank_is_an_error_within_seconds(ended: dict[str, Any]) -> None:
    """transformers #48569: the first rank waits for shards, the second in its next step, for ever.
    It is found while the limit of the watchdog is far from over."""
    job = ended["saved_alone"]
    _said(job, 0, "LayoutError", "saving 'sequential'", "Rank 1 waits in", "if rank == 0")
    _said(job, 0, "in evaluate")
    assert all(rank["status"] == 1 for rank in job)
    assert "The job ends here" not in job[0]["said"] + job[1]["said"]
    assert not any("saved_alone.weights" in name for name in ended["files"])


def test_saving_waits_for_a_rank_that_may_yet_come(ended: dict[str, Any]) -> None:
    """A rank that computes for long before it saves, too, would be told that it is wrong."""
    job = ended["saved_while_busy"]
    assert job[0]["status"] == 1
    _said(job, 0, " in a roll call, in save_weights", "Rank 1 is busy in mishaps.py:")
    assert job[0]["seconds"] > mishaps.LIMIT
    assert not any("saved_while_busy.weights" in name for name in ended["files"])


def test_a_replica_may_save_alone(ended: dict[str, Any]) -> None:
    """It holds everything, so that nobody is needed; plain data parallelism saves like this."""
    assert [rank["status"] for rank in ended["replica_saved_alone"]] == [0, 0]
    assert "replica.weights.h5" in ended["files"]


def test_loading_on_one_rank_is_an_error(ended: dict[str, Any]) -> None:
    """The ranks would go on with shards of different weights, without a word."""
    _said(ended["loaded_alone"], 1, "LayoutError", "loading 'sequential'", "Rank 0 waits in")


def test_a_rank_that_is_never_started_is_named(ended: dict[str, Any]) -> None:
    """torch's error has the name of a key in a store."""
    _said(ended["absent"], 0, "these did not: 1", "LayoutError", "KERAS_TP_TIMEOUT")


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_a_timeout_is_a_number_of_seconds(timeout: float) -> None:
    """A limit of nan would never be over, one of 0 always is."""
    with pytest.raises(keras_tp.LayoutError, match="a number of seconds, above 0"):
        initialize(timeout=timeout)


def test_the_variable_of_the_timeout_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error there would give torch's half hour, in silence."""
    monkeypatch.setenv("KERAS_TP_TIMEOUT", "ten")
    with pytest.raises(keras_tp.LayoutError, match=r"KERAS_TP_TIMEOUT"):
        initialize()


def test_where_a_thread_is() -> None:
    """Phases from the outside in, the innermost layer, and a line of the program, not of Keras."""

    class Waits(layers.Layer):
        def call(self, x: Any) -> Any:
            inside.set()
            leave.wait(10)
            return x

    inside, leave = threading.Event(), threading.Event()
    leave.set()  # to begin with: building and the first batch call it, too
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3), Waits(name="waits")])
    model.predict(keras.ops.ones((2, 3)), verbose=0)
    inside.clear()
    leave.clear()
    thread = _in_thread(lambda: model.predict(keras.ops.ones((2, 3)), verbose=0))
    assert inside.wait(10)
    time.sleep(0.1)
    found = whereabouts(thread.ident or 0)
    leave.set()
    thread.join(10)
    assert found.doing == "predict, predict_step, layer 'sequential/waits'"
    assert found.at.startswith("test_watchdog.py:")
    assert found.waits == ""
    assert whereabouts(-1).at == "its end"


def _in_thread(act: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def _load(path: str, other: str) -> str:
    """Of ranks that hold a model together, the second loads `other`."""
    import torch.distributed as dist

    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="dense")])
    layout_map = keras.distribution.LayoutMap(keras_tp.device_mesh({"model": 2}))
    layout_map[".*dense/kernel"] = (None, "model")
    keras_tp.parallelize(model, layout_map)
    before = keras_tp.full_weights(model)
    try:
        model.load_weights(other if dist.get_rank() == 1 else path)
    except Exception as error:
        after = keras_tp.full_weights(model)
        assert all((after[name] == value).all() for name, value in before.items())
        return f"{type(error).__name__}: {error}"
    return ""


def test_ranks_load_the_same_weights(ranks: Any, tmp_path: Path) -> None:
    """A stale copy on one host gave ranks shards of different trainings, in silence; the path need
    not be the same."""
    names = [str(tmp_path / f"{name}.weights.h5") for name in ("a", "copy", "other")]
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="dense")])
    model.save_weights(names[0])
    Path(names[1]).write_bytes(Path(names[0]).read_bytes())
    model.layers[0].kernel.assign(model.layers[0].kernel + 1)
    model.save_weights(names[2])
    assert ranks(2)(_load, names[0], names[1]) == ["", ""]
    for said in ranks(2)(_load, names[0], names[2]):
        assert said.startswith("LayoutError"), said
        assert "rank 0 is to load" in said, said
    for said in ranks(2)(_load, names[0], str(tmp_path / "none.weights.h5")):
        assert "LayoutError" in said
        assert "none.weights.h5" in said


def _export() -> str:
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="dense")])
    layout_map = keras.distribution.LayoutMap(keras_tp.device_mesh({"model": 2}))
    layout_map[".*dense/kernel"] = (None, "model")
    keras_tp.parallelize(model, layout_map)
    with pytest.raises(keras_tp.LayoutError) as error:
        model.export("nowhere", format="onnx")
    return str(error.value)


def test_exporting_shards_is_refused(ranks: Any) -> None:
    """The file would hold one rank's part, and wait for the others wherever it runs."""
    assert all("keras.saving.load_model" in said for said in ranks(2)(_export))


def _versions() -> str:
    import torch.distributed as dist

    from keras_tp import agreement

    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="dense")])
    layout_map = keras.distribution.LayoutMap(keras_tp.device_mesh({"model": 2}))
    layout_map[".*dense/kernel"] = (None, "model")
    original = agreement.__version__
    if dist.get_rank() == 1:
        agreement.__version__ = "0.0.7"
    try:
        with pytest.raises(keras_tp.LayoutError) as error:
            keras_tp.parallelize(model, layout_map)
    finally:
        agreement.__version__ = original
    return str(error.value)


def test_ranks_of_different_versions_are_refused(ranks: Any) -> None:
    """They may communicate otherwise, and then wait for each other."""
    for said in ranks(2)(_versions):
        assert "keras_tp 0.0.7. Install the same everywhere" in said
