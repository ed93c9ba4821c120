"""The figures of `run.py`, in the paper's form: training solid, test dashed, mean over seeds.

Matplotlib is imported only when one is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpicdsgd.common.figures import COLOURS, INK, save
from paper.curves import Array, Curves
from paper.runs import TITLES

SMOOTH = 5  # evaluations of the moving average, over which the paper smooths the variance, too
_STYLES = ("-", "--", ":")
_MARKERS = "osD^vP*X<>hp"  # one each where there are more lines than colours
_MARKED = 6  # points of a line
Lines = dict[str, Curves]


def draw(experiment: str, title: str, found: Lines, out: Path) -> None:
    """The figure of an experiment on one data set. Raises UserError where ``out`` cannot be."""
    from matplotlib.figure import Figure

    panels = _PANELS[experiment]
    figure = Figure(figsize=(4.0 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        panel(axes, found)
        axes.grid(color="#DDDDDD", lw=0.5)
        axes.tick_params(which="both", labelsize=7, colors=INK)
    figure.suptitle(f"{TITLES[experiment]}; {title}", fontsize=9, color=INK)
    handles, labels = legend(np.atleast_1d(figure.axes)[0], found, experiment == "algorithms")
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)),
                  frameon=False, fontsize=7)  # fmt: skip
    _save(figure, out)


def legend(axes: Any, found: Lines, by_result: bool) -> tuple[list[Any], list[str]]:
    """Handles and labels; where asked for, the best at the end first, and with what it reached."""
    handles, labels = axes.get_legend_handles_labels()
    if not by_result:
        return handles, labels
    ends = {label: float(one.late("test").mean()) for label, one in found.items()}
    pairs = sorted(zip(handles, labels, strict=True), key=lambda pair: -ends[pair[1]])
    return [h for h, _ in pairs], [f"{label}: {ends[label]:.1f}" for _, label in pairs]


def _save(figure: Any, out: Path) -> None:
    """A PNG of 64 colours, which lines need no more of: a third of the size."""
    from PIL import Image  # which Matplotlib needs, too

    save(figure, out)
    with Image.open(out) as whole:
        few = whole.convert("RGB").quantize(64)
    few.save(out, optimize=True)


def _look(k: int, of: int, points: int) -> dict[str, Any]:
    """Of line k: a colour; where there are not enough, also a marker and another kind of line."""
    look = {"color": COLOURS[k % len(COLOURS)], "ls": _STYLES[k // len(COLOURS) % 3], "lw": 1.2}
    if of > len(COLOURS):
        apart = max(1, points // _MARKED)  # and each begins elsewhere, not to hide another's
        look |= {"marker": _MARKERS[k % len(_MARKERS)], "ms": 3.5, "markevery": (k % apart, apart)}
    return look


def _train_and_test(axes: Any, found: Lines, train: str, test: str, name: str) -> None:
    for k, (label, one) in enumerate(found.items()):
        colour = COLOURS[k % len(COLOURS)]
        axes.plot(one.epoch, one.values[train].mean(axis=0), color=colour, lw=1.3, label=label)
        axes.plot(one.epoch, one.values[test].mean(axis=0), color=colour, lw=1.1, ls="--")
    _name(axes, "epoch", f"{name}: training solid, test dashed")


def _accuracy(axes: Any, found: Lines) -> None:
    _train_and_test(axes, found, "train", "test", "accuracy, %")
    _from_half(axes, found, ("train", "test"))


def _loss(axes: Any, found: Lines) -> None:
    _train_and_test(axes, found, "train_loss", "test_loss", "loss")
    axes.set_yscale("log")


def _variance(axes: Any, found: Lines) -> None:
    """The variance of the test accuracy over agents, smoothed as in the paper."""
    for k, (label, one) in enumerate(found.items()):
        variance_E = (one.values["std"] ** 2).mean(axis=0)
        axes.plot(one.epoch, smooth(variance_E), label=label, **_look(k, 0, 0))
    _name(axes, "epoch", "variance of test accuracy over agents")


def smooth(values_E: Array) -> Array:
    """A moving average, over fewer values at the ends."""
    ones = np.ones(SMOOTH)
    if len(values_E) < SMOOTH:
        return values_E
    count = np.convolve(np.ones(len(values_E)), ones, "same")
    return np.asarray(np.convolve(values_E, ones, "same") / count)


def _against(key: str, name: str, factor: float = 1.0, log: bool = False) -> Callable[..., None]:
    """A panel of test accuracy against something that grows with the epochs."""

    def panel(axes: Any, found: Lines) -> None:
        for k, (label, one) in enumerate(found.items()):
            # The middle seed's: one that shared the machine with something else is no measure.
            x_E = one.epoch if key == "epoch" else np.median(one.values[key], axis=0) * factor
            look = _look(k, len(found), len(x_E))
            axes.plot(x_E, one.values["test"].mean(axis=0), label=label, **look)
        if log:
            axes.set_xscale("log")
        _name(axes, name, "test accuracy, %")
        _without_the_beginning(axes, found)

    return panel


def _from_half(axes: Any, found: Lines, names: tuple[str, ...]) -> None:
    """Leave out what lies below half of the best: the first epochs, and what learnt nothing."""
    top = max(float(np.nanmax(one.values[name])) for one in found.values() for name in names)
    low = min(float(np.nanmin(one.values[name])) for one in found.values() for name in names)
    axes.set_ylim(max(low - 1, top / 2), top + 1)


def _without_the_beginning(axes: Any, found: Lines) -> None:
    """Leave out what lies below where the slowest is after a sixth of the epochs, if it learns."""
    means = [one.values["test"].mean(axis=0) for one in found.values()]
    top = max(float(np.nanmax(mean_E)) for mean_E in means)
    low = min(float(mean_E[len(mean_E) // 6]) for mean_E in means)
    axes.set_ylim(max(low, top / 2) - 1, top + 0.5)


def _name(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=8, color=INK)
    axes.set_ylabel(y, fontsize=8, color=INK)


_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "1a": (_accuracy, _loss),
    "1b": (_accuracy, _loss),
    "2a": (_accuracy, _loss, _variance),
    "2b": (_accuracy, _loss, _variance),
    "steps": (_accuracy, _loss),
    "partition": (_accuracy, _loss, _variance),
    "fraction": (_accuracy, _loss),
    "cnn": (_accuracy, _loss),
    "algorithms": (
        _against("epoch", "epoch"),
        _against("time_s", "seconds, evaluations included"),
        _against("bytes", "MB sent by an agent", 1e-6, log=True),
    ),
}
