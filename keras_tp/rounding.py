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

# Differences are told in units of rounding times what one unit was seen to make. This
# many are let pass: of bfloat16 12 %, of float32 two millionths.
UNITS = 16


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
        The largest difference, relative to the largest value of `whole`, or, if
        nudges change it by more than their unit, to that change divided by the
        unit: about a unit where only rounding differs. inf where there is
        nothing to compare: other shapes or dtypes, infinities in other places.
    """
    tensors = [t for t in (wanted, found, whole, *nudged) if t is not None]
    if not tensors:
        return 0.0, True
    # What is not used has no gradient, or one of zeros.
    wanted, found = (torch.zeros_like(tensors[0]) if t is None else t for t in (wanted, found))
    whole = wanted if whole is None else whole
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return math.inf, True
    largest = _largest(whole)
    moved = max((_gap(whole, n) for n in nudged if n is not None), default=0.0)
    scale = max(largest, moved / unit if math.isfinite(moved) else 0.0)
    gap = _gap(wanted, found)
    finite = all(bool(torch.isfinite(t).all()) for t in (wanted, found) if t.is_floating_point())
    return (gap / scale if scale else math.inf if gap else 0.0), finite


def _finite(t: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(t.double(), nan=0.0, posinf=0.0, neginf=0.0)


def _largest(t: torch.Tensor) -> float:
    return float(_finite(t).abs().max()) if t.numel() else 0.0


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of what is finite; inf if something else is not the same."""
    if one.shape != other.shape:
        return math.inf
    if one.is_floating_point():
        marks = [
            torch.nan_to_num(t.double().where(~torch.isfinite(t), 0), nan=1) for t in (one, other)
        ]
        if not torch.equal(*marks):
            return math.inf
    return _largest(_finite(one) - _finite(other))
