"""What `step_time.py` wants to find: how long keras_tp may take, beside others."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

OURS = ("keras_tp", "keras_tp-compiled")


def spread(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@dataclass
class Result:
    """What was measured of one contestant at one size.

    Attributes:
        seconds: of a step, one number a round.
        peak, imports: bytes of resident memory of its fullest rank: at most, and once its
            packages were imported.
        traffic: kind and bytes of each collective of a step, of the first rank.
    """

    seconds: list[float]
    peak: int
    imports: int
    traffic: list[tuple[str, int]]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratios(self, other: Result) -> list[float]:
        """Of the seconds of a round to the other's in the same round."""
        return [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]


@dataclass(frozen=True)
class Bar:
    """A ratio that is not to be exceeded.

    Attributes:
        ours, other: contestants; of `ours` the one that is fastest.
        limit: of the median of the rounds' ratios.
        strict: whether it must stay below the limit.
    """

    ours: tuple[str, ...]
    other: str
    limit: float
    strict: bool = False

    def __str__(self) -> str:
        return f"{'<' if self.strict else '<='} {self.limit:g}"

    def measured(self, results: dict[str, Result]) -> tuple[str, float] | None:
        """Which of `ours`, and its ratio; None if one side has not been measured."""
        there = [name for name in self.ours if name in results]
        if not there or self.other not in results:
            return None
        best = min(there, key=lambda name: results[name].median)
        return best, statistics.median(results[best].ratios(results[self.other]))

    def met(self, ratio: float) -> bool:
        return ratio < self.limit or (ratio == self.limit and not self.strict)


def bars(size: str) -> list[Bar]:
    """Those of one size, by its name."""
    return [
        Bar(OURS, "hand-written", 1.10),
        Bar(OURS, "parallelize_module", 1.0, strict=True),
        Bar(OURS, "jax", 0.85, strict=True),
        # What a step costs besides computing weighs most where there is least to compute.
        Bar(OURS, "nightly", 0.3 if size == "small" else 0.6),
        Bar(("keras_tp-1-rank",), "keras", 1.05),
    ]
