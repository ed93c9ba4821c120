"""Damaged checkpoints of a whole job: each is found, it is said which file, and the run goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from job import Ended
from samerun import same_run
from test_torture import CONFIG, RANKS

pytestmark = pytest.mark.slow

EPOCHS, STEPS = 4, 48


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2 * len(data) // 3] ^= 16
    path.write_bytes(data)


def other_generation(path: Path) -> None:
    """The same agent's state at the same step, as the start before had written it."""
    shutil.copyfile(path.with_name(path.name.replace("g0002", "g0001")), path)


def other_rank(path: Path) -> None:
    shutil.copyfile(path.with_name(path.name.replace("rank-0001", "rank-0002")), path)


# Of the newest checkpoint, the one before, ...: what happens to which file, and what is said.
DAMAGE: list[tuple[Callable[[Path], None], str, str]] = [
    (cut, "rank-0000.g0002.h5", "bytes, "),
    (flip, "rank-0003.g0002.h5", "its checksum is not the one that was written"),
    (other_generation, "rank-0002.g0002.h5", "its checksum is not|bytes, "),
    (other_rank, "rank-0001.g0002.h5", "its checksum is not|bytes, "),
    (Path.unlink, "rank-0001.g0002.h5", "missing"),
    (empty, "rank-0002.g0002.h5", "has 0 bytes, "),
    (cut, "index.g0002.h5", "bytes, "),
    (empty, "index.g0002.h5", "has 0 bytes, "),
    (flip, "index.g0002.h5", "its checksum is not the one that was written"),
    (Path.unlink, "index.g0002.h5", "missing"),
    (cut, "manifest.g0002.json", "not JSON"),
    (empty, "manifest.g0002.json", "not JSON"),
    (flip, "manifest.g0002.json", "not JSON|its own checksum does not fit"),
    (other_generation, "manifest.g0002.json", "is of step"),
]


def test_the_newest_that_is_intact(run: Callable[..., Ended], tmp_path: Path) -> None:
    """Fourteen checkpoints in a row are damaged, each in a way of its own."""
    (tmp_path / "r.toml").write_text(CONFIG)

    def train(run_dir: str, *more: str) -> Ended:
        settings = (f"run.dir={run_dir}", f"run.epochs={EPOCHS}", "run.keep=100", *more)
        ended = run(RANKS, "-m", "mpicdsgd", "train", "r.toml", *settings)
        assert ended.code == 0, ended.err
        return ended

    train("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged", symlinks=True)
    train("damaged", "run.resume=never")  # a second generation beside the first, step by step
    for behind, (damage, name, _) in enumerate(DAMAGE):
        damage(tmp_path / "damaged" / "checkpoints" / f"step-{STEPS - 3 * behind:08d}" / name)

    ended = train("damaged")
    said = [line for line in ended.err.splitlines() if "is not intact" in line]
    assert len(said) == len(DAMAGE)
    for behind, (line, (_, name, why)) in enumerate(zip(said, DAMAGE, strict=True)):
        assert f"step-{STEPS - 3 * behind:08d} (generation 2)" in line
        assert f"({name}: " in line
        assert any(one in line for one in why.split("|")), line
    assert f"going on from step {STEPS - 3 * len(DAMAGE)} " in ended.err
    same_run(tmp_path / "whole", tmp_path / "damaged", RANKS)
