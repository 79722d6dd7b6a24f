"""Draws a cost as a table."""

from __future__ import annotations

from collections import Counter

from keras_tp.prices import Cost
from keras_tp.tables import plain_table, render, size_text


def cost_table(cost: Cost, bandwidth: float | None = None) -> str:
    """The price of a step.

    Args:
        cost: the price.
        bandwidth: bytes per second that a rank sends, for a line more.
    """
    table = plain_table("phase", "collective", "along", "ranks", "of", "count", "bytes", "sent")
    groups: Counter[tuple[str, str, str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str, str, str]] = Counter()
    sent: Counter[tuple[str, str, str, str, str]] = Counter()
    for traffic in cost.traffic:
        axis = "all ranks" if traffic.axis == "all" else traffic.axis
        key = traffic.phase, traffic.kind, axis, str(traffic.ranks), traffic.of
        groups[key] += traffic.count
        sizes[key] += traffic.bytes
        sent[key] += traffic.sent  # type: ignore[assignment]
    for key, count in groups.items():
        table.add_row(*key, str(count), size_text(sizes[key]), size_text(sent[key]))
    stored = cost.stored
    lines = [
        f"one training step on a batch of {cost.batch}, rank {cost.rank} of {cost.ranks}:",
        f"memory: parameters {size_text(stored.parameters)}, gradients "
        f"{size_text(stored.gradients)}, optimizer slots {size_text(stored.slots)}, activations "
        f"{size_text(cost.activations)} at most; {size_text(cost.peak)} together.",
        f"communication: {sum(groups.values())} collectives; each rank sends "
        f"{size_text(cost.sent)} if ranks stand in rings. Computation: {_flops_text(cost.flops)}.",
    ]
    if bandwidth is not None:
        lines.append(
            f"at {bandwidth / 1e9:g} GB/s it communicates for {_time_text(cost.seconds(bandwidth))} "
            "(latency not counted), which is half of the step where a rank computes at "
            f"{_flops_text(cost.flops / max(cost.seconds(bandwidth), 1e-12))}/s."
            if cost.sent
            else "it communicates nothing."
        )
    lines += [f"note: {note}" for note in cost.notes]
    head = [lines[0]]
    parts = [table] if groups else []
    return render("\n".join(head), *parts, "\n".join(["", *lines[1:]]) if groups else lines[1])


def _flops_text(flops: float) -> str:
    for unit in ("", "K", "M", "G", "T"):
        if flops < 1000:
            return f"{flops:.4g} {unit}FLOP"
        flops /= 1000
    return f"{flops:.4g} PFLOP"


def _time_text(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
