"""What is said of an evaluation and of a whole run."""

from __future__ import annotations

import math
from typing import Any

from mpicdsgd.common.text import agents_in_words


def evaluation(line: dict[str, Any], total_steps: int) -> str:
    """A line of metrics in one line of text."""
    test, average = line["test_accuracy"], line["averaged_model"]
    spread = (
        f"(std {line['test_loss']['std']:.4f}, averaged model {average['test_loss']:.4f}"
        f"{_centre(line, 'test_loss')})"
        if math.isnan(test["mean"])
        else f"test accuracy {test['mean']:.4f} "
        f"(std {test['std']:.4f}, averaged model {average['test_accuracy']:.4f}"
        f"{_centre(line, 'test_accuracy')})"
    )
    return (
        f"epoch {line['epoch']:g}  step {line['step']}/{total_steps}  "
        f"train loss {line['train_loss']['mean']:.4f}  test loss "
        f"{line['test_loss']['mean']:.4f}  {spread}  "
        f"consensus distance {line['consensus']['max']:.2e}  {line['time_s']:.0f} s"
    )


def reached(line: dict[str, Any]) -> str:
    """Mean test accuracy of a line of metrics, or the loss where a task has no accuracy."""
    accuracy = line["test_accuracy"]["mean"]
    if math.isnan(accuracy):
        return f"test loss {line['test_loss']['mean']:.4f}"
    return f"test accuracy {accuracy:.4f}"


def summary(line: dict[str, Any], where: str, run_dir: str) -> str:
    """What a run has come to, in a sentence; ``where``: on what the agents were."""
    test, name, key = line["test_accuracy"], "accuracy", "test_accuracy"
    if math.isnan(test["mean"]):
        test, name, key = line["test_loss"], "loss", "test_loss"
    return (
        f"{agents_in_words(len(test['agents']))}{where}: mean test {name} {test['mean']:.4f} "
        f"(lowest {min(test['agents']):.4f}, highest {max(test['agents']):.4f}), averaged model "
        f"{line['averaged_model'][key]:.4f}{_centre(line, key)}, "
        f"consensus distance {line['consensus']['max']:.2e}, "
        f"{line['time_s']:.0f} s; everything is in {run_dir}"
    )


def _centre(line: dict[str, Any], key: str) -> str:
    """Of the model that an algorithm with a centre trains."""
    return f", centre {line['centre'][key]:.4f}" if "centre" in line else ""
