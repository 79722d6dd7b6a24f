"""Draws a cost as a table."""

from __future__ import annotations

from keras_tp.prices import Cost
from keras_tp.tables import plain_table, render, size_text


def cost_table(cost: Cost, bandwidth: float | None = None) -> str:
    """The price of a step.

    Args:
        cost: the price.
        bandwidth: bytes per second that a rank sends, for a line more.
    """
    table = plain_table("phase", "collective", "along", "ranks", "of", "count", "bytes", "sent")
    groups: dict[tuple[str, str, str, str, str], tuple[int, int, float]] = {}
    for traffic in cost.traffic:
        axis = "all ranks" if traffic.axis == "all" else traffic.axis
        key = traffic.phase, traffic.kind, axis, str(traffic.ranks), traffic.of
        count, size, sent = groups.get(key, (0, 0, 0.0))
        groups[key] = count + traffic.count, size + traffic.bytes, sent + traffic.sent
    for key, (count, size, sent) in groups.items():
        table.add_row(*key, str(count), size_text(size), size_text(sent))
    stored = cost.stored
    lines = [
        f"one training step on a batch of {cost.batch}, rank {cost.rank} of {cost.ranks}:",
        f"memory: parameters {size_text(stored.parameters)}, gradients "
        f"{size_text(stored.gradients)}, optimizer slots {size_text(stored.slots)}, activations "
        f"{size_text(cost.activations)} at most; {size_text(cost.peak)} together.",
        f"communication: {sum(t.count for t in cost.traffic)} collectives; each rank sends "
        f"{size_text(cost.sent)} if ranks stand in rings. Computation: {_flops_text(cost.flops)}.",
    ]
    if bandwidth is not None and cost.sent:
        seconds = cost.seconds(bandwidth)
        lines.append(
            f"at {bandwidth / 1e9:g} GB/s it communicates for {_time_text(seconds)} (latency not "
            f"counted), as long as a rank computes that does {_flops_text(cost.flops / seconds)}/s."
        )
    lines += [f"note: {note}" for note in cost.notes]
    if not groups:
        return render("\n".join(lines))
    return render(lines[0], table, "", "\n".join(lines[1:]))


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
