"""Replicas: the ranks along one mesh axis, which share out the rows of each batch.

What a model's caller sees stays global: it gives whole batches and gets whole
outputs, and computes losses and metrics of them, the same on every rank. The
model's own call is made by each replica on its rows, after which the outputs
are gathered. So gradients that come back are those of the whole batch's loss,
each replica has its rows' part of a weight's gradient, and their sum (not their
mean) is that of one process: for any loss, any weighting of samples, and any
number of rows.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import torch

from keras_tp.all_rows import give_all_rows, is_alike
from keras_tp.buckets import Buckets, summed
from keras_tp.collectives import Axis, join, reduce
from keras_tp.data import has_rows
from keras_tp.errors import LayoutError, LayoutWarning
from keras_tp.layouts import row_counts
from keras_tp.outputs import mapped
from keras_tp.proof import ROWS, Proof, Shapes, prove_rows
from keras_tp.rounding import Nudge
from keras_tp.row_collectives import gather_rows, split_rows, sum_over
from keras_tp.rows import Rows
from keras_tp.seam.contexts import (
    current_replicas,
    is_stateless,
    is_symbolic,
    is_training,
    on_rows_of,
    stepping,
)
from keras_tp.seam.layers import (
    Owner,
    check_variables,
    tensors_kept,
    variables_of,
)
from keras_tp.seam.rows import average_losses, losses_of, with_mask
from keras_tp.seam.variables import cut_along, local_tensor

ALIKE = "With batch_axis=None every replica computes all rows."


class Replicas:
    """The replicas during one call of a model.

    Args:
        axis: along which they stand.
        counts: rows of each.
        whole: what the rank stores of the variables that are not cut along the axis, in
            the order in which the model is expected to use them.
        fixed: shapes in which random numbers are drawn whatever the number of rows.
        training: whether the model is called for training.
    """

    def __init__(
        self,
        axis: Axis,
        counts: tuple[int, ...],
        whole: Sequence[torch.Tensor],
        fixed: Shapes = frozenset(),
        training: bool = False,
    ):
        self.training = training
        self.fixed = fixed
        self.alike: list[torch.Tensor] = []
        self.along = axis
        self.counts = counts
        self.axis = axis.name
        self.rows = counts[axis.rank]
        self.total = sum(counts)
        self.start = sum(counts[: axis.rank])
        self._buckets = Buckets(whole, axis)
        self._renewed: dict[int, torch.Tensor] = {}

    def own(self, variable: Any) -> torch.Tensor:
        """What this rank stores of a variable; backward, the sum of the replicas' gradients.

        A variable that is cut along the axis stays as it is: the sum is taken
        where it is gathered.
        """
        stored = local_tensor(variable)
        if not (torch.is_grad_enabled() and stored.requires_grad):
            return stored
        if cut_along(variable, self.axis):
            return stored
        if id(variable) in self._renewed:
            return self._renewed[id(variable)]
        return summed(stored, self.along, self._buckets)

    def renew(self, variable: Any) -> None:
        """What was read before stays the old value's, what is read from now on is the new one's."""
        stored = local_tensor(variable)
        if stored.requires_grad and not cut_along(variable, self.axis):
            with torch.enable_grad():
                self._renewed[id(variable)] = summed(stored, self.along)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return sum_over(x, self.along)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return reduce(x * (self.rows / self.total), self.along)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return gather_rows(x, self.counts, self.along)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        return split_rows(x, self.counts, self.along)


class RowsCall:
    """A model's `call`, which each replica makes on its rows.

    A batch of fewer rows than replicas is computed whole by every one.

    Args:
        model: the model that is parallelized.
        axis: along which the replicas stand.
        owners: its layers.
    """

    def __init__(self, model: Any, axis: Axis, owners: Sequence[Owner]):
        self.model = model
        self.original = model.call
        self.axis = axis
        self.owners = owners
        self.variables = variables_of(owners)
        self.whole = [local_tensor(v) for v in self.variables if not cut_along(v, axis.name)]
        self.calls: dict[Any, int] = {}  # of each kind
        self.fixed: Shapes = frozenset()  # of random numbers that are not drawn by row
        self.proving = False
        self.kept: dict[tuple[int, str], None] = {}  # layers' attributes that calls set to tensors
        self.where = f"model '{model.name}', whose rows are shared out along axis '{axis.name}'"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_symbolic() or is_stateless() or is_alike() or current_replicas() is not None:
            return self.original(*args, **kwargs)
        total = self._count_rows(args, kwargs)
        if total < self.axis.size:
            return self.original(*args, **kwargs)
        counts = _counts_of((args, kwargs)) or row_counts(total, self.axis.size)
        training = is_training()
        if torch.compiler.is_compiling():
            return self._share_out(args, kwargs, counts, self.fixed, training)
        check_variables(self.model, self.variables, self.where)
        kind = training, *self._kind_of(args, kwargs)
        calls = self.calls.get(kind, 0)
        if calls & (calls + 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
            self.fixed = self.fixed | self._prove(args, kwargs, counts, training)
        self.calls[kind] = calls + 1
        return self._share_out(args, kwargs, counts, self.fixed, training)

    def _kind_of(self, args: Any, kwargs: Any) -> Any:
        """What may decide which way the model's code goes: all but numbers."""
        leaves = [
            repr(leaf) if leaf is None or isinstance(leaf, bool | str) else type(leaf).__name__
            for leaf in keras.tree.flatten((args, kwargs))
        ]
        names = [len(args), *kwargs]
        trained = tuple(owner.layer.trainable for owner in self.owners)
        return tuple(names), tuple(leaves), trained

    def _prove(self, args: Any, kwargs: Any, counts: tuple[int, ...], training: bool) -> Shapes:
        few = min(ROWS, *counts)
        rows = [i for end in itertools.accumulate(counts) for i in range(end - few, end)]

        def some(leaf: Any, nudge: Nudge) -> Any:
            if not has_rows(leaf):
                return leaf
            if isinstance(leaf, np.ndarray):
                return leaf[rows]
            if isinstance(leaf, Rows):
                local = leaf.local_rows[-few:]
                return nudge(join(local, 0, (few,) * len(counts), self.axis))
            return with_mask(leaf, lambda t: nudge(t.detach()[rows]))

        def call(nudge: Nudge, fixed: Shapes | None) -> Any:
            given = keras.tree.map_structure(lambda leaf: some(leaf, nudge), (args, kwargs))
            if fixed is None:
                before = [dict(vars(owner.layer)) for owner in self.owners]
                outputs = self.original(*given[0], **given[1])
                self.kept |= dict.fromkeys(tensors_kept(self.owners, before))
            else:
                outputs = self._share_out(given[0], given[1], (few,) * len(counts), fixed, training)
            return outputs, [vars(self.owners[i].layer).get(name) for i, name in self.kept]

        given_all: list[Owner] = []
        while (proof := self._proof(call)).mixing:
            mixing = [self.owners[i] for i in proof.mixing]
            again = [owner.path for owner in mixing if owner in given_all]
            if again:
                raise LayoutError(
                    f"its rows are not computed alone (results differ by {proof.gap:.1e}), though "
                    f"{', '.join(map(repr, again))} is given all rows. {ALIKE}",
                    where=self.where,
                )
            for owner in mixing:
                give_all_rows(owner.layer, training)
            given_all += mixing
        if given_all:
            paths = ", ".join(f"'{owner.path}'" for owner in given_all)
            warnings.warn(
                f"{'in training' if training else 'in inference'}, {paths} mix the rows of a "
                "batch: outputs or losses of some rows are not those of all. From now on each "
                "replica computes them on all rows: the same numbers, at the price of one "
                "process. Layers that say so, `layer.all_rows = True`, stand in the plan.",
                LayoutWarning,
                stacklevel=2,
            )
        return proof.fixed

    def _proof(self, call: Any) -> Proof:
        self.proving = True
        try:
            with stepping(False):
                return prove_rows(self.owners, call, self.where)
        finally:
            self.proving = False

    def _share_out(
        self, args: Any, kwargs: Any, counts: tuple[int, ...], fixed: Shapes, training: bool
    ) -> Any:
        replicas = Replicas(self.axis, counts, self.whole, fixed, training)

        def mine(leaf: Any) -> Any:
            if not has_rows(leaf):
                return leaf
            if isinstance(leaf, np.ndarray):
                return leaf[replicas.start : replicas.start + replicas.rows]
            if isinstance(leaf, Rows):
                return leaf.local_rows
            return with_mask(leaf, replicas.take)

        def joined(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if leaf.shape[:1] != (replicas.rows,):
                raise LayoutError(
                    f"an output has shape {tuple(leaf.shape)} where the replica has "
                    f"{replicas.rows} rows, so that it is not one of rows. {ALIKE}",
                    where=self.where,
                )
            return with_mask(leaf, lambda t: mapped(replicas.gather, t))

        args, kwargs = keras.tree.map_structure(mine, (args, kwargs))
        earlier = losses_of(self.owners)
        where = "" if self.proving else self.where
        before = {(i, name): vars(self.owners[i].layer).get(name) for i, name in self.kept}
        with on_rows_of(replicas):
            outputs = self.original(*args, **kwargs)
        average_losses(self.owners, replicas, [*earlier, *replicas.alike], where)
        for (number, name), old in before.items():
            self._join_kept(self.owners[number], name, old, replicas)
        return keras.tree.map_structure(joined, outputs)

    def _join_kept(self, owner: Owner, name: str, old: Any, replicas: Replicas) -> None:
        """What a layer keeps of a call is there to be read later, and so is that of all rows."""
        kept = vars(owner.layer).get(name)
        if not isinstance(kept, torch.Tensor) or kept is old:
            return
        if kept.shape[:1] == (replicas.total,):  # of a layer that was given all rows
            return
        if kept.shape[:1] == (replicas.rows,):
            vars(owner.layer)[name] = with_mask(kept, replicas.gather)
        elif kept.requires_grad:
            raise LayoutError(
                f"'{owner.path}' keeps `{name}`, of shape {tuple(kept.shape)}, of a call: it is "
                "not one of rows, and its gradient would be that of one replica's rows. Use "
                "add_loss, or keep what it is computed from.",
                where=self.where,
            )

    def _count_rows(self, args: Any, kwargs: Any) -> int:
        shapes = [
            tuple(leaf.shape) for leaf in keras.tree.flatten((args, kwargs)) if has_rows(leaf)
        ]
        counts = dict.fromkeys(shape[0] for shape in shapes)
        if len(counts) > 1:
            raise LayoutError(
                f"inputs of shapes {', '.join(map(str, shapes))} do not have the same number of "
                f"rows, so that no replica's part of them is known. {ALIKE}",
                where=self.where,
            )
        return next(iter(counts), 0)


def _counts_of(nest: Any) -> tuple[int, ...] | None:
    """How many rows each replica has of inputs that are shared out already."""
    shared = (leaf.counts for leaf in keras.tree.flatten(nest) if isinstance(leaf, Rows))
    return next(shared, None)
