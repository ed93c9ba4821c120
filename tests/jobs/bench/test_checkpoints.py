"""The bench of checkpoints runs to its end in small, and its record and page are whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job import HERE, Ended

BENCH = HERE.parents[1] / "bench"
pytestmark = pytest.mark.slow


def test_quick(run: Callable[..., Ended], tmp_path: Path, full: bool) -> None:
    """With --full also the sections that start jobs again and again."""
    pytest.importorskip("sklearn")
    path = tmp_path / "record.json"
    parts = ("steps,write", "restart,startup") if full else ("steps", "write")
    for sections in parts:  # the second keeps what the first found
        command = (str(BENCH / "checkpoints" / "run.py"), "--quick", "--only", sections)
        done = run(0, *command, "--out", str(path), "--folder", str(tmp_path), timeout_s=280)
        assert done.code == 0, done.err
    record = json.loads(path.read_text())
    found = record["sections"]
    assert found.keys() == set(",".join(parts).split(","))
    for section in found.values():
        assert {"python", "torch", "numpy", "mpicdsgd", "mpi"} <= section["versions"].keys()
        assert {"commit", "dirty", "host", "cpu", "cores", "file system"} <= section.keys()

    steps = found["steps"]["results"]["mlp"]
    assert steps["files"] == 2 + 2  # of two ranks, index and manifest
    assert all(s > 0 for times in steps["seconds"].values() for s in times)
    write = found["write"]["results"]["mlp"]
    # Parameters and momentum of two ranks, and the generators' states.
    assert 2 * 2 * 4 * steps["parameters"] < write["plain_bytes"] < write["size_bytes"]
    if full:
        _starts(found)
    assert [(c["goal"], c["holds"]) for c in record["checks"]] == [(1.05, None), (0.7, None)]
    page = path.with_suffix(".md").read_text()
    assert page.count("\n## ") == len(found)
    assert page.count("a quick round") == len(found)
    assert page in done.out


def _starts(found: dict[str, Any]) -> None:
    restart = found["restart"]["results"]["mlp"]["starts"]
    startup = found["startup"]["results"]
    assert (startup["ranks"], startup["starts"][0]["new"]["checkpoint"]["files"]) == (3, 5)
    starts = [one for way in restart.values() for one in way]
    for one in (*starts, startup["starts"][0]["new"], startup["starts"][0]["again"]):
        marks = [one[mark] for mark in ("entered", "imported", "ready", "first step")]
        assert all(list(times) == sorted(times) for times in zip(*marks, strict=True))
        assert min(one["reading"]) > 0
    files = startup["files"]
    if shutil.which("strace"):
        counts = {name: sum(files[name]["count"].values()) for name in files if name != "seconds"}
        assert 10 < counts["a writer of checkpoints"] < counts["torch"] < counts["a rank"]
    else:
        assert "strace" in files["skipped"]
