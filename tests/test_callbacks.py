"""Callbacks and files of parallelized models: those of one process, written once.

Each rank trains the plain model by itself, with files of its own, and the parallelized
one with the others, with files that all share; then it compares both.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
import resource
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import distributed
import features
import keras
import numpy as np
import parity
import pytest
import torch.distributed as dist
from counting import Collectives
from features import MESHES, exact
from keras import callbacks, layers
from keras.saving import save_model  # by name, before anything is parallelized

import keras_tp
from keras_tp.seam.callbacks import initial_epoch
from keras_tp.seam.variables import ShardedVariable

LAYOUT = {".*dense/kernel": (None, "model"), ".*dense_1/kernel": ("model", None)}


def build() -> Any:
    dense = [layers.Dense(8, activation="tanh"), layers.BatchNormalization(), layers.Dense(6)]
    return keras.Sequential([keras.Input((5,)), *dense])


def data(rows: int = 24) -> tuple[Any, Any]:
    random = np.random.default_rng(4)
    return random.standard_normal((rows, 5)), random.standard_normal((rows, 6))


def made(axes: dict[str, int] | None, build: Callable[[], Any] = build, **options: Any) -> Any:
    """The model, compiled; parallelized over a mesh of these axes, or plain with None."""
    model = parity.build_seeded(build)
    if axes is not None:
        layout = LAYOUT if "model" in axes else {}
        keras_tp.parallelize(model, parity.layout_map(layout, axes))
        assert any(isinstance(v, ShardedVariable) for v in model.variables) == bool(layout)
    optimizer = keras.optimizers.Adam(0.02, **options)
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


def state(model: Any) -> list[Any]:
    return [v.numpy() for v in (*model.variables, *model.optimizer.variables)]


def gap(one: list[Any], many: list[Any]) -> float:
    return max(parity.difference(a, b) for a, b in zip(one, many, strict=True))


class Seen:
    """What a `LambdaCallback` is told."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.logs: list[dict[str, Any]] = []

    def batch(self, number: int, logs: Any) -> None:
        self.numbers.append(number)

    def epoch(self, number: int, logs: Any = None) -> None:
        self.numbers.append(number)
        self.logs.append(dict(logs or {}))


def runs(axes: dict[str, int], folder: str) -> Iterator[tuple[dict[str, int] | None, Path]]:
    """Plain with a folder of this rank's, then parallelized with the one of all ranks."""
    dist.barrier()
    for kind, where in ((None, Path(folder) / f"plain{dist.get_rank()}"), (axes, Path(folder))):
        where.mkdir(exist_ok=True)
        yield kind, where


def error_of(act: Callable[[], Any]) -> tuple[str, str]:
    try:
        act()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "nothing raised"


def table(path: Path) -> list[list[float]]:
    with open(path) as file:
        return [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]


