"""The package's communication on tensors without values: nothing is sent, all is written down.

Each function makes the tensors that its like in `keras_tp.collectives` and
`keras_tp.row_collectives` makes, forward and backward, which is what counts for memory.
(Those know process groups, of which a plan knows none.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from keras_tp.layouts import chunk_bounds
from keras_tp.ledger import Ledger

Step = Callable[[torch.Tensor], torch.Tensor]
# Of what `joined` is.
Joining = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class DryAxis:
    """One mesh axis as one rank sees it.

    Attributes:
        name: the axis name.
        size: number of ranks along it.
        rank: the position of the one rank.
        ledger: where what would be sent is written down.
    """

    name: str
    size: int
    rank: int
    ledger: Ledger = field(repr=False)

    def note(self, kind: str, layer: str, of: str, size: int) -> None:
        """Writes down one collective."""
        self.ledger.note(kind, self.name, self.size, layer, of, size)

    def bounds(self, total: int) -> tuple[int, int]:
        """Start and length of this rank's chunk."""
        return chunk_bounds(total, self.size, self.rank)

    def chunks(self, total: int) -> tuple[int, ...]:
        """Length of each position's chunk."""
        return tuple(chunk_bounds(total, self.size, rank)[1] for rank in range(self.size))


class _Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: Step, back: Step) -> torch.Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.back(grad), None, None


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x)


def copy(x: torch.Tensor, axis: DryAxis, layer: str, of: str) -> torch.Tensor:
    """As `collectives.copy`; `of` names the gradient."""
    return _Both.apply(x, _same, lambda grad: all_reduced(grad, axis, layer, of))


def reduce(x: torch.Tensor, axis: DryAxis, layer: str, of: str) -> torch.Tensor:
    """As `collectives.reduce`."""
    return _Both.apply(x, lambda x: all_reduced(x, axis, layer, of), _same)


def reduce_own(x: torch.Tensor, axis: DryAxis, layer: str, of: str) -> torch.Tensor:
    """As `collectives.reduce_own`."""

    def there(x: torch.Tensor) -> torch.Tensor:
        axis.note("all_reduce", layer, of, x.nbytes)
        return x.contiguous().data

    return _Both.apply(x, there, _same)


def gather(
    x: torch.Tensor,
    dim: int,
    total: int,
    axis: DryAxis,
    layer: str,
    of: str,
    joining: Joining | None = None,
) -> torch.Tensor:
    """As `collectives.gather`."""
    dim, there = dim % x.dim(), joining or joined

    def back(grad: torch.Tensor) -> torch.Tensor:
        return _dense(grad.narrow(dim, *axis.bounds(total)))

    return _Both.apply(x, lambda x: there(x, dim, axis.chunks(total), axis, layer, of), back)


def split(x: torch.Tensor, dim: int, axis: DryAxis, layer: str, of: str) -> torch.Tensor:
    """As `collectives.split`; `of` names the gradient."""
    dim = dim % x.dim()
    total = x.shape[dim]

    def back(grad: torch.Tensor) -> torch.Tensor:
        return joined(grad, dim, axis.chunks(total), axis, layer, of)

    return _Both.apply(x, lambda x: x.narrow(dim, *axis.bounds(total)), back)


def gather_weight(
    x: torch.Tensor,
    dim: int,
    total: int,
    axis: DryAxis,
    layer: str,
    of: str,
    joining: Joining | None = None,
) -> torch.Tensor:
    """As `row_collectives.gather_weight`."""
    dim, there = dim % x.dim(), joining or joined
    sizes = axis.chunks(total)

    def back(grad: torch.Tensor) -> torch.Tensor:
        return _scattered(grad, dim, axis, layer, f"{of} gradient")

    return _Both.apply(x, lambda x: there(x, dim, sizes, axis, layer, of), back)


def scatter(x: torch.Tensor, dim: int, axis: DryAxis, layer: str, of: str) -> torch.Tensor:
    """As `row_collectives.scatter`."""
    dim, sizes = dim % x.dim(), axis.chunks(x.shape[dim])
    return _Both.apply(
        x,
        lambda x: _scattered(x, dim, axis, layer, of),
        lambda grad: joined(grad, dim, sizes, axis, layer, f"{of} gradient"),
    )


def cut(x: torch.Tensor, dim: int, axis: DryAxis, layer: str, of: str) -> torch.Tensor:
    """As `collectives.cut`; `of` names the gradient."""
    dim, total = dim % x.dim(), x.shape[dim]
    return _Both.apply(
        x,
        lambda x: _dense(x.narrow(dim, *axis.bounds(total))),
        lambda grad: joined(grad, dim, axis.chunks(total), axis, layer, of),
    )


