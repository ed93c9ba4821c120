"""``mpicdsgd submit``: a batch script for a run, written into the run's folder and given to Slurm.

What can be wrong is found here, not after hours in the queue: config, overrides, topology and
number of ranks. The script does what jobs/requeue.sbatch does.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.files import reason, write_whole
from mpicdsgd.common.text import printable


@dataclass(frozen=True)
class Request:
    """What is asked of Slurm.

    Attributes:
        time: as Slurm takes it: minutes, H:M:S, D-H, ...
        ranks_per_node, gpus_per_node: 0 GPUs: none are asked for.
        stop_before_s: how long before the limit the run is told to stop.
        site: a file like jobs/site.sh; None: this Python, and srun with what suits its MPI library.
        options: more options of sbatch, such as "--partition=gpu".
    """

    nodes: int
    time: str
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    stop_before_s: int = 120
    site: Path | None = None
    options: tuple[str, ...] = ()


# After the values of the site: $1 the config, $2 the run's folder, then overrides.
BODY = """\
config=$1 dir=$2 && shift 2
mine() { grep -Eqs "\\"job\\": \\"(${SLURM_JOB_ID-})?\\"" "$dir/requeue.json"; }
if mine; then rm -f "$dir/requeue.json"; fi # of an earlier start: one may fail before it trains
trap 'kill -USR1 "${pid-}" 2>/dev/null || true' TERM # once requeued, it finds nobody
trap 'kill -USR1 "${pid-}" 2>/dev/null || true
    ( # what hangs till the limit would end as a timeout, and Slurm sends none back
        end=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s)
        sleep $((end - $(date +%s) - 10)) && kill -KILL "$pid"
    ) 2>/dev/null &' USR1
"${launcher[@]}" mpicdsgd train "$config" "run.dir=$dir" "$@" &
pid=$! code=0
while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done # a trap ends the wait, not the run
wait "$pid" || code=$?
if ! mine && [ "$code" != 0 ]; then echo "not sent back to the queue: no $dir/requeue.json"; fi
mine || exit "$code"
for _ in {1..10}; do # Slurm's controller may be away
    state=$(squeue -h -j "$SLURM_JOB_ID" -o '%T %r') || state=
    if [ "$state" = "COMPLETING None" ]; then echo "ended by Slurm"; break; fi # not by TimeLimit
    echo "back to the queue: $(cat "$dir/requeue.json")"
    if [ -n "$state" ] && scontrol requeue "$SLURM_JOB_ID"; then sleep 60; fi # Slurm ends it
    sleep 30
done
exit "$code"
"""


def script(config: Path, overrides: Sequence[str], request: Request) -> tuple[Path, str]:
    """The run's folder and the batch script. Local; loads MPI and torch, starts neither.

    Raises:
        UserError: for anything wrong with config, overrides, request, or the number of agents.
    """
    run_dir = Path(_checked(config, overrides, request))
    if not re.fullmatch(r"[^\s'\"\\%]+", str(run_dir)):
        raise UserError(
            f'run.dir = "{printable(str(run_dir))}" cannot stand in a line of #SBATCH: leave out '
            "spaces, quotes, backslashes and percent signs"
        )
    options = [
        f"--job-name={re.sub(r'[^A-Za-z0-9_.-]', '-', run_dir.name) or 'mpicdsgd'}",
        f"--nodes={request.nodes}",
        f"--ntasks-per-node={request.ranks_per_node}",
        *([f"--gpus-per-node={request.gpus_per_node}"] if request.gpus_per_node else []),
        f"--time={request.time}",
        "--requeue",
        "--open-mode=append",
        f"--output={run_dir}/slurm-%j.out",
        f"--signal=B:USR1@{request.stop_before_s}",
        *request.options,
    ]
    if request.site is not None:
        site = f"source {shlex.quote(str(request.site))} || exit 1"
    else:
        folder = shlex.quote(str(Path(sys.executable).parent))
        site = f"PATH={folder}:$PATH\nlauncher=(srun --mpi={_plugin()} --wait=60)"
    words = shlex.join([str(config), str(run_dir), *overrides])
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {option}" for option in options),
        site,
        "set -euo pipefail",  # not before: the functions of environment modules bear no -u
        f"set -- {words}",
    ]
    return run_dir, "\n".join(lines) + "\n" + BODY


def submit(run_dir: Path, text: str, site: Path | None) -> str:
    """Write the script into the run's folder and give it to Slurm; what sbatch says.

    ``site`` is sourced before sbatch is called, for the SBATCH_* that it may set.

    Raises:
        UserError: there is no sbatch, it refuses, or the folder cannot be written.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch in PATH: submit on a login node of a Slurm cluster, or use "
            "--dry-run to see the script"
        )
    path = run_dir / "job.sbatch"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({reason(error)}): "
            "set run.dir to a folder that you may write"
        ) from None
    command = ["sbatch", str(path)]
    if site is not None:
        command = ["bash", "-c", 'source "$0" && exec sbatch "$1"', str(site), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"sbatch refused {path}: {printable(said)[:500]}")
    return done.stdout.strip()


