"""Checkpoints of which each rank writes and reads its shards.

A checkpoint is written whole or not at all (`keras_tp.archives`), and read whole into
memory of the host before anything of the model changes.
"""

from __future__ import annotations

import atexit
import functools
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_tp.archives import Archive
from keras_tp.contents import Contents
from keras_tp.errors import CheckpointError
from keras_tp.leading import held_together
from keras_tp.manifests import Manifest, extra_problems, misfits
from keras_tp.randomness import set_random_state
from keras_tp.savings import Crew, Saving, Work
from keras_tp.seam.stored import store
from keras_tp.storage import read_part

# The last that was begun. One is written at a time, for the threads of two would talk over each
# other's messages; and it is to be told of, at the latest as the next begins.
_LAST: list[Saving] = []


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been loaded.

    Attributes:
        step: the step that it was saved with.
        extra: what it was saved with besides.
        path: its folder.
        skipped: what was wrong with newer ones, of which `fall_back` has made nothing worse.
    """

    step: int
    extra: dict[str, Any]
    path: Path
    skipped: tuple[str, ...] = ()


def save_checkpoint(
    directory: Any,
    model: Any,
    *,
    step: int,
    extra: dict[str, Any] | None = None,
    keep: int | None = None,
    asynchronous: bool = False,
) -> Saving:
    """Saves a model, its optimizer and the random state, each rank what it stores.

    Weights, statistics, seeds of layers; slots, iterations, learning rate, loss scale, moving
    averages; state of metrics; the random states of Python, NumPy, torch and Keras. What ranks hold
    alike is written once. A checkpoint is a folder `step-00000120` that
    `torch.distributed.checkpoint` can read too, and comes into being by being renamed, once all
    of it is on the disk: it is complete or not there.

    Collective for a parallelized model: every rank of the job calls it, with one directory that all
    of them see and that belongs to this job. Two small all-gathers at once and three as it is
    written, in a process group of its own (made the first time); no weight is gathered.

    Args:
        directory: where checkpoints are; made if it is not there.
        model: a built Keras model, parallelized or not.
        step: the checkpoint's number. One of the same number is replaced.
        extra: what `load_checkpoint` is to give back, such as the epoch and the position in
            the data: names to numbers, strings, and lists and dicts of them. The first rank's
            is kept.
        keep: how many checkpoints there may be, the newest; by default all are kept.
        asynchronous: copy what this rank stores to the host's memory, return, and write it
            beside the training. Waits first for the one before.

    Returns:
        A `Saving`. Its `wait()` returns once the checkpoint is there, and raises what has
        gone wrong; so does the next call of this function, or of `load_checkpoint`.

    Raises:
        OSError: on every rank, a checkpoint that could not be written (this one, or an
            asynchronous one before): what each rank has to say. Older ones are as they were.
        CheckpointError: on every rank, a model that is not built, ranks that disagree, an
            `extra` that would not come back as it is.

    Example:
        >>> keras_tp.save_checkpoint("runs/1", model, step=120, extra={"epoch": 3}, keep=2)
    """
    return save(directory, model, step, extra, keep, asynchronous)


def save(
    directory: Any,
    model: Any,
    step: int,
    extra: dict[str, Any] | None,
    keep: int | None,
    asynchronous: bool,
    begun: Any = None,
) -> Saving:
    """`save_checkpoint`, with the random state in which this rank began to read its data."""
    _settle()
    crew = Crew(held_together(model))
    archive, extra = Archive(directory), {} if extra is None else extra
    problems = extra_problems(extra)
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        problems.append(f"`step` is {step!r}; it is a whole number from 0.")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        problems.append(f"`keep` is {keep!r}; it is a whole number from 1, or None for all.")
    crew.agree(problems, f"step {step} in '{archive.directory}'", "what is to be saved")
    contents = Contents(model)
    made = crew.do(
        lambda: archive.begin(step) if crew.rank == 0 else None,
        lambda failures: f"'{archive.directory}' cannot be written\n  {failures}",
    )
    folder = made[0]
    work = Work(crew, archive, folder, step, dict(extra), keep, contents, asynchronous, begun)
    saving = Saving(work)
    _LAST.append(saving)
    _tell_at_exit()
    saving.start(asynchronous)
    if not asynchronous:
        _settle()
    return saving


def load_checkpoint(
    directory: Any, model: Any, *, step: int | None = None, fall_back: bool = False
) -> Checkpoint:
    """Loads what `save_checkpoint` has saved, on any number of ranks.

    The model may be laid out in another way than the one that was saved, on other ranks, or
    not parallelized; each rank reads its parts of the shards that there are. Training
    goes on as if it had not been interrupted: weights, slots and random states are those
    that were saved. A model that is not compiled takes its weights alone. (State of
    metrics is loaded where the model has the same ones.)

    All of it is read, and checked, before anything of the model changes. Nothing is unpickled but
    tensors, by `torch.load(weights_only=True)`.

    Collective for a parallelized model: a few small all-gathers, no weights are sent.

    Args:
        directory: as for `save_checkpoint`.
        model: a built Keras model with the same names and full shapes.
        step: which one; by default the newest.
        fall_back: if that one is damaged, take the newest before it that is not, and warn.

    Returns:
        A `Checkpoint`: its `step`, `extra`, `path`, and `skipped`, the damage that `fall_back` met.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: on every rank, all that is damaged, on any rank; or all in
            which the checkpoint's model is another.
        OSError: an asynchronous save before this could not be written.

    Example:
        >>> extra = keras_tp.load_checkpoint("runs/1", model).extra
    """
    return load(directory, model, step, fall_back)[0]


def load(directory: Any, model: Any, step: int | None, fall_back: bool) -> tuple[Checkpoint, Any]:
    """`load_checkpoint`; and the random state in which this rank began to read its data."""
    _settle()
    crew, archive = Crew(held_together(model)), Archive(directory)
    contents = Contents(model)
    crew.agree([], f"'{archive.directory}'", "what is to be loaded")
    steps = _steps(crew, archive)
    wanted = steps[:1] if step is None else [step]
    if not steps or wanted[0] not in steps:
        there = f"There are {', '.join(map(str, reversed(steps)))}." if steps else "There are none."
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(f"no {which} in '{archive.directory}'. {there}")
    if fall_back:
        wanted += [older for older in steps if older < wanted[0]]
    skipped: list[str] = []
    for candidate in wanted:
        room = contents.room()
        manifest, damages = _read(crew, archive, candidate, contents, room)
        if manifest is not None and not damages:
            break
        skipped += damages
    else:
        remedy = "" if fall_back else " fall_back=True takes the newest before it that is whole."
        older = [older for older in steps if older < wanted[0]]
        raise CheckpointError(
            skipped,
            where=f"the checkpoint of step {wanted[0]} in '{archive.directory}', of which nothing "
            f"was loaded.{remedy if older else ' There is none before it.'}",
        )
    if skipped:
        warnings.warn(
            f"the checkpoint of step {candidate} was loaded, for newer ones are damaged: "
            + " ".join(skipped),
            UserWarning,
            stacklevel=3,
        )
    for name, tensor in room.items():
        if name in contents.variables:
            store(contents.variables[name], tensor)
    alike = manifest.made_by.get("ranks") == (1 if crew.group is None else crew.group.size())
    others = manifest.random["others"] if alike else {}
    random = others.get(str(crew.rank), manifest.random["first"])
    set_random_state(random["now"])
    path = archive.folder(candidate)
    return Checkpoint(candidate, manifest.extra, path, tuple(skipped)), random["begun"]


def newest_step(directory: Any, model: Any) -> int | None:
    """The step of the newest checkpoint, None if there is none. Collective as loading is."""
    _settle()
    steps = _steps(Crew(held_together(model)), Archive(directory))
    return steps[0] if steps else None


def _steps(crew: Crew, archive: Archive) -> list[int]:
    """Those that the first rank sees, on every rank."""
    return crew.do(
        lambda: archive.steps() if crew.rank == 0 else [],
        lambda failures: f"'{archive.directory}' cannot be read\n  {failures}",
    )[0]


def _settle() -> None:
    """Waits for the checkpoint that is being written, and raises what went wrong with it."""
    while _LAST:
        _LAST.pop().wait()


@functools.cache
def _tell_at_exit() -> None:
    atexit.register(_tell)


def _tell() -> None:
    # Of a checkpoint that nobody has waited for. (Its thread has ended before.)
    try:
        _settle()
    except Exception as error:
        print(f"keras_tp: {error}", file=sys.stderr)


def _read(
    crew: Crew, archive: Archive, step: int, contents: Contents, room: dict[str, Any]
) -> tuple[Manifest | None, list[str]]:
    """The checkpoint's manifest, its tensors in `room`, and what is damaged. Collective.

    Raises:
        CheckpointError: on every rank, if it was made of another model.
    """
    text, failure = "", None
    if crew.rank == 0:
        try:
            text = archive.read(step)
        except OSError as error:
            failure = f"'{archive.folder(step)}' has no manifest ({error.strerror or error})."
    text, failure = crew.told((text, failure))[0]
    if failure is not None:
        return None, [failure]
    try:
        manifest = Manifest.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, [f"'{archive.folder(step)}': {error}"]
    wanted = contents.wanted()
    other = []
    if contents.optimizer not in (None, manifest.optimizer):
        saved = manifest.optimizer or "none, for the model was not compiled"
        other.append(
            f"the model's optimizer is {contents.optimizer}, the checkpoint's {saved}. Load "
            "before `compile`, and the weights alone are loaded."
        )
        wanted = {name: kind for name, kind in wanted.items() if name.startswith("weights.")}
    other += misfits(manifest, wanted)
    where = f"the checkpoint of step {step} in '{archive.directory}', made of another model"
    crew.agree(other, "", where)
    contents.leave_out_metrics_but(manifest)
    damages = list(archive.damages(manifest))
    if not damages:
        try:
            damages = read_part(archive.folder(step), manifest, contents.tensors(), room)
        except Exception as error:  # which the others would wait for
            damages = [f"'{archive.folder(step)}' cannot be read ({error!r})."]
    everywhere = crew.told(damages)
    return manifest, list(dict.fromkeys(damage for damages in everywhere for damage in damages))
