"""What `inspect` says of checkpoints, without MPI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from team import files, folder, snapshot, write

from mpicdsgd.checkpoints import inspect
from mpicdsgd.common.errors import UserError


def test_inspect(tmp_path: Path) -> None:
    write(tmp_path, 1, 10, 20, size=3)
    folder(tmp_path, 30).mkdir()
    with open(folder(tmp_path, 10) / "rank-0001.g0001.h5", "r+b") as file:
        file.seek(3000)
        file.write(b"\1\2\3")
    report = inspect.inspect(tmp_path)
    json.dumps(report, allow_nan=False)
    unfinished, newest, older = report["checkpoints"]
    assert (unfinished["step"], unfinished["finished"], unfinished["intact"]) == (30, False, False)
    assert (newest["step"], newest["generation"], newest["agents"]) == (20, 1, 3)
    assert newest["intact"]
    assert newest["arrays"]["momentum/layers.0.weight"] == {"shape": [5, 4], "dtype": "<f8"}
    assert {f["name"] for f in newest["files"]} == set(files(1, 3)) - {"manifest.g0001.json"}
    assert {f["health"] for f in newest["files"]} == {"ok"}
    x = np.stack([snapshot(20, rank).arrays["x"] for rank in range(3)]).astype(np.float64)
    distance = np.linalg.norm(x - x.mean(axis=0), axis=1)
    rms = np.sqrt((distance**2).mean())
    assert newest["consensus"] == pytest.approx({"max": distance.max(), "rms": rms}, rel=1e-12)
    assert not older["intact"]
    assert older["consensus"] is None
    (bad,) = [f for f in older["files"] if f["health"] != "ok"]
    assert bad["name"] == "rank-0001.g0001.h5"
    assert "checksum" in bad["health"]
    assert "not finished" in unfinished["problems"][0]
    for path in (folder(tmp_path, 20), folder(tmp_path, 20) / "manifest.g0001.json"):
        assert inspect.inspect(path)["checkpoints"] == [newest]


def test_inspect_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 10)
    whole = inspect.inspect(tmp_path)["checkpoints"][0]["consensus"]
    monkeypatch.setattr("mpicdsgd.checkpoints.inspect._BLOCK", 26)
    assert inspect.inspect(tmp_path)["checkpoints"][0]["consensus"] == pytest.approx(whole)


def test_inspect_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "none", tmp_path / "file", tmp_path / "checkpoints"):
        with pytest.raises(UserError, match="holds no checkpoint"):
            inspect.inspect(path)


def test_inspect_needs_no_mpi() -> None:
    code = "import mpicdsgd.checkpoints.reading, sys; sys.exit('mpi4py' in sys.modules)"
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
