"""Compares a parallelized model with itself on gathered weights, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import torch
import torch.distributed as dist

from keras_tp.agreement import AgreedInputs, fingerprint
from keras_tp.all_rows import WholeRowsCall
from keras_tp.calls import GatheredCall, ShardCall
from keras_tp.checks import Verification
from keras_tp.comparison import Comparison, Mode
from keras_tp.errors import LayoutError
from keras_tp.prefetch import PrefetchedCall, gathering_at_once
from keras_tp.region_calls import RegionCall
from keras_tp.replicas import RowsCall
from keras_tp.seam.contexts import is_symbolic, on_rows_of
from keras_tp.seam.layers import Owner, parallelized_part, variables_of, walk_layers
from keras_tp.seam.trials import position_of, restored
from keras_tp.seam.variables import local_tensor
from keras_tp.sequence_calls import SequenceCall


def verify_model(model: Any, batch: Any, training: bool, tolerance: float | None) -> Verification:
    """See `keras_tp.verify`. Collective."""
    if parallelized_part(model) is None:
        raise LayoutError(
            "it is not parallelized, so there is nothing to compare. Call keras_tp.parallelize "
            "first.",
            where=f"model '{model.name}'",
        )
    inputs = keras.tree.map_structure(
        lambda leaf: keras.ops.convert_to_tensor(leaf) if hasattr(leaf, "shape") else leaf,
        batch[0] if isinstance(batch, tuple) else batch,
    )
    owners = walk_layers(model)
    mode = Mode()
    calls = [
        _CheckedCall(o, mode) for o in owners if isinstance(getattr(*_place(o.layer)), _Planned)
    ]
    with restored(owners), gathering_at_once(), _batches_compared(model), _in_place(calls):
        unequal = _unequal_weights(owners)
        with torch.no_grad():
            model(inputs, training=training)
        whole = Comparison(Owner(model, model.path or model.name, ()), "whole model", mode)
        whole.compare(lambda given: model(given, training=training), (inputs,), {})
    return Verification(
        layers=tuple(c.result(tolerance) for c in mode.called if c is not whole),
        model=whole.result(tolerance),
        unequal_weights=tuple(unequal),
        not_called=tuple(c.comparison.owner.path for c in calls if not c.comparison.calls),
    )


_Planned = ShardCall | GatheredCall | RegionCall | SequenceCall
_AROUND = AgreedInputs | RowsCall | PrefetchedCall | WholeRowsCall


def _place(layer: Any) -> tuple[Any, str]:
    """Where the plan has put what computes the layer: an object and its attribute."""
    holder, name = layer, "call"
    while isinstance(getattr(holder, name), _AROUND):
        holder, name = getattr(holder, name), "original"
    return holder, name


def _original(planned: Any) -> Any:
    """The call that it has taken the place of, with none around it that has layers share."""
    call = planned.original
    within = isinstance(planned, SequenceCall) and isinstance(call, RegionCall)
    return call.original if within else call


class _CheckedCall:
    """A layer's call that is compared, before it is made, with one on gathered weights."""

    def __init__(self, owner: Owner, mode: Mode):
        self.planned = getattr(*_place(owner.layer))
        self.mode = mode
        self.comparison = Comparison(owner, self.planned.style, mode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.mode.now == "checking" and not is_symbolic():
            # As if there were no replicas: each compares what it does with its own rows.
            with on_rows_of(None):
                self.comparison.compare(self._call, args, kwargs)
            if isinstance(self.planned, RegionCall | SequenceCall):
                # As if its layers handed each other whole activations, so that each is compared.
                return _original(self.planned)(*args, **kwargs)
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        call = _original(self.planned) if self.mode.now == "gathered" else self.planned
        return call(*args, **kwargs)


@contextlib.contextmanager
def _in_place(calls: list[_CheckedCall]) -> Iterator[None]:
    places = [_place(checked.comparison.owner.layer) for checked in calls]
    for place, checked in zip(places, calls, strict=True):
        setattr(*place, checked)
    try:
        yield
    finally:
        for place, checked in zip(places, calls, strict=True):
            setattr(*place, checked.planned)


@contextlib.contextmanager
def _batches_compared(model: Any) -> Iterator[None]:
    """Has the ranks compare the next batch, and count on afterwards as if there had been none."""
    batches = model.call.batches if isinstance(model.call, AgreedInputs) else None
    seen = batches.seen if batches else 0
    if batches:
        batches.seen = 0
    try:
        yield
    finally:
        if batches:
            batches.seen = seen


def _unequal_weights(owners: list[Owner]) -> list[str]:
    """Variables of which ranks that should store the same do not, in words. Collective."""
    variables = variables_of(owners)
    everywhere: Any = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [fingerprint(local_tensor(v)) for v in variables])
    unequal = []
    for i, variable in enumerate(variables):
        stored: dict[tuple[int, ...], set[str]] = {}
        for rank, prints in enumerate(everywhere):
            stored.setdefault(position_of(variable, rank), set()).add(prints[i])
        if any(len(different) > 1 for different in stored.values()):
            each = ", ".join(f"rank {rank} {prints[i]}" for rank, prints in enumerate(everywhere))
            unequal.append(f"{variable.path}: {each}")
    return unequal
