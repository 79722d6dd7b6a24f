"""Calls that replicas make on their rows of a batch, without values.

See `keras_tp.replicas` and `keras_tp.all_rows`, which make them with values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import torch

from keras_tp.dry_collectives import DryAxis
from keras_tp.dry_weights import DryWeights
from keras_tp.layouts import row_counts
from keras_tp.ledger import Ledger
from keras_tp.outputs import mapped
from keras_tp.seam.contexts import current_replicas, on_rows_of
from keras_tp.seam.rows import with_mask

Call = Callable[..., Any]


class DryRowsCall:
    """A model's call, which a replica makes on its rows; see `keras_tp.replicas.RowsCall`."""

    def __init__(self, original: Call, axis: DryAxis, path: str, weights: DryWeights):
        self.original, self.axis, self.path, self.weights = original, axis, path, weights
        self.losses: list[torch.Tensor] = []  # that layers add
        self.shared: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = [leaf for leaf in keras.tree.flatten((args, kwargs)) if _has_rows(leaf)]
        total = min((leaf.shape[0] for leaf in leaves), default=0)
        if current_replicas() is not None or total < self.axis.size:
            return self.original(*args, **kwargs)
        self.shared = True
        counts = row_counts(total, self.axis.size)
        replicas = self.weights.replicas(self.axis, counts, self.path)

        def mine(leaf: Any) -> Any:
            return with_mask(leaf, replicas.take) if _has_rows(leaf) else leaf

        def whole(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return with_mask(leaf, lambda t: mapped(lambda t: replicas.gather(t, "output"), t))

        args, kwargs = keras.tree.map_structure(mine, (args, kwargs))
        earlier = len(self.losses)
        with on_rows_of(replicas):
            outputs = self.original(*args, **kwargs)
        known = {id(loss) for loss in replicas.alike}
        added = [i for i in range(earlier, len(self.losses)) if id(self.losses[i]) not in known]
        if added:
            values = torch.stack([self.losses[i].reshape(()) for i in added])
            replicas.mean(values)  # what it gives has the same gradients, in shape
        return keras.tree.map_structure(whole, outputs)


class DryWholeRowsCall:
    """The call of a layer that is given all rows; see `keras_tp.all_rows.WholeRowsCall`."""

    def __init__(self, original: Call, path: str, rows_call: DryRowsCall):
        self.original, self.path, self.rows_call = original, path, rows_call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replicas: Any = current_replicas()
        if replicas is None:
            return self.original(*args, **kwargs)

        def whole(leaf: Any) -> Any:
            if not _has_rows(leaf) or leaf.shape[0] != replicas.rows:
                return leaf
            return with_mask(leaf, lambda t: replicas.gather(t, "input"))

        def mine(leaf: Any) -> Any:
            if not _has_rows(leaf) or leaf.shape[0] != replicas.total:
                return leaf
            return with_mask(leaf, lambda t: replicas.take(t, "output gradient"))

        args, kwargs = keras.tree.map_structure(whole, (args, kwargs))
        earlier = len(self.rows_call.losses)
        with on_rows_of(None):
            outputs = self.original(*args, **kwargs)
        replicas.alike += self.rows_call.losses[earlier:]
        return keras.tree.map_structure(mine, outputs)


class Named:
    """A call, during which the ledger knows whose it is."""

    def __init__(self, original: Call, path: str, ledger: Ledger):
        self.original, self.path, self.ledger = original, path, ledger

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, self.ledger.layer = self.ledger.layer, self.path
        try:
            return self.original(*args, **kwargs)
        finally:
            self.ledger.layer = before


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0
