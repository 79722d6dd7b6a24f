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
import itertools
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import torch
from keras.src.backend.common.variables import get_autocast_scope
from keras.src.utils.tracking import TrackedDict, TrackedList, TrackedSet

from keras_tp.seam.contexts import is_training
from keras_tp.seam.layers import Owner, variables_of, walk_layers
from keras_tp.seam.masks import keras_mask

# Names of a layer, and its graphs, files, builders and ways to be called, which its class has; and
# what it refuses before it is called, of which there is no more to know than that it does.
_ASIDE = {
    *("name", "_name", "_path", "_parent_path", "_auto_config", "_tracker", "_torch_params"),
    *("_inbound_nodes", "_outbound_nodes", "_build_shapes_dict", "build", "quantize", "call"),
    *("_call_signature", "call_signature_parameters", "_call_context_args"),
    *("_call_has_context_arg", "_called", "_modules", "_input_spec"),
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


class Likeness:
    """Tells which calls of layers are alike.

    A layer is looked at once while nothing of what it keeps is another object.
    """

    def __init__(self) -> None:
        self._looked: dict[int, list[Looked]] = {}
        self._numbers: dict[Any, int] = {}

    def of(self, layer: Any) -> Looked:
        """A layer and all below it, as they are now."""
        cast = getattr(get_autocast_scope(), "dtype", None)  # in which their weights are read
        known = self._looked.setdefault(id(layer), [])
        for looked in known:
            if looked.cast == cast and looked.is_as_before():
                return looked
        below = walk_layers(layer)
        walk = _Walk({id(owner.layer) for owner in below} | {id(v) for v in variables_of(below)})
        kind = cast, walk.of(layer)
        number = self._numbers.setdefault(kind, len(self._numbers))
        known[MOST - 1 :] = []
        known.insert(0, Looked(number, cast, below, variables_of(below), walk))
        return known[0]

    def kind_of_call(
        self, looked: Looked, args: Any, kwargs: Any, mark: Callable[[Any], Any]
    ) -> Any:
        """What calls of layers have in common that are alike; to compare, and as a key.

        Args:
            looked: the layer and all below it.
            args, kwargs: what it is called with; of tensors shapes, dtypes and masks count.
            mark: what else is to be the same of two layers, or variables, in the same place.
        """
        walk = _Walk(looked.walk.own)
        walk.seen = dict(looked.walk.seen)
        given = keras.tree.map_structure(walk.argument, (args, kwargs))
        return looked.number, (*map(mark, looked.walk.owned),), walk.of(given), is_training()


# Ways to be of a layer that are kept: those of rehearsals, in which other calls take its place.
MOST = 4


@dataclass(frozen=True, eq=False)
class Looked:
    """A layer and all below it, as it was when it was looked at.

    Attributes:
        number: the same of all that are alike.
        cast: what weights are read in.
        below: the layer and all below it.
        variables: theirs.
        walk: what was come by.
    """

    number: int
    cast: str | None
    below: list[Owner]
    variables: tuple[Any, ...]
    walk: _Walk

    @property
    def owned(self) -> list[Any]:
        """The layers and variables, in an order that all that are alike have in common."""
        return self.walk.owned

    def is_as_before(self) -> bool:
        """Whether all that is kept are the same objects."""
        for kept, names, values, all_of_it in self.walk.attributes_kept:
            if not all(map(operator.is_, map(kept.get, names, _MISSING), values)):
                return False
            if all_of_it and len(kept) - sum(map(kept.__contains__, _ASIDE)) != len(names):
                return False
        if any(self.walk.empty):
            return False
        for contents, before in self.walk.contents_kept:
            if len(contents) != len(before) or not all(map(operator.is_, contents, before)):
                return False
        return True


_MISSING = itertools.repeat(object())


class _Walk:
    def __init__(self, own: set[int]):
        self.own = own
        self.owned: list[Any] = []
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no id comes again
        self.attributes_kept: list[tuple[dict[str, Any], list[str], list[Any], bool]] = []
        self.contents_kept: list[tuple[Any, list[Any]]] = []
        self.empty: list[Any] = []  # containers

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return kind, value
        if kind in _CONTAINERS and not value:
            self.empty.append(value)
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
        if known:
            self.owned.append(value)
        if kind in _CONTAINERS:
            self.contents_kept.append((value, list(value)))
        if kind in _LISTS:
            return kind, *map(self.of, value)
        if kind in _DICTS:
            self.contents_kept.append((value.values(), list(value.values())))
            return kind, *((self.of(k), self.of(v)) for k, v in value.items())
        if kind in _SETS:
            return kind, frozenset(map(self.of, value))
        if kind is types.MethodType:
            return kind, value.__func__, self.of(value.__self__)
        if kind is functools.partial:
            return kind, self.of(value.func), self.of(value.args), self.of(value.keywords)
        if isinstance(value, keras.Variable):
            self._keep(vars(value), [n for n in _OF_VARIABLES if n in vars(value)], False)
            return kind, tuple(value.shape), str(value.dtype), bool(value.trainable)
        if known or _is_open(kind):  # type: ignore[arg-type]
            return kind, known, *self.attributes(value)
        return _Itself(value)

    def attributes(self, value: Any) -> list[Any]:
        kept = vars(value)
        names = [name for name in kept if name not in _ASIDE]
        self._keep(kept, names, True)
        found = [(name, self.of(kept[name])) for name in names]
        parts = kept.get("_modules") if isinstance(value, keras.layers.Layer) else None
        if not parts:
            return found
        names = [name for name in parts if name not in _ASIDE]
        self._keep(parts, names, True)
        return found + [(name, self.of(parts[name])) for name in names]

    def _keep(self, kept: dict[str, Any], names: list[str], all_of_it: bool) -> None:
        self.attributes_kept.append((kept, names, [kept[name] for name in names], all_of_it))

    def argument(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return self.of(leaf)
        if id(leaf) in self.seen:
            return "again", self.seen[id(leaf)]
        self.seen[id(leaf)] = len(self.seen)
        mask = keras_mask(leaf)
        like = tuple(leaf.shape), leaf.dtype
        return like if mask is None else (like, self.argument(mask))


# What decides of a variable; its value does not.
_OF_VARIABLES = "_shape", "_dtype", "_trainable"


@functools.cache
def _is_open(kind: type) -> bool:
    """Whether all that objects of a class keep is in their attributes."""
    return all(
        c is object or (c.__flags__ & _HEAP_TYPE and not c.__dict__.get("__slots__"))
        for c in kind.__mro__
    )
