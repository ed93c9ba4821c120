"""``RUN_DIR/requeue.json``: if this job ends now, it is to go back to the queue. No MPI here.

A job rarely has the time to say so when it ends: a rank is killed for memory, and with a node that
dies the others' MPI fails long before Slurm notices. So a start leaves the marker as it begins to
train; a stop overwrites it with its reason. Taken away again it is at the run's end, and where the
next start would meet the same mistake. A start that is as far back as the two before it leaves none
until it has written a checkpoint: else a fault that comes at the same step would come for ever.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import weakref
from pathlib import Path
from typing import Any

from mpicdsgd.errors import UserError
from mpicdsgd.runfolder import reason, write_whole

log = logging.getLogger("mpicdsgd")

MARKER = "requeue.json"
STARTS = 3  # from one checkpoint, at most, that send the job back without another one
_UNTOLD = "ended before it could say why; goes on from the newest checkpoint"


class Marker:
    """The marker of one start. Local, as all here is.

    Args:
        step, from_generation: of the checkpoint that the start goes on from, None and 0 if there is
            none.
        leaves: whether this rank leaves it: one does, if the next start would go on at all.
    """

    def __init__(
        self,
        run_dir: Path,
        generation: int,
        step: int | None,
        from_generation: int,
        leaves: bool,
    ) -> None:
        self._path = Path(run_dir).absolute() / MARKER
        self._whose = {"generation": generation, "job": os.environ.get("SLURM_JOB_ID", "")}
        self._step, self._is_due = step, leaves
        self._in_vain = generation - from_generation > STARTS
        _mine.add(self)

    def keep(self, step: int | None) -> None:
        """Leave it where another start is worth its while. As training begins, and at every step.

        ``step``: of the newest checkpoint.
        """
        if not self._is_due or (self._in_vain and step == self._step):
            return
        self._is_due = False
        try:
            self.write(reason=_UNTOLD)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, reason(error))

    def write(self, **about: Any) -> None:
        """Write it, with the generation and the Slurm job it is about.

        Raises:
            OSError: it cannot be written.
        """
        write_whole(self._path, (json.dumps({**self._whose, **about}) + "\n").encode())

    def withdraw(self) -> None:
        """Take it away if it is there, and this start's; by any rank."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._path.read_text())
            if isinstance(found, dict) and {**found, **self._whose} == found:
                self._path.unlink()


_mine: weakref.WeakSet[Marker] = weakref.WeakSet()


def withdraw_all() -> None:
    """Take away what this process's runs have left: somebody wants the job to end."""
    for held in list(_mine):
        held.withdraw()


def remove_marker(run_dir: Path) -> None:
    """Have no marker in the run's folder: a run has begun, or ended for good. Local.

    Raises:
        UserError: it cannot be removed, and a job would be sent back to the queue for ever.
    """
    try:
        (run_dir / MARKER).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{run_dir / MARKER} cannot be removed ({reason(error)}): remove it by hand"
        ) from None
