"""Batch jobs on a real Slurm: whatever happens to one, its result is the undisturbed run's."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import SHORT_WAIT, SRUN, Batch, Cluster, last_step
from samerun import same_run

Whole = Callable[[int], Path]


def requeue(cluster: Cluster, run: str, *options: str, launcher: str = SRUN) -> Batch:
    """A job of jobs/requeue.sbatch on two nodes that has made some steps."""
    command = (*options, "jobs/requeue.sbatch", "r.toml", run)
    batch = cluster.submit("-N2", *command, pace_s=0.1, launcher=launcher)
    batch.until(lambda: last_step(cluster.work / run) > 0, "some steps")
    return batch


def came_back(cluster: Cluster, batch: Batch, whole: Whole, run: str, why: str) -> None:
    """It was sent back, for that reason, and then came to its end."""
    restarts = int(batch.wait()["Restarts"])
    log = batch.log()
    assert restarts >= 1
    assert (
        len(re.findall(rf"\({why} on ranks? [01, ]+\): its checkpoint is in {run}", log))
        == restarts
    )
    assert log.count("back to the queue: ") == log.count("going on from step") == restarts
    assert not (cluster.work / run / "requeue.json").exists()
    same_run(whole(2), cluster.work / run, 2)


# Free memory of every size, each piece followed by bytes that are not zero.
HOLES = """
import ctypes, os
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
holes = []
for size in [s for s in range(24, 1200, 16) for _ in range(64)]:
    holes.append(libc.malloc(size))
    ctypes.memset(libc.malloc(6000), 0x5A, 6000)
for hole in holes:
    libc.free(hole)
import mpicdsgd
from mpi4py import MPI
assert MPI.COMM_WORLD.allreduce(1) == 2
print(os.environ["MPIR_CVAR_CH4_NETMOD"])
"""


@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize("launcher", ["srun --mpi=pmi2", "mpirun"])
def test_a_run_over_nodes(
    cluster: Cluster, limited: Batch, whole: Whole, nodes: int, launcher: str
) -> None:
    run = f"{launcher.split()[0]}-{nodes}"
    command = ("jobs/train.sbatch", "r.toml", f"run.dir={run}")
    batch = cluster.submit(f"-N{nodes}", *command, launcher=launcher)
    about = batch.wait()
    assert about["NumNodes"] == str(nodes)
    assert ("MPICH uses its network ofi" in batch.log()) == launcher.startswith("srun")
    same_run(whole(nodes), cluster.work / run, nodes)


def test_memory_that_does_not_compress(cluster: Cluster) -> None:
    """ucx sends the memory behind its addresses, more than Slurm reads of a request."""
    srun = ("srun", "--mpi=pmi2", "-N2", "--ntasks-per-node=1")
    said = cluster.call(*srun, "timeout", "-s", "KILL", "30", "python", "-c", HOLES)
    assert sorted(said.split()) == ["ofi", "ofi"]


def test_ranks_that_do_not_find_each_other(cluster: Cluster) -> None:
    """Else each of them would train alone, into the same folder."""
    command = ("jobs/train.sbatch", "r.toml", "run.dir=lonely")
    batch = cluster.submit("-N2", *command, launcher="srun --mpi=none")
    about = batch.wait("FAILED")
    assert about["ExitCode"] == "2:0"
    said = [line for line in batch.log().splitlines() if line.startswith("mpicdsgd: ")]
    assert len(said) == 1
    assert "srun started 2 tasks (SLURM_NTASKS=2), but no two of them found each other" in said[0]
    assert "(MPICH): use srun --mpi=pmi2 (srun --mpi=list shows" in said[0]
    assert not (cluster.work / "lonely").exists()


def test_the_time_limit(cluster: Cluster, limited: Batch, whole: Whole) -> None:
    """USR1 comes before it, in every start, until there is time enough."""
    limited.until(lambda: limited.about()["Restarts"] != "0", "sent back")
    # Where nothing else runs, the second start may be at its end already.
    more = ("scontrol", "update", f"JobId={limited.number}", "TimeLimit=10")
    cluster.call(*more, check=False)
    came_back(cluster, limited, whole, "limited", "USR1")


def test_a_signal_by_hand(cluster: Cluster, whole: Whole) -> None:
    """To all processes of the ranks' step; the batch script hears nothing of it."""
    batch = requeue(cluster, "hand")
    cluster.call("scancel", "--signal=USR1", batch.number)
    came_back(cluster, batch, whole, "hand", "USR1")


def test_preemption(cluster: Cluster, whole: Whole) -> None:
    batch = requeue(cluster, "preempted", "-wn3,n4")
    urgent = cluster.submit("-phigh", "-wn3,n4", "-N2", "--exclusive", "--wrap", "sleep 1")
    urgent.wait()
    came_back(cluster, batch, whole, "preempted", "TERM")


def test_a_cancelled_job_stays_cancelled(cluster: Cluster) -> None:
    """Its ranks stop in order all the same, so it can be submitted again."""
    batch = requeue(cluster, "cancelled")
    cluster.call("scancel", batch.number)
    batch.wait("CANCELLED")
    assert "stopped after step" in batch.log()
    assert "ended by Slurm\n" in batch.log()
    assert (cluster.work / "cancelled" / "requeue.json").exists()
    time.sleep(3)
    assert batch.state == "CANCELLED", batch.log()


