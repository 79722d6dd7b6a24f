"""How far apart two right computations of the same may be.

Shards are summed in another order than whole tensors, so that results differ by
rounding, and how much that is depends on the computation: a layer norm of
numbers far from zero, a ReLU in bfloat16, a gradient that is zero by mathematics
multiply it. It is therefore measured: what was computed once is computed again
with inputs and weights nudged by one unit of rounding, and the largest change
is what such a unit makes there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import torch

# How often what is compared is computed again on nudged numbers, to see what rounding makes.
NUDGES = 2


def units_allowed(unit: float) -> int:
    """How many units of rounding pass for equal.

    Processors sum float16 and bfloat16 in float32 and round once. In float32
    itself, sums of thousands in another order are several units apart; and 16
    of those are still two millionths.
    """
    return 4 if unit > 1e-4 else 16


def allowed(unit: float) -> float:
    """The largest relative difference that passes for equal."""
    return units_allowed(unit) * unit


def unit_of(dtypes: Sequence[str]) -> float:
    """The unit of rounding of the coarsest of these Keras dtypes that layers compute in."""
    names = set(dtypes)
    if keras.backend.result_type("float64", "float64") != "float64":
        names = {"float32" if name == "float64" else name for name in names}  # as Keras on torch
    known = [getattr(torch, name, None) for name in names]
    units = [torch.finfo(t).eps for t in known if t is not None and t.is_floating_point]
    return max(units, default=torch.finfo(torch.float32).eps)


class Nudge:
    """Multiplies floats by one plus or minus up to one unit, the same ones on every rank.

    Args:
        unit: of rounding; 0 leaves everything as it is.
        seed: of the random numbers, which are the nudge's own.
    """

    def __init__(self, unit: float, seed: int):
        self.unit = unit
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        if not self.unit or not value.is_floating_point():
            return value
        noise = torch.rand(value.shape, generator=self.random, dtype=torch.float64) * 2 - 1
        return (value.double() * (1 + self.unit * noise.to(value.device))).to(value.dtype)


def difference(
    wanted: Any, found: Any, whole: Any, nudged: Sequence[Any], unit: float
) -> tuple[float, bool]:
    """How far `found` is from `wanted`, and whether all their values are finite.

    Args:
        wanted: a tensor, or None where there is no gradient.
        found: likewise.
        whole: what `wanted` is a shard of, or `wanted`.
        nudged: `whole` computed again after nudges.
        unit: of the nudges.

    Returns:
        The largest difference relative to the largest value of `whole`, or, if
        nudges change it by more than their unit, to that change divided by the
        unit: about a unit where only rounding differs. The same is done with root
        mean squares, and the larger number counts. inf where there is nothing to
        compare: other shapes or dtypes, infinities in other places.
    """
    tensors = [t for t in (wanted, found, whole, *nudged) if t is not None]
    if not tensors:
        return 0.0, True
    # What is not used has no gradient, or one of zeros.
    wanted, found = (torch.zeros_like(tensors[0]) if t is None else t for t in (wanted, found))
    whole = wanted if whole is None else whole
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return math.inf, True
    finite = all(bool(torch.isfinite(t).all()) for t in (wanted, found))
    gaps = _gaps(wanted, found)
    if gaps is None:
        return math.inf, finite
    moves = [moved for n in nudged if n is not None and (moved := _gaps(whole, n)) is not None]
    size = _real(whole)
    return max(
        _relative(measure(gaps), measure(size), [measure(m) for m in moves], unit)
        for measure in (_largest, _typical)
    ), finite


def _relative(gap: float, size: float, moves: Sequence[float], unit: float) -> float:
    scale = max([size, *(moved / unit for moved in moves)])
    return gap / scale if scale else math.inf if gap else 0.0


def _real(t: torch.Tensor) -> torch.Tensor:
    """The finite values in real numbers of float64, zeros for the others."""
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return torch.nan_to_num(t.double(), nan=0.0, posinf=0.0, neginf=0.0)


def _largest(t: torch.Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _typical(t: torch.Tensor) -> float:
    # What is wrong everywhere does not pass for the one ReLU that a nudge switches.
    return float(t.square().mean().sqrt()) if t.numel() else 0.0


def _gaps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
    """Differences of what is finite; None if what is not is not the same."""
    if one.shape != other.shape:
        return None
    if one.is_floating_point():
        odd = [t.double().where(~torch.isfinite(t), 0) for t in (one, other)]
        if not torch.equal(*(torch.nan_to_num(t, nan=1.0) for t in odd)):
            return None
    return _real(one) - _real(other)