def deciding(axes: dict[str, int], folder: str) -> dict[str, features.Found]:
    found: list[dict[str, Any]] = []
    x, y = data()
    with parity.real_float64():
        for kind, where in runs(axes, folder):
            model, seen = made(kind), Seen()
            stopping = callbacks.EarlyStopping(
                "val_loss", patience=4, restore_best_weights=True, start_from_epoch=1
            )
            plateau = callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=2)
            history = model.fit(
                x,
                y,
                batch_size=10,
                epochs=12,
                validation_data=(x, -y),  # gets worse and worse
                verbose=0,
                callbacks=[
                    stopping,
                    plateau,
                    callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
                    callbacks.TerminateOnNaN(),
                    callbacks.CSVLogger(where / "log.csv"),
                    callbacks.LambdaCallback(on_epoch_end=seen.epoch),
                    callbacks.ModelCheckpoint(
                        where / "best/{epoch:02d}.keras", save_best_only=True
                    ),
                    callbacks.ModelCheckpoint(
                        where / "deep/er/{epoch}-{batch}.weights.h5",
                        save_weights_only=True,
                        save_freq=4,
                    ),
                ],
            )
            assert 4 < len(history.history["loss"]) < 12  # or nothing was decided
            best = keras.models.load_model(where / "best/01.keras")
            late = keras.models.load_model(sorted((where / "best").iterdir())[-1])
            again = parity.build_seeded(build)
            again.compile("adam")
            again.optimizer.build(again.trainable_variables)
            again.load_weights(where / "deep/er/2-1.weights.h5")
            found.append(
                {
                    "EarlyStopping": state(model),
                    "ReduceLROnPlateau": [logs["learning_rate"] for logs in seen.logs],
                    "LearningRateScheduler": history.history["learning_rate"],
                    "LambdaCallback": [list(logs.values()) for logs in seen.logs],
                    "CSVLogger": table(where / "log.csv"),
                    "ModelCheckpoint, models": [*state(best), *state(late)],
                    "ModelCheckpoint, weights": state(again),
                    "compiled": best.get_compile_config(),
                    "files": sorted(
                        str(path.relative_to(where))
                        for path in where.rglob("*")
                        if "plain" not in str(path.relative_to(where))
                    ),
                }
            )
        nan = x.copy()
        nan[15] = math.nan
        counts = []
        averages = []
        for kind, _ in runs(axes, folder):
            model = made(kind)
            seen = Seen()
            count = callbacks.LambdaCallback(on_train_batch_end=seen.batch)
            model.fit(nan, y, batch_size=4, epochs=2, verbose=0, shuffle=False,
                      callbacks=[callbacks.TerminateOnNaN(), count])  # fmt: skip
            counts.append(seen.numbers)
            model = made(kind, use_ema=True, ema_momentum=0.8)
            swapped = callbacks.SwapEMAWeights(swap_on_epoch=True)
            model.fit(x, y, batch_size=8, epochs=2, verbose=0, validation_data=(x, y),
                      callbacks=[swapped])  # fmt: skip
            averages.append([*state(model), model.evaluate(x, y, verbose=0, callbacks=[
                callbacks.SwapEMAWeights()])])  # fmt: skip
        assert counts[0] == [0, 1, 2, 3]
    one, many = found
    for same in ("compiled", "files"):
        assert one.pop(same) == many.pop(same)
    gaps = {name: exact(gap(value, many[name])) for name, value in one.items()}
    gaps["TerminateOnNaN"] = exact(gap(*counts))
    gaps["SwapEMAWeights"] = exact(gap(*averages))
    return gaps


@pytest.mark.parametrize("mesh", MESHES)
def test_callbacks_decide_as_in_one_process(
    ranks: Any, mesh: str, tmp_path: Path, record_property: Any
) -> None:
    """Every rank opened the same CSV file and wrote each row, all of them wrote each checkpoint
    into the same file at once, and one of two that made its folder failed."""
    axes = MESHES[mesh]
    answers = ranks(math.prod(axes.values()))(deciding, axes, str(tmp_path))
    features.note(record_property, "callbacks", mesh, answers)


class InterruptedTrainingError(Exception):
    pass