def seconds(time: str) -> int:
    """A time limit as Slurm takes it, in seconds.

    Raises:
        UserError: it is none, or 0.
    """
    found = re.fullmatch(
        r"(?:([0-9]{1,4})-)?([0-9]{1,7})(?::([0-9]{1,2}))?(?::([0-9]{1,2}))?", time
    )
    if found is None:
        total = 0
    else:
        days, *rest = (int(part) if part else None for part in found.groups())
        one, two, three = rest
        assert one is not None
        if days is not None:  # D-H[:M[:S]]
            hours, minutes, secs = one, two or 0, three or 0
        elif three is not None:  # H:M:S
            hours, minutes, secs = one, two or 0, three
        else:  # M[:S]
            hours, minutes, secs = 0, one, two or 0
        total = (((days or 0) * 24 + hours) * 60 + minutes) * 60 + secs
    if total == 0:
        raise UserError(
            f'--time must be like "90" (minutes), "2:00:00" or "1-12:00:00" (a day and a half), '
            f'got "{printable(time)}"'
        )
    return total


def _checked(config: Path, overrides: Sequence[str], request: Request) -> str:
    """The run's folder, if all is well."""
    limit_s = seconds(request.time)
    for name in ("nodes", "ranks_per_node", "stop_before_s"):
        if getattr(request, name) < 1:
            option = name.removesuffix("_s").replace("_", "-")
            raise UserError(f"--{option} must be at least 1, got {getattr(request, name)}")
    if request.gpus_per_node < 0:
        raise UserError(f"--gpus-per-node must be at least 0, got {request.gpus_per_node}")
    if limit_s <= request.stop_before_s:
        raise UserError(
            f"--time {request.time} is not more than the {request.stop_before_s} s before the "
            "limit at which the run is told to stop: give more --time or less --stop-before"
        )
    if request.site is not None and not request.site.is_file():
        raise UserError(f"there is no file {printable(str(request.site))}: see jobs/site.sh")
    import mpi4py

    mpi4py.rc.initialize = False
    from mpicdsgd.algorithms.config import needs_server
    from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
    from mpicdsgd.runs.config import check, load_config

    filled = load_config(config, overrides)
    check(filled)
    if filled.run.resume == "never":
        raise UserError(
            'run.resume = "never" would begin the run anew whenever the job goes on: leave it out, '
            "and set run.dir to a folder of its own"
        )
    agents = request.nodes * request.ranks_per_node - needs_server(filled.optim)
    if agents < 1:
        raise UserError("no rank is left for agents, as the server takes one: start more")
    mixing_from_spec(filled.agents.mixing, graph_from_spec(filled.agents.topology, agents))
    return filled.run.dir


def _plugin() -> str:
    from mpi4py import MPI

    from mpicdsgd.cli.launch import fitting

    return fitting(MPI.Get_library_version())[1]


def default_site() -> Path | None:
    """``MPICDSGD_SITE``, else jobs/site.sh where there is one."""
    if named := os.environ.get("MPICDSGD_SITE"):
        return Path(named)
    return Path("jobs/site.sh") if Path("jobs/site.sh").is_file() else None
