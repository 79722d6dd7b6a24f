"""Whether a model treats the rows of a batch alone, shown on a few rows of its first batches.

Nobody can tell from Python code whether a layer mixes rows: a mean over the
batch, a penalty on how experts are used, a permutation. So before replicas share out
rows for the first time, in training and in inference, they compute two rows of
each, once as they will from then on and once all of them on every rank, from the
same state. Layers whose outputs, losses or states differ by more than rounding, which is
measured (`keras_tp.rounding`), are told to the caller; if no layer's do, but the
model's, that is an error. It costs two calls on a few rows, or four.

The first batch may hide it: its rows are all alike, a gate is zero, a layer is frozen.
So it is shown again for the 2nd, 4th, 8th, ... batch, and for every kind of call (its
arguments but for tensors and numbers, and which layers are trained).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import keras
import torch
import torch.distributed as dist

from keras_tp.errors import LayoutError
from keras_tp.messages import control_device
from keras_tp.rounding import NUDGES, Nudge, allowed, difference, unit_of
from keras_tp.seam.contexts import current_replicas
from keras_tp.seam.layers import Owner, metric_variables_of, states_of, variables_of
from keras_tp.seam.rows import losses_of, recorded_draws
from keras_tp.seam.trials import nudged_weights, restored
from keras_tp.seam.variables import local_tensor

ROWS = 2  # of each replica

Shapes = Set[tuple[int, ...]]
# Calls the model on some rows, nudged, with the shapes of what is not drawn by row; with
# None for them, on every rank alike.
Call = Callable[[Nudge, Shapes | None], Any]
_Record = list[tuple[int, torch.Tensor]]  # a layer, and what it gave


@dataclass(frozen=True)
class Proof:
    """What was found.

    Attributes:
        fixed: the shapes in which random numbers were drawn for some rows and for
            all: what has one of these is drawn whole, though it begin with the
            number of rows.
        gap: the largest difference.
        mixing: indices of layers below the model that want all rows. Of those whose
            outputs differ only the first, as it may be why those of others do.
    """

    fixed: Shapes
    gap: float
    mixing: tuple[int, ...]


def prove_rows(owners: Sequence[Owner], call: Call, where: str) -> Proof:
    """Compares the replicas' rows with all rows; `mixing` is empty if they come out alike.

    Collective.

    Raises:
        LayoutError: on every rank, if they do not, and no layer is to blame.
    """
    unit = unit_of([o.layer.compute_dtype for o in owners])
    still = Nudge(0.0, seed=0)
    with recorded_draws(by_replicas=False) as whole:
        wanted = _results(owners, call, still, None)
    with recorded_draws(by_replicas=True) as some:
        found = _results(owners, call, still, whole)
    gap = _largest_gap(wanted, found, (), unit)
    if gap > allowed(unit):  # nudges allow for more, never for less
        nudged = [_results(owners, call, Nudge(unit, seed), None) for seed in range(NUDGES)]
        gap = _largest_gap(wanted, found, nudged, unit)
    mixing = _who_mixes(owners, call, whole, unit) if gap > allowed(unit) else ()
    if gap > allowed(unit) and not mixing:
        raise LayoutError(
            f"its rows are not computed alone: of {ROWS} rows on each replica, results differ by "
            f"{gap:.1e} (rounding: {allowed(unit):.1e}) from those of all rows together, though "
            "no layer's do: look at how the model joins their outputs. With batch_axis=None every "
            "replica computes all rows.",
            where=where,
        )
    return Proof(whole & some, gap, mixing)


def _results(
    owners: Sequence[Owner], call: Call, nudge: Nudge, fixed: Shapes | None
) -> list[torch.Tensor]:
    with _trial(owners, nudge):
        outputs = call(nudge, fixed)
        tensors = [*keras.tree.flatten(outputs), *owners[0].layer.losses]
        tensors += _states(owners)
        return [torch.as_tensor(t).detach().clone() for t in tensors if _is_number(t)]


def _states(owners: Sequence[Owner]) -> list[torch.Tensor]:
    return [local_tensor(v) for v in (*states_of(owners), *metric_variables_of(owners))]


@contextlib.contextmanager
def _trial(owners: Sequence[Owner], nudge: Nudge) -> Iterator[None]:
    nudged = nudged_weights(variables_of(owners) if nudge.unit else (), nudge)
    with restored(owners, trained=False), torch.no_grad(), nudged:
        yield


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor | int | float)


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


def _who_mixes(owners: Sequence[Owner], call: Call, fixed: Shapes, unit: float) -> tuple[int, ...]:
    """The layers that are to blame; see `Proof.mixing`. Collective."""

    def run(nudge: Nudge, shapes: Shapes | None) -> tuple[_Record, _Record]:
        with _trial(owners, nudge), _recorded(owners) as outputs:
            call(nudge, shapes)
            kept = [(i, [*losses_of([o]), *_states([o])]) for i, o in enumerate(owners)]
            return outputs, [(i, t.detach().clone()) for i, tensors in kept for t in tensors]

    still = Nudge(0.0, seed=0)
    one, many = run(still, None), run(still, fixed)
    nudged = [run(Nudge(unit, seed), None) for seed in range(NUDGES)]
    blamed: list[int] = []
    for kind in (0, 1):  # outputs; losses and states
        for (i, whole), (_, rows), *again in zip(
            one[kind], many[kind], *(n[kind] for n in nudged), strict=False
        ):
            # (What is no longer by row, such as tokens in one line, shows further on.)
            if i == 0 or i in blamed or (kind == 0 and (blamed or whole.shape != rows.shape)):
                continue
            if _largest_gap([whole], [rows], [[t] for _, t in again], unit) > allowed(unit):
                blamed.append(i)
    return tuple(blamed)


@contextlib.contextmanager
def _recorded(owners: Sequence[Owner]) -> Iterator[_Record]:
    """While open, what layers give, in the order in which they are done; rows of all replicas."""
    record: _Record = []

    def listen(i: int) -> Any:
        def hook(layer: Any, args: Any, outputs: Any) -> None:
            replicas = current_replicas()
            for leaf in keras.tree.flatten(outputs):
                if isinstance(leaf, torch.Tensor) and leaf.dim():
                    if replicas is not None and leaf.shape[0] == replicas.rows:
                        leaf = replicas.gather(leaf)
                    record.append((i, leaf))

        return hook

    handles = [o.layer.register_forward_hook(listen(i)) for i, o in enumerate(owners)]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
