"""Files of a parallelized model: all ranks give what they hold, the first writes, whole or not.

What is called on one rank alone is found out before anybody waits for the others.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from keras_tp.agreement import first_difference
from keras_tp.errors import LayoutError
from keras_tp.leading import held_together, lead, load_everywhere, sharded_variables
from keras_tp.roll_calls import call_roll
from keras_tp.seam.contexts import current_leader
from keras_tp.seam.saving import Write, is_local


class FileWork:
    """See `keras_tp.seam.saving.Work`."""

    def takes_over(self, model: Any) -> bool:
        return held_together(model)

    def save(self, model: Any, path: Any, write: Write, parents: bool) -> None:
        """Has the first rank write. All ranks return, or raise, once it has. Collective.

        A rank that is found to be alone writes by itself if it holds all there is, as replicas do.

        Raises:
            LayoutError: on every rank, if one is given another path; on those that call it, if
                others cannot come any more, and hold a part.
            Exception: on every rank, what writing raises on the first.
        """
        _first_writes(model, path, lambda: write_whole(path, write, parents))

    def load(self, model: Any, path: Any, load: Callable[[], None]) -> None:
        """Has every rank load, of files that are found alike. Collective.

        Raises:
            LayoutError: on every rank, if one is to load another file; on those that call it, if
                others cannot come any more.
            Exception: what loading raises.
            OSError: another rank cannot load what this one can.
        """
        missing = call_roll("loading")
        if missing:
            why = "Each rank loads its part"
            raise _alone(f"loading '{model.name}'", why, missing)
        different = first_difference([_fingerprint(path)])
        if different is not None:
            first, rank, other = different
            raise LayoutError(
                f"rank 0 is to load {first} where rank {rank} is to load {other}. Give every rank "
                "the same weights, in one file that all can read or in copies of it.",
                where=f"loading '{model.name}'",
            )
        load_everywhere(path, load)

    def export(self, model: Any) -> NoReturn:
        """Refuses: what is exported would be one rank's part, with its collectives."""
        raise LayoutError(
            f"'{model.name}' is spread over {dist.get_world_size()} ranks, and an exported program "
            "runs in one process. Save it (model.save('model.keras'), on every rank), load that "
            "with keras.saving.load_model in a process of its own, and export it there.",
            where="model.export",
        )

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
        missing = call_roll("saving")
        if missing and sharded_variables(model):
            raise _alone(f"saving '{model.name}'", "Each rank holds a part of its weights", missing)
        if missing:
            write()
            return
        different = first_difference([str(path)])
        if different is not None:
            first, rank, other = different
            raise LayoutError(
                f"rank 0 is given the path '{first}' where rank {rank} is given '{other}'. The "
                "first rank alone writes the file: give every rank the same path.",
                where=f"saving '{model.name}'",
            )
    lead(model, write)


def _alone(what: str, why: str, missing: str) -> LayoutError:
    return LayoutError(
        f"rank {dist.get_rank()} waits for ranks that do not come. {missing} {why}: call it on "
        "every rank, with one path, and not under `if rank == 0`. (The first rank alone writes.)",
        where=what,
    )


# How much of a file is looked at to tell it from another: so many blocks, evenly spread, of bytes.
_BLOCKS, _BLOCK = 256, 4096


def _fingerprint(path: Any) -> str:
    """A file or folder in so many bytes and a checksum of samples; what is no local one as it is.

    Weights of two states of a training differ nearly everywhere, so that samples tell.
    """
    if not is_local(path) or not os.path.exists(path):
        return f"'{path}'"
    checksum, total = 0, 0
    place = Path(path)
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if file.is_file():
            size = file.stat().st_size
            total += size
            with open(file, "rb") as stream:
                for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
                    stream.seek(start)
                    checksum = zlib.crc32(stream.read(_BLOCK), checksum)
    return f"{total} bytes of checksum {checksum:08x}"


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
