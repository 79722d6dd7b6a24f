"""Why a row of the plan is not better, in words."""

from __future__ import annotations

from collections.abc import Collection

from torch.distributed.tensor import Shard

from keras_tp.plans import StylePlan, VariablePlan


def reason_of(
    styles: list[StylePlan],
    plans: list[VariablePlan],
    names: Collection[str],
    why_not: str,
    why_whole: str,
) -> str:
    """Why a layer is not better off, in words; empty if nothing is in the way.

    Args:
        styles: the layer's.
        plans: of its variables.
        names: what the variables are called by what it computes.
        why_not: why it computes with gathered weights, where it does.
        why_whole: why its output is gathered, as far as was found out.
    """
    if not any("float" in plan.dtype for plan in plans):
        return ""
    if not styles:
        claimed = [plan for plan in plans if plan.pattern is not None]
        if not claimed:
            return "no pattern claims it"
        axes = {axis for plan in claimed for axis in plan.layout if axis is not None}
        if not axes:
            return "its layout shards nothing"
        return f"one rank along {', '.join(sorted(axes))}"
    reasons = []
    for style in styles:
        if style.name == "gathered":
            reasons.append(f"gathered on use: {why_not}")
        if (style.kept or style.open) and "bias" in names and "bias" not in style.local:
            reasons.append(
                f"its bias is whole, so that the gradient travels: cut it by {style.axis!r}"
            )
        if isinstance(style.output, Shard) and not (style.kept or style.open):
            why = why_whole or "no row layer takes it as a shard"
            reasons.append(f"its output is gathered: {why}")
        if isinstance(style.input, Shard) and not style.given:
            reasons.append("its input is sliced: it does not come as a shard")
    return "; ".join(dict.fromkeys(reasons))
