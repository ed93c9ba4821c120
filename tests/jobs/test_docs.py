"""The jobs on the documentation's page of how to extend the project, run as they stand there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from job import Ended
from pages import ROOT, commands, write_files

EXTENDING = ROOT / "docs" / "extending.md"
pytestmark = pytest.mark.slow


def test_extending_runs_in_a_job(run: Callable[..., Ended], tmp_path: Path) -> None:
    write_files(EXTENDING, tmp_path)
    done = []
    for words in commands(EXTENDING):
        match words:
            case ["mpicdsgd", "train", config, "--agents", agents, *overrides]:
                ended = run(int(agents), "-m", "mpicdsgd", "train", config, *overrides)
            case ["mpiexec", "-n", ranks, "python", script]:
                ended = run(int(ranks), script)
            case _:
                continue
        assert ended.code == 0, ended.err
        done.append(ended.out)
    four, six, checked = done
    assert "mean test loss 1.5148" in four  # the least possible
    assert "mean test loss 1.8874" in six  # although S has begun on four agents
    assert "the same bits" in checked
