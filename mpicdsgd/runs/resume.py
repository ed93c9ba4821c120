"""Finding a run's checkpoint and going on from it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mpicdsgd.algorithms.config import keeps_count
from mpicdsgd.checkpoints import reading
from mpicdsgd.checkpoints.elastic import origins
from mpicdsgd.checkpoints.snapshot import Snapshot
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.text import agents_in_words
from mpicdsgd.runs.config import Config, differences
from mpicdsgd.runs.epochs import Course
from mpicdsgd.runs.prepared import Start

log = logging.getLogger("mpicdsgd")


FORMAT = 1  # of a checkpoint's contents, raised when a restart needs other ones


def find_checkpoint(start: Start) -> None:
    """Find the checkpoint to go on from, and where in the epochs it is. Collective."""
    agents, config = start.agents, start.config

    def parts(before: int) -> list[tuple[int, float]]:
        row = origins(agents.mixing, before)[agents.rank]
        return [(agent, float(row[agent])) for agent in np.flatnonzero(row).tolist()]

    snapshot = reading.read_newest(
        start.dir,
        agents.comm,
        lambda shared: _expect(start, shared),
        parts if config.resume.elastic else None,
    )
    if snapshot is None:
        return
    with agents.agreement("resume.elastic"):
        if snapshot.agents != agents.size:
            _check_elastic(config, snapshot.agents, agents.size)
    go_on(start, snapshot)
    if agents.rank != 0:
        return
    for key in differences(snapshot.shared["config"], start.shared["config"]):
        log.warning("%s is not what it was before this checkpoint", key)
    if snapshot.agents != agents.size:
        _tell(start, snapshot.agents)
    elif snapshot.shared["Pi"] != start.shared["Pi"]:  # of a file, which may have changed
        log.warning("the mixing matrix is not what it was before this checkpoint")


def go_on(start: Start, snapshot: Snapshot) -> None:
    """Take over ``snapshot`` and its place in the epochs. Local."""
    start.snapshot = snapshot
    then = Course(0, int(snapshot.shared["steps_per_epoch"]), int(snapshot.shared.get("shift", 0)))
    start.course = start.course.going_on(then, snapshot.step)


def _expect(start: Start, shared: dict[str, Any]) -> None:
    """Raise a UserError if a checkpoint's ``shared`` is of another model or data. Local."""
    remedy = 'set run.dir to another folder, or run.resume = "never" to begin anew in this one'
    if shared.get("format") != FORMAT:
        raise UserError(
            f"the checkpoint in {start.dir} is of format {shared.get('format')}, this version "
            f"reads format {FORMAT}: {remedy}"
        )
    config, then = start.config, shared.get("config")

    def changed(section: str) -> str:
        if not isinstance(then, dict):
            return ""
        found = differences(then.get(section), start.shared["config"][section], f"{section}.")
        return "".join(f", {text}" for text in found)

    if shared.get("parameters") != start.shared["parameters"]:
        what = changed("model") or f", though it is {config.model.name} as before"
        raise UserError(f"the checkpoint in {start.dir} is of another model{what}: {remedy}")
    if (
        not config.resume.elastic
        and shared.get("steps_per_epoch") != start.shared["steps_per_epoch"]
    ):
        steps = f"{shared.get('steps_per_epoch')} steps, not {start.shared['steps_per_epoch']}"
        raise UserError(
            f"the checkpoint in {start.dir} has epochs of {steps}{changed('data')}: set "
            f"resume.elastic = true to go on all the same; else {remedy}"
        )
    optim = then.get("optim") if isinstance(then, dict) else None
    if not isinstance(optim, dict) or any(
        optim.get(k) != getattr(config.optim, k)
        for k in ("name", "nesterov", "asynchronous", "adagrad")
    ):
        raise UserError(
            f"the checkpoint in {start.dir} is of another algorithm than optim.name = "
            f'"{config.optim.name}": {remedy}'
        )


def _check_elastic(config: Config, before: int, now: int) -> None:
    """Raise a UserError for what cannot go on with another number of agents. Local."""
    change = f"the checkpoint in {config.run.dir} is of {before} agents, the job has {now}"
    if keeps_count(config.optim):
        raise UserError(
            f'{change}: optim.name = "{config.optim.name}" counts what its agents have sent each '
            f"other, and can go on with the same number only: start {before}"
        )
    if config.run.theory:
        raise UserError(
            f"{change}: run.theory = true records a run of one matrix: start {before}, or set it "
            "to false"
        )


def _tell(start: Start, before: int) -> None:
    n = start.agents.size
    first, last = min(n, before), max(n, before) - 1
    one = first == last
    who = f"agent {first}" if one else f"agents {first} to {last}"
    others = (
        f"{who} and {'its' if one else 'their'} momentum are left behind"
        if n < before
        else f"{who} begin{'s' * one} with the mix of {'its' if one else 'their'} neighbours' state"
    )
    mixing = start.agents.mixing
    log.info(
        "%s instead of %d on %s, mixing %s (spectral gap %.3g): %s, and the data are shared out "
        "anew",
        agents_in_words(n),
        before,
        mixing.graph.title,
        mixing.name,
        mixing.spectrum.gap,
        others,
    )
