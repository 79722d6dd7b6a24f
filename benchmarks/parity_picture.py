"""Draws the loss curves of `parity.py`, and how far they are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

from matplotlib import pyplot as plt

# Okabe and Ito's, which colour-blind people tell apart, and a dash for those who see no colour.
STYLES = {
    "model=2": {"color": "#0072B2", "linestyle": "-"},
    "batch=2": {"color": "#E69F00", "linestyle": (0, (5, 2))},
    "batch=2, model=2": {"color": "#009E73", "linestyle": (0, (1, 1.2))},
    "1, nudged": {"color": "#CCCCCC", "linestyle": "-", "linewidth": 5},
}
NAMES = {
    "model=2": "2 ranks, model=2",
    "batch=2": "2 ranks, batch=2",
    "batch=2, model=2": "4 ranks, batch=2, model=2",
    "1, nudged": "1 process, begun one rounding off",
}

WINDOW = 10  # steps, over which differences are averaged: many a one is zero


def draw(path: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Writes the picture.

    Args:
        path: of the PNG.
        runs: by dtype and by what they ran on, with `losses`, a list for each rank. The loss is
            drawn of the first dtype, the difference of each.
    """
    plt.rcParams.update(
        {
            "font.size": 9,
            "lines.linewidth": 1.4,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    figure, (top, bottom) = plt.subplots(
        2, sharex=True, figsize=(7, 5.2), height_ratios=(1, 1.15), layout="constrained"
    )
    first = next(iter(runs.values()))
    steps = np.arange(1, len(first["1"].losses[0]) + 1)
    window = min(WINDOW, len(steps))
    # Wide and pale, so that what lies on it is seen to lie on it.
    top.plot(
        steps, first["1"].losses[0], color="#CCCCCC", linewidth=5, label="1 process, plain Keras"
    )
    for on, style in STYLES.items():
        if on in first and on != "1, nudged":
            top.plot(steps, first[on].losses[0], label=NAMES[on], **style)
    top.set_ylabel("loss")
    top.set_ylim(bottom=0)
    top.legend(frameon=False)
    for dtype, of_dtype in runs.items():
        plain = of_dtype["1"].losses
        for on, style in reversed(STYLES.items()):
            if on in of_dtype:
                gap = np.abs(np.subtract(of_dtype[on].losses, plain)).max(axis=0)
                gap = np.convolve(gap, np.ones(window) / window, "valid")
                gap = np.where(gap > 0, gap, np.nan)  # a log axis has no zero
                label = NAMES[on] if on == "1, nudged" and of_dtype is first else None
                bottom.plot(steps[window - 1 :], gap, label=label, **style)
        bottom.annotate(
            f" {dtype}", (steps[-1], np.nanmean(gap)), va="center", annotation_clip=False
        )
    bottom.set_yscale("log")
    bottom.set_ylabel(f"difference from the loss of\n1 process, mean of {window} steps")
    bottom.set_xlabel("step")
    bottom.legend(frameon=False, loc="center right")
    figure.savefig(path, dpi=105)
    plt.close(figure)
