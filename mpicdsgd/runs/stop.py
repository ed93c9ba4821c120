"""Stopping a run before its end so that the same command goes on from there.

USR1, TERM (see `signals`) or `run.max_seconds` on any rank make that agent ask; the exchange's
headers spread the step after which all stop, the same on all. They write a checkpoint unless that
step has one, and only when it is whole and the exchange is closed does the marker ``requeue.json``
say so. A step or more is made in every start, so a job that is sent back over and over comes to its
end.

    signal or clock ... ask -> (graph's diameter + 1 steps) -> checkpoint -> close -> marker -> 80

A fault goes before a stop: all agents raise it before the checkpoint, and the marker goes.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.algorithms.server.server import Server
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.agreement import collect
from mpicdsgd.common import signals
from mpicdsgd.common.files import reason
from mpicdsgd.common.run_folder import newest_generation
from mpicdsgd.runs.config import RunConfig
from mpicdsgd.runs.owner import Owner
from mpicdsgd.runs.requeue_marker import MARKER, Marker

log = logging.getLogger("mpicdsgd")

CODE = 80  # of all ranks: stopped with a checkpoint, requeue me
_RECENT = 16  # steps whose longest one counts
_FLOOR_S = 60.0  # the least margin, or ...
_FLOOR = 0.05  # ... this part of max_seconds, if that is less
_SAFETY = 2.0  # times the measured seconds: a file system shared with others is not steady
_NAMED = 8  # ranks in a message
_BYTES_PER_S = 1e8  # of all agents together, until a checkpoint's write has been measured


class Stop:
    """Whether this run is to stop before its end, and why. Local, but for `leave`.

    Args:
        config: with `max_seconds`, since the program began (0: no limit), and `resume`.
        server: the job's, if it has one: its rank may get a signal too.
        owner: of the run's folder, on the rank that has it: it may have been taken over.
        marker: of this start.
    """

    def __init__(
        self,
        agents: Agents,
        config: RunConfig,
        server: Server | None,
        owner: Owner | None,
        marker: Marker,
    ) -> None:
        self._agents, self._dir, self._server = agents, Path(config.dir), server
        self._owner, self._marker = owner, marker
        self._max_seconds, self._resumes = config.max_seconds, config.resume != "never"
        self._why = ""
        self._is_first = True
        self._step_s: deque[float] = deque(maxlen=_RECENT)
        self._longest_s = 0.0  # beside the steps
        self._looked: float | None = None

    def look(self, optimizer: AgentOptimizer, write_s: float) -> None:
        """Ask all agents to stop if somebody wants it of this one. Before every step.

        ``write_s``: how long the longest checkpoint took to be there, 0 if there was none.
        """
        now = time.monotonic()
        if self._looked is not None:
            self._step_s.append(now - self._looked)
        self._looked, is_first, self._is_first = now, self._is_first, False
        if self._why:
            return
        if signal := signals.received():
            self._why = signal.name.removeprefix("SIG")
        elif self._server is not None and self._server.signal:
            self._why = f"{self._server.signal} on rank {self._server.rank}, the server, told"
        elif self._owner is not None and self._owner.is_taken_over:
            self._why = "a newer run has taken over the folder"
        elif (
            self._max_seconds
            and now - signals.STARTED + self.margin_s(optimizer, write_s) >= self._max_seconds
        ):
            self._why = f"run.max_seconds = {self._max_seconds:g}"
            if is_first and self._agents.rank == 0:
                log.warning(
                    "run.max_seconds = %g leaves no time to train: this start took %.0f s until "
                    "its first step, and %.0f s are kept free for the stop and its checkpoint",
                    self._max_seconds,
                    now - signals.STARTED,
                    self.margin_s(optimizer, write_s),
                )
        if self._why:
            optimizer.request_stop()

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """A block that is no part of a step: an evaluation, a copy for a checkpoint."""
        start = time.monotonic()
        yield
        self._looked = None
        self._longest_s = max(self._longest_s, time.monotonic() - start)

    def margin_s(self, optimizer: AgentOptimizer, write_s: float) -> float:
        """How long before the limit to ask, in seconds.

        Twice what then comes at most, by what this start has measured: the steps until all agents
        know, an evaluation and a checkpoint, the longest of each. Before the first checkpoint its
        size and a slow disk stand for its time. Not less than 5 % of the limit or a minute, as
        what was fast so far need not be so the next time.
        """
        steps_s = optimizer.exchange.stops_within * max(self._step_s, default=0.0)
        arrays = len(optimizer.context.flats)
        size = 4 * optimizer.arena.size * arrays * self._agents.size
        expected_s = steps_s + self._longest_s + (write_s or size / _BYTES_PER_S)
        return max(_SAFETY * expected_s, min(_FLOOR_S, _FLOOR * self._max_seconds))

    def leave(self, step: int, saved_step: int | None, generation: int) -> int:
        """Say why, leave the marker if all is well; the exit code. Collective, at the very end.

        Args:
            saved_step: of the newest checkpoint.
        """
        agents = self._agents
        whys = collect(agents.comm, "stopping", self._why)
        code = 0
        if agents.rank == 0:
            code = self._mark(step, saved_step, generation, _told(whys))
            if code != CODE:
                self._marker.withdraw()
        return int(agents.comm.bcast(code))

    def _mark(self, step: int, saved_step: int | None, generation: int, why: str) -> int:
        if saved_step != step:
            kept = "there is none" if saved_step is None else f"that of step {saved_step} is kept"
            log.error(
                "stopped after step %d (%s), but its checkpoint could not be written: %s in %s",
                step, why, kept, self._dir,
            )  # fmt: skip
            return 1
        if not self._resumes:
            log.error(
                'stopped after step %d (%s), but with run.resume = "never" the next start would '
                "begin anew: nothing is to be sent back to the queue", step, why,
            )  # fmt: skip
            return 1
        try:
            taken_over = self._owner is not None and self._owner.is_taken_over
            if taken_over or newest_generation(self._dir) > generation:
                log.error(
                    "stopped after step %d (%s), but a newer run has taken over %s: nothing is to "
                    "be sent back to the queue", step, why, self._dir,
                )  # fmt: skip
                return 1
            self._marker.write(step=step, reason=why)
        except OSError as error:
            log.error("%s cannot be written: %s", self._dir / MARKER, reason(error))
        log.info(
            "stopped after step %d (%s): its checkpoint is in %s, and the same command goes on "
            "from there (exit code %d)", step, why, self._dir, CODE,
        )  # fmt: skip
        return CODE


def _told(whys: list[str]) -> str:
    """What the ranks say, each thing once, with the ranks that say it."""
    told = []
    for why in dict.fromkeys(filter(None, whys)):
        ranks = [str(rank) for rank, other in enumerate(whys) if other == why]
        more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
        told.append(f"{why} on rank{'s'[: len(ranks) > 1]} {', '.join(ranks[:_NAMED])}{more}")
    return "; ".join(told)
