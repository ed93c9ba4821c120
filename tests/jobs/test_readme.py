"""What the README shows, run as it stands there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from job import Ended

from mpicdsgd.runs.config import load_config

ROOT = Path(__file__).parents[2]


def test_the_library_example(run: Callable[..., Ended], tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "train.py").write_text(blocks[0])
    ended = run(2, "train.py")
    assert ended.code == 0, ended.err
    accuracies = re.findall(r"agent \d: test accuracy ([0-9.]+)", ended.out)
    assert len(accuracies) == 2
    assert min(map(float, accuracies)) >= 0.9
    assert ended.err == ""


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.toml")), ids=lambda p: p.name)
def test_the_configs_in_jobs(path: Path) -> None:
    config = load_config(path)
    assert config.run.dir.startswith("runs/")
    assert config.agents.topology == "ring"


def test_the_readme_lists_every_config_key() -> None:
    text = (ROOT / "README.md").read_text()
    config = load_config(ROOT / "jobs" / "mnist.toml")
    for section, values in vars(config).items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `[{section}]`"))
        missing = [key for key in vars(values) if f"`{key}`" not in row]
        assert not missing, f"[{section}]: {missing}"
