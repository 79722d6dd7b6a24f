"""Files of a parallelized model: all ranks give what they hold, the first writes, whole or not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from keras_tp.agreement import first_difference
from keras_tp.errors import LayoutError
from keras_tp.leading import held_together, lead
from keras_tp.seam.contexts import current_leader
from keras_tp.seam.saving import Write, is_local


class FileWork:
    """See `keras_tp.seam.saving.Work`."""

    def takes_over(self, model: Any) -> bool:
        return held_together(model)

    def save(self, model: Any, path: Any, write: Write, parents: bool) -> None:
        """Has the first rank write. All ranks return, or raise, once it has. Collective.

        Raises:
            LayoutError: on every rank, if one is given another path.
            Exception: on every rank, what writing raises on the first.
        """
        _first_writes(model, path, lambda: write_whole(path, write, parents))

    def ask(self, model: Any, path: Any, ask: Callable[[], bool]) -> bool:
        """Has the first rank ask. The others go on to `save`, and there learn the answer."""
        if current_leader() is not None:
            return ask()
        if dist.get_rank() > 0:
            return True
        try:
            proceed = ask()
        except BaseException as error:
            failure = error  # such as that of input() where there is nobody to ask
            _first_writes(model, path, lambda: _raise(failure))
            raise
        if not proceed:
            _first_writes(model, path, lambda: None)
        return proceed


def _raise(error: BaseException) -> None:
    raise error


def _first_writes(model: Any, path: Any, write: Callable[[], None]) -> None:
    if current_leader() is None:
        different = first_difference([str(path)])
        if different is not None:
            first, rank, other = different
            raise LayoutError(
                f"rank 0 is given the path '{first}' where rank {rank} is given '{other}'. The "
                "first rank alone writes the file: give every rank the same path.",
                where=f"saving '{model.name}'",
            )
    lead(model, write)


def write_whole(path: Any, write: Write, parents: bool = False) -> None:
    """Has `write(other)` make what then takes the place of `path`, which is never half written.

    It is made in a hidden folder beside `path`, under the same name, and renamed;
    a job that is killed meanwhile leaves that folder. Of weights in several files the
    index comes last.

    Args:
        path: what is not in a file system is given to `write` as it is.
        write: writes a file or folder, or several.
        parents: whether to make the folders above `path`.
    """
    if not is_local(path):
        write(path)
        return
    target = Path(os.path.realpath(path))  # the file that a link stands for, not the link
    if parents:
        target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        write(os.path.join(folder, target.name))
        made = sorted(Path(folder).iterdir(), key=lambda entry: entry.suffix == ".json")
        for entry in made:
            _put(entry, target.parent / entry.name)


def _put(made: Path, place: Path) -> None:
    if made.is_dir() and place.is_dir():
        for entry in sorted(made.iterdir()):
            _put(entry, place / entry.name)
    else:
        os.replace(made, place)
