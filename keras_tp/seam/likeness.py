"""Calls of layers that are alike: what of a layer and its arguments its code can go by.

Two layers of one class run the same code. They are alike if all that they keep is: each attribute,
in the layers below as well, but for names, what Keras and torch keep to find, save and build
layers, and what draws values, of which a run without values has none. What is neither a plain
value, nor a container, nor an object of Python's own of such, is like itself alone. Weights and
layers of their own are told by their places, so that one in two places is not like two.
"""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import torch
from keras.src.utils.tracking import TrackedDict, TrackedList, TrackedSet

from keras_tp.seam.contexts import is_training
from keras_tp.seam.layers import Owner, variables_of
from keras_tp.seam.rehearsals import keras_mask

# Names of a layer, and its graphs, files, builders and ways to be called, which its class has.
_ASIDE = {
    *("name", "_name", "_path", "_parent_path", "_auto_config", "_tracker", "_torch_params"),
    *("_inbound_nodes", "_outbound_nodes", "_build_shapes_dict", "build", "quantize", "call"),
    *("_call_signature", "call_signature_parameters", "_call_context_args"),
    *("_call_has_context_arg", "_called", "_modules"),
}
_PLAIN = {bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device}
_DRAWING = (keras.initializers.Initializer, keras.random.SeedGenerator)
_LISTS = {list, tuple, TrackedList, collections.deque}
_DICTS = {dict, collections.OrderedDict, TrackedDict}
_SETS = {set, frozenset, TrackedSet}
_CONTAINERS = _LISTS | _DICTS | _SETS
_OWNED = (keras.Variable, keras.layers.Layer)
_HEAP_TYPE = 1 << 9  # of a class: made by a `class` statement


@dataclass(frozen=True, eq=False)
class _Itself:
    """Something that is like nothing else; kept, so that its id is not another's."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def kind_of_call(
    below: list[Owner],
    args: Any,
    kwargs: Any,
    mark: Callable[[Any], Any],
) -> Any:
    """What calls of layers have in common that are alike; to compare, and as a key.

    Args:
        below: the layer and all below it.
        args, kwargs: what it is called with; of tensors shapes, dtypes and masks count.
        mark: what else is to be the same of two layers, or variables, in the same place.
    """
    walk = _Walk(below, mark)
    layer = walk.of(below[0].layer)
    given = keras.tree.map_structure(walk.argument, (args, kwargs))
    return layer, walk.of(given), is_training()


class _Walk:
    def __init__(self, below: list[Owner], mark: Callable[[Any], Any]):
        self.mark = mark
        self.own = {id(owner.layer) for owner in below} | {id(v) for v in variables_of(below)}
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no id comes again

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return kind, value
        if kind in _CONTAINERS and not value:
            return kind
        if id(value) in self.seen:
            return "again", self.seen[id(value)]
        if isinstance(value, _DRAWING):
            return kind
        known = id(value) in self.own
        if isinstance(value, _OWNED) and not known:
            return _Itself(value)
        self.seen[id(value)] = len(self.seen)
        self.kept.append(value)
        if kind in _LISTS:
            return kind, *map(self.of, value)
        if kind in _DICTS:
            return kind, *((self.of(k), self.of(v)) for k, v in value.items())
        if kind in _SETS:
            return kind, frozenset(map(self.of, value))
        if kind is types.MethodType:
            return kind, value.__func__, self.of(value.__self__)
        if kind is functools.partial:
            return kind, self.of(value.func), self.of(value.args), self.of(value.keywords)
        if isinstance(value, keras.Variable):
            shape, dtype = tuple(value.shape), str(value.dtype)
            return kind, shape, dtype, bool(value.trainable), self.mark(value)
        if known or _is_open(kind):  # type: ignore[arg-type]
            return kind, self.mark(value) if known else None, *self.attributes(value)
        return _Itself(value)

    def attributes(self, value: Any) -> list[Any]:
        kept = vars(value)
        found = [(name, self.of(v)) for name, v in kept.items() if name not in _ASIDE]
        parts = kept.get("_modules", {}) if isinstance(value, keras.layers.Layer) else {}
        return found + [(name, self.of(v)) for name, v in parts.items() if name not in _ASIDE]

    def argument(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return self.of(leaf)
        if id(leaf) in self.seen:
            return "again", self.seen[id(leaf)]
        self.seen[id(leaf)] = len(self.seen)
        mask = keras_mask(leaf)
        like = tuple(leaf.shape), leaf.dtype
        return like if mask is None else (like, self.argument(mask))


@functools.cache
def _is_open(kind: type) -> bool:
    """Whether all that objects of a class keep is in their attributes."""
    return all(
        c is object or (c.__flags__ & _HEAP_TYPE and not c.__dict__.get("__slots__"))
        for c in kind.__mro__
    )
