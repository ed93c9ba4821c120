"""How a command ends: what is said, once, and that no other rank waits for one that has left."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from mpicdsgd.common.errors import UserError

if TYPE_CHECKING:
    from mpi4py import MPI


def mistake(error: UserError) -> int:
    """Print ``error`` once; if only this rank has it, end the others too, with the same code."""
    if not started():
        print(f"mpicdsgd: {error}", file=sys.stderr)
        return 2
    from mpi4py import MPI

    from mpicdsgd.comm import shutdown

    if not shutdown.in_job() or error.raised_on_all_ranks:
        if shutdown.is_first() and (shutdown.in_job() or first()):
            print(f"mpicdsgd: {error}", file=sys.stderr)
        return 2
    print(f"mpicdsgd: rank {MPI.COMM_WORLD.rank}: {error}", file=sys.stderr)
    shutdown.abort(2)
    return 2


def started() -> bool:
    """Whether this process has started MPI."""
    if "mpicdsgd.comm.shutdown" not in sys.modules:
        return False
    from mpi4py import MPI

    return bool(MPI.Is_initialized())


_GOES_ON = "the same command goes on from the newest checkpoint"


def of_another(error: MPI.Exception) -> bool:
    """Whether the network may be the cause, and not what this rank has asked of MPI."""
    from mpi4py import MPI

    return error.Get_error_class() in (
        MPI.ERR_OTHER, MPI.ERR_INTERN, MPI.ERR_UNKNOWN, MPI.ERR_IN_STATUS, MPI.ERR_PENDING,
        MPI.ERR_PROC_FAILED, MPI.ERR_PROC_ABORTED, MPI.ERR_REVOKED,
    )  # fmt: skip


def waited_in_vain(why: str) -> int:
    """Another rank is away, or has failed: say so in one line, and end the job."""
    from mpi4py import MPI

    from mpicdsgd.comm import shutdown

    print(f"mpicdsgd: rank {MPI.COMM_WORLD.rank}: {why}; {_GOES_ON}", file=sys.stderr)
    time.sleep(shutdown.AFTER_YOU_S)
    shutdown.abort(1)
    os._exit(1)  # one rank alone; nothing is to be drained


def interrupted() -> int:
    """Say so in one line, and end the other ranks too."""
    message = f"mpicdsgd: interrupted; {_GOES_ON}"
    if not started():
        print("mpicdsgd: interrupted", file=sys.stderr)
        return 1
    from mpicdsgd.comm import shutdown

    if "mpicdsgd.runs.requeue_marker" in sys.modules:
        from mpicdsgd.runs import requeue_marker

        requeue_marker.withdraw_all()
    if not first():  # a terminal interrupts all ranks: the first one speaks for them
        time.sleep(shutdown.AFTER_YOU_S)
    print(message, file=sys.stderr)
    shutdown.abort(1)
    sys.stdout.flush()
    os._exit(1)  # one rank alone; nothing is to be drained


def first() -> bool:
    """Whether this process is rank 0, as far as the launcher says, before MPI is started."""
    names = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"
