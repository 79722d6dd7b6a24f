"""A batch of which this rank holds some rows, gathered if something computes with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from keras_tp.collectives import Axis, join
from keras_tp.messages import control_device
from keras_tp.seam.weights import OF_THE_SHAPE, was_written


class Rows(torch.Tensor):
    """A tensor of `sum(counts)` rows, of which each rank of the batch axis stores its own.

    To whoever reads it, it is the whole tensor: loss functions, metrics and
    training steps compute what one process computes. Shape, dtype and device are
    known without communication, and a conversion (`to`, `float`, `detach`, ...)
    converts the local rows and gives `Rows` again. Anything else gathers the rows
    first (one all-gather along the axis, once, whatever they are converted to
    afterwards), and so must be done on every rank. Take `local_rows` to compute
    on what is here.

    What is written into the tensor is written into all rows. It takes no
    gradient: `clone()` gives a plain, whole tensor that does.
    """

    _local: torch.Tensor
    _counts: tuple[int, ...]
    _axis: Axis
    _source: tuple[Rows, Callable[[torch.Tensor], torch.Tensor]] | None
    _gathered: torch.Tensor | None
    _whole: torch.Tensor | None

    @classmethod
    def of(cls, local: torch.Tensor, counts: Sequence[int], axis: Axis) -> Rows:
        """Without communication.

        Args:
            local: this rank's rows, `(counts[axis.rank], ...)`.
            counts: number of rows of each rank of the axis; other dims and the dtype
                are the same on all of them.
            axis: the batch axis.
        """
        return cls._make(local, tuple(counts), axis, None)

    @classmethod
    @torch.compiler.disable
    def _make(cls, local: torch.Tensor, counts: tuple[int, ...], axis: Axis, source: Any) -> Rows:
        assert len(counts) == axis.size, (counts, axis)
        assert local.shape[0] == counts[axis.rank], (local.shape, counts, axis)
        shape = (sum(counts), *local.shape[1:])
        self = cls._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        self._local, self._counts, self._axis = local, counts, axis
        self._source = source
        self._gathered = self._whole = None
        return self

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of rows of each rank of the batch axis."""
        return self._counts

    @property
    def local_rows(self) -> torch.Tensor:
        """This rank's rows, a plain tensor."""
        if self.written:
            assert self._whole is not None
            start = sum(self._counts[: self._axis.rank])
            return self._whole.narrow(0, start, self._counts[self._axis.rank])
        return self._local

    @property
    def written(self) -> bool:
        """Whether something was written into the gathered rows."""
        return self._whole is not None and was_written(self._whole)

    def whole(self) -> torch.Tensor:
        """All rows, a plain tensor on the same device. Collective, the first time."""
        if self._whole is None:
            self._whole = self.gathered().to(self._local.device)
        return self._whole

    @torch.compiler.disable
    @torch.no_grad()
    def gathered(self) -> torch.Tensor:
        """All rows, where they were gathered: on the GPU if ranks talk by NCCL. See `whole`."""
        if self._gathered is None:
            if self._local.is_meta:
                self._gathered = self._local.new_empty(self.shape)
            elif self._source is not None and not self._source[0].written:
                source, convert = self._source
                self._gathered = convert(source.gathered())
            else:
                there = control_device().type == "cuda" and not self._local.is_cuda
                local = self._local.to(control_device()) if there else self._local
                self._gathered = join(local.detach(), 0, self._counts, self._axis)
        return self._gathered

    def converted(self, convert: Callable[[torch.Tensor], Any]) -> Any:
        """Rows of what `convert` makes of the local rows, or its answer if that is no tensor."""
        before = self.local_rows
        local = convert(before)
        if local is before:
            return self
        if not isinstance(local, torch.Tensor):
            return local
        return self._make(local, self._counts, self._axis, (self, convert))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if args and isinstance(args[0], cls):
            rows, rest = args[0], args[1:]
            if func in OF_THE_SHAPE:
                return super().__torch_function__(func, types, args, named)
            if func in _CONVERSIONS:
                return rows.converted(lambda tensor: func(tensor, *rest, **named))
            if func in _OF_GRADIENTS:
                raise ValueError(
                    f"{rows!r} takes no gradient: its rows are shared out over "
                    f"{len(rows.counts)} replicas. x.clone() gives the whole batch as a tensor "
                    "that does."
                )
        args, named = tree_map_only(cls, lambda rows: rows.whole(), (args, named))
        return func(*args, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, *args: Any, **kwargs: Any
    ) -> Any:
        raise TypeError(f"{func} came by the rows of a batch without gathering them")

    # A gather on the one rank that prints would wait for the others.

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        here = self._counts[self._axis.rank]
        kind = str(self.dtype).removeprefix("torch.")
        return f"<Rows: {here} of {self.shape[0]}, shape={tuple(self.shape)}, dtype={kind}>"

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __dir__(self) -> list[str]:
        return dir(torch.Tensor)


_TENSOR: Any = torch.Tensor  # whose class attributes its stubs do not have
# What treats each element alone and gives as many.
_CONVERSIONS = {
    *(_TENSOR.to, _TENSOR.type, _TENSOR.cpu, _TENSOR.cuda, _TENSOR.pin_memory, _TENSOR.is_pinned),
    *(_TENSOR.float, _TENSOR.double, _TENSOR.half, _TENSOR.bfloat16, _TENSOR.bool),
    *(_TENSOR.int, _TENSOR.long, _TENSOR.short, _TENSOR.char, _TENSOR.byte),
    *(_TENSOR.contiguous, _TENSOR.detach, _TENSOR.data.__get__, torch.detach),
}
_OF_GRADIENTS = {
    *(_TENSOR.requires_grad_, _TENSOR.requires_grad.__set__, _TENSOR.retain_grad),
    *(_TENSOR.register_hook, _TENSOR.backward, _TENSOR.grad.__set__),
}
