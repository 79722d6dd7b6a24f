"""What Keras does that looks at more rows than one, while each replica has its own.

Random numbers are drawn for the rows of all replicas, of which each takes its
own: the masks are those of one process, on any number of ranks. The statistics
of BatchNormalization are summed over the replicas. Losses that layers add are
averaged over all rows.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import torch
from keras.src.backend.common import remat as common_remat
from keras.src.backend.torch import random as backend_random
from keras.src.backend.torch.core import get_device

from keras_tp.errors import LayoutError
from keras_tp.seam.contexts import Replicas, current_replicas, on_rows_of
from keras_tp.seam.layers import Owner

# Of `keras.src.backend.torch.random`: what is given a shape first, and what a tensor.
_OF_A_SHAPE = "normal", "uniform", "randint", "truncated_normal", "gamma", "binomial", "beta"
_OF_A_TENSOR = "categorical", "shuffle"
RANDOM = *_OF_A_SHAPE, *_OF_A_TENSOR, "dropout"


# Shapes of what is drawn, while somebody wants to know.
_records: list[tuple[set[tuple[int, ...]], bool]] = []


@contextlib.contextmanager
def recorded_draws(by_replicas: bool) -> Iterator[set[tuple[int, ...]]]:
    """While open, collects the shapes in which Keras draws random numbers.

    Args:
        by_replicas: whether only of those that are drawn for a replica's rows.
    """
    _records.append((set(), by_replicas))
    try:
        yield _records[-1][0]
    finally:
        _records.pop()


def hook_random() -> None:
    """Has Keras draw random numbers for the rows of all replicas. Idempotent."""
    if hasattr(backend_random.normal, "_keras_tp"):
        return
    for name in _OF_A_SHAPE:
        _hook(name, _shaped_like_rows, lambda shape, *_, **__: tuple(shape))
    for name in _OF_A_TENSOR:
        _hook(name, _of_all_rows, lambda x, *_, **__: tuple(x.shape))
    _hook("dropout", _dropout, lambda *args, **kwargs: tuple(_noise_shape(*args, **kwargs)))


def hook_remat() -> None:
    """Has what is computed again in backward be computed for the same rows. Idempotent."""
    original = common_remat.remat
    if hasattr(original, "_keras_tp"):
        return

    @functools.wraps(original)
    def remat(f: Callable[..., Any]) -> Callable[..., Any]:
        replicas = current_replicas()
        if replicas is None:
            return original(f)

        @functools.wraps(f)
        def on_rows(*args: Any, **kwargs: Any) -> Any:
            with on_rows_of(replicas):
                return f(*args, **kwargs)

        return original(on_rows)

    remat._keras_tp = True  # type: ignore[attr-defined]
    common_remat.remat = remat


def _noise_shape(inputs: Any, rate: Any, noise_shape: Any = None, seed: Any = None) -> list[int]:
    given = inputs.shape if noise_shape is None else noise_shape
    return [m if n is None else n for n, m in zip(given, inputs.shape, strict=True)]


def _hook(name: str, on_rows: Callable[..., Any], shape_of: Callable[..., Any]) -> None:
    setattr(backend_random, name, _hooked(getattr(backend_random, name), on_rows, shape_of))


def _hooked(
    original: Callable[..., Any], on_rows: Callable[..., Any], shape_of: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def draw(*args: Any, **kwargs: Any) -> Any:
        replicas = current_replicas()
        if _records and args:
            shapes, by_replicas = _records[-1]
            if replicas is not None or not by_replicas:
                shapes.add(shape_of(*args, **kwargs))
        if replicas is None or get_device() == "meta":
            return original(*args, **kwargs)
        return on_rows(original, replicas, *args, **kwargs)

    draw._keras_tp = True  # type: ignore[attr-defined]
    return draw


def _by_row(shape: tuple[int, ...], replicas: Replicas) -> bool:
    return shape[:1] == (replicas.rows,) and shape not in replicas.fixed


def _shaped_like_rows(
    original: Callable[..., Any], replicas: Replicas, shape: Any, *args: Any, **kwargs: Any
) -> Any:
    shape = tuple(shape)
    if not _by_row(shape, replicas):
        return original(shape, *args, **kwargs)

    def whole(leaf: Any) -> Any:  # parameters of a distribution may come by row
        rows = isinstance(leaf, torch.Tensor) and leaf.shape[:1] == (replicas.rows,)
        return replicas.gather(leaf) if rows and leaf.dim() == len(shape) else leaf

    args, kwargs = keras.tree.map_structure(whole, (args, kwargs))
    return replicas.take(original((replicas.total, *shape[1:]), *args, **kwargs))


def _of_all_rows(
    original: Callable[..., Any], replicas: Replicas, x: Any, *args: Any, **kwargs: Any
) -> Any:
    x = keras.ops.convert_to_tensor(x)
    if not _by_row(tuple(x.shape), replicas):
        return original(x, *args, **kwargs)
    return replicas.take(original(replicas.gather(x), *args, **kwargs))


def _dropout(
    original: Callable[..., Any],
    replicas: Replicas,
    inputs: Any,
    rate: Any,
    noise_shape: Any = None,
    seed: Any = None,
) -> Any:
    inputs = keras.ops.convert_to_tensor(inputs)
    shape = _noise_shape(inputs, rate, noise_shape)
    if inputs.shape[:1] != (replicas.rows,) or rate in (0.0, 1.0):
        return original(inputs, rate, noise_shape, seed)
    if noise_shape is not None and _by_row(tuple(shape), replicas):
        shape[0] = replicas.total
    noise_shape = None if noise_shape is None else shape
    ones = torch.ones((), dtype=inputs.dtype, device=inputs.device)
    ones = ones.expand(replicas.total, *inputs.shape[1:])
    kept = replicas.take(original(ones, rate, noise_shape, seed)) != 0
    return torch.where(kept, inputs / (1.0 - rate), 0)


def share_statistics(layer: Any) -> None:
    """Has a BatchNormalization take the moments of the rows of all replicas.

    Forward one all-reduce of the sums (with a mask two), backward one of their gradients.
    """
    original = layer._moments

    @functools.wraps(original)
    def _moments(inputs: Any, mask: Any) -> Any:
        replicas = current_replicas()
        if replicas is None or 0 not in layer._reduction_axes:
            return original(inputs, mask)
        dims = list(layer._reduction_axes)
        if mask is None:
            return _mean_and_variance(inputs, dims, replicas)
        mask = torch.broadcast_to(mask.unsqueeze(-1), inputs.shape).bool()
        total = torch.where(mask, inputs, 0).sum(dims, keepdim=True)
        count = mask.to(inputs.dtype).sum(dims, keepdim=True)
        total, count = replicas.sum(torch.stack([total, count])).unbind()
        count = count + keras.config.epsilon()
        mean = total / count
        squares = torch.where(mask, inputs - mean, 0).square().sum(dims, keepdim=True)
        variance = replicas.sum(squares) / count
        return mean.squeeze(), variance.squeeze()

    layer._moments = _moments


def _mean_and_variance(x: Any, dims: list[int], replicas: Replicas) -> Any:
    # As Keras's `ops.moments` on torch: E[x^2] - E[x]^2, of float16 in float32.
    dtype = x.dtype
    x = x.float() if dtype == torch.float16 else x
    count = math.prod(x.shape[dim] for dim in dims if dim) * replicas.total
    sums = replicas.sum(torch.stack([x.sum(dims), x.square().sum(dims)])) / count
    mean, variance = sums[0], sums[1] - sums[0].square()
    if dtype == torch.float16:
        limits = torch.finfo(torch.float16)
        mean, variance = (t.clip(limits.min, limits.max).to(dtype) for t in (mean, variance))
    return mean, variance


def losses_of(owners: Iterable[Owner]) -> list[torch.Tensor]:
    """The losses that layers have added up to now."""
    return [loss for owner in owners for loss in owner.layer._losses]


def average_losses(
    owners: Iterable[Owner], replicas: Replicas, but: Iterable[torch.Tensor], where: str = ""
) -> None:
    """Makes losses that layers have added those of all rows: the mean, weighted by rows.

    One all-reduce for all. A loss that sums over rows is not what Keras's own
    penalties are: the first batch shows it (`keras_tp.proof`), and its layer is
    given all rows.

    Args:
        owners: the layers.
        replicas: which have computed their rows.
        but: losses that are those of all rows already: of earlier calls, and of
            layers that were given all rows.
        where: for errors, what is called; without it a loss that has no mean stays
            as it is, for the proof to find.
    """
    known = {id(loss) for loss in but}
    added = [
        (owner.layer._losses, i, owner.path)
        for owner in owners
        for i, loss in enumerate(owner.layer._losses)
        if id(loss) not in known
    ]
    odd = [(path, tuple(losses[i].shape)) for losses, i, path in added if losses[i].numel() != 1]
    if odd and where:
        raise LayoutError(
            [
                f"'{path}' adds a loss of shape {shape}. Keras sums it, and that of a replica's "
                "rows is not a mean over all. Add a scalar, a mean over rows."
                for path, shape in odd
            ],
            where=where,
        )
    added = [entry for entry in added if entry[0][entry[1]].numel() == 1]
    values = [losses[i] for losses, i, _ in added]
    if not values:
        return
    means = replicas.mean(torch.stack([v.reshape(()) for v in values]))
    for (losses, i, _), mean, value in zip(added, means.unbind(), values, strict=True):
        losses[i] = mean.reshape(value.shape).to(value.dtype)


def with_mask(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`change(tensor)`, with the mask that Keras has put on `tensor` changed likewise."""
    changed = change(tensor)
    mask = getattr(tensor, "_keras_mask", None)
    if mask is not None:
        changed._keras_mask = change(mask)  # type: ignore[attr-defined]
    return changed
