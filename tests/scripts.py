"""What a user does with a model, done with a plain one and with a parallelized one, on one mesh.

The first rank does the one for all, every rank the other, from one seed: all ranks are compared
with one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import features
import keras
import numpy as np
import parity

import keras_tp
from keras_tp import heads

# Gives what it sees, by name; what is a nest is compared leaf by leaf.
Script = Callable[[Any], dict[str, Any]]
Layout = Mapping[str, tuple[str | None, ...]]


def size_of(mesh: str) -> int:
    return int(np.prod(list(features.MESHES[mesh].values())))


# Meshes on which outputs, of however few columns, stay shards until the loss.
OPEN = [("model=2", 1), ("batch=2 model=2", 1)]


@contextlib.contextmanager
def open_from(fewest: int) -> Iterator[None]:
    """While open, outputs of at least so many columns stay shards until the loss."""
    before, heads.FEWEST = heads.FEWEST, fewest
    try:
        yield
    finally:
        heads.FEWEST = before


def layout_on(layout: Layout, mesh: str) -> Any:
    """A LayoutMap of those axes that the mesh has; on the others, dims are left whole."""
    axes = features.MESHES[mesh]
    kept = {p: tuple(a if a in axes else None for a in entry) for p, entry in layout.items()}
    return parity.layout_map(kept, axes)


def both(
    build: Callable[[], Any], layout: Layout, mesh: str, script: Script
) -> tuple[dict[str, Any], dict[str, float]]:
    """What the script sees on one process, and the largest differences on the mesh, by name.

    Compared besides: all weights, slots of the optimizer and state of metrics. Collective.
    """

    def run(parallelized: bool) -> dict[str, Any]:
        model = parity.build_seeded(build)
        if parallelized:
            plan = parity.planned(model, layout_on(layout, mesh))
            keras_tp.parallelize(model, plan=plan)
        keras.utils.set_random_seed(3)
        return {**script(model), **state(model)}

    one = parity.once(lambda: run(False))
    many = run(True)
    assert list(one) == list(many)
    return one, {name: difference(value, many[name]) for name, value in one.items()}


def state(model: Any) -> dict[str, Any]:
    """All that training has changed, whole, by kind. Collective."""
    optimizer = getattr(model, "optimizer", None)
    return {
        "weights": list(keras_tp.full_weights(model).values()),
        "slots": [] if optimizer is None else [v.numpy() for v in optimizer.variables],
        "metrics": [v.numpy() for v in getattr(model, "metrics_variables", ())],
    }


def difference(one: Any, many: Any) -> float:
    """The largest of two nests of arrays and numbers."""
    keras.tree.assert_same_structure(one, many)
    pairs = zip(keras.tree.flatten(one), keras.tree.flatten(many), strict=True)
    return max((parity.difference(a, b) for a, b in pairs), default=0.0)
