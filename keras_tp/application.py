"""What is done for models that are used under a `keras.distribution.Distribution`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import keras

from keras_tp import creation, distribution_lib
from keras_tp.callbacks import act_together
from keras_tp.collectives import Axis
from keras_tp.distributions import differences, plan_of
from keras_tp.errors import LayoutError, LayoutWarning
from keras_tp.mesh import torch_mesh
from keras_tp.plans import Plan
from keras_tp.seam.distribution import Role, distribution_of
from keras_tp.seam.layers import parallelized_part, plan_carried_out, variables_of, walk_layers
from keras_tp.sources import share_out, sharing_rows
from keras_tp.wrapper import apply_plan


class DistributionWork:
    """See `keras_tp.seam.distribution.Work`."""

    library = distribution_lib

    def prepare(self, distribution: Any) -> None:
        creation.prepare(distribution)
        act_together()  # a model may be saved before it is planned

    def place(self, variable: Any, role: Role, own: bool) -> None:
        creation.place(variable, role, own)

    def apply(self, model: Any) -> None:
        """Plans and parallelizes `model` at its first use. Collective then.

        Under the current distribution, or, if there is none, under the one that
        its variables were made under. What was given to `keras_tp.parallelize`
        by hand stays so outside of every scope.

        Raises:
            LayoutError: as for `keras_tp.parallelize`; a model that was made or
                used under another distribution.
        """
        distribution = _distribution_for(model)
        if distribution is None:
            return
        carried_out = plan_carried_out(model)
        if carried_out is not None:
            if keras.distribution.distribution() is not None:
                _check_same(model, carried_out, distribution)
            return
        part = parallelized_part(model)
        if part is None:
            apply_plan(model, plan_of(model, distribution))
        elif any(plan_carried_out(owner.layer) for owner in walk_layers(model)):
            # (Otherwise it is itself a part of what is parallelized, as its layers are.)
            warnings.warn(
                f"'{part}' is parallelized already, so that model '{model.name}', of which it is "
                "a part, stays as it is: other layers compute whole, the same on every rank. Train "
                "the outermost model first, or build a new one.",
                LayoutWarning,
                stacklevel=2,
            )

    @contextlib.contextmanager
    def feeding(self, model: Any) -> Iterator[None]:
        """Has replicas read their rows where that can be done; see `keras_tp.sources`."""
        distribution = _distribution_for(model)
        if distribution is None:
            yield
            return
        with sharing_rows(_axis_of(distribution), not distribution.auto_shard_dataset):
            yield

    def share_out(self, distribution: Any, dataset: Any) -> Any:
        """In place of `Distribution.distribute_dataset`."""
        if not distribution.auto_shard_dataset:
            return dataset
        return share_out(dataset, _axis_of(distribution))


def _distribution_for(model: Any) -> Any:
    current = keras.distribution.distribution()
    if current is not None:
        return current
    made_under = (distribution_of(v) for v in variables_of(walk_layers(model)))
    distribution = next((d for d in made_under if d is not None), None)
    carried_out = plan_carried_out(model)
    if distribution is None or carried_out is None:
        return distribution
    # If not, it was given to `keras_tp.parallelize`, which asked for something else.
    return None if differences(carried_out, distribution) else distribution


def _axis_of(distribution: Any) -> Axis:
    mesh = creation.join(distribution.device_mesh)
    return Axis.of(torch_mesh(mesh), distribution.batch_dim_name)


def _check_same(model: Any, plan: Plan, distribution: Any) -> None:
    problems = differences(plan, distribution)
    if problems:
        raise LayoutError(
            [
                *problems[:-1],
                f"{problems[-1]} A weight is sharded once: use the model under the "
                "distribution it was first used under, or build a new one.",
            ],
            where=f"model '{model.name}': it was parallelized otherwise",
        )
