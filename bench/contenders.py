"""What the benches of host jobs share: a job for each number of ranks, and contenders in turn.

Every rank has one thread. Ranks may share cores, so nothing here spins while it waits: the core
would be missing to who is waited for.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.distributed as dist

import mpicdsgd
from mpicdsgd.kernels import native

# Gloo moves data by threads of its own. Here it goes over the loopback, without a host's name.
STORE = "127.0.0.1"
INTERFACE = "lo"


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Contender:
    """A way to make a step.

    Attributes:
        rest: returns when nothing of its steps is under way, so that none is in another's time.
    """

    step: Callable[[], object]
    rest: Callable[[], object] = nothing
    close: Callable[[], object] = nothing


@dataclass
class Times:
    """Seconds per step in every round, by contender.

    Attributes:
        wall: of the slowest rank.
        cpu: the mean over the ranks, of all their threads; ``system``: what of it the kernel took.
    """

    wall: common.Seconds
    cpu: common.Seconds
    system: common.Seconds


# Jobs


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """What the benches of host jobs take; see `run`."""
    parser.add_argument("--ranks", default="2,4", help="where this is no MPI job; default: 2,4")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)  # a job's record, for `run`
    parser.set_defaults(emulate=False, name=name)


def run(args: argparse.Namespace, measure: Callable[[], common.Record]) -> int:
    """Measure in this job or, outside one, in a job for each of ``--ranks``; print and write.

    Args:
        measure: see `collect`.
    """
    whole = collect(args, measure, args.ranks)
    if whole is None:
        return 0
    print(f"{whole['cpu']}, {whole['cores']} cores, {whole['kernel']['isa']}, one thread a rank")
    common.print_times(whole["results"], _cpu_text)
    for name, why in whole["skipped"].items():
        print(f"skipped: {name}: {why}")
    common.finish(args, whole)
    return 0


def collect(
    args: argparse.Namespace,
    measure: Callable[[], common.Record],
    ranks: str,
    launcher: Callable[[int], list[str]] = common.mpiexec,
) -> common.Record | None:
    """The record of this job or, outside one, of a job on each number of ``ranks``, as one.

    None where that is another's to print: on ranks but the first, and where ``--part`` has it.

    Args:
        measure: collective; its record is rank 0's. `provenance` is put before it.
        ranks: as in "2,4".
        launcher: the command that starts what follows it on so many.
    """
    if not common.in_job():
        parts = [_in_job(launcher(int(n))) for n in ranks.split(",")]
    else:
        record = _measured(measure)
        if record is None:
            return None
        if args.part is not None:
            common.write(record, args.part)
            return None
        parts = [record]
    whole = parts[0] | {"ranks": [part["ranks"] for part in parts]}
    for name in {"skipped", "results", "losses"} & whole.keys():
        whole[name] = {key: value for part in parts for key, value in part[name].items()}
    whole["checks"] = [check for part in parts for check in part["checks"]]
    return whole


def _in_job(launcher: Sequence[str]) -> common.Record:
    """The record of this very command as a job."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "part.json")
        command = [*launcher, sys.executable, *sys.argv, "--part", str(part)]
        code = subprocess.run(command, env=environment, check=False).returncode
        if code or not part.exists():
            sys.exit(code or 1)
        return json.loads(part.read_text())


def _measured(measure: Callable[[], common.Record]) -> common.Record | None:
    """Rank 0's record, None elsewhere. Collective over COMM_WORLD."""
    from mpi4py import MPI

    torch.set_num_threads(1)
    logging.getLogger("mpicdsgd").setLevel(logging.ERROR)  # what graphs remark is no matter here
    try:
        record = measure()
    except mpicdsgd.UserError as error:  # on all ranks alike
        if MPI.COMM_WORLD.rank == 0:
            print(error, file=sys.stderr)
        sys.exit(2)
    return provenance() | record if MPI.COMM_WORLD.rank == 0 else None


