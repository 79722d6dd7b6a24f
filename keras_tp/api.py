"""The tour: every public function, each a few lines that name what does the work.

plan         reads the model and the layout map, decides everything, touches nothing
auto_layout_map   proposes the layout map, by what the model's code does
parallelize  obeys a plan
local_shapes, full_weights   look at the result
verify       compares it with itself on gathered weights
enable       has `keras.distribution` do all of this, in scripts written for it
disable      and has it stop

(`save_checkpoint` and `load_checkpoint` are in `keras_tp/checkpoints.py`.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from keras_tp.advice import better_layout
from keras_tp.application import DistributionWork
from keras_tp.automatic import make_layout_map
from keras_tp.backend import require_torch
from keras_tp.checks import Verification
from keras_tp.errors import LayoutError
from keras_tp.garbage import uncollected
from keras_tp.planner import make_plan
from keras_tp.plans import Plan
from keras_tp.problems import check_model
from keras_tp.proposals import Proposal
from keras_tp.seam.distribution import install, uninstall
from keras_tp.seam.layers import by_path
from keras_tp.seam.likeness import Likeness
from keras_tp.seam.variables import full_numpy, local_tensor
from keras_tp.verification import verify_model
from keras_tp.wrapper import apply_plan


def plan(
    model: Any,
    layout_map: Any,
    *,
    strict: bool = False,
    batch_axis: str | None = "batch",
    sequence_parallel: bool = False,
    advise: bool = True,
) -> Plan:
    """Decides how `model` will be sharded, without touching it.

    Pure: needs no process group and no device, and plans for any number of
    ranks. `print` it for a table, `to_dict()` for JSON.

    Args:
        model: a built Keras model.
        layout_map: a `keras.distribution.LayoutMap`, patterns of variable paths
            to one mesh axis or None per dim.
        strict: make a pattern that matches nothing an error, not a warning.
        batch_axis: the mesh axis along which replicas share out the rows of each
            batch, if the mesh has it; with None every rank computes all rows.
        sequence_parallel: compute norms, dropout and residuals on shards of the sequence, dim 1 of
            activations (batch, tokens, features), between the layers that compute on shards of
            weights (Korthikanti et al. 2022), wherever that is proven to be the same. An
            all_reduce becomes a reduce_scatter and an all_gather: activations take less
            memory, and as much is sent. The notes of the plan say where it could not be proven.
        advise: where layers gather or slice what they could hand each other as shards, look for
            a layout of them with which they send less, and name it in a note.

    Raises:
        LayoutError: every problem of the layout map at once: wrong numbers of
            entries, two patterns for one variable, unknown axes (of which Keras
            itself refuses most, one at a time, as they are put into the map).
            Or a model that is not built, or parallelized already.

    Example:
        >>> mesh = keras_tp.device_mesh({"batch": 1, "model": 2})
        >>> layout_map = keras.distribution.LayoutMap(mesh)
        >>> layout_map[".*dense.*kernel"] = (None, "model")
        >>> print(keras_tp.plan(model, layout_map))
    """
    require_torch()
    likeness = Likeness()
    made = make_plan(
        model,
        layout_map,
        strict=strict,
        batch_axis=batch_axis,
        sequence_parallel=sequence_parallel,
        likeness=likeness,
    )
    mesh = layout_map.device_mesh
    better = better_layout(made, model, mesh, batch_axis, likeness) if advise else ""
    return replace(made, notes=(*made.notes, better)) if better else made


def auto_layout_map(model: Any, mesh: Any, batch_axis: str | None = "batch") -> Proposal:
    """Proposes a layout map for any built model, which stays as it is.

    Pure, as `plan`: needs no process group, and no weight needs to have values. The model is called
    once on shapes alone, and by what its code does layers are cut so that they hand
    each other shards: columns then rows (Megatron-LM: for a transformer two all-reduces forward and
    two backward a block), by heads, hidden units or experts. Tables of embeddings and the
    last layer are cut if that saves, of a weight, its gradient and two slots, as many bytes as it
    sends for 4096 positions. All else is left whole, each with its reason.

    Args:
        model: a built Keras model.
        mesh: a `keras.distribution.DeviceMesh`. Weights are cut along one axis, of those besides
            `batch_axis` the one of the most ranks.
        batch_axis: as for `plan`.

    Returns:
        A `keras.distribution.LayoutMap`, to `print` (what is cut, what is left and why) and to
        give to `plan` or `parallelize`, changed or as it is. `left` has the reasons by path,
        `plan` the plan it was confirmed by.

    Raises:
        LayoutError: no mesh, a `batch_axis` that it lacks; a model that is not built, or
            parallelized already.

    Example:
        >>> mesh = keras_tp.device_mesh({"batch": 1, "model": 2})
        >>> layout_map = keras_tp.auto_layout_map(model, mesh)
        >>> print(layout_map)
        >>> keras_tp.parallelize(model, layout_map)
    """
    require_torch()
    return make_layout_map(model, mesh, batch_axis)


@uncollected()
def parallelize(
    model: Any,
    layout_map: Any = None,
    *,
    plan: Plan | None = None,
    strict: bool = False,
    batch_axis: str | None = "batch",
    sequence_parallel: bool = False,
    check_batches: bool = True,
) -> Any:
    """Makes `model` compute tensor-parallel over the ranks of the job, in place.

    Every rank calls it on the same model (collective). Afterwards each variable
    of the model, and each optimizer slot made before or later, stores this
    rank's shard, with the first rank's values; `fit`, `evaluate`, `predict` and
    direct calls take and give whole batches, the same on every rank, and give
    the numbers of one process. Ranks that are fed different batches are told.
    Every rank also takes over the first one's random state (Python, NumPy,
    torch), so that shuffling and dropout agree.

    Random layers (dropout, noise, augmentation) draw for whole activations, of all
    rows, so that their masks are the same bits on every rank. With the same seed a run on any
    number of ranks repeats itself, and draws the masks of one process, as long
    as the same layers draw in the same order; unseeded, they are the first
    rank's. What an own layer draws from a rank's own generator is not followed.

    Joins the process group if need be (`keras_tp.initialize`). After a
    LayoutError the model is as it was.

    Args:
        model: a built Keras model, compiled or not.
        layout_map: as for `keras_tp.plan`.
        plan: a plan of this model, instead of a layout map.
        strict, batch_axis, sequence_parallel: as for `keras_tp.plan`; not with a plan, which was
            made already.
        check_batches: compare the 1st, 2nd, 4th, 8th, ... batch over the ranks: inputs, targets
            and weights of samples. Each time it costs a checksum of the batch (on a GPU, a
            copy of it to the host) and two small all-reduces. With False, ranks that are
            fed different batches train nonsense, in silence. (What replicas read in
            parts, of a DataLoader, is compared as it is read in any case.)

    Returns:
        `model`.

    Raises:
        LayoutError: as for `keras_tp.plan`; also a mesh that does not fit the
            job, ranks that disagree, an optimizer that would not give the same
            numbers on shards.
    """
    require_torch()
    asked = strict or batch_axis != "batch" or sequence_parallel
    if (layout_map is None) == (plan is None) or (asked and plan is not None):
        raise LayoutError(
            "give either a layout map (and strict, batch_axis and sequence_parallel, if wanted) or "
            "a plan.",
            where="parallelize(model, layout_map, plan=...)",
        )
    if plan is None:
        plan = make_plan(
            model,
            layout_map,
            strict=strict,
            batch_axis=batch_axis,
            sequence_parallel=sequence_parallel,
        )
    elif not isinstance(plan, Plan):
        raise LayoutError(
            f"expected a keras_tp.Plan, got {type(plan).__name__}.",
            where="parallelize(model, plan=...)",
        )
    check_model(model)
    return apply_plan(model, plan, check_batches)


def verify(
    model: Any, batch: Any, *, training: bool = False, tolerance: float | None = None
) -> Verification:
    """Checks a parallelized model against itself on gathered weights, layer by layer.

    Every layer that computes with sharded weights is called with what it gets
    from your batch, once as planned and once whole, as plain Keras would, and
    then the whole model is. Outputs, gradients of inputs and gradients of
    weights are compared on every rank; so are the weights that ranks should
    hold alike. As each layer gets the same inputs twice, a difference in one is
    not inherited by the next: the first row that differs is where it begins.

    What rounding may make is measured: the whole computation is repeated on
    inputs and weights that are nudged by one unit of rounding of the dtype.

    Collective; every sharded layer is called six times, and the memory
    is that of a layer's full weights, in the end of all. It changes nothing:
    weights, gradients, statistics, losses and random states stay as they are
    (but for what Python code of yours remembers of a call).

    Args:
        model: a model that `keras_tp.parallelize` was given.
        batch: the model's inputs, or a tuple (x, y, ...) of which x is used; the
            same on every rank, which is checked (but not after check_batches=False).
        training: how to call the model.
        tolerance: largest difference that counts as equal, by default 16 units
            of rounding of the dtype that a layer computes in, 4 of low precision:
            2e-6 for float32, 0.03 for bfloat16. (Keras on torch computes float64
            in float32.)

    Returns:
        What was found, the same on every rank; `print` it for a table.

    Raises:
        LayoutError: a model that is not parallelized.

    Example:
        >>> print(keras_tp.verify(model, x[:8]))
    """
    require_torch()
    return verify_model(model, batch, training, tolerance)


def enable() -> None:
    """Makes `keras.distribution` work on torch, over the ranks of the job. Idempotent.

    Afterwards scripts written for Keras on JAX find its devices, meshes and
    layouts here as they are, and every variable made while a distribution is
    current (`keras.distribution.set_distribution`, or its `scope()`) is made as
    this rank's shard of the first rank's value. Making one is then collective:
    every rank makes the same variables in the same order.

    Starts and joins nothing by itself. `keras.distribution.initialize()` joins
    the job, as does the first variable made under a distribution.

    Raises:
        RuntimeError: a Keras that is not as expected, with its version.

    Example:
        >>> keras_tp.enable()
        >>> keras.distribution.list_devices()
        ['cpu:0']
    """
    require_torch()
    install(DistributionWork())


def disable() -> None:
    """Puts back what `enable` has changed of Keras. Idempotent; no communication.

    Variables that are shards stay so, and go on working.
    """
    uninstall()


def local_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Shape of what this rank stores of every variable, by path. No communication.

    Of a model that is not parallelized these are the full shapes. A path that
    comes again is told apart by `#2`, `#3`, ... behind it.
    """
    return {path: tuple(local_tensor(v).shape) for path, v in by_path(model)}


def full_weights(model: Any) -> dict[str, np.ndarray]:
    """The full value of every variable, by path (as in `local_shapes`).

    Collective: every rank of the job must call it, and each gets all of them,
    one all-gather per sharded variable and axis. Of a model that is not
    parallelized it gives the values.
    """
    return {path: full_numpy(v) for path, v in by_path(model)}