def processes_on(node: str, batch: Batch) -> list[int]:
    """Of the job on that node: its ranks, and the stepds that are their parents."""
    found: dict[int, None] = {}
    there = f"SLURMD_NODENAME={node}", f"SLURM_JOB_ID={batch.number}"
    for entry in filter(str.isdigit, os.listdir("/proc")):
        process = Path("/proc") / entry
        try:
            words = (process / "environ").read_bytes().split(b"\0")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            above = Path(f"/proc/{parent}/cmdline").read_bytes()
        except OSError:
            continue
        if all(word.encode() in words for word in there):
            found[int(entry)] = None
            if above.startswith(f"slurmstepd: [{batch.number}.".encode()):
                found[parent] = None
    return list(found)


def is_rank(process: int, rank: int) -> bool:
    folder = Path(f"/proc/{process}")
    words = (folder / "environ").read_bytes().split(b"\0")
    is_writer = b"writer_process" in (folder / "cmdline").read_bytes()
    return f"PMI_RANK={rank}".encode() in words and not is_writer


def test_a_node_dies(cluster: Cluster, whole: Whole) -> None:
    """Its slurmd, its stepds and its ranks: what a power failure leaves. Not the script's node.

    Whoever notices first sends the job back: the other rank, whose MPI fails, or Slurm.
    """
    batch = requeue(cluster, "dead")
    first, second = cluster.call("scontrol", "show", "hostnames", batch.about()["NodeList"]).split()
    assert batch.about()["BatchHost"] == first
    slurmd = int((cluster.folder / "log" / f"{second}.pid").read_text())
    victims = [slurmd, *processes_on(second, batch)]
    assert len(victims) == 4, "slurmd, stepd, a rank and its writer of checkpoints"
    for process in victims:
        os.kill(process, signal.SIGKILL)
    try:
        about = batch.wait()
    finally:
        cluster.call("slurmd", "-N", second)
    assert about["Restarts"] == "1", batch.log()
    nodes = cluster.call("scontrol", "show", "hostnames", about["NodeList"]).split()
    assert second not in nodes
    assert "stopped after step" not in batch.log()
    assert "going on from step" in batch.log()
    same_run(whole(2), cluster.work / "dead", 2)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_rank_is_killed(cluster: Cluster, whole: Whole, nodes: int) -> None:
    """As for want of memory: the job goes on from its last checkpoint.

    On one node its ranks would meet in the file that those of the first start have left.
    """
    run = f"killed-{nodes}"
    options = (f"-N{nodes}", f"--ntasks-per-node={2 // nodes}")
    batch = requeue(cluster, run, *options, launcher=SHORT_WAIT)
    node = cluster.call("scontrol", "show", "hostnames", batch.about()["NodeList"]).split()[-1]
    victims = [p for p in processes_on(node, batch) if is_rank(p, 1)]
    assert len(victims) == 1
    os.kill(victims[0], signal.SIGKILL)
    about = batch.wait()
    log = batch.log()
    assert about["Restarts"] == "1", log
    assert log.count("back to the queue: ") == log.count("going on from step") == 1
    same_run(whole(2), cluster.work / run, 2)


def test_a_sweep(cluster: Cluster) -> None:
    (cluster.work / "settings").write_text("run.seed=0\nrun.seed=1 optim.lr=0.05\nrun.seed=2\n")
    small = ("run.epochs=2", "run.evaluate_every=never")
    command = ("jobs/sweep.sbatch", "r.toml", "settings", "sweep", *small)
    array = cluster.submit("--array=1-4%2", "-N1", *command)
    waiting = ("squeue", "-h", "-j", array.number)
    array.until(lambda: not cluster.call(*waiting, check=False), "its end")
    missing = (cluster.work / f"slurm-{array.number}_4.out").read_text()
    assert missing == "settings has no line 4\n"
    assert not (cluster.work / "sweep/4").exists()
    train = ("mpicdsgd", "train", "r.toml", "run.dir=single", "run.seed=1", "optim.lr=0.05")
    cluster.call(*train, *small)
    same_run(cluster.work / "single", cluster.work / "sweep/2", 1)
    for k in (1, 3):
        line = json.loads((cluster.work / f"sweep/{k}/metrics.jsonl").read_text())
        assert line["step"] == 80
        assert f"\nseed = {k - 1}\n" in (cluster.work / f"sweep/{k}/config.g0001.toml").read_text()


@pytest.mark.parametrize("launcher", ["srun --mpi=pmi2", "mpirun"])
def test_scaling(cluster: Cluster, launcher: str) -> None:
    """Of its two nodes it uses one, then both."""
    out = f"scaling-{launcher.split()[0]}.json"
    small = ("--quick", "--model", "mlp", "--transports", "neighbor", "--out", out)
    command = ("--ntasks-per-node=1", "jobs/scaling.sbatch", "1 2", *small)
    batch = cluster.submit("-N2", *command, launcher=launcher)
    batch.wait()
    log = batch.log()
    assert "N=1 measured\nN=2 measured\n" in log
    record = json.loads((cluster.work / out).read_text())
    agents = {row["agents"] for row in record["results"].values()}
    assert agents == {1, 2}
    assert {row["agents"] for row in record["memory"].values()} == {1, 2}


def test_submit(cluster: Cluster, whole: Whole) -> None:
    """The script lies in the run's folder, beside its log."""
    site = f"--site={cluster.site()}"
    asked = ("--nodes=2", "--time=10", "--sbatch=--partition=high", site)
    said = cluster.call("mpicdsgd", "submit", "r.toml", *asked, "run.dir=submitted")
    script = (cluster.work / "submitted" / "job.sbatch").read_text()
    number = said.split()[-1]
    assert said == f"{script}Submitted batch job {number}\n"
    about = Batch(cluster, number).wait()
    assert (about["NumNodes"], about["Partition"]) == ("2", "high")
    assert "2 agents on ring" in (cluster.work / f"submitted/slurm-{number}.out").read_text()
    same_run(whole(2), cluster.work / "submitted", 2)
