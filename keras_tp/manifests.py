"""What a checkpoint says of itself, as JSON: steps, tensors, files with their sizes and checksums.

torch's own description of a checkpoint is a pickle, which runs whatever code somebody wrote into
it. It is written, for torch's tools to read; what is read here is this one.
"""

from __future__ import annotations

import difflib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from keras_tp.layouts import Shape

NAME = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, and where it is.

    Attributes:
        start: its first index in the tensor, along each dim.
        shape: its own shape.
        file: name of a file in the checkpoint's folder.
        offset: first byte in the file.
        length: number of bytes, as `torch.save` wrote them.
        checksum: CRC-32 of these.
    """

    start: Shape
    shape: Shape
    file: str
    offset: int
    length: int
    checksum: int


@dataclass(frozen=True)
class SavedTensor:
    """One tensor of a checkpoint: its full shape, dtype (`"float32"`) and chunks."""

    shape: Shape
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint says of itself.

    Attributes:
        step: the number that it was given.
        extra: what the caller wanted to be told again.
        tensors: by name, such as `"weights.dense/kernel"`.
        files: number of bytes of each file but this one.
        optimizer: the class of the optimizer, None without one.
        random: the random states of each rank, now and as it began to read its data, of which
            only those that differ from the first's are there; see `keras_tp.randomness`.
        made_by: versions and number of ranks.
    """

    step: int
    extra: dict[str, Any]
    tensors: dict[str, SavedTensor]
    files: dict[str, int]
    optimizer: str | None
    random: dict[str, Any]
    made_by: dict[str, Any]

    def to_json(self) -> str:
        """As text, with a checksum over all of it."""
        content = _canonical(asdict(self))
        return f'{{"format": {_FORMAT}, "checksum": {_crc(content)}, "content": {content}}}\n'

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads what `to_json` gave.

        Raises:
            ValueError: anything else, in a sentence that says what is wrong.
        """
        try:
            read = json.loads(text)
            form, checksum, content = read["format"], read["checksum"], read["content"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"'{NAME}' is cut off or no manifest ({error!r}).") from error
        if form != _FORMAT:
            raise ValueError(f"'{NAME}' has format {form!r}; this version reads {_FORMAT}.")
        if checksum != _crc(_canonical(content)):
            raise ValueError(f"'{NAME}' has been changed: its checksum is not {checksum}.")
        tensors = {
            name: SavedTensor(
                tuple(entry["shape"]),
                entry["dtype"],
                tuple(
                    Chunk(**{**c, "start": tuple(c["start"]), "shape": tuple(c["shape"])})
                    for c in entry["chunks"]
                ),
            )
            for name, entry in content["tensors"].items()
        }
        # Names of files come from outside: none may lead out of the folder.
        for name in {*content["files"], *(c.file for t in tensors.values() for c in t.chunks)}:
            if "/" in name or "\\" in name or name in ("", ".", ".."):
                raise ValueError(f"'{NAME}' names a file {name!r}, which is none of its folder.")
        return cls(**{**content, "tensors": tensors})


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _crc(text: str) -> int:
    return zlib.crc32(text.encode())


def extra_problems(extra: Any) -> list[str]:
    """Why `extra` would not come back as it is; empty if it would."""
    if not isinstance(extra, Mapping):
        return [f"`extra` is a {type(extra).__name__}; give a dict of names to plain values."]
    problems = []
    for name, value in extra.items():
        try:
            same = isinstance(name, str) and json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            problems.append(
                f"`extra` has {name!r}: {value!r} ({type(value).__name__}). Names are strings, and "
                "values what JSON gives back as it was: finite numbers, strings, booleans, None, "
                "and lists and dicts of these."
            )
    return problems


def misfits(manifest: Manifest, wanted: Mapping[str, tuple[Shape, str]]) -> list[str]:
    """What of a model a checkpoint does not have, and what else it has.

    Args:
        manifest: of the checkpoint.
        wanted: shape and dtype of each tensor of the model.
    """
    groups = {name.split(".", 1)[0] for name in wanted}
    others = [n for n in manifest.tensors if n not in wanted and n.split(".", 1)[0] in groups]
    problems = []
    for name, (shape, dtype) in wanted.items():
        saved = manifest.tensors.get(name)
        if saved is None:
            near = difflib.get_close_matches(name, others, n=1)
            hint = f" Nearest: '{near[0]}'." if near else ""
            problems.append(f"the model has '{name}' {shape}, the checkpoint has not.{hint}")
        elif saved.shape != shape:
            problems.append(f"'{name}' has shape {saved.shape}, in the model {shape}.")
        elif saved.dtype != dtype:
            problems.append(f"'{name}' has dtype {saved.dtype}, in the model {dtype}.")
        elif sum(math.prod(c.shape) for c in saved.chunks) != math.prod(shape):
            problems.append(f"'{name}' {shape} has chunks for another number of elements.")
    problems += [
        f"the checkpoint has '{name}' {manifest.tensors[name].shape}, the model has not."
        for name in others
    ]
    return problems
