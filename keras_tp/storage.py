"""The files of a checkpoint, in the format of `torch.distributed.checkpoint` (DCP).

DCP plans who writes what of which tensor, and who reads it on other ranks; its files are what its
own tools read. What it keeps beside them, `.metadata`, is a pickle: it is written, and
never read. Reading goes by the manifest, and tensors are loaded with `weights_only=True`.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from keras_tp.manifests import Chunk, Manifest, SavedTensor

Nested = dict[str, dict[str, torch.Tensor]]


class SavePlanner(DefaultSavePlanner):
    """Plans by what tensors look like on this rank's device, and writes what was copied of them.

    Args:
        stored: what this rank stores of each tensor.
    """

    def __init__(self, stored: Mapping[str, torch.Tensor]):
        super().__init__()
        self.stored = stored

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """This rank's part: there is one of each tensor."""
        return self.stored[index.fqn]


class LoadPlanner(DefaultLoadPlanner):
    """Plans by what tensors look like on this rank's device, and reads into other memory.

    Args:
        room: memory for what this rank stores of each tensor.
    """

    def __init__(self, room: Mapping[str, torch.Tensor]):
        super().__init__()
        self.room = room

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Where to this rank's part is read."""
        return self.room[index.fqn]


@dataclass(frozen=True)
class Written:
    """What one rank has written: DCP's results, and a checksum of each."""

    results: list[WriteResult]
    checksums: list[int]


def write_part(folder: Path, planner: SavePlanner, plans: list[SavePlan], rank: int) -> Written:
    """Writes what the plans of all ranks leave to this one, each tensor once. No communication.

    Raises:
        OSError: what the disk says.
    """
    writer = _writer(folder)
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[rank])
    results = writer.write_data(plan, planner).value()
    checksums = []
    for result in results:
        with open(folder / result.storage_data.relative_path, "rb") as file:
            file.seek(result.storage_data.offset)
            checksums.append(zlib.crc32(file.read(result.storage_data.length)))
    return Written(results, checksums)


def write_metadata(folder: Path, metadata: Metadata, everywhere: list[Written]) -> None:
    """Writes what torch's own tools want to know, as they want it."""
    _writer(folder).finish(metadata, [written.results for written in everywhere])


def _writer(folder: Path) -> FileSystemWriter:
    # Nothing is copied ahead, which would want a stream of CUDA on whichever device is the first.
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(False)
    return writer


def saved_tensors(metadata: Metadata, everywhere: list[Written]) -> dict[str, SavedTensor]:
    """What a manifest says of the tensors."""
    chunks: dict[str, list[Chunk]] = {}
    shapes = {
        (name, tuple(chunk.offsets)): tuple(chunk.sizes)
        for name, entry in metadata.state_dict_metadata.items()
        for chunk in entry.chunks  # type: ignore[union-attr]
    }
    for written in everywhere:
        for result, checksum in zip(written.results, written.checksums, strict=True):
            name, start = result.index.fqn, tuple(result.index.offset or ())
            where = result.storage_data
            chunk = Chunk(
                start=start,
                shape=shapes[name, start],
                file=where.relative_path,
                offset=where.offset,
                length=where.length,
                checksum=checksum,
            )
            chunks.setdefault(name, []).append(chunk)
    return {
        name: SavedTensor(
            tuple(entry.size),  # type: ignore[union-attr]
            str(entry.properties.dtype).removeprefix("torch."),  # type: ignore[union-attr]
            tuple(chunks[name]),
        )
        for name, entry in metadata.state_dict_metadata.items()
    }


def read_part(
    folder: Path, manifest: Manifest, tensors: Nested, room: Mapping[str, torch.Tensor]
) -> list[str]:
    """Reads this rank's part of `tensors` into `room`, whoever wrote it. No communication.

    Returns:
        What is wrong with what was read, a sentence for each chunk.
    """
    planner = LoadPlanner(room)
    planner.set_up_planner(tensors, _metadata(manifest), False)
    plan = planner.finish_plan(planner.create_local_plan())
    chunks = {(name, c.start): c for name, t in manifest.tensors.items() for c in t.chunks}
    problems = []
    for item in plan.items:
        chunk = chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
        try:
            saved = _read(folder, chunk, manifest.tensors[item.storage_index.fqn])
        except Exception as error:
            problems.append(
                f"'{folder / chunk.file}' does not hold '{item.storage_index.fqn}' at byte "
                f"{chunk.offset}: {error}"
            )
        else:
            planner.resolve_tensor(item).copy_(_narrowed(saved, item))
    return list(dict.fromkeys(problems))


def _read(folder: Path, chunk: Chunk, tensor: SavedTensor) -> torch.Tensor:
    with open(folder / chunk.file, "rb") as file:
        file.seek(chunk.offset)
        data = file.read(chunk.length)
    if len(data) != chunk.length:
        raise ValueError(f"{len(data)} bytes of {chunk.length} are there.")
    if zlib.crc32(data) != chunk.checksum:
        raise ValueError("its checksum is another than when it was written.")
    saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    kind = tuple(saved.shape), str(saved.dtype).removeprefix("torch.")
    if kind != (chunk.shape, tensor.dtype):
        raise ValueError(f"it is {kind}, not {(chunk.shape, tensor.dtype)}.")
    return saved


def _narrowed(saved: torch.Tensor, item: ReadItem) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        saved = saved.narrow(dim, start, length)
    return saved


def _metadata(manifest: Manifest) -> Metadata:
    found: dict[str, Any] = {
        name: TensorStorageMetadata(
            TensorProperties(),  # nothing is made by it
            torch.Size(tensor.shape),
            [ChunkStorageMetadata(torch.Size(c.start), torch.Size(c.shape)) for c in tensor.chunks],
        )
        for name, tensor in manifest.tensors.items()
    }
    return Metadata(found)
