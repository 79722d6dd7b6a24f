"""Draws a cost as a table."""

from __future__ import annotations

from keras_tp.prices import Cost
from keras_tp.tables import plain_table, render, size_text


def cost_table(
    cost: Cost, bandwidth: float | None = None, flops_per_second: float | None = None
) -> str:
    """The price of a step.

    Args:
        cost: the price.
        bandwidth: bytes per second that a rank sends, for a line more.
        flops_per_second: what a rank computes, for the share of a step in that line.
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
    if bandwidth is not None:
        lines.append(_time_line(cost, bandwidth, flops_per_second))
    lines += [f"note: {note}" for note in cost.notes]
    if not groups:
        return render("\n".join(lines))
    return render(lines[0], table, "", "\n".join(lines[1:]))


def _time_line(cost: Cost, bandwidth: float, flops_per_second: float | None) -> str:
    """How long a step communicates, and what that is of it."""
    if not cost.sent:
        return "nothing is sent, at whatever bandwidth."
    seconds = cost.seconds(bandwidth)
    along: dict[str, float] = {}
    for traffic in cost.traffic:
        axis = "all ranks" if traffic.axis == "all" else traffic.axis
        along[axis] = along.get(axis, 0.0) + traffic.sent / bandwidth
    parts = ", ".join(f"{_time_text(part)} along {axis}" for axis, part in along.items())
    said = f"at {bandwidth / 1e9:g} GB/s along every axis it communicates for {_time_text(seconds)}"
    said += f" ({parts})" if len(along) > 1 else ""
    said += ", latency not counted"
    if flops_per_second is None:
        speed = _flops_text(cost.flops / seconds)
        share = f"half of a step of ranks that compute {speed}/s, less of slower ones"
    else:
        computing = _time_text(cost.flops / flops_per_second)
        said += f", and computes for {computing} at {_flops_text(flops_per_second)}/s"
        part = cost.share(bandwidth, flops_per_second=flops_per_second)
        share = f"communication is {100 * part:.3g} % of a step"
    return f"{said}: {share}, were nothing done meanwhile."


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
