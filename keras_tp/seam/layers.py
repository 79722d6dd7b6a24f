"""Keras layers: which there are, what they own, and where a call or a loss can be taken over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import keras

from keras_tp.seam.variables import ShardedVariable, is_symbolic, reading_full


@dataclass(frozen=True)
class Owner:
    """A layer and the variables it owns itself, its sublayers' not counted."""

    layer: Any
    path: str
    variables: tuple[Any, ...]


def walk_layers(model: Any) -> list[Owner]:
    """The model and all layers below it, depth first, each once, in creation order.

    The order is the same on every rank; collectives rely on it.
    """
    owners: list[Owner] = []
    seen: set[int] = set()

    def visit(layer: Any) -> None:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        own = [*layer._trainable_variables, *layer._non_trainable_variables]
        own += [generator.state for generator in layer._seed_generators]
        owners.append(Owner(layer, layer.path or layer.name, _unique(own)))
        for sublayer in layer._layers:
            visit(sublayer)

    visit(model)
    return owners


def variables_of(owners: Iterable[Owner]) -> tuple[Any, ...]:
    """All variables that `owners` own, each once, in their order."""
    return _unique(v for owner in owners for v in owner.variables)


def _unique(variables: Iterable[Any]) -> tuple[Any, ...]:
    return tuple({id(v): v for v in variables}.values())


def overrides_build(layer: Any) -> bool:
    """Whether the layer's class makes weights in a `build` of its own."""
    return type(layer).build is not keras.layers.Layer.build


_PARALLELIZED = "_keras_tp_parallelized"


def mark_parallelized(model: Any) -> None:
    """Remembers that `model` was parallelized, even where nothing of it is sharded."""
    vars(model)[_PARALLELIZED] = True


def parallelized_part(model: Any) -> str | None:
    """Path of a layer or variable of `model` that is parallelized already, or None."""
    for owner in walk_layers(model):
        if _PARALLELIZED in vars(owner.layer):
            return owner.path
        for variable in owner.variables:
            if isinstance(variable, ShardedVariable):
                return variable.path
    return None


def observe_loss(model: Any, observe: Callable[[Any, Any], None]) -> None:
    """Has `observe(y, sample_weight)` called before each loss, and gives the loss full weights.

    A `compute_loss` or a loss function that reads weights sees them in full.
    """
    original = model._compute_loss

    @functools.wraps(original)
    def compute_loss(
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        if not is_symbolic():
            observe(y, sample_weight)
        with reading_full():
            return original(x, y, y_pred, sample_weight, training)

    model._compute_loss = compute_loss