def gather_rows(
    x: torch.Tensor, sizes: tuple[int, ...], axis: DryAxis, layer: str, of: str
) -> torch.Tensor:
    """As `row_collectives.gather_rows`."""
    return _Both.apply(
        x,
        lambda x: joined(x, 0, sizes, axis, layer, of),
        lambda grad: _rows(grad, sizes, axis),
    )


def split_rows(
    x: torch.Tensor, sizes: tuple[int, ...], axis: DryAxis, layer: str, of: str
) -> torch.Tensor:
    """As `row_collectives.split_rows`; `of` names the gradient."""
    return _Both.apply(
        x,
        lambda x: _rows(x, sizes, axis),
        lambda grad: joined(grad, 0, sizes, axis, layer, of),
    )


def _scattered(x: torch.Tensor, dim: int, axis: DryAxis, layer: str, of: str) -> torch.Tensor:
    sizes = axis.chunks(x.shape[dim])
    chunks = [_padded(chunk, dim, sizes[0]) for chunk in x.split(sizes, dim)]
    axis.note("reduce_scatter", layer, of, sum(c.nbytes for c in chunks))
    out = torch.empty_like(chunks[0])
    return out.narrow(dim, 0, sizes[axis.rank]).contiguous()


def all_reduced(x: torch.Tensor, axis: DryAxis, layer: str, of: str) -> torch.Tensor:
    """What an all-reduce gives, which autograd does not see."""
    axis.note("all_reduce", layer, of, x.nbytes)
    return _dense(x)


def joined(
    x: torch.Tensor, dim: int, sizes: tuple[int, ...], axis: DryAxis, layer: str, of: str
) -> torch.Tensor:
    """As `collectives.join`: what an all-gather gives, which autograd does not see."""
    return placed(sent(x, dim, sizes, axis, layer, of), dim, sizes)


def sent(
    x: torch.Tensor, dim: int, sizes: tuple[int, ...], axis: DryAxis, layer: str, of: str
) -> list[torch.Tensor]:
    """The parts of all ranks, as an all-gather brings them."""
    x = _padded(x, dim, max(sizes))
    parts = [torch.empty_like(x) for _ in sizes]
    axis.note("all_gather", layer, of, sum(part.nbytes for part in parts))
    return parts


def placed(parts: list[torch.Tensor], dim: int, sizes: tuple[int, ...]) -> torch.Tensor:
    """As `collectives.placed`."""
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, sizes, strict=True)], dim)


def _padded(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    if x.shape[dim] < size:
        padding = list(x.shape)
        padding[dim] = size - x.shape[dim]
        x = torch.cat([x, x.new_zeros(padding)], dim)
    return x.contiguous()


def _rows(x: torch.Tensor, sizes: tuple[int, ...], axis: DryAxis) -> torch.Tensor:
    return _dense(x.narrow(0, sum(sizes[: axis.rank]), sizes[axis.rank]))


@dataclass(frozen=True)
class DryMeeting:
    """See `keras_tp.likelihoods.Meeting` and `keras_tp.meetings`.

    Attributes:
        axis: along which the ranks stand.
        layer: path of the layer whose output it is about.
    """

    axis: DryAxis
    layer: str

    @property
    def parts(self) -> int:
        return self.axis.size

    @property
    def rank(self) -> int:
        return self.axis.rank

    @property
    def _of(self) -> str:
        return "metrics" if self.axis.ledger.phase == "metrics" else "loss"

    def total(self, x: torch.Tensor) -> torch.Tensor:
        return all_reduced(x, self.axis, self.layer, self._of)

    def highest(self, x: torch.Tensor) -> torch.Tensor:
        return all_reduced(x, self.axis, self.layer, self._of)

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        return reduce(x, self.axis, self.layer, self._of)

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        return copy(x, self.axis, self.layer, self._of)

    def split(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return split(x, dim, self.axis, self.layer, self._of)

    def gather(self, x: torch.Tensor, dim: int, total: int) -> torch.Tensor:
        return gather(x, dim, total, self.axis, self.layer, self._of)

    def whole(self, x: torch.Tensor, dim: int, total: int) -> torch.Tensor:
        return gather(x, dim, total, self.axis, self.layer, "output")

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        ledger = self.axis.ledger
        before, ledger.resting = ledger.resting, True
        try:
            yield
        finally:
            ledger.resting = before
