"""A directory of checkpoints: which there are, how one comes to be there whole, which are kept.

Each is a folder `step-00000120`. It is written as a hidden one and renamed once all of it is on the
disk, so that a folder of that name is complete, whenever the job was killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keras_tp.manifests import NAME, Manifest


class Archive:
    """The checkpoints of one job in one directory, which belongs to that job alone.

    Args:
        directory: where they are; made by the first one.
    """

    def __init__(self, directory: Any):
        self.directory = Path(os.path.abspath(directory))

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, the newest first."""
        with contextlib.suppress(FileNotFoundError):
            names = [re.fullmatch(r"step-(\d+)", name) for name in os.listdir(self.directory)]
            return sorted((int(name.group(1)) for name in names if name), reverse=True)
        return []

    def folder(self, step: int) -> Path:
        """Where the checkpoint of `step` is."""
        return self.directory / f"step-{step:08d}"

    def begin(self, step: int) -> Path:
        """A hidden folder to write into. What killed jobs have left of theirs goes.

        Raises:
            OSError: a directory that cannot be written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
        made = self.directory / f".step-{step:08d}.{uuid.uuid4().hex[:8]}"
        made.mkdir()
        return made

    def publish(self, made: Path, manifest: Manifest, keep: int | None) -> None:
        """Makes what `begin` gave a checkpoint, and deletes all but the newest `keep`.

        Raises:
            OSError: files that are not there, or not of the size they were written in.
        """
        for name, size in manifest.files.items():
            found = (made / name).stat().st_size
            if found != size:
                raise OSError(f"'{name}' has {found} bytes of the {size} that were written.")
        with open(made / NAME, "w") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        _sync(made)
        target = self.folder(manifest.step)
        if target.exists():  # a folder takes the place of an empty one only
            self._hide(target)
        os.rename(made, target)
        _sync(self.directory)
        for old in [] if keep is None else [s for s in self.steps() if s <= manifest.step][keep:]:
            self._hide(self.folder(old))
        for hidden in self.directory.glob(".step-old.*"):
            shutil.rmtree(hidden, ignore_errors=True)

    def _hide(self, folder: Path) -> None:
        # Before it is deleted, which a job may be killed at: half of it is no checkpoint.
        os.rename(folder, self.directory / f".step-old.{uuid.uuid4().hex[:8]}")

    def read(self, step: int) -> str:
        """The text of the manifest of `step`.

        Raises:
            OSError: there is none.
        """
        return (self.folder(step) / NAME).read_text()

    def damages(self, manifest: Manifest) -> Iterator[str]:
        """What is missing or of another size, of the files of a checkpoint."""
        folder = self.folder(manifest.step)
        for name, size in manifest.files.items():
            try:
                found = (folder / name).stat().st_size
            except OSError as error:
                yield f"'{folder / name}' cannot be read ({error.strerror or error})."
            else:
                if found != size:
                    yield f"'{folder / name}' has {found} bytes, {size} were written."


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
