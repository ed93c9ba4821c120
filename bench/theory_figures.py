"""The figures and tables of `theory.py`, from its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import numpy as np

from mpicdsgd.common.figures import COLOURS, INK, save

_SHOWN = ("ring lazy:metropolis", "complete uniform", "chain lazy:metropolis")


def draw(record: common.Record, out: Path) -> None:
    """All four figures into the folder ``out``."""
    for name, figure in (
        ("erratum", _erratum(record["erratum"])),
        ("consensus", _consensus(record["consensus"])),
        ("bias", _bias(record["bias"])),
        ("diminishing", _diminishing(record["diminishing"])),
    ):
        save(figure, out / f"theory_{name}.png")


def _figure(columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 if columns == 1 else 4.6 * columns, 4.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, columns)).tolist()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def _finish(axes: Any, title: str, x: str, y: str, *, log_x: bool = True) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=10, fontweight="bold")
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_yscale("log")
    if log_x:
        axes.set_xscale("log")
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK)


def _erratum(found: common.Record) -> Any:
    figure, panels = _figure(3)
    for axes, name in zip(panels, _SHOWN, strict=True):
        series = found["series"].get(name) or {}
        steps = np.array(series.get("step", []), float)
        for key, colour, line, label in (
            ("measured", COLOURS[0], "-", "V - V*, measured"),
            ("printed", COLOURS[1], "--", "Theorem 1 as printed"),
            ("corrected", COLOURS[2], "-.", "Theorem 1, corrected"),
        ):
            values = np.array([v if isinstance(v, float) else np.nan for v in series.get(key, [])])
            values = np.where(values > 1e-9, values, np.nan)
            axes.plot(steps, values, color=colour, ls=line, lw=1.6, label=label)
        _finish(axes, name.replace(" ", ", "), "step", "", log_x=False)
    return figure


def _consensus(found: common.Record) -> Any:
    figure, (axes,) = _figure()
    topologies = list(dict.fromkeys(row["topology"] for row in found["rows"]))
    for k, topology in enumerate(topologies):
        rows = [row for row in found["rows"] if row["topology"] == topology]
        x = [row["alpha"] / (1 - row["lambda_2"]) for row in rows]
        y = [row["distance"] / row["L"] for row in rows]
        axes.plot(
            x, y, color=COLOURS[k % len(COLOURS)], marker="os^Dv"[k % 5], ms=5, lw=1, label=topology
        )
    span = np.array([min(r["alpha"] / (1 - r["lambda_2"]) for r in found["rows"]),
                     max(r["alpha"] / (1 - r["lambda_2"]) for r in found["rows"])])  # fmt: skip
    axes.plot(span, span, color=INK, ls="--", lw=1.2, label="Proposition 1")
    _finish(
        axes, f"Consensus distance, {found['agents']} agents", "alpha / (1 - lambda_2)",
        "|X - 1 s| / L",
    )  # fmt: skip
    return figure


def _bias(found: common.Record) -> Any:
    figure, (axes,) = _figure()
    alpha = np.array([row["alpha"] for row in found["rows"]])
    for key, colour, marker, label in (
        ("mean", COLOURS[0], "o", "of the agents' mean"),
        ("agents", COLOURS[1], "s", "of the agents, root mean square"),
    ):
        values = [row[key] for row in found["rows"]]
        axes.plot(alpha, values, color=colour, marker=marker, ms=5, lw=1.2, label=label)
    last = found["rows"][-1]
    axes.plot(
        alpha,
        last["mean"] * alpha / alpha[-1],
        color=INK,
        ls="--",
        lw=1,
        label="proportional to alpha",
    )
    _finish(axes, "Where a fixed step ends", "alpha", "distance from the optimum")
    return figure


def _diminishing(found: common.Record) -> Any:
    figure, panels = _figure(2)
    for axes, noisy in zip(panels, (False, True), strict=True):
        for k, (name, curve) in enumerate(found["curves"].items()):
            if ("noise" in name) != noisy:
                continue
            colour = COLOURS[k % 2]
            axes.plot(curve["step"], curve["distance"], color=colour, lw=1.6, label=name)
            if "bound" in curve and not name.startswith("fixed"):
                axes.plot(
                    curve["step"], curve["bound"], color=INK, ls="--", lw=1, label="its bound"
                )
        title = "Minibatches of 8" if noisy else "Exact gradients"
        _finish(axes, title, "step", "distance of the mean from the optimum")
    return figure


def tables(record: common.Record) -> str:
    """The tables of docs/theory.md."""
    erratum = [
        [
            f"{row['topology']}, {row['mixing']}",
            f"{row['lambda_2']:.3f}",
            f"{row['lambda_n']:.3f}",
            row["condition (15)"]["text"],
            row["condition (14)"]["text"],
            row["Theorem 1 as printed"]["text"],
            row["Theorem 1 corrected"]["text"],
            _factor(row["Proposition 1 corrected"]["factor"]),
            _factor(row["Theorem 2 corrected"]["factor"]),
        ]
        for row in record["erratum"]["rows"]
    ]
    consensus = [
        [
            row["topology"],
            f"{row['alpha']:.3g}",
            f"{row['gap']:.4f}",
            f"{row['distance']:.3g}",
            f"{row['radius']:.3g}",
            f"{row['radius'] / row['distance']:.2f}",
        ]
        for row in record["consensus"]["rows"]
    ]
    bias = [
        [f"{row['alpha']:g}", f"{row['mean']:.3g}", f"{row['mean'] / row['alpha']:.3f}",
         f"{row['agents']:.3g}"]
        for row in record["bias"]["rows"]
    ]  # fmt: skip
    diminishing = [
        [name, f"{curve['step'][-1]}", f"{curve['distance'][-1]:.3g}", f"{curve['apart'][-1]:.3g}"]
        for name, curve in record["diminishing"]["curves"].items()
    ]
    return "\n\n".join(
        "\n".join(common.table(head, rows))
        for head, rows in (
            (["matrix", "lambda_2", "lambda_N", "(15)", "(14)", "Theorem 1 as printed",
              "corrected", "Prop. 1: bound/measured", "Theorem 2: bound/measured"], erratum),
            (["graph", "alpha", "gap", "distance", "radius", "radius/distance"], consensus),
            (["alpha", "mean to optimum", "divided by alpha", "agents to optimum"], bias),
            (["steps", "made", "mean to optimum", "agents apart"], diminishing),
        )
    )  # fmt: skip


def _factor(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "-"
