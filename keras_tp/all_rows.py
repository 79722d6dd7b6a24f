"""What computes all rows on every replica: layers that look at several, and whole models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_tp.data import has_rows
from keras_tp.seam.contexts import current_replicas, is_symbolic, on_rows_of
from keras_tp.seam.layers import walk_layers
from keras_tp.seam.rows import losses_of, with_mask


class WholeRowsCall:
    """The `call` of a layer that looks at several rows: on the rows of all replicas, by each.

    Forward one all-gather of each input, backward one of each output's gradient.
    """

    def __init__(self, layer: Any):
        self.original = layer.call
        self.owners = walk_layers(layer)
        self.modes: set[bool] = set()  # in inference, in training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replicas = current_replicas()
        if replicas is None or is_symbolic() or replicas.training not in self.modes:
            return self.original(*args, **kwargs)

        def whole(leaf: Any) -> Any:
            if not has_rows(leaf) or leaf.shape[0] != replicas.rows:
                return leaf
            return with_mask(leaf, replicas.gather)

        def mine(leaf: Any) -> Any:
            if not has_rows(leaf) or leaf.shape[0] != replicas.total:
                return leaf
            return with_mask(leaf, replicas.take)

        args, kwargs = keras.tree.map_structure(whole, (args, kwargs))
        earlier = losses_of(self.owners)
        with on_rows_of(None):
            outputs = self.original(*args, **kwargs)
        known = {id(loss) for loss in earlier}
        replicas.alike += [loss for loss in losses_of(self.owners) if id(loss) not in known]
        return keras.tree.map_structure(mine, outputs)


def give_all_rows(layer: Any, *modes: bool) -> None:
    """Has a layer compute on all rows, in inference (False) or training (True)."""
    if not isinstance(layer.call, WholeRowsCall):
        layer.call = WholeRowsCall(layer)
    layer.call.modes |= set(modes)


_ALIKE: list[bool] = []


def is_alike() -> bool:
    """Whether `computing_alike` is open."""
    return bool(_ALIKE)


@contextlib.contextmanager
def computing_alike() -> Iterator[None]:
    """While open, every replica computes all rows, and models do not share them out."""
    _ALIKE.append(True)
    try:
        yield
    finally:
        _ALIKE.pop()
