"""A plot of `report.py`'s series: what was measured, and the bounds. No pyplot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mpicdsgd.common.figures import COLOURS, INK, check_suffix, save

_PANELS = (
    ("V", "V - V* (Theorem 1)"),
    ("consensus", "Consensus distance |X - 1s| (Proposition 1)"),
    ("gradient", "Mean |grad V|^2 so far (Theorem 2)"),
)
_STYLES = (
    ("measured", COLOURS[0], "-", "measured"),
    ("printed", COLOURS[1], "--", "bound as printed"),
    ("corrected", COLOURS[2], "-.", "bound, corrected"),
)
_FEW = 30  # points up to which each is marked


def plot_theory(report: dict[str, Any], out: Path) -> None:
    """Draw V - V*, consensus distance and gradient against the step, on log axes. Local.

    Args:
        report: of `theory.report.report`.
        out: the file to write: .png, .pdf or .svg.

    Raises:
        UserError: ``out`` cannot be written or has another suffix.
    """
    check_suffix(out)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        _panel(axes, report["series"].get(key), title)
    save(figure, out)


def _panel(axes: Any, series: dict[str, list[Any]] | None, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_xlabel("steps", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    drawn = False
    # Both axes are logarithmic, and the first step is 0.
    steps = 1 + np.array(series["step"] if series else [], dtype=np.float64)
    for key, colour, line, label in _STYLES:
        values = np.array((series or {}).get(key, []), dtype=np.float64)
        values = np.where(values > 0, values, np.nan)
        if len(values) and np.isfinite(values).any():
            marker = "o" if len(values) <= _FEW else None
            axes.plot(
                steps, values, color=colour, ls=line, lw=1.6, marker=marker, ms=3, label=label
            )
            drawn = True
    if drawn:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    else:
        axes.text(0.5, 0.5, "not applicable", color=INK, ha="center", transform=axes.transAxes)
