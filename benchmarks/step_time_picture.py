"""Draws what `step_time.py` has measured: how much longer a step takes than by hand."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from bars import Result, spread
from contestants import CONTESTANTS

mpl.use("Agg")

from matplotlib import pyplot as plt

# Okabe and Ito's, which colour-blind people tell apart: ours, other ways on two ranks, one process.
OURS, TWO, ONE = "#0072B2", "#E69F00", "#BBBBBB"
CUT = 5.0  # where an axis ends; a longer bar is cut, and its number says so


def draw(path: Path, results: dict[str, dict[str, Result]]) -> None:
    """Writes the PNG: a panel for each size, a bar for each contestant.

    Args:
        path: of the PNG.
        results: by size and contestant, the hand-written one among them.
    """
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(
        1, len(results), sharey=True, figsize=(3.2 * len(results) + 1.6, 3.4), layout="constrained"
    )
    names = [name for name in CONTESTANTS if any(name in r for r in results.values())]
    panels = panels if len(results) > 1 else [panels]
    for panel, (title, of_size) in zip(panels, results.items(), strict=True):
        by_hand = of_size["hand-written"]
        for row, name in enumerate(names):
            if name not in of_size:
                panel.text(1.1, row, "did not run", va="center", color="#666666")
                continue
            low, middle, high = spread(of_size[name].ratios(by_hand))
            shown = min(middle, CUT)
            panel.barh(row, shown, color=colour(name), height=0.7)
            if high <= CUT:
                panel.plot([low, high], [row, row], color="black", linewidth=1)
            more = ", cut" if middle > CUT else ""
            panel.text(max(shown, min(high, CUT)) + 0.08, row, f"{middle:.2f}{more}", va="center")
        panel.axvline(1, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
        panel.set_title(f"{title}: {1e3 * by_hand.median:.0f} ms by hand")
        panel.set_xlim(0, 1.25 * CUT)
        panel.set_yticks(range(len(names)), [CONTESTANTS[name].title for name in names])
        panel.tick_params(axis="y", length=0)
    panels[0].invert_yaxis()
    figure.supxlabel("time of a training step / that of layers by hand; lower is faster")
    figure.savefig(path, dpi=105)
    plt.close(figure)


def colour(name: str) -> str:
    if name.startswith("keras_tp"):
        return OURS
    return ONE if name in ("keras", "keras-2-threads") else TWO