def provenance() -> common.Record:
    """`common.provenance` with the MPI library, in a job."""
    from mpi4py import MPI

    record = common.provenance()
    mpi = MPI.Get_library_version().split("\n")[0].strip("\0 ")
    record["versions"] |= {"mpicdsgd": mpicdsgd.__version__, "mpi": mpi}
    return record | {"kernel": {"backend": native.backend, "isa": native.isa}, "threads": 1}


def _cpu_text(row: common.Record) -> str:
    return f"  {row['cpu_s'] * 1e3:9.3f} ms of CPU" if "cpu_s" in row else ""


def open_gloo(comm: Any, interface: str = INTERFACE, address: str = STORE) -> None:
    """torch.distributed by gloo between the job's ranks, its store on rank 0. Collective."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    # The first store finds a free port by itself.
    store = None
    if comm.rank == 0:
        store = dist.TCPStore(address, 0, comm.size, True, wait_for_workers=False)
    port = comm.bcast(store.port if store else 0)
    store = store or dist.TCPStore(address, port, comm.size, False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)


def close_gloo(comm: Any) -> None:
    """Collective."""
    dist.destroy_process_group()
    comm.Barrier()  # the store is rank 0's


# Waiting and timing


def wait(request: Any) -> None:
    """Complete an MPI request, giving the core away meanwhile."""
    while not request.Test():
        os.sched_yield()


def wait_all(requests: Sequence[Any]) -> None:
    from mpi4py import MPI

    while not MPI.Request.Testall(requests):
        os.sched_yield()


def gather(comm: Any, values: Sequence[float]) -> np.ndarray:
    """All ranks' values, a row each. Collective; who comes early sleeps."""
    mine = np.array(values)
    rows = np.empty((comm.size, mine.size))
    request = comm.Iallgather(mine, rows)
    while not request.Test():
        time.sleep(1e-4)
    return rows


def block(comm: Any, contender: Contender, steps: int) -> tuple[float, float, float]:
    """Wall, CPU and system seconds per step of ``steps`` of them; see `Times`. Collective.

    One more before them leaves an exchange under way, as each of them does.
    """
    wait(comm.Ibarrier())
    contender.step()
    system_s = resource.getrusage(resource.RUSAGE_SELF).ru_stime
    cpu_s, start = time.process_time(), time.perf_counter()
    for _ in range(steps):
        contender.step()
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_s
    system_s = resource.getrusage(resource.RUSAGE_SELF).ru_stime - system_s
    contender.rest()
    rows = gather(comm, [wall_s, cpu_s, system_s]) / steps
    return float(rows[:, 0].max()), float(rows[:, 1].mean()), float(rows[:, 2].mean())


def take_turns(comm: Any, contenders: dict[str, Contender], rounds: int, steps: int) -> Times:
    """Time all contenders in every round, after one that warms up. Collective."""
    times = Times({}, {}, {})
    for round_ in range(rounds + 1):
        for name, contender in contenders.items():
            found = block(comm, contender, steps)
            if round_ > 0:
                kinds = (times.wall, times.cpu, times.system)
                for kind, seconds in zip(kinds, found, strict=True):
                    kind.setdefault(name, []).append(seconds)
    return times


# Ours


def agents_on(topology: str) -> mpicdsgd.Agents:
    """The job's agents, on the CPU; "one-peer" changes by turns. Collective over COMM_WORLD."""
    from mpi4py import MPI

    if topology == "one-peer":
        mixing = mpicdsgd.one_peer_exponential(MPI.COMM_WORLD.size)
        return mpicdsgd.Agents(MPI.COMM_WORLD, mixing, device="cpu")
    graph = mpicdsgd.graph_from_spec(topology, MPI.COMM_WORLD.size)
    return mpicdsgd.Agents(MPI.COMM_WORLD, mpicdsgd.metropolis(graph), device="cpu")


def at_rest(optimizer: Any) -> None:
    """Return when what the last step sent has arrived, here and from here."""
    while not optimizer.exchange.progress():  # `wait` would take it
        time.sleep(1e-4)
