"""Bytes and floating-point operations of a computation without values, as torch would do it."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from keras_tp.ledger import Ledger

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class LiveBytes(TorchDispatchMode):
    """While open, follows tensors of the meta device: what is alive is what nobody let go of.

    What an operation needs within itself, and what awaits Python's garbage collector, is
    not counted.

    Args:
        known: tensors that are there already.
        ledger: says when it rests.

    Attributes:
        peak: the largest number of bytes alive at once.
        flops: of matrix products, convolutions and attention, two for each multiplication
            that is added up, as torch counts them.
    """

    def __init__(self, known: Iterable[torch.Tensor], ledger: Ledger):
        super().__init__()
        self._ledger = ledger
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._noted = 0  # bytes of these storages, of which some may be gone by now
        self.peak = 0
        self.flops = 0
        self.note(known)

    def __enter__(self) -> Any:
        self._collects = gc.isenabled()
        gc.freeze()  # what is there is not looked at, and looking for garbage is quick
        gc.disable()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        gc.unfreeze()
        if self._collects:
            gc.enable()

    def note(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors that were made before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference.cdata not in self._storages:
                self._storages[reference.cdata] = reference, storage.nbytes()
                self._noted += storage.nbytes()

    def now(self) -> int:
        """Bytes alive, with what awaits the garbage collector."""
        self._storages = {k: entry for k, entry in self._storages.items() if not entry[0].expired()}
        self._noted = sum(size for _, size in self._storages.values())
        return self._noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if self._ledger.resting:
            return results
        self.flops += _flops(func.overloadpacket, args, kwargs, results)
        made = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor) and t.is_meta]
        self.note(made)
        if self._noted > self.peak and self.now() > self.peak:
            gc.collect()
            self.peak = max(self.peak, self.now())
        return results


def _flops(packet: Any, args: Any, kwargs: Any, results: Any) -> int:
    if packet is _ATTENTION or packet is _ATTENTION_BACKWARD:
        # Two products of matrices forward; backward five, of which torch computes one again.
        query, key = args[:2] if packet is _ATTENTION else args[1:3]
        times = 4 if packet is _ATTENTION else 10
        return times * query.numel() * int(key.shape[-2])
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=results))


class FusedAttention(TorchFunctionMode):
    """While open, attention is computed on the meta device as torch does on CPUs: in one kernel.

    Left to itself torch takes it apart there, and keeps the scores of all pairs of tokens.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            fused = _fused(*args, **kwargs)
            if fused is not None:
                return fused
        return func(*args, **kwargs)


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    alike = query.dim() == key.dim() == 4 and query.shape[1] == key.shape[1] == value.shape[1]
    masked = attn_mask is not None and attn_mask.requires_grad
    if not (query.is_meta and alike and query.shape[-1] == value.shape[-1]) or dropout_p or masked:
        return None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    result: torch.Tensor = _ATTENTION(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return result
