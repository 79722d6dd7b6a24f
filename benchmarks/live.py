"""Which bytes are alive while a model trains, and who has asked for them.

torch keeps no such statistics on CPUs. So storages are counted here, after every operation, by
weak references: what is alive is what torch has not freed, no matter who holds it. What an
operation needs within itself is not seen.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Parts of a training step, by functions that are running. Inner ones first.
PHASES = {
    "BaseOptimizer.apply": "update",
    "Tensor.backward": "backward",
    "Trainer._compute_loss": "loss",
}
GATHERED = "weights, gathered"
# What keras_tp makes, by functions that are running. Inner ones first.
MAKERS = {
    "Shards.full": GATHERED,
    "_Source.begin": GATHERED,
    "Replicas.gather": "outputs, gathered",
    "Replicas.take": "own rows",
    "_ShardStyle._joined": "activations, gathered",
    "_ShardStyle._split": "activations, sliced",
    "RowwiseParallel.combine": "activations, summed",
    "VocabularyParallel.combine": "activations, summed",
}


class Live(TorchDispatchMode):
    """While open, counts bytes that are alive, but for what awaits the garbage collector.

    Args:
        known: tensors that are there already, by kind.

    Attributes:
        peaks: the largest number of bytes alive at once, by phase: "step" is forward and
            backward, "update" what the optimizer does.
        at_peak: what they were then, by kind.
    """

    def __init__(self, **known: Iterable[torch.Tensor]):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self.noted = 0  # bytes of these storages, of which some may be gone by now
        self.peaks: Counter[str] = Counter()
        self.at_peak: dict[str, Counter[str]] = {}
        for kind, tensors in known.items():
            self.note(tensors, kind)

    def __enter__(self) -> Any:
        gc.collect()
        gc.freeze()  # what is there is no garbage, and looking for garbage is quick
        gc.disable()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        gc.enable()
        gc.unfreeze()

    def note(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Says of what kind tensors are, be they known or not."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if storage.nbytes():
                if reference.cdata not in self.storages:
                    self.noted += storage.nbytes()
                self.storages[reference.cdata] = reference, storage.nbytes(), kind

    def now(self) -> int:
        """Bytes alive, with what awaits the garbage collector."""
        self.storages = {k: entry for k, entry in self.storages.items() if not entry[0].expired()}
        self.noted = sum(size for _, size, _ in self.storages.values())
        return self.noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(results) if _has_memory(leaf)]
        made = [t for t in made if StorageWeakRef(t.untyped_storage()).cdata not in self.storages]
        if made:
            phase, kind = _who_asks()
            self.note(made, kind)
            self._look("update" if phase == "update" else "step")
        return results

    def _look(self, phase: str) -> None:
        if self.noted <= self.peaks[phase] or self.now() <= self.peaks[phase]:
            return
        gc.collect()
        if self.now() > self.peaks[phase]:
            self.peaks[phase] = self.noted
            self.at_peak[phase] = Counter()
            for _, size, kind in self.storages.values():
                self.at_peak[phase][kind] += size


def _has_memory(leaf: Any) -> bool:
    return (
        isinstance(leaf, torch.Tensor)
        and not leaf.is_meta
        and leaf.layout == torch.strided
        and type(leaf) in (torch.Tensor, torch.nn.Parameter)
    )


def _who_asks() -> tuple[str, str]:
    """The phase of the step, and a name for what is being made."""
    phase, maker, keras_seen = "layers", "", False
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        name = ".".join(code.co_qualname.split(".")[-2:])
        # Of keras_tp is what it computes itself, not what Keras does inside of it.
        keras_seen |= "/keras/src/" in code.co_filename
        if not keras_seen and "/keras_tp/" in code.co_filename:
            maker = MAKERS.get(name) or maker or "keras_tp: " + name
        if phase == "layers":
            phase = PHASES.get(name, phase)
        frame = frame.f_back
    return phase, maker if maker else f"Keras: {phase}"
