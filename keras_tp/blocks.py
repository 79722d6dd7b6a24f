"""The layers of a plan as a tree by path, in which blocks that are alike are found."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from keras_tp.plans import LayerPlan, Plan

# Layers that repeat, side by side, in groups of at most so many.
LONGEST_PERIOD = 32


@dataclass
class Block:
    """A part of a path, what stands there, and what is below.

    Attributes:
        name: the last part of the path.
        path: all of it.
        layers: those with this path; mostly one, or none where it only leads further.
        below: what is under it, by name.
    """

    name: str
    path: str
    layers: list[LayerPlan] = field(default_factory=list)
    below: dict[str, Block] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """Blocks side by side that repeat: `blocks`, and then others like them.

    Attributes:
        blocks: what is repeated, the first time.
        again: paths of the blocks that are like the first, second, ... one, each time anew.
    """

    blocks: tuple[Block, ...]
    again: tuple[str, ...] = ()

    @property
    def times(self) -> int:
        """How often the blocks come, the first time counted."""
        return 1 + len(self.again) // len(self.blocks)


def is_shown(layer: LayerPlan) -> bool:
    """Whether there is anything to say of a layer."""
    return bool(layer.variables or layer.styles or layer.forward or layer.backward)


class Tree:
    """A plan's layers by path, those of which there is nothing to say left out.

    Args:
        plan: whose layers.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._numbers: dict[object, int] = {}
        self._known: dict[str, int] = {}

    @cached_property
    def top(self) -> list[Block]:
        """What is at the top."""
        root = Block("", "")
        for layer in filter(is_shown, self.plan.layers):
            here = root
            for name in layer.path.split("/"):
                path = f"{here.path}/{name}" if here is not root else name
                here = here.below.setdefault(name, Block(name, path))
            here.layers.append(layer)
        return list(root.below.values())

    def runs(self, blocks: Sequence[Block]) -> Iterator[Run]:
        """The blocks in their order, with repeated ones joined.

        Blocks are alike if they differ in numbers within names and patterns only.
        """
        kinds = [self._kind(block) for block in blocks]
        start = 0
        while start < len(blocks):
            length, times = _repeated(kinds, start)
            end = start + length * times
            again = tuple(block.path for block in blocks[start + length : end])
            yield Run(tuple(blocks[start : start + length]), again)
            start = end

    def _kind(self, block: Block) -> int:
        """A number that blocks share which are alike."""
        if block.path not in self._known:
            layers = tuple(self._look(layer) for layer in block.layers)
            below = tuple(self._kind(each) for each in block.below.values())
            key = (_stem(block.name), layers, below)
            self._known[block.path] = self._numbers.setdefault(key, len(self._numbers))
        return self._known[block.path]

    def _look(self, layer: LayerPlan) -> tuple[object, ...]:
        """All of a layer that is shown, but for numbers in words."""
        variables = [self.plan.variables[i] for i in layer.variables]
        weights = tuple(
            (_stem(v.path.rpartition("/")[2]), v.shape, v.layout, v.dtype, _stem(v.pattern or ""))
            for v in variables
        )
        moves = tuple((c.kind, c.axis, _stem(c.of)) for c in layer.forward + layer.backward)
        how = (layer.kind, layer.style, layer.rows, layer.output_layout, len(layer.forward))
        return (*how, weights, moves, _stem(layer.reason))


def _stem(name: str) -> str:
    """A name without its numbers: `dense`, `dense_1` and `dense_2` are one."""
    return re.sub(r"_?\d+", "", name)


def _repeated(kinds: Sequence[int], start: int) -> tuple[int, int]:
    """How many from `start` on are repeated, and how often: what covers most, else (1, 1)."""
    best = (1, 1)
    for length in range(1, min(LONGEST_PERIOD, (len(kinds) - start) // 2) + 1):
        first = kinds[start : start + length]
        times = 1
        while kinds[start + times * length : start + (times + 1) * length] == first:
            times += 1
        if times > 1 and length * times > best[0] * best[1]:
            best = length, times
    return best
