"""What calls of a model have gathered after what, along one mesh axis, as a tree of ways to go.

From it follows what to begin ahead of its turn: what has come next on every way from here, as long
as there is one only. A tree, because calls differ: with a mask, with a cache, by a branch of the
model's code. Where they part, nothing is begun; after that the ways are told apart again.

Ranks along the axis gather the same in the same order, or they would wait for each other today. The
tree is made of that order and of nothing else (not of shapes of rows, not of what other axes see),
so that all of them have the same tree, and begin the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

# What is under way ahead of its turn, at most: one weight of more bytes than SMALL, and so many
# small ones before it. (A kernel's bias comes after it: were one weight the limit, the next
# kernel would travel while a bias is added, and not while matrices are multiplied.)
SMALL, MOST = 1 << 16, 8
# Steps of a tree. A model whose code goes another way each time is not followed for ever.
MOST_STEPS = 1 << 14


@dataclass(eq=False)
class Step(Generic[T]):
    """One gather, by the way on which calls come to it.

    Attributes:
        what: what is gathered; None before the first.
        size: bytes of what it gives, padding included.
        early: whether it can be begun ahead of its turn.
        after: the steps that have followed it.
        ended: whether a call has ended after it.
    """

    what: T | None = None
    size: int = 0
    early: bool = True
    after: dict[Hashable, Step[T]] = field(default_factory=dict)
    ended: bool = False

    def ahead(self) -> Iterator[Step[T]]:
        """The steps to begin now, in the order of their turns."""
        step = self
        for _ in range(MOST):
            if len(step.after) != 1 or step.ended:
                return
            (step,) = step.after.values()
            if not step.early:
                return
            yield step
            if step.size > SMALL:
                return


class Trail(Generic[T]):
    """The tree of one axis."""

    def __init__(self) -> None:
        self.start: Step[T] = Step()
        self._steps = 0

    def go(self, step: Step[T], key: Hashable, what: T, size: int, early: bool) -> Step[T] | None:
        """The step after `step` that is told by `key`; None where the tree is as large as may be.

        Args:
            step: of this trail.
            key: tells the steps after it apart.
            what, size, early: see `Step`.
        """
        if key not in step.after:
            if self._steps == MOST_STEPS:
                return None
            self._steps += 1
            step.after[key] = Step(what, size, early)
        return step.after[key]
