"""Compares a parallelized model with itself on gathered weights, layer by layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import torch
import torch.distributed as dist

from keras_tp.agreement import AgreedInputs, every_ranks, fingerprint
from keras_tp.calls import GatheredCall, ShardCall
from keras_tp.checks import LayerCheck, Verification
from keras_tp.collectives import control_device
from keras_tp.errors import LayoutError
from keras_tp.seam.layers import Owner, parallelized_part, variables_of, walk_layers
from keras_tp.seam.variables import (
    full_numpy,
    gathered_instead,
    is_symbolic,
    local_tensor,
    restored,
    shard_of,
)

# Differences that rounding makes: sums of shards add up in another order.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 5e-2,
}


def verify_model(model: Any, batch: Any, training: bool, tolerance: float | None) -> Verification:
    """See `keras_tp.verify`. Collective."""
    if parallelized_part(model) is None:
        raise LayoutError(
            "it is not parallelized, so there is nothing to compare. Call keras_tp.parallelize "
            "first.",
            where=f"model '{model.name}'",
        )
    owners = walk_layers(model)
    unequal = _unequal_weights(owners)
    x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
    inputs = keras.tree.map_structure(
        lambda leaf: keras.ops.convert_to_tensor(leaf) if hasattr(leaf, "shape") else leaf, x
    )
    mode = _Mode()
    calls = [_CheckedCall(o, mode) for o in owners if isinstance(_planned(o), _Planned)]
    with restored(variables_of(owners)), _in_place(calls):
        with torch.no_grad():
            model(inputs, training=training)
        whole = _Comparison(Owner(model, model.path or model.name, ()), "whole model", mode)
        whole.compare(lambda given: model(given, training=training), (inputs,), {})
    done = [call.comparison for call in calls]
    return Verification(
        layers=tuple(c.result(tolerance) for c in sorted(done, key=lambda c: c.order) if c.calls),
        model=whole.result(tolerance),
        unequal_weights=tuple(unequal),
        not_called=tuple(c.owner.path for c in done if not c.calls),
    )


class _Mode:
    """How layers compute just now.

    Attributes:
        now: `"checking"`, each call being compared before it is made, or within
            a comparison `"shards"` and then `"gathered"`, the layers below included.
        compared: number of comparisons so far.
    """

    now = "checking"
    compared = 0

    @contextlib.contextmanager
    def be(self, mode: str) -> Iterator[None]:
        before, self.now = self.now, mode
        try:
            yield
        finally:
            self.now = before


class _Comparison:
    """One layer's differences so far."""

    def __init__(self, owner: Owner, style: str, mode: _Mode):
        self.owner = owner
        self.style = style
        self.mode = mode
        self.order = math.inf
        self.calls = 0
        self.differences = [0.0, 0.0, 0.0]
        self.tolerance = 0.0

    def compare(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Makes `call` on shards and on gathered weights, from the same state. Collective."""
        self.mode.compared += 1
        self.order = min(self.order, self.mode.compared)
        self.calls += 1
        variables = variables_of(walk_layers(self.owner.layer))
        trained = [local_tensor(v).requires_grad for v in variables]

        def run(mode: str, sources: Sequence[torch.Tensor]) -> Any:
            weights = [w for w, is_trained in zip(sources, trained, strict=True) if is_trained]
            with self.mode.be(mode), restored(variables), torch.enable_grad():
                return self._run(call, args, kwargs, weights)

        outputs, inputs, weights = run("shards", [local_tensor(v) for v in variables])
        with gathered_instead(variables) as sources:
            full_outputs, full_inputs, full_weights = run("gathered", sources)
        of_weights = [v for v, is_trained in zip(variables, trained, strict=True) if is_trained]
        mine = [
            None if grad is None else shard_of(v, grad)
            for v, grad in zip(of_weights, full_weights, strict=True)
        ]
        found = [
            _difference(full_outputs, outputs, full_outputs),
            _difference(full_inputs, inputs, full_inputs),
            _difference(mine, weights, full_weights),
        ]
        self.differences = [max(a, b) for a, b in zip(self.differences, found, strict=True)]
        coarsest = [TOLERANCES.get(o.dtype, 0.0) for o in full_outputs]
        self.tolerance = max([self.tolerance, *coarsest])

    def _run(
        self, call: Callable[..., Any], args: Any, kwargs: Any, weights: list[torch.Tensor]
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """Outputs, gradients of the inputs, gradients of the weights."""
        leaves = []

        def fresh(leaf: Any) -> Any:
            if not _is_float(leaf):
                return leaf
            leaves.append(leaf.detach().requires_grad_())
            return leaves[-1]

        args, kwargs = keras.tree.map_structure(fresh, (args, kwargs))
        outputs = [o for o in keras.tree.flatten(call(*args, **kwargs)) if _is_float(o)]
        if isinstance(self.owner.layer, keras.Model):
            outputs += self.owner.layer.losses  # penalties look at weights as well
        ends = [o for o in outputs if o.requires_grad]
        wanted = [*leaves, *weights]
        grads: Any = [None] * len(wanted)
        if ends and wanted:
            grads = torch.autograd.grad(ends, wanted, _random_like(ends), allow_unused=True)
        outputs = [o.detach() for o in outputs]
        return outputs, list(grads[: len(leaves)]), list(grads[len(leaves) :])

    def result(self, tolerance: float | None) -> LayerCheck:
        """What was found, on all ranks. Collective."""
        worst = torch.tensor(self.differences, dtype=torch.float64, device=control_device())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        output, input_gradient, weight_gradient = worst.tolist()
        return LayerCheck(
            path=self.owner.path,
            style=self.style,
            calls=self.calls,
            output=output,
            input_gradient=input_gradient,
            weight_gradient=weight_gradient,
            tolerance=self.tolerance if tolerance is None else tolerance,
        )


_Planned = ShardCall | GatheredCall


def _planned(owner: Owner) -> Any:
    """What the plan has put in place of the layer's call; of a model, behind its batch check."""
    call = owner.layer.call
    return call.original if isinstance(call, AgreedInputs) else call


class _CheckedCall:
    """A layer's call that is compared, before it is made, with one on gathered weights."""

    def __init__(self, owner: Owner, mode: _Mode):
        self.planned = _planned(owner)
        self.mode = mode
        self.comparison = _Comparison(owner, self.planned.style, mode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.mode.now == "checking" and not is_symbolic():
            self.comparison.compare(self._call, args, kwargs)
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        call = self.planned.original if self.mode.now == "gathered" else self.planned
        return call(*args, **kwargs)


@contextlib.contextmanager
def _in_place(calls: list[_CheckedCall]) -> Iterator[None]:
    def put(checked: _CheckedCall, call: Any) -> None:
        layer = checked.comparison.owner.layer
        if isinstance(layer.call, AgreedInputs):
            layer.call.original = call
        else:
            layer.call = call

    for checked in calls:
        put(checked, checked)
    try:
        yield
    finally:
        for checked in calls:
            put(checked, checked.planned)


def _unequal_weights(owners: list[Owner]) -> list[str]:
    # Full values, so that shards which several ranks hold are compared as well.
    variables = variables_of(owners)
    everywhere = every_ranks([fingerprint(full_numpy(v)) for v in variables])
    if everywhere is None:
        return []
    return [
        f"{v.path}: {', '.join(f'rank {rank} {line}' for rank, line in enumerate(lines))}"
        for v, lines in zip(variables, zip(*everywhere, strict=True), strict=True)
        if len(set(lines)) > 1
    ]


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _random_like(ends: list[torch.Tensor]) -> list[torch.Tensor]:
    # Of a generator of its own, so that the user's numbers go on as they would.
    random = torch.Generator().manual_seed(0)
    return [torch.randn(end.shape, generator=random, dtype=torch.float64).to(end) for end in ends]


def _difference(wanted: list[Any], found: list[Any], scale: list[Any]) -> float:
    """Largest difference relative to the largest value of `scale`; inf if not comparable."""
    if len(wanted) != len(found):
        return math.inf
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        if a is None or b is None:
            # What is not used has no gradient, or one of zeros.
            worst = max(worst, *(_largest(t) for t in (a, b) if t is not None), 0.0)
        elif a.shape != b.shape:
            return math.inf
        else:
            worst = max(worst, _largest(a - b))
    return worst / (max((_largest(t) for t in scale if t is not None), default=0.0) or 1.0)


def _largest(t: torch.Tensor) -> float:
    value = float(t.abs().max()) if t.numel() else 0.0
    return value if math.isfinite(value) else math.inf
