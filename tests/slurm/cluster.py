"""A Slurm that the tests have for themselves, and what they ask it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from costs import busy

import mpicdsgd

HERE = Path(__file__).parent
ROOT = Path(mpicdsgd.__file__).parent.parent
_OUTER = ("SLURM_", "SBATCH_", "PMI_", "PMIX_", "OMPI_", "HYDRA_", "MPI_LOCAL")

CONFIG = """
[run]
epochs = 15
evaluate_every = "50 steps"
checkpoint_every = "40 steps"
[agents]
topology = "ring"
[model]
name = "paced:model"
loss = "paced:loss"
buffers = "mixed"
[data]
name = "paced:data"
batch_size = 36
[optim]
lr = 0.02
schedule = "cosine"
"""  # 300 steps on two agents, 150 on four


SRUN = "srun --mpi=pmi2"
SHORT_WAIT = "srun --mpi=pmi2 --wait=5"  # for the others, once a rank has died


class Cluster:
    """Slurm as up.sh started it, and a checkout to submit from: ``work``, with jobs/ and bench/.

    Args:
        folder: given to up.sh.
        work: where jobs run, with r.toml, jobs/ and bench/.
    """

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.work = folder, work
        for folder_name in ("jobs", "bench"):
            (work / folder_name).symlink_to(ROOT / folder_name)
        (work / "r.toml").write_text(CONFIG)
        for launcher in (SRUN, SHORT_WAIT, "srun --mpi=none", "mpirun"):
            lines = [f"launcher=({launcher})", f'PATH="{Path(sys.executable).parent}:$PATH"']
            self.site(launcher).write_text("# shellcheck shell=bash\n" + "\n".join(lines) + "\n")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(_OUTER)}
        self.environment.update(
            SLURM_CONF=str(folder / "slurm.conf"),
            PYTHONPATH=os.pathsep.join([str(ROOT), str(HERE.parent), str(HERE)]),
            OMP_NUM_THREADS="1",
            PYTHONUNBUFFERED="1",
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        )

    def site(self, launcher: str = SRUN) -> Path:
        return self.work / f"site-{launcher.replace(' ', '')}.sh"

    def call(self, *command: str, check: bool = True, **environment: str) -> str:
        """A command's stdout, in ``work``."""
        done = subprocess.run(
            command, cwd=self.work, env={**self.environment, **environment},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def submit(self, *arguments: str, launcher: str = SRUN, pace_s: float = 0.0) -> Batch:
        """``sbatch arguments``."""
        environment = {"MPICDSGD_SITE": str(self.site(launcher)), "PACE_S": str(pace_s)}
        said = self.call("sbatch", *arguments, **environment)
        return Batch(self, re.fullmatch(r"Submitted batch job (\d+)\n", said)[1])  # type: ignore[index]


class Batch:
    """A submitted job."""

    def __init__(self, cluster: Cluster, number: str) -> None:
        self._cluster, self.number = cluster, number

    def about(self) -> dict[str, str]:
        """What scontrol knows of it."""
        text = self._cluster.call("scontrol", "-o", "show", "job", self.number)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    @property
    def state(self) -> str:
        return self.about()["JobState"]

    def log(self) -> str:
        path = self._cluster.work / f"slurm-{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, holds: Callable[[], Any], what: str, timeout_s: float = 150.0) -> None:
        """Wait until ``holds()``; fails with the job's log where that takes too long."""
        deadline = time.monotonic() + timeout_s * busy()
        while not holds():
            if time.monotonic() > deadline:
                about, log = self.about(), self.log()
                self._cluster.call("scancel", self.number, check=False)
                pytest.fail(f"{what}: not after {timeout_s:g} s\n{about}\n{log}")
            time.sleep(0.5)

    def wait(self, *states: str, timeout_s: float = 150.0) -> dict[str, str]:
        """Wait until it is in one of ``states``, at first COMPLETED; what is known of it."""
        wanted = states or ("COMPLETED",)
        ended = (*wanted, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.state in ended, " or ".join(wanted), timeout_s)
        about = self.about()
        assert about["JobState"] in wanted, (about, self.log())
        return about


def last_step(run_dir: Path) -> int:
    """Of the last line of metrics, 0 if there is none."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0
