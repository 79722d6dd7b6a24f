"""Obeys a plan: shards the variables, applies the styles, adopts the optimizer. Decides nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import keras
import torch
import torch.distributed as dist
from torch.distributed.tensor.parallel import parallelize_module

from keras_tp.agreement import AgreedBatches, AgreedInputs, check_plans
from keras_tp.all_rows import give_all_rows
from keras_tp.callbacks import act_together
from keras_tp.collectives import Axis
from keras_tp.errors import LayoutError
from keras_tp.garbage import uncollected
from keras_tp.handovers import members_along
from keras_tp.job import initialize
from keras_tp.loops import watch_loops
from keras_tp.mesh import check_devices, check_ranks, keras_mesh, torch_mesh
from keras_tp.messages import broadcast_each
from keras_tp.optimizers import check_optimizer
from keras_tp.plans import Plan
from keras_tp.prefetch import PrefetchedCall
from keras_tp.problems import captured_weights
from keras_tp.region_calls import share_region
from keras_tp.replicas import RowsCall
from keras_tp.rules import computation_of
from keras_tp.seam.attention import hook_attention
from keras_tp.seam.distribution import layout_of, set_layout
from keras_tp.seam.dropout import hook_dropout
from keras_tp.seam.fused import hook_adam
from keras_tp.seam.gradients import announce_gradients
from keras_tp.seam.layers import (
    Owner,
    announce_quantize,
    hook_layers,
    mark_parallelized,
    observe_loss,
    variables_of,
    walk_layers,
)
from keras_tp.seam.rows import hook_random, hook_remat, share_statistics
from keras_tp.seam.shortcuts import hook_calls
from keras_tp.seam.steps import mark_steps
from keras_tp.seam.trials import try_before_compiling
from keras_tp.seam.updates import hook_optimizers
from keras_tp.seam.variables import (
    local_tensor,
    replicate_for_rows,
    replicate_variable,
    reshard_variable,
    set_awaiting_plan,
    shard_variable,
    sharding_of,
)
from keras_tp.sequence_calls import share_sequence
from keras_tp.shards import Shards
from keras_tp.sources import feed_rows
from keras_tp.state_dicts import show_dtensors
from keras_tp.styles import GatheredOnUse, make_style
from keras_tp.threads import take_turns
from keras_tp.training import adopt_optimizer, share_random_state


@uncollected()
def apply_plan(model: Any, plan: Plan, check_batches: bool = True) -> Any:
    """Carries out `plan` on `model`, in place; see `keras_tp.parallelize`. Collective."""
    owners = walk_layers(model)
    variables = variables_of(owners)
    optimizer = getattr(model, "optimizer", None)
    _check_fits(plan, owners, variables)
    if optimizer is not None and any(v.sharded for v in plan.variables):
        check_optimizer(optimizer)
    check_ranks(plan.mesh)
    initialize()
    check_devices([local_tensor(v) for v in variables])
    layouts = [str(layout_of(v)) for v in variables]
    check_plans(plan, optimizer, [*layouts, f"with check_batches={check_batches}"])
    # From here on the model changes; what can be wrong with it has been looked at.

    mesh = torch_mesh(plan.mesh)
    hook_layers()
    hook_calls()
    hook_attention()
    hook_optimizers()
    hook_adam()
    hook_dropout()
    act_together()
    lies = functools.cache(functools.partial(Shards, plan.mesh))  # one for all that lie alike
    shards = [lies(decided.placements, decided.shape) for decided in plan.variables]
    moved = [v for v, s in zip(variables, shards, strict=True) if _is_moved(v, s)]
    values = broadcast_each(map(local_tensor, moved))
    for variable, wanted, decided in zip(variables, shards, plan.variables, strict=True):
        _store(variable, wanted, values)
        if plan.batch_axis is not None and not decided.sharded:
            replicate_for_rows(variable)
        if layout_of(variable) is not None:
            made_on = keras_mesh(plan.mesh)
            set_layout(variable, keras.distribution.TensorLayout(decided.layout, made_on))
    sliced = functools.cache(lambda axis: mesh[axis])  # once for all layers: it takes torch long
    for owner, decided_layer in zip(owners, plan.layers, strict=True):
        for style in decided_layer.styles:
            if decided_layer.computation is not None and style.name != "gathered":
                made = make_style(style, decided_layer.computation)
                parallelize_module(owner.layer, sliced(style.axis), made)
        if decided_layer.gathers:
            held = [variables[i] for i in decided_layer.gathers]
            axis = decided_layer.styles[0].axis
            parallelize_module(owner.layer, sliced(axis), GatheredOnUse(held))
        if any(plan.variables[i].sharded for i in decided_layer.variables):
            announce_quantize(owner.layer)
        if decided_layer.rows == "statistics":
            share_statistics(owner.layer)
    along = {
        axis: {m.number: m for m in members_along(axis, owners, plan.layers)}
        for axis in {region.axis: None for region in plan.regions}
    }
    for region in plan.regions:
        members = [along[region.axis][number] for number in region.members]
        share_region(owners[region.layer].layer, members, Axis.of(mesh, region.axis))
    if plan.sequence is not None:
        share_sequence(owners, plan, Axis.of(mesh, plan.sequence.axis))
    for owner, decided_layer in zip(owners, plan.layers, strict=True):
        if decided_layer.rows == "all":
            give_all_rows(owner.layer, False, True)
    adopt_optimizer(model)
    cut = [v for v, decided in zip(variables, plan.variables, strict=True) if decided.sharded]
    watch_loops((v.path, local_tensor(v), sharding_of(v)) for v in cut)  # type: ignore[misc]
    show_dtensors(owners)
    if cut:
        model.call = PrefetchedCall(model)
    if plan.batch_axis is not None:
        hook_random()
        hook_remat()
        replicas = Axis.of(mesh, plan.batch_axis)
        model.call = RowsCall(model, replicas, owners)
        feed_rows(model, replicas)
    if cut:
        announce_gradients(model)
    if plan.batch_axis is not None or plan.regions:
        try_before_compiling(model)
    if any(style.open for layer in plan.layers for style in layer.styles):
        mark_steps(model)
    if check_batches and dist.get_world_size() > 1:
        model.call = AgreedInputs(model)
        observe_loss(model, AgreedBatches("targets or sample weights").check)
    share_random_state()
    take_turns()  # now, as a thread has its name once it has begun
    mark_parallelized(model, plan)
    return model


def _is_moved(variable: Any, shards: Shards) -> bool:
    """Whether `variable` is to have the first rank's value, and has not got it by now."""
    return sharding_of(variable) is None and (bool(shards.cuts) or layout_of(variable) is None)


