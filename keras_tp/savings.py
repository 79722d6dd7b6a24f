"""A checkpoint while it is written: by all ranks, beside the training or while they wait for it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import torch
import torch.distributed as dist

from keras_tp.archives import Archive
from keras_tp.contents import Contents
from keras_tp.errors import CheckpointError
from keras_tp.manifests import Manifest
from keras_tp.mesh import group_aside
from keras_tp.randomness import random_state
from keras_tp.storage import SavePlanner, saved_tensors, write_metadata, write_part
from keras_tp.version import __version__


class Crew:
    """Those who save or load together: all ranks of the job, or this process alone.

    They talk in a group of their own, so that a thread can beside the training. Collective to
    make the first time.
    """

    def __init__(self, together: bool):
        self.group = group_aside() if together else None
        self.rank = dist.get_rank() if together else 0

    def told(self, mine: Any) -> list[Any]:
        """What each rank says (pickled, from process to process). Collective."""
        if self.group is None:
            return [mine]
        everyone: list[Any] = [None] * self.group.size()
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def agree(self, problems: list[str], mine: str, what: str) -> None:
        """Collective.

        Raises:
            CheckpointError: on every rank, if one has problems, or another line than the first.
        """
        told = self.told((problems, mine))
        found = list(dict.fromkeys(p for problems, _ in told for p in problems))
        different = [(rank, line) for rank, (_, line) in enumerate(told) if line != told[0][1]]
        if different:
            rank, line = different[0]
            found.append(
                f"rank 0 is to save or load {told[0][1]}, rank {rank} {line}: give every rank the "
                "same."
            )
        if found:
            raise CheckpointError(found, where=what)

    def do(self, act: Callable[[], Any], failing: Callable[[str], str]) -> list[Any]:
        """What `act` gives on each rank. Collective.

        Raises:
            OSError: on every rank, if it fails on any; `failing` makes the message of a line for
                each rank that did.
        """
        made, failure, number = None, None, None
        try:
            made = act()
        except Exception as error:
            number = getattr(error, "errno", None)
            failure = f"rank {self.rank}: {type(error).__name__}: {error}"
        everyone = self.told((made, failure, number))
        failures = [failure for _, failure, _ in everyone if failure is not None]
        if failures:
            numbers = [number for _, _, number in everyone if number is not None]
            message = failing("\n  ".join(failures))
            raise OSError(numbers[0], message) if numbers else OSError(message)
        return [made for made, _, _ in everyone]


@dataclass
class Work:
    """One checkpoint to be written.

    Attributes:
        crew: who writes.
        archive: where to.
        folder: the hidden folder in it.
        step, extra, keep: as for `keras_tp.save_checkpoint`.
        contents: what.
        copied: whether to copy it at once, so that it may change afterwards.
        begun: the random state of this rank as it began to read its data, if that is known.
    """

    crew: Crew
    archive: Archive
    folder: Path
    step: int
    extra: dict[str, Any]
    keep: int | None
    contents: Contents
    copied: bool
    begun: Any = None

    def __post_init__(self) -> None:
        self.random = {"now": random_state(), "begun": self.begun}
        self.optimizer = self.contents.optimizer
        self.planner = SavePlanner(self.contents.stored(self.copied))
        self.planner.set_up_planner(self.contents.tensors())
        self.plan = self.planner.create_local_plan()
        del self.contents

    def write(self) -> None:
        """Writes it, or leaves nothing behind. Three small all-gathers of the crew.

        Raises:
            OSError: on every rank, with what each has to say.
        """
        try:
            self._write()
        except BaseException:
            if self.crew.rank == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _write(self) -> None:
        crew, made = self.crew, {}
        told = crew.told((self.plan, self.random))
        first = told[0][1]
        others = {str(rank): s for rank, (_, s) in enumerate(told) if s != first}

        def write_mine() -> Any:
            plans, made["metadata"] = self.planner.create_global_plan([plan for plan, _ in told])
            return write_part(self.folder, self.planner, plans, crew.rank)

        everywhere = crew.do(write_mine, self._failing)

        def finish() -> None:
            if crew.rank > 0:
                return
            tensors = saved_tensors(made["metadata"], everywhere)
            write_metadata(self.folder, made["metadata"], everywhere)
            files = {path.name: path.stat().st_size for path in self.folder.iterdir()}
            named = {chunk.file for tensor in tensors.values() for chunk in tensor.chunks}
            missing = sorted(named - set(files))
            if missing:
                raise OSError(f"{missing} are not there: give all ranks one directory.")
            made_by = {
                "keras_tp": __version__,
                "keras": keras.__version__,
                "torch": torch.__version__,
                "ranks": len(told),
            }
            manifest = Manifest(
                self.step,
                self.extra,
                tensors,
                files,
                self.optimizer,
                {"first": first, "others": others},
                made_by,
            )
            self.archive.publish(self.folder, manifest, self.keep)

        crew.do(finish, self._failing)

    def _failing(self, failures: str) -> str:
        return (
            f"the checkpoint of step {self.step} in '{self.archive.directory}' was not written\n  "
            f"{failures}\nThose that were complete before are still there. Make room (keep=... "
            "deletes older ones), or give another directory, one that every rank can write."
        )


class Saving:
    """A checkpoint that is being written, or has been.

    Attributes:
        step: its step.
        path: the folder that it is in, once it is there.
    """

    def __init__(self, work: Work):
        self.step, self.path = work.step, work.archive.folder(work.step)
        self._error: Exception | None = None
        self._work: Work | None = work
        # Not a daemon: a program that ends waits until its last checkpoint is there.
        self._thread = threading.Thread(target=self._run, name="keras_tp checkpoint")

    def start(self, asynchronous: bool) -> None:
        """Writes it, in a thread of its own if `asynchronous`. Errors are kept for `wait`."""
        if asynchronous:
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        try:
            self._work.write()  # type: ignore[union-attr]
        except Exception as error:
            self._error = error
        finally:
            self._work = None  # and with it the copies

    def done(self) -> bool:
        """Whether it is there, or has failed."""
        return self._work is None

    def wait(self) -> None:
        """Returns once it is there.

        Raises:
            OSError: it could not be written. On every rank, and once.
        """
        if self._thread.is_alive():
            self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
