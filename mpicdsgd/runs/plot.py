"""Plots of runs: accuracy, losses and consensus. Matplotlib is imported only when one is drawn.

Figures are made without pyplot, so neither a display nor a global setting is needed or changed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.figures import COLOURS, INK, check_suffix, save
from mpicdsgd.graphs.graph_plot import draw_graph
from mpicdsgd.runs import metrics_file

__all__ = ["draw_graph", "plot_runs"]

Series = NDArray[np.float64]
Line = dict[str, Any]

_FEW = 30  # points up to which each is marked
_NAME = 36  # characters of a run's name in the legend


def plot_runs(runs: Sequence[Path], out: Path) -> None:
    """Draw runs against the epoch: test accuracy, losses, consensus distance. Local.

    Accuracy: the mean over agents as a line, the spread (min to max) as a band, the averaged
    model's dashed. One colour a run.

    Args:
        runs: run folders or metrics files.
        out: the file to write: .png, .pdf or .svg.

    Raises:
        UserError: a run has no metrics, or ``out`` cannot be written or has another suffix.
    """
    runs, out = [Path(run) for run in runs], Path(out)
    check_suffix(out)
    if not runs:
        raise UserError("no run to plot: name at least one run folder")
    records = [metrics_file.read(run) for run in runs]
    for run, lines in zip(runs, records, strict=True):
        if not lines:
            raise UserError(f"{run} has no evaluation yet: plot it after its first")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    accuracy, loss, consensus = figure.subplots(1, 3)
    handles = []
    few = max(map(len, records)) <= _FEW
    for k, (label, lines) in enumerate(zip(_labels(runs), records, strict=True)):
        colour = COLOURS[k % len(COLOURS)]
        epoch = _values(lines, "epoch")
        solid = {"color": colour, "lw": 1.8, "marker": "o" if few else None, "ms": 3.5}
        # Without a line between two points, a run of one evaluation would show nothing.
        thin = {"color": colour, "lw": 1.3, "marker": "." if len(lines) == 1 else None}

        mean = _values(lines, "test_accuracy", "mean")
        _band(accuracy, epoch, lines, "test_accuracy", colour)
        (handle,) = accuracy.plot(epoch, mean, **solid)
        handle.set_label(_with_result(label, mean))
        handles.append(handle)
        accuracy.plot(epoch, _values(lines, "averaged_model", "test_accuracy"), ls="--", **thin)

        _band(loss, epoch, lines, "test_loss", colour)
        loss.plot(epoch, _values(lines, "test_loss", "mean"), **solid)
        loss.plot(epoch, _values(lines, "train_loss", "mean"), ls=":", **thin)

        consensus.plot(epoch, _positive(_values(lines, "consensus", "max")), **solid)
        consensus.plot(epoch, _positive(_values(lines, "consensus", "rms")), ls="--", **thin)

    _dress(accuracy, "Test accuracy", {"-": "mean over agents", "--": "averaged model"}, band=True)
    _dress(loss, "Loss", {"-": "test, mean over agents", ":": "training, running mean"}, band=True)
    _dress(consensus, "Consensus distance", {"-": "farthest agent", "--": "root mean square"})
    _log_axis(consensus)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False
    )
    save(figure, out)


def _band(axes: Any, epoch: Series, lines: list[Line], key: str, colour: str) -> None:
    """The spread over agents, min to max."""
    low, high = np.full(len(lines), np.nan), np.full(len(lines), np.nan)
    for i, line in enumerate(lines):
        agents = line.get(key, {}).get("agents") if isinstance(line.get(key), dict) else None
        values = [_number(v) for v in agents] if isinstance(agents, list) else []
        if finite := [v for v in values if np.isfinite(v)]:
            low[i], high[i] = min(finite), max(finite)
    if len(lines) == 1:
        axes.vlines(epoch, low, high, color=colour, alpha=0.35, lw=5)
    else:
        axes.fill_between(epoch, low, high, color=colour, alpha=0.2, lw=0)


def _values(lines: list[Line], *keys: str) -> Series:
    """The number at this place of every line; NaN where there is none."""
    found: list[float] = []
    for line in lines:
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        found.append(_number(value))
    return np.array(found)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _positive(values: Series) -> Series:
    """NaN where agents are equal: a log axis has no zero."""
    return np.where(values > 0, values, np.nan)


def _labels(runs: Sequence[Path]) -> list[str]:
    """Short names: the folder's; with as much of the path as tells runs of one name apart."""
    folders = [run if run.is_dir() else run.parent for run in map(Path.resolve, runs)]
    names = [folder.name for folder in folders]
    shared = {name for name, count in Counter(names).items() if count > 1}
    common = os.path.commonpath(folders) if len(set(folders)) > 1 else ""
    labels = [
        os.path.relpath(folder, common) if common and name in shared else name
        for folder, name in zip(folders, names, strict=True)
    ]
    return [x if len(x) <= _NAME else "…" + x[1 - _NAME :] for x in labels]


def _with_result(label: str, accuracy: Series) -> str:
    finite = accuracy[np.isfinite(accuracy)]
    # A leading underscore would have Matplotlib leave the entry out.
    name = label.replace("$", r"\$").lstrip("_") or "run"
    return f"{name}: {100 * finite[-1]:.1f} % at the end" if finite.size else name


def _dress(axes: Any, title: str, styles: dict[str, str], *, band: bool = False) -> None:
    """Title, grid, and in grey what the line styles mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold")
    axes.set_xlabel("epoch", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    keys: list[Any] = [Line2D([], [], color="#777777", ls=ls, label=s) for ls, s in styles.items()]
    if band:
        keys.insert(1, Patch(color="#777777", alpha=0.25, lw=0, label="least to most over agents"))
    axes.legend(handles=keys, fontsize=8, frameon=False, labelcolor=INK)


def _log_axis(axes: Any) -> None:
    if any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
        axes.set_yscale("log")
    else:
        axes.text(
            0.5, 0.5, "all agents are equal", color=INK, ha="center", transform=axes.transAxes
        )