class Interrupts(callbacks.Callback):
    """Ends training within an epoch, on every rank."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.model.optimizer.iterations.numpy() == 8:
            raise InterruptedTrainingError


def resuming(axes: dict[str, int], folder: str) -> dict[str, features.Found]:
    x, y = data()
    gaps: dict[str, features.Found] = {}
    options = {"batch_size": 8, "epochs": 4, "shuffle": False, "verbose": 0}
    with parity.real_float64():
        whole = made(None)
        whole.fit(x, y, **options)
        for name, how in {
            "epochs": {},
            "batches": {"save_freq": 4},
            "a file that is damaged": {"double_checkpoint": True},
        }.items():
            ends = []
            for kind, where in runs(axes, f"{folder}/"):
                backup = where / name
                with contextlib.suppress(InterruptedTrainingError):
                    made(kind).fit(x, y, **options, callbacks=[
                        callbacks.BackupAndRestore(str(backup), **how), Interrupts()
                    ])  # fmt: skip
                assert backup.exists()
                dist.barrier()
                if "damaged" in name and (kind is None or dist.get_rank() == 0):
                    latest = backup / "latest.weights.h5"
                    latest.write_bytes(latest.read_bytes()[:100])
                dist.barrier()
                model = made(kind)
                seen = Seen()
                began = callbacks.LambdaCallback(on_epoch_begin=seen.epoch)
                restore = callbacks.BackupAndRestore(str(backup), **how)
                model.fit(x, y, **options, callbacks=[restore, began])
                assert not backup.exists()  # on no rank
                ends.append([*state(model), seen.numbers, [initial_epoch(model)]])
            gaps[f"BackupAndRestore, {name}"] = exact(gap(*ends))
            if name == "epochs":
                assert seen.numbers == [2, 3]
                gaps["BackupAndRestore, uninterrupted"] = exact(gap(state(whole), ends[1][:-2]))
    return gaps


@pytest.mark.parametrize("mesh", MESHES)
def test_an_interrupted_run_goes_on_where_it_was(
    ranks: Any, mesh: str, tmp_path: Path, record_property: Any
) -> None:
    """Ranks that each look whether there is a backup find one or none, as fast as they are; those
    that restore each by itself copied the older file over the newer at once."""
    axes = MESHES[mesh]
    answers = ranks(math.prod(axes.values()))(resuming, axes, str(tmp_path))
    features.note(record_property, "callbacks", mesh, answers)


def saving(axes: dict[str, int], folder: str) -> tuple[list[int], list[Any], list[str]]:
    model = made(axes)
    x, y = (a.astype("float32") for a in data())
    model.fit(x, y, batch_size=8, verbose=0)
    full = state(model)
    written: list[int] = []
    replace = os.replace

    def counted(*args: Any) -> None:
        written.append(1)
        replace(*args)

    os.replace = counted
    counts = []
    try:
        for save in SAVES:
            save(model, folder)
            counts.append(len(written))
    finally:
        os.replace = replace
    # At once, with no barrier between, on every rank.
    later = keras.models.load_model(f"{folder}/a.keras")
    assert all((a == b).all() for a, b in zip(full, state(later), strict=True))
    model.load_weights(f"{folder}/c.weights.h5")
    assert all((a == b).all() for a, b in zip(full, state(model), strict=True))
    return counts, full, sorted(os.listdir(folder))


SAVES: list[Callable[[Any, str], Any]] = [
    lambda model, folder: model.save(f"{folder}/a.keras"),
    lambda model, folder: save_model(model, Path(folder) / "b.keras"),
    lambda model, folder: model.save_weights(f"{folder}/c.weights.h5"),
    lambda model, folder: keras.saving.save_weights(model, f"{folder}/d.weights.h5"),
    lambda model, folder: model.save_weights(f"{folder}/e.weights.json", max_shard_size=1e-6),
    lambda model, folder: model.save(f"{folder}/f", zipped=False),
    lambda model, folder: model.save(f"{folder}/new/g.h5"),
]

READING = """
import sys, numpy as np, keras
folder = sys.argv[1]
def state(model):
    return [v.numpy() for v in (*model.variables, *model.optimizer.variables)]
found = {}
for name in ("a.keras", "b.keras", "f"):
    found[name] = state(keras.models.load_model(f"{folder}/{name}"))
# (Keras does not read the loss that it has written there.)
old = keras.models.load_model(f"{folder}/new/g.h5", compile=False)
found["new/g.h5"] = [v.numpy() for v in old.variables]
model = keras.models.load_model(f"{folder}/a.keras")
for name in ("c.weights.h5", "d.weights.h5", "e.weights.json"):
    for v in (*model.variables, *model.optimizer.variables):
        v.assign(np.zeros(v.shape))
    model.load_weights(f"{folder}/{name}")
    found[name] = state(model)
