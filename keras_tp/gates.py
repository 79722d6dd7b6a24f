"""Where activations go over from whole to shards of the sequence and back: as layers are called.

A gate stands around a layer's call. What it does to each tensor that goes in or comes out was
found by a proof (`keras_tp.sequences`), and is done in that order (`keras_tp.sequence_calls`
with values, `keras_tp.dry_sequences` without).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import torch

# The dim of activations (batch, tokens, features) that is the sequence.
SEQUENCE = 1

# What a gate does to a tensor.
KEEP = ""
CUT = "cut"  # a whole one: a copy of this rank's shard; its gradient is gathered
SUM = "sum"  # a shard: gathered for use on weights that are shards; its gradient is scattered
JOIN = "join"  # a shard: gathered for what every rank does alike; its gradient is sliced


@dataclass(frozen=True)
class Passage:
    """One time that something goes through a gate.

    Attributes:
        layer: number of the layer, among the outermost and all below it.
        leaving: whether the layer returns, or is called.
        done: what is done to each tensor.
    """

    layer: int
    leaving: bool
    done: tuple[str, ...]


@dataclass(frozen=True)
class SequencePlan:
    """What of a model is computed on shards of the sequence, in a call as it was built for.

    Other calls are looked at as they come.

    Attributes:
        axis: the mesh axis.
        scattered: indices into `Plan.layers` of layers whose output is a sum that is scattered.
        whole: indices of layers that are given whole activations, for want of a proof.
        summed: indices into `Plan.variables` of weights that are used on shards: their gradients
            are summed over the axis, in buckets.
    """

    axis: str
    scattered: tuple[int, ...]
    whole: tuple[int, ...]
    summed: tuple[int, ...]


# Does one of these to a tensor, for the layer of a number.
Convert = Callable[[str, torch.Tensor, int], torch.Tensor]


@dataclass
class Converted:
    """What was made of tensors, so that whoever is given the same tensor shares it.

    It is kept for as long as the tensor is, which nobody can be given again afterwards.
    """

    convert: Convert
    made: dict[tuple[str, int], tuple[Any, torch.Tensor]] = field(default_factory=dict)

    def of(self, what: str, tensor: torch.Tensor, layer: int) -> torch.Tensor:
        """The tensor converted."""
        self.made = {key: entry for key, entry in self.made.items() if entry[0]() is not None}
        key = what, id(tensor)
        if key not in self.made:
            self.made[key] = weakref.ref(tensor), self.convert(what, tensor, layer)
        return self.made[key][1]


class Gates:
    """The gates of one call of the outermost layer.

    Args:
        passages: what will go through them, in order.
        convert: does it.
    """

    def __init__(self, passages: Sequence[Passage], convert: Convert):
        self.left = iter(passages)
        self.converted = Converted(convert)

    def through(self, layer: int, leaving: bool, nest: Any) -> Any:
        """`nest` as it comes out of a gate."""
        passage = next(self.left)
        assert (passage.layer, passage.leaving) == (layer, leaving), (passage, layer, leaving)
        done = iter(passage.done)

        def converted(leaf: Any) -> Any:
            if isinstance(leaf, np.ndarray):
                next(done)  # a tensor where nothing has values, of which nothing is made
            if not isinstance(leaf, torch.Tensor):
                return leaf
            what = next(done)
            return leaf if what == KEEP else self.converted.of(what, leaf, layer)

        return keras.tree.map_structure(converted, nest)

    def around(self, layer: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's call with its gate."""

        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self.through(layer, False, (args, kwargs))
            return self.through(layer, True, original(*args, **kwargs))

        return call

    @contextlib.contextmanager
    def open(self, layers: Sequence[tuple[int, Any]]) -> Iterator[None]:
        """While open, the gates of these layers stand.

        Args:
            layers: each with its number.
        """
        before = [(vars(layer), vars(layer).get("call")) for _, layer in layers]
        for number, layer in layers:
            vars(layer)["call"] = self.around(number, layer.call)
        try:
            yield
        finally:
            for attributes, call in before:
                if call is None:
                    del attributes["call"]
                else:
                    attributes["call"] = call


def gated(passages: Sequence[Passage]) -> tuple[int, ...]:
    """Numbers of the layers whose gates do anything."""
    return tuple(sorted({p.layer for p in passages if any(what != KEEP for what in p.done)}))
