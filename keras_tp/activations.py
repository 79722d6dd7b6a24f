"""Layer outputs that are kept for the backward pass as shards.

A layout of a layer's output says where the activation lives. Layers here hand
each other whole activations, so what a layout can change is the memory that one
takes from the forward to the backward pass: of an output with a layout each
rank keeps its shard, and gathers it once when the backward pass first needs it
(partitioned activations as in ZeRO-R, Rajbhandari et al. 2020, section 5.1).
The numbers are the same bits.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import keras
import torch

from keras_tp.errors import LayoutError
from keras_tp.layouts import Layout, MeshShape, placements_of
from keras_tp.seam.variables import is_symbolic
from keras_tp.seam.weights import writes_into
from keras_tp.shards import Shards


class KeptOutputs:
    """Watches a model's calls and packs the outputs that have a layout.

    What an operation within the model's call saves for its backward pass passes
    through torch's saved-tensor hooks; where that is a watched output, its shard
    is saved in its place. A compiled call keeps everything whole.

    Args:
        model: the model, whose calls are watched from first to last layer.
        mesh: for the layouts.
    """

    def __init__(self, model: Any, mesh: MeshShape):
        self.mesh = mesh
        self.outputs: dict[int, _Output] = {}  # by address, as long as they live
        self.open: list[Any] = []
        model.register_forward_pre_hook(self._enter)
        model.register_forward_hook(self._leave, always_call=True)

    def keep(self, layer: Any, layout: Layout) -> None:
        """Has the outputs of `layer` kept as shards of `layout`."""

        def watch(layer: Any, args: Any, outputs: Any) -> None:
            if self.open and not is_symbolic() and not torch.compiler.is_compiling():
                for leaf in keras.tree.flatten(outputs):
                    if type(leaf) is torch.Tensor and leaf.requires_grad:
                        self._watch(layer, leaf, layout)

        layer.register_forward_hook(watch)

    def _watch(self, layer: Any, output: torch.Tensor, layout: Layout) -> None:
        if output.dim() != len(layout):
            raise LayoutError(
                f"the output of layer '{layer.path}' has shape {tuple(output.shape)}, its layout "
                f"{layout} {len(layout)} entries. Give each dim an axis or None.",
                where="this call",
            )
        shards = Shards(self.mesh, placements_of(layout, self.mesh), tuple(output.shape))
        address = output.untyped_storage().data_ptr()
        self.outputs[address] = _Output(output, shards)
        weakref.finalize(output, self.outputs.pop, address, None)

    def _enter(self, model: Any, args: Any) -> None:
        if not torch.compiler.is_compiling():
            hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
            hooks.__enter__()
            self.open.append(hooks)

    def _leave(self, model: Any, args: Any, outputs: Any) -> None:
        if not torch.compiler.is_compiling() and self.open:
            self.open.pop().__exit__()

    def _pack(self, saved: torch.Tensor) -> Any:
        if type(saved) is not torch.Tensor or saved.layout != torch.strided or saved.is_meta:
            return saved
        output = self.outputs.get(saved.untyped_storage().data_ptr())
        return saved if output is None or not output.has(saved) else output.pack(saved)


class _Output:
    """One output: alive as a tensor while the forward pass uses it, then a shard.

    Refers to the tensor weakly; the graph refers to this.
    """

    def __init__(self, output: torch.Tensor, shards: Shards):
        self.output = weakref.ref(output)
        self.writes = writes_into(output)
        self.shards = shards
        self.shard: torch.Tensor | None = None
        self.whole: torch.Tensor | None = None
        self.packed = 0
        self.unpacked = 0

    def has(self, saved: torch.Tensor) -> bool:
        """Whether `saved` can be cut out of the output, as it still is."""
        output = self.output()
        return (
            output is not None
            and output.is_contiguous()
            and output.nbytes == output.untyped_storage().nbytes()
            and saved.dtype == output.dtype
            and writes_into(output) == self.writes
        )

    def pack(self, saved: torch.Tensor) -> _View:
        """Cuts the shard, once for all the operations that save the output."""
        if self.shard is None:
            output = self.output()
            assert output is not None
            self.shard = self.shards.local(output)
        self.packed += 1
        return _View(self, tuple(saved.shape), saved.stride(), int(saved.storage_offset()))

    def unpack(self) -> torch.Tensor:
        """The whole output, gathered once for all the operations that saved it. Collective."""
        assert self.shard is not None
        if self.whole is None:
            with torch.no_grad():
                self.whole = self.shards.full(self.shard).contiguous()
        whole = self.whole
        self.unpacked += 1
        if self.unpacked % self.packed == 0:  # a graph that is kept may be walked again
            self.whole = None
        return whole


@dataclass(frozen=True)
class _View:
    """What one operation saved: the output, or what a reshape or a transpose made of it."""

    output: _Output
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _unpack(saved: Any) -> torch.Tensor:
    if not isinstance(saved, _View):
        return saved
    return saved.output.unpack().as_strided(saved.shape, saved.stride, saved.offset)