assert "keras_tp" not in sys.modules
named = {f"{name}:{i}": a for name, arrays in found.items() for i, a in enumerate(arrays)}
np.savez(f"{folder}/read.npz", **named)
"""


def test_files_are_written_once_and_are_plain(ranks: Any, tmp_path: Path) -> None:
    """Every rank wrote the same file at once, in place: a reader found half of it, or HDF5's lock.
    And a file that only the job itself can read is no checkpoint."""
    first, *others = ranks(2)(saving, {"model": 2}, str(tmp_path))
    counts, full, names = first
    assert np.diff([0, *counts]).min() > 0
    for other, _, _ in others:
        assert set(other) == {0}
    assert not [name for name in names if name.startswith(".")]
    environment = {**os.environ, "PYTHONPATH": ""}
    code = [sys.executable, "-W", "ignore", "-c", READING, str(tmp_path)]
    subprocess.run(code, check=True, env=environment, timeout=120)
    with np.load(tmp_path / "read.npz") as read:
        assert {key.split(":")[0] for key in read} == {
            *("a.keras", "b.keras", "c.weights.h5", "d.weights.h5", "e.weights.json"),
            *("f", "new/g.h5"),
        }
        for key in read:
            assert (read[key] == full[int(key.split(":")[1])]).all(), key


class Unwritable(layers.Dense):
    """A disk that is full after the first layer, for whoever writes."""

    full = False

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self.full:
            raise OSError(28, "No space left on device")


def failing(folder: str) -> dict[str, Any]:
    def build() -> Any:
        names = [Unwritable(8, name="dense"), layers.Dense(6, name="dense_1")]
        return keras.Sequential([keras.Input((5,)), *names])

    model, rank = made({"model": 2}, build), dist.get_rank()
    path = f"{folder}/a.weights.h5"
    model.save_weights(path)
    before = Path(path).read_bytes()
    model.layers[1].kernel.assign(np.ones((8, 6)))
    told: dict[str, Any] = {}

    def save(**options: Any) -> Callable[[], Any]:
        return lambda: model.save_weights(path, **options)

    Unwritable.full = True
    told["full"] = error_of(save())
    Unwritable.full = False
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1000, hard)
    )  # of this process, so that a write fails
    try:
        told["limit"] = error_of(lambda: model.save(f"{folder}/b.keras"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told["folder"] = error_of(lambda: model.save_weights(f"{folder}/none/a.weights.h5"))
    told["paths"] = error_of(lambda: model.save_weights(f"{folder}/{rank}.weights.h5"))
    told["checkpoint"] = error_of(
        lambda: model.fit(
            *data(), verbose=0, callbacks=[callbacks.ModelCheckpoint(f"{folder}/a.weights.h5/b.h5")]
        )
    )
    asked: list[int] = []
    import builtins

    builtin = builtins.input

    def answering(answer: str) -> Any:
        def ask(question: str) -> str:
            asked.append(rank)
            if not answer:
                raise EOFError("nobody is there")
            return answer

        return ask

    try:
        builtins.input = answering("")
        told["nobody"] = error_of(save(overwrite=False))
        builtins.input = answering("n")
        model.save_weights(path, overwrite=False)
        told["kept"] = Path(path).read_bytes() == before
        builtins.input = answering("y")
        with contextlib.redirect_stdout(io.StringIO()):
            model.save_weights(path, overwrite=False)
        told["written"] = Path(path).read_bytes() != before
        told["asked"] = asked
        told["left"] = sorted(os.listdir(folder))
    finally:
        builtins.input = builtin
    return told


def test_an_error_of_writing_is_raised_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    """The others wait for ever for the one that writes, or go on as if there were a file."""
    first, second = ranks(2)(failing, str(tmp_path))
    assert (first.pop("asked"), second.pop("asked")) == ([0, 0, 0], [])
    assert first == second
    assert first["full"] == ("OSError", "[Errno 28] No space left on device")
    assert "rror" in first["limit"][0]
    assert first["folder"][0] == "FileNotFoundError"
    assert "0.weights.h5' where rank 1 is given" in first["paths"][1]
    assert first["checkpoint"][0] in ("NotADirectoryError", "FileExistsError")
    assert first["nobody"] == ("EOFError", "nobody is there")
    assert first["kept"]
    assert first["written"]
    assert first["left"] == ["a.weights.h5"]  # nothing half written


def printed(act: Callable[[], Any]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        act()
    # Bars come and go as fast as a rank is.
    lines = re.sub(r"[\x08\r]+", "\n", text.getvalue())
    lines = re.sub(r"\x1b\[\d+m|\d+(ms|us|s)(/\w+)?|━", "", lines)
    return "\n".join(dict.fromkeys(line.strip() for line in lines.splitlines()))


def printing(axes: dict[str, int], folder: str) -> list[str]:
    x, y = (a.astype("float32") for a in data())
    texts = []
    for kind, where in runs(axes, folder):
        model = made(kind)
        stopping = callbacks.EarlyStopping("loss", patience=0, min_delta=9.0, verbose=1)
        checkpoint = callbacks.ModelCheckpoint(where / "a.keras", verbose=1)
        rate = callbacks.LearningRateScheduler(lambda epoch, rate: rate * 1.0, verbose=1)

        def train(model: Any = model, given: Any = (stopping, checkpoint, rate)) -> None:
            model.fit(x, y, epochs=3, batch_size=24, verbose=1, callbacks=list(given))
            model.fit(x, y, epochs=1, batch_size=24, verbose=2)

        texts.append(printed(train).replace(str(where), ""))
        texts.append(printed(lambda model=model: model.evaluate(x, y, batch_size=24)))
        texts.append(printed(lambda model=model: model.predict(x, batch_size=24)))
    return texts


def test_one_rank_prints(ranks: Any, tmp_path: Path) -> None:
    """As many progress bars as ranks, over each other."""
    first, second = ranks(2)(printing, {"model": 2}, str(tmp_path))
    assert all(first)
    for plain, one in zip(first[:3], first[3:], strict=True):
        numbers = r"\d+\.\d+(e-\d+)?"
        assert re.sub(numbers, "N", plain) == re.sub(numbers, "N", one)
    for said in ("early stopping", "saving model to", "LearningRateScheduler setting", "1/1"):
        assert said in first[3]
    assert all(second[:3])  # plain models, which are this rank's own affair
    assert second[3:] == ["", "", ""]


class Uneven(keras.metrics.Metric):
    """A number that is not the same on every rank, as sums of a GPU are not to the last bit."""

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        pass

    def result(self) -> Any:
        return keras.ops.convert_to_tensor(1.0 + dist.get_rank())


class Clock(callbacks.Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if dist.get_rank() == 1 and batch == 1:
            self.model.stop_training = True

    def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
        if dist.get_rank() == 1:
            self.model.stop_predicting = True


def disagreeing() -> tuple[Any, ...]:
    x, y = data()
    model = made({"model": 2})
    model.compile("sgd", "mse", metrics=[Uneven(name="uneven")])
    stopping = callbacks.EarlyStopping("uneven", baseline=1.5, patience=2, mode="min")
    plain = made(None)
    ended = model.fit(x, y, epochs=5, verbose=0, callbacks=[stopping]).epoch
    seen = Seen()
    count = callbacks.LambdaCallback(on_train_batch_end=seen.batch)
    model.fit(x, y, batch_size=4, epochs=5, verbose=0, callbacks=[Clock(), count])
    rows = len(model.predict(x, batch_size=4, verbose=0, callbacks=[Clock()]))
    mine = [callbacks.TerminateOnNaN()] if dist.get_rank() == 0 else None
    refused = error_of(lambda: model.fit(x, y, verbose=0, callbacks=mine))
    alone = callbacks.LambdaCallback() if dist.get_rank() == 0 else Clock()
    if dist.get_rank() == 1:  # a model of this rank's own is nobody else's affair
        plain.fit(x, y, verbose=0, callbacks=[alone])
    return ended, seen.numbers, rows, refused


def test_ranks_that_find_otherwise_go_on_alike(ranks: Any) -> None:
    """One rank stops and the others wait for it in the next step, for half an hour."""
    first, second = ranks(2)(disagreeing)
    assert first == second
    ended, batches, rows, (kind, message) = first
    assert ended == [0, 1, 2]  # the second rank alone would have ended after two
    assert batches == [0, 1]
    assert rows == 4
    assert kind == "LayoutError"
    assert "rank 0 has TerminateOnNaN where rank 1 has nothing" in message


def counting(folder: str) -> list[dict[str, int]]:
    x, y = data()
    model = made({"model": 2})
    # The 16th batch is compared, and then the 32nd.
    model.fit(x[:18], y[:18], batch_size=1, epochs=1, verbose=0)
    counts = []
    for given in (
        None,
        [callbacks.LambdaCallback()],
        [callbacks.CSVLogger(f"{folder}/log.csv")],
        [callbacks.ModelCheckpoint(f"{folder}/" + "{epoch}.keras", initial_value_threshold=0.0,
                                   save_best_only=True, monitor="loss", mode="min")],
    ):  # fmt: skip
        with Collectives() as counted:
            model.fit(x[:4], y[:4], batch_size=2, verbose=0, callbacks=given)
        counts.append(counted)
    return [dict((more - counts[0]).items()) for more in counts[1:]]


def test_what_callbacks_cost(ranks: Any, tmp_path: Path) -> None:
    """A collective too many for each batch is slow and right. Here of two batches and one epoch."""
    for own, logger, checkpoint in ranks(2)(counting, str(tmp_path)):
        # Whether to stop, three times; where training begins, which is two broadcasts.
        assert own == {"all_reduce": 3, "broadcast": 2}
        # And three events.
        assert logger == {"all_reduce": 3, "broadcast": 2 + 3}
        # And each batch, the epoch, and where it begins: nothing is saved, and no weight read.
        assert checkpoint == {"all_reduce": 3, "broadcast": 2 + 4}
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


class Predicts(callbacks.ModelCheckpoint):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.predict(data()[0], verbose=0)


class Assigns(callbacks.ModelCheckpoint):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = 0.5


class Reads(callbacks.ModelCheckpoint):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        weights = self.model.get_weights()
        assert (self.model.layers[0].kernel + 0.0).shape == weights[0].shape
        Path(self.filepath).with_suffix(".txt").write_text(str(dist.get_rank()))


class ReadsAnother(callbacks.ModelCheckpoint):
    other: Any = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.other.get_weights()


def derived(folder: str) -> list[tuple[str, str]]:
    x, y = data()
    ReadsAnother.other = made({"model": 2})
    told = []
    for cls in (Predicts, Assigns, Reads, ReadsAnother):
        model = made({"model": 2})
        checkpoint = cls(f"{folder}/a.keras")
        told.append(error_of(lambda: model.fit(x, y, verbose=0, callbacks=[checkpoint])))  # noqa: B023
    with contextlib.chdir(Path(folder) / str(dist.get_rank())):  # each on a disk of its own
        for kept in (True, False):
            restore = callbacks.BackupAndRestore("backup", delete_checkpoint=not kept)
            last = error_of(lambda: model.fit(x, y, verbose=0, callbacks=[restore]))  # noqa: B023
    return [*told, last]


def test_what_a_callback_of_the_first_rank_cannot_do_is_told(ranks: Any, tmp_path: Path) -> None:
    """A subclass of ModelCheckpoint that predicts waits for ranks that do not; what it assigns is
    one rank's alone."""
    for rank in "01":
        (tmp_path / rank).mkdir()
    first, second = ranks(2)(derived, str(tmp_path))
    assert first == second
    predicts, assigns, reads, another, restores = first
    assert "it computes with the model" in predicts[1]
    assert "it assigns to 'adam/learning_rate'" in assigns[1]
    assert reads == ("", "nothing raised")
    assert "no part of 'sequential" in another[1]
    assert (tmp_path / "a.txt").read_text() == "0"
    assert restores[0] == "OSError"
    assert "rank 1 cannot load 'backup/latest.weights.h5'" in restores[1]


