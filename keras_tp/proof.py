"""Whether a model treats the rows of a batch alone, shown on a few rows of its first batches.

Nobody can tell from Python code whether a layer mixes rows: a mean over the
batch, a contrastive loss, a permutation. So before replicas share out rows for the
first time, in training and in inference, they compute two rows of each, once as
they will from then on and once all of them on every rank, from the same state.
What differs by more than rounding, which is measured (`keras_tp.rounding`), is an
error that names the layer. It costs four calls on a few rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import keras
import torch
import torch.distributed as dist

from keras_tp.collectives import control_device
from keras_tp.errors import LayoutError
from keras_tp.rounding import Nudge, difference, unit_of, units_allowed
from keras_tp.seam.contexts import current_replicas
from keras_tp.seam.layers import Owner, metric_variables_of, states_of, variables_of
from keras_tp.seam.rows import recorded_draws
from keras_tp.seam.trials import nudged_weights, restored
from keras_tp.seam.variables import local_tensor

ROWS = 2  # of each replica
NUDGES = 2

Shapes = Set[tuple[int, ...]]
# Calls the model on some rows, nudged, with the shapes of what is not drawn by row; with
# None for them, on every rank alike.
Call = Callable[[Nudge, Shapes | None], Any]


def prove_rows(owners: Sequence[Owner], call: Call, where: str) -> Shapes:
    """Raises LayoutError on every rank if the replicas' rows come out other than all rows do.

    Collective.

    Returns:
        The shapes in which random numbers were drawn for some rows and for all: what
        has one of these is drawn whole, though it begin with the number of rows.
    """
    variables = variables_of(owners)
    unit = unit_of([o.layer.compute_dtype for o in owners])
    allowed = _allowed(unit)

    def results(nudge: Nudge, fixed: Shapes | None) -> list[torch.Tensor]:
        nudged = nudged_weights(variables if nudge.unit else (), nudge)
        with restored(owners, trained=False), torch.no_grad(), nudged:
            outputs = call(nudge, fixed)
            tensors = [*keras.tree.flatten(outputs), *owners[0].layer.losses]
            written = *states_of(owners), *metric_variables_of(owners)
            tensors += [local_tensor(v) for v in written]
            return [torch.as_tensor(t).detach().clone() for t in tensors if _is_number(t)]

    still = Nudge(0.0, seed=0)
    with recorded_draws(by_replicas=False) as whole:
        wanted = results(still, None)
    with recorded_draws(by_replicas=True) as some:
        found = results(still, whole)
    nudged = [results(Nudge(unit, seed), None) for seed in range(NUDGES)]
    gap = _largest_gap(wanted, found, nudged, unit)
    if gap > allowed:
        raise LayoutError(
            f"its rows are not computed alone: of {ROWS} rows on each replica, results differ by "
            f"{gap:.1e} (rounding: {allowed:.1e}) from those of all rows together. "
            f"{_who_mixes(owners, call, whole, unit)} A layer with `layer.all_rows = True`, set "
            "before it is parallelized, is given all rows on every replica; with batch_axis=None "
            "the whole model is.",
            where=where,
        )
    return whole & some


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor | int | float)


def _allowed(unit: float) -> float:
    return units_allowed(unit) * unit


def _largest_gap(
    wanted: Sequence[torch.Tensor],
    found: Sequence[torch.Tensor],
    nudged: Sequence[Sequence[torch.Tensor]],
    unit: float,
) -> float:
    """The largest difference on any rank. Collective."""
    gap = 0.0
    if len({len(wanted), len(found), *map(len, nudged)}) > 1:
        gap = math.inf
    else:
        for one, other, *again in zip(wanted, found, *nudged, strict=True):
            gap = max(gap, difference(one, other, one, again, unit)[0])
    worst = torch.tensor([gap], dtype=torch.float64, device=control_device())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item()


def _who_mixes(owners: Sequence[Owner], call: Call, fixed: Shapes, unit: float) -> str:
    """The first layer whose outputs differ, in words. Collective."""

    def outputs(nudge: Nudge, shapes: Shapes | None) -> list[tuple[str, torch.Tensor]]:
        nudged = nudged_weights(variables_of(owners) if nudge.unit else (), nudge)
        record = _recorded(owners)
        with restored(owners, trained=False), torch.no_grad(), nudged, record as given:
            call(nudge, shapes)
        return given

    still = Nudge(0.0, seed=0)
    one, many = outputs(still, None), outputs(still, fixed)
    nudged = [outputs(Nudge(unit, seed), None) for seed in range(NUDGES)]
    for (path, whole), (_, rows), *again in zip(one, many, *nudged, strict=False):
        if _largest_gap([whole], [rows], [[t] for _, t in again], unit) > _allowed(unit):
            return f"The first layer whose outputs do is '{path}'."
    return (
        "No layer's outputs do: look at losses it adds, metrics it updates, or at how the model "
        "joins them."
    )


@contextlib.contextmanager
def _recorded(owners: Sequence[Owner]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """While open, what layers give, in the order in which they are done; rows of all replicas."""
    record: list[tuple[str, torch.Tensor]] = []

    def listen(path: str) -> Any:
        def hook(layer: Any, args: Any, outputs: Any) -> None:
            replicas = current_replicas()
            for leaf in keras.tree.flatten(outputs):
                if isinstance(leaf, torch.Tensor) and leaf.dim():
                    if replicas is not None and leaf.shape[0] == replicas.rows:
                        leaf = replicas.gather(leaf)
                    record.append((path, leaf))

        return hook

    handles = [o.layer.register_forward_hook(listen(o.path)) for o in owners]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
