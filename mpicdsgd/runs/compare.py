"""What several runs reached and what it took, in one table. No MPI here."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpicdsgd.common.errors import UserError
from mpicdsgd.runs import metrics_file

log = logging.getLogger("mpicdsgd")


def compare(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """The last line of every run's metrics, as a row of the table.

    Returns:
        Of each run its name, agents, epochs; test loss: mean over agents; test accuracy: mean and
        lowest over agents, of the averaged model, of the centre (None where there is none, and all
        four in a task without classes); greatest consensus distance; seconds; bytes that an agent
        sent, the mean.

    A run without metrics is left out, which the log says.

    Raises:
        UserError: none has metrics.
    """
    rows = []
    missing: list[UserError] = []
    for run in runs:
        try:
            lines = metrics_file.read(run)
            if not lines:
                raise UserError(f"{run} has no line of metrics yet: a run has one at its end")
        except UserError as error:
            missing.append(error)
            continue
        last = lines[-1]
        test = last["test_accuracy"]
        rows.append(
            {
                "run": run.name,
                "agents": len(test["agents"]),
                "epochs": last["epoch"],
                "loss": last["test_loss"]["mean"],
                "mean": _accuracy(test["mean"]),
                "lowest": _accuracy(min(test["agents"])),
                "averaged": _accuracy(last["averaged_model"]["test_accuracy"]),
                "centre": _accuracy(last["centre"]["test_accuracy"]) if "centre" in last else None,
                "consensus": last["consensus"]["max"],
                "seconds": last["time_s"],
                "bytes_sent": last["bytes_sent"],
            }
        )
    if missing and not rows:
        raise missing[0]
    for one in missing:
        log.warning("left out: %s", one)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """``rows`` of `compare` as text, a line each."""
    width = max(len(row["run"]) for row in rows)
    lines = [
        f"{'':{width}}                     test   test accuracy                      consensus",
        f"{'run':{width}}  agents epochs      loss     mean  lowest  average centre   distance"
        "  seconds   MB sent per agent",
    ]
    for row in rows:
        accuracies = [row[key] for key in ("mean", "lowest", "averaged", "centre")]
        shown = "  ".join("     -" if a is None else f"{a:.4f}" for a in accuracies)
        lines.append(
            f"{row['run']:{width}}  {row['agents']:6} {row['epochs']:6g} {row['loss']:9.4g}   "
            f"{shown}   {row['consensus']:.2e} {row['seconds']:8.1f}   "
            f"{row['bytes_sent'] / 1e6:9.1f}"
        )
    return "\n".join(lines)


def _accuracy(value: float) -> float | None:
    return None if math.isnan(value) else value
