"""Obeys a plan: shards the variables, applies the styles, adopts the optimizer. Decides nothing."""

from __future__ import annotations

import hashlib
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor.parallel import parallelize_module

from keras_tp.collectives import all_equal
from keras_tp.errors import LayoutError
from keras_tp.mesh import check_ranks, initialize, torch_mesh
from keras_tp.optimizers import optimizer_problems
from keras_tp.plans import Plan
from keras_tp.shards import Shards
from keras_tp.styles import GatheredOnUse, make_style
from keras_tp.training import adopt_optimizer, share_random_state
from keras_tp.variables import (
    Owner,
    ShardedVariable,
    compute_loss_on_whole_weights,
    hook_optimizers,
    replicate_variable,
    shard_variable,
    walk_layers,
)


def apply_plan(model: Any, plan: Plan) -> Any:
    """Carries out `plan` on `model`, in place; see `keras_tp.parallelize`. Collective."""
    owners = walk_layers(model)
    variables = list({id(v): v for owner in owners for v in owner.variables}.values())
    check_new(model, owners)
    _check_fits(plan, owners, variables)
    _check_optimizer(plan, model)
    check_ranks(plan.mesh)
    initialize()
    _check_agreement(plan)

    mesh = torch_mesh(plan.mesh)
    hook_optimizers()
    for variable, decided in zip(variables, plan.variables, strict=True):
        cut = Shards(plan.mesh, decided.placements, decided.shape)
        if decided.sharded:
            shard_variable(variable, cut)
        else:
            replicate_variable(variable, cut)
    for owner, layer_plan in zip(owners, plan.layers, strict=True):
        for style in layer_plan.styles:
            if style.name != "gathered":
                parallelize_module(owner.layer, mesh[style.axis], make_style(style))
            elif layer_plan.gathers:
                held = [variables[i] for i in layer_plan.gathers]
                parallelize_module(owner.layer, mesh[style.axis], GatheredOnUse(held))
    adopt_optimizer(model, plan.mesh)
    compute_loss_on_whole_weights(model)
    share_random_state()
    vars(model)[_PLAN] = plan
    return model


_PLAN = "_keras_tp_plan"


def plan_of(model: Any) -> Plan | None:
    """The plan the model was parallelized with, or None."""
    return vars(model).get(_PLAN)


def check_new(model: Any, owners: list[Owner]) -> None:
    """Raises LayoutError if the model or a layer in it is parallelized already."""
    done = [o.path for o in owners if plan_of(o.layer) is not None]
    done += [v.path for o in owners for v in o.variables if isinstance(v, ShardedVariable)]
    if done:
        raise LayoutError(
            f"'{done[0]}' is parallelized already, and a weight is sharded once. Call "
            "keras_tp.parallelize on the outermost model only, or on a new model.",
            where=f"parallelize('{model.name}')",
        )


def _check_fits(plan: Plan, owners: list[Owner], variables: list[Any]) -> None:
    wanted = [(v.path, v.shape) for v in plan.variables]
    found = [(v.path, tuple(v.shape)) for v in variables]
    problems = [
        f"the plan has {path!r} {shape}, the model has not."
        for path, shape in wanted
        if (path, shape) not in set(found)
    ] + [
        f"the model has {path!r} {shape}, the plan has not."
        for path, shape in found
        if (path, shape) not in set(wanted)
    ]
    if not problems and (wanted != found or len(plan.layers) != len(owners)):
        problems.append("the plan lists the same variables in another order.")
    if problems:
        raise LayoutError(problems, where="this plan: it was made for another model")


def _check_optimizer(plan: Plan, model: Any) -> None:
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and any(v.sharded for v in plan.variables):
        problems = optimizer_problems(optimizer)
        if problems:
            raise LayoutError(problems, where="this optimizer")


def _check_agreement(plan: Plan) -> None:
    """Ranks with different plans would wait for each other's collectives forever."""
    lines = [str(plan.mesh)] + [f"{v.path} {v.shape} {v.dtype} {v.layout}" for v in plan.variables]
    lines += [f"{layer.path}: {layer.style}" for layer in plan.layers]
    if all_equal(hashlib.sha256("\n".join(lines).encode()).digest()):
        return
    plans: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(plans, lines)
    other = next(rank for rank, plan in enumerate(plans) if plan != plans[0])
    pairs = list(zip(plans[0] + ["nothing"], plans[other] + ["nothing"], strict=False))
    first, second = next((a, b) for a, b in pairs if a != b)
    raise LayoutError(
        f"rank 0 plans '{first}' where rank {other} plans '{second}'. Every rank must build the "
        "same model, with the same names, and use the same layout map. Layer names count up: "
        "make as many layers on one rank as on the other.",
        where="this job: its ranks disagree",
    )
