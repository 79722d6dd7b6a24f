"""One computation made in two ways from the same state, and how far apart the results are."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import torch
import torch.distributed as dist

from keras_tp.all_rows import computing_alike
from keras_tp.checks import LayerCheck
from keras_tp.messages import control_device
from keras_tp.rounding import NUDGES, Nudge, allowed, difference, unit_of
from keras_tp.seam.layers import Owner, variables_of, walk_layers
from keras_tp.seam.trials import gathered_instead, leaf_of, restored, shard_of
from keras_tp.seam.variables import local_tensor


class Mode:
    """How layers compute just now.

    Attributes:
        now: `"checking"`, each call being compared before it is made, or within
            a comparison `"shards"` or `"gathered"`, the layers below included.
        called: the comparisons of layers that were called, in the order of first calls.
    """

    def __init__(self) -> None:
        self.now = "checking"
        self.called: list[Comparison] = []

    @contextlib.contextmanager
    def be(self, mode: str) -> Iterator[None]:
        before, self.now = self.now, mode
        try:
            yield
        finally:
            self.now = before


class Results(NamedTuple):
    """What one call gave.

    Attributes:
        outputs: all tensors, and the losses of the layer and what is below it.
        inputs: the gradient of each float input.
        weights: the gradient of each weight that is trained.
    """

    outputs: Sequence[Any]
    inputs: Sequence[Any]
    weights: Sequence[Any]


class Comparison:
    """One layer's differences so far."""

    def __init__(self, owner: Owner, style: str, mode: Mode):
        self.owner = owner
        self.style = style
        self.mode = mode
        self.calls = 0
        self.differences = [0.0, 0.0, 0.0]
        self.finite = True
        self.differentiable = True
        self.owners = walk_layers(owner.layer)
        self.variables = variables_of(self.owners)
        self.unit = unit_of([o.layer.compute_dtype for o in self.owners])

    def compare(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Makes `call` on shards and on gathered weights, from the same state. Collective."""
        if not self.calls:
            self.mode.called.append(self)
        self.calls += 1

        def gathered(nudge: Nudge) -> Results:
            instead = gathered_instead(self.variables, nudge)
            with instead as sources, self.mode.be("gathered"), computing_alike():
                return self._run(call, args, kwargs, sources, nudge)

        still = Nudge(0.0, seed=0)
        wanted = gathered(still)
        nudged = [gathered(Nudge(self.unit, seed)) for seed in range(NUDGES)]
        with self.mode.be("shards"):
            found = self._run(call, args, kwargs, [local_tensor(v) for v in self.variables], still)
            with restored(self.owners), torch.no_grad():
                without_gradients = self._outputs(call(*args, **kwargs))
        trained = [v for v in self.variables if local_tensor(v).requires_grad]
        shards = [
            None if grad is None else shard_of(v, grad)
            for v, grad in zip(trained, wanted.weights, strict=True)
        ]
        outputs, again = wanted.outputs, [r.outputs for r in nudged]
        self._note(0, outputs, found.outputs, outputs, again)
        self._note(0, outputs, without_gradients, outputs, again)
        self._note(1, wanted.inputs, found.inputs, wanted.inputs, [r.inputs for r in nudged])
        self._note(2, shards, found.weights, wanted.weights, [r.weights for r in nudged])

    def _note(
        self,
        kind: int,
        wanted: Sequence[Any],
        found: Sequence[Any],
        whole: Sequence[Any],
        nudged: Sequence[Sequence[Any]],
    ) -> None:
        if len({len(wanted), len(found), *map(len, nudged)}) > 1:
            self.differences[kind] = math.inf
            return
        for one, other, full, *again in zip(wanted, found, whole, *nudged, strict=True):
            gap, finite = difference(one, other, full, again, self.unit)
            self.differences[kind] = max(self.differences[kind], gap)
            self.finite = self.finite and finite

    def _run(
        self, call: Callable[..., Any], args: Any, kwargs: Any, sources: Any, nudge: Nudge
    ) -> Results:
        leaves: list[torch.Tensor] = []

        def fresh(leaf: Any) -> Any:
            if not (isinstance(leaf, torch.Tensor) and leaf.is_floating_point()):
                return leaf
            leaves.append(leaf_of(leaf, nudge(leaf.detach())))
            return leaves[-1]

        with restored(self.owners), torch.enable_grad():
            args, kwargs = keras.tree.map_structure(fresh, (args, kwargs))
            outputs = self._outputs(call(*args, **kwargs))
            ends = [o for o in outputs if o.requires_grad]
            weights = [
                source
                for source, v in zip(sources, self.variables, strict=True)
                if local_tensor(v).requires_grad
            ]
            grads: Any = [None] * (len(leaves) + len(weights))
            if ends and grads and self.differentiable:
                try:
                    grads = torch.autograd.grad(
                        ends, [*leaves, *weights], _random_like(ends), allow_unused=True
                    )
                except RuntimeError as error:
                    # Plain Keras cannot either: such as a stateful RNN, which writes what it reads.
                    if self.mode.now != "gathered" or "inplace operation" not in str(error):
                        raise
                    self.differentiable = False
        outputs = [o.detach() for o in outputs]
        return Results(outputs, grads[: len(leaves)], grads[len(leaves) :])

    def _outputs(self, outputs: Any) -> list[torch.Tensor]:
        # Penalties look at weights as well.
        tensors = [*keras.tree.flatten(outputs), *self.owner.layer.losses]
        return [t for t in tensors if isinstance(t, torch.Tensor)]

    def result(self, tolerance: float | None) -> LayerCheck:
        """What was found, on all ranks. Collective."""
        found = [*self.differences, float(not self.finite)]
        worst = torch.tensor(found, dtype=torch.float64, device=control_device())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        output, input_gradient, weight_gradient, not_finite = worst.tolist()
        return LayerCheck(
            path=self.owner.path,
            style=self.style,
            calls=self.calls,
            output=output,
            input_gradient=input_gradient,
            weight_gradient=weight_gradient,
            finite=not not_finite,
            differentiable=self.differentiable,
            tolerance=allowed(self.unit) if tolerance is None else tolerance,
        )


def _random_like(ends: list[torch.Tensor]) -> list[torch.Tensor]:
    # Of a generator of its own, so that the user's numbers go on as they would.
    random = torch.Generator().manual_seed(0)
    return [torch.randn(end.shape, generator=random, dtype=torch.float64).to(end) for end in ends]
