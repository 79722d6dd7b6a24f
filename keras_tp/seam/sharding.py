"""How a variable lies on the ranks, as Keras's side sees it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch

from keras_tp.layouts import Shape


class Sharding(Protocol):
    """What a sharded variable asks of `keras_tp.shards.Shards`."""

    local_shape: Shape

    @property
    def counts(self) -> bool:
        """Whether this rank is the first of those that store the same shard."""

    def local(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a full value."""

    def part(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a full value, a view of it."""

    def full(
        self,
        local: torch.Tensor,
        keep: Collection[str] = (),
        replicas: str | None = None,
        joining: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The full value, gathered along the axes not in `keep`; on rows along `replicas`.

        By `joining`, if it is given; see `keras_tp.seam.contexts.Reads`.
        """

    def dtensor(self, local: torch.Tensor) -> Any:
        """The full value as a DTensor that shares the shard's memory."""

    def cut_along(self, axis: str) -> bool:
        """Whether ranks along the axis store different parts."""

    def cut_only_along(self, axes: Collection[str]) -> bool:
        """Whether ranks store the same part along every other axis."""

    def distribute(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's shard of the first rank's value."""

    def assembled(self, local: torch.Tensor) -> torch.Tensor:
        """The full value, gathered in another way, to compare with."""

    def position(self, rank: int) -> tuple[int, ...]:
        """Which shard `rank` stores."""

    def add_up(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over all ranks of the job, in place."""