def _store(variable: Any, shards: Shards, values: Iterator[torch.Tensor]) -> None:
    """Makes `variable` store what `shards` says, of the next of `values` if it is moved.

    Collective, unless it was made so.
    """
    stored = sharding_of(variable)
    if stored is not None:  # it was sharded as it was made
        if not shards.cuts:
            reshard_variable(variable, None)
            return
        if (stored.mesh, stored.placements) != (shards.mesh, shards.placements):
            reshard_variable(variable, shards)
        set_awaiting_plan(variable, False)
    elif shards.cuts:
        shard_variable(variable, shards, next(values))
    elif _is_moved(variable, shards):
        replicate_variable(variable, next(values))


def _check_fits(plan: Plan, owners: list[Owner], variables: tuple[Any, ...]) -> None:
    wanted = [(v.path, v.shape) for v in plan.variables]
    found = [(v.path, tuple(v.shape)) for v in variables]
    in_plan, in_model = set(wanted), set(found)
    problems = [
        f"the plan has {path!r} {shape}, the model has not."
        for path, shape in wanted
        if (path, shape) not in in_model
    ] + [
        f"the model has {path!r} {shape}, the plan has not."
        for path, shape in found
        if (path, shape) not in in_plan
    ]
    layers = [(layer.path, layer.kind) for layer in plan.layers]
    if not problems and (
        wanted != found or layers != [(o.path, type(o.layer).__name__) for o in owners]
    ):
        problems.append("the model has the same variables, but other layers or another order.")
    if not problems:
        problems = [
            f"layer '{layer.path}' is planned to compute {layer.computation}, which it does not."
            for layer, owner in zip(plan.layers, owners, strict=True)
            if layer.computation is not None and layer.computation != computation_of(owner.layer)[0]
        ]
    if problems:
        raise LayoutError(problems, where="this plan: it was made for another model")
    # A plan may have been made of a model without values, whose views are not all known.
    captured = captured_weights(owners, variables, list(plan.variables))
    if captured:
        raise LayoutError(captured, where="this model")