class Summary:
    """Stands in for `tensorflow.summary`, which TensorBoard writes by: a line for each."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.experimental = types.SimpleNamespace(summary_scope=self.scope)

    def create_file_writer(self, folder: str) -> Any:
        os.makedirs(folder, exist_ok=True)
        Path(folder, f"events.{dist.get_rank()}").touch()
        return types.SimpleNamespace(
            as_default=lambda step=None: contextlib.nullcontext(), flush=lambda: None,
            close=lambda: None,
        )  # fmt: skip

    @contextlib.contextmanager
    def scope(self, *args: Any) -> Iterator[Any]:
        yield "graph", None

    def write(self, **kwargs: Any) -> None:
        self.lines.append("graph")

    def record_if(self, condition: Any) -> Any:
        return contextlib.nullcontext()

    def scalar(self, name: str, value: Any, step: Any = None) -> None:
        self.lines.append(name)

    def histogram(self, name: str, weight: Any, step: Any = None) -> None:
        self.lines.append(f"{name} {np.asarray(weight.numpy()).sum():.4f}")

    def image(self, name: str, image: Any, step: Any = None) -> None:
        self.lines.append(f"{name} {image.shape}")


def boarding(axes: dict[str, int], folder: str) -> list[list[str]]:
    x, y = (a.astype("float32") for a in data())
    found = []
    for kind, where in runs(axes, folder):
        model = made(kind)  # which looks whether there is a TensorFlow, to seed it
        summary = Summary()
        fake = types.ModuleType("tensorflow")
        fake.summary = summary  # type: ignore[attr-defined]
        compat = types.ModuleType("tensorflow.compat.v1")
        compat.SummaryMetadata = lambda: types.SimpleNamespace(  # type: ignore[attr-defined]
            plugin_data=types.SimpleNamespace()
        )
        modules = {
            "tensorflow": fake,
            "tensorflow.summary": summary,
            "tensorflow.compat": types.ModuleType("tensorflow.compat"),
            "tensorflow.compat.v1": compat,
        }
        before = {name: sys.modules.get(name) for name in modules}
        sys.modules.update(modules)  # type: ignore[arg-type]
        try:
            board = callbacks.TensorBoard(
                where / "logs", histogram_freq=1, write_images=True, update_freq="batch"
            )
            model.fit(x, y, epochs=2, verbose=0, validation_data=(x, y), callbacks=[board])
            model.evaluate(x, y, verbose=0, callbacks=[board])
        finally:
            for name, module in before.items():
                sys.modules.pop(name)
                if module is not None:
                    sys.modules[name] = module
        found.append(summary.lines)
    return found


def test_tensorboard_is_written_once_and_reads_whole_weights(ranks: Any, tmp_path: Path) -> None:
    """With a stand-in for TensorFlow, by which Keras writes. Histograms of weights are read on the
    rank that writes, which waited for ranks that did not."""
    (plain, one), (_, other) = ranks(2)(boarding, {"model": 2}, str(tmp_path))
    assert "graph" in plain
    assert any("dense/kernel/histogram" in line for line in plain)
    assert one == plain
    assert other == []
    events = sorted(path.name for path in (tmp_path / "logs").rglob("events*"))
    assert events == ["events.0", "events.0"]


def without_tensorflow(folder: str) -> tuple[str, str]:
    sys.modules["tensorflow"] = None  # type: ignore[assignment]  # cannot be imported
    try:
        model = made({"model": 2})
        return error_of(
            lambda: model.fit(*data(), verbose=0, callbacks=[callbacks.TensorBoard(folder)])
        )
    finally:
        del sys.modules["tensorflow"]


def test_tensorboard_without_tensorflow_is_keras_error_on_every_rank(
    ranks: Any, tmp_path: Path
) -> None:
    """The first rank has it alone, and the others wait."""
    for kind, _ in ranks(2)(without_tensorflow, str(tmp_path)):
        assert kind == "ModuleNotFoundError"


def under_a_distribution(which: str, folder: str) -> dict[str, float]:
    texts = []

    def script(scope: Any) -> dict[str, Any]:
        plain = scope is contextlib.nullcontext
        where = Path(folder) / (f"plain{dist.get_rank()}" if plain else "all")
        x, y = distributed.classes(12)
        with scope():
            model = keras.Sequential(
                [keras.Input((6,)), layers.Dense(8, activation="tanh"), layers.Dense(4)]
            )
            model.compile(keras.optimizers.Adam(0.02), "mse")
            model.save(where.with_suffix(".keras"))  # before it is planned
            with contextlib.redirect_stdout(io.StringIO()) as text:
                history = model.fit(
                    x,
                    y,
                    epochs=6,
                    batch_size=4,
                    validation_data=(x, -y),
                    verbose=2,
                    callbacks=[
                        callbacks.ModelCheckpoint(where / "a.keras", save_best_only=True),
                        callbacks.BackupAndRestore(str(where / "backup")),
                        callbacks.CSVLogger(where.with_suffix(".csv")),
                        callbacks.EarlyStopping(patience=2, restore_best_weights=True),
                    ],
                )
                model.predict(x)
            texts.append(bool(text.getvalue()))
        assert len(history.epoch) < 6
        before = keras.models.load_model(where.with_suffix(".keras"), compile=False)
        best = keras.models.load_model(where / "a.keras")

        def joined(arrays: Any) -> Any:
            return np.concatenate([array.ravel() for array in arrays])

        return {
            "parallelized": not plain,
            "end": joined(v.numpy() for v in model.variables),
            "before": joined(before.get_weights()),
            "best": joined(state(best)),
            "table": table(where.with_suffix(".csv")),
        }

    makers: dict[str, distributed.Maker] = {
        "DataParallel": distributed.data_parallel,
        "ModelParallel": lambda: distributed.model_parallel(
            (1, 2), {".*dense/kernel": (None, "model"), ".*dense_1/kernel": ("model", None)}
        ),
    }
    gaps = distributed.both(script, makers[which])
    # One process, which is made on the first rank, and that rank print; the other does not.
    assert texts == ([True, True] if dist.get_rank() == 0 else [False])
    return gaps


@pytest.mark.parametrize("which", ["DataParallel", "ModelParallel"])
def test_under_keras_distribution(ranks: Any, which: str, tmp_path: Path) -> None:
    """The model is parallelized once the first `fit` has begun, with its callbacks."""
    for gaps in ranks(2)(under_a_distribution, which, str(tmp_path)):
        assert max(gaps.values()) < features.EXACT, gaps


def test_one_process_is_left_to_keras(tmp_path: Path) -> None:
    """On a mesh of one rank files are written as Keras writes them, and it prints."""
    script = tmp_path / "script.py"
    script.write_text(ALONE)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(keras_tp.__file__).parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert "Epoch 2/2" in done.stdout
    assert "written 0" in done.stdout


ALONE = """
import os, sys, keras_tp, keras, numpy as np
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
layout_map = keras.distribution.LayoutMap(keras_tp.device_mesh({"model": 1}))
layout_map[".*kernel"] = (None, "model")
keras_tp.parallelize(model, layout_map)
model.compile("sgd", "mse")
written = []
os.replace = lambda *args: written.append(args)
checkpoint = keras.callbacks.ModelCheckpoint(f"{sys.argv[1]}/a.keras")
model.fit(np.ones((4, 4)), np.ones((4, 4)), epochs=2, callbacks=[checkpoint])
keras.models.load_model(f"{sys.argv[1]}/a.keras")
print("written", len(written))
"""
