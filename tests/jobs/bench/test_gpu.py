"""The GPU benches run to their end on an emulated GPU, and their records are whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from emulation import shim
from job import HERE, Ended

from mpicdsgd.kernels import gpu

BENCH = HERE.parents[1] / "bench"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shim.compiler is None, reason="no C++ compiler"),
]

Run = Callable[..., Ended]


def record_of(
    run: Run, tmp_path: Path, ranks: int, bench: str, *options: str, **environment: str
) -> dict[str, Any]:
    """The record of an emulated run, of which what all records have in common is checked."""
    path = tmp_path / "record.json"
    script = str(BENCH / f"{bench}.py")
    job = run(
        ranks,
        script,
        "--emulate",
        "--quick",
        "--out",
        str(path),
        *options,
        timeout_s=100,
        **environment,
    )
    assert job.code == 0, job.err
    assert "emulated" in job.out.splitlines()[-1]  # whoever reads the end knows
    record = json.loads(path.read_text())
    assert record["emulated"] is True
    assert record["gpu"] == "emulated GPU"
    assert {"python", "torch", "mpicdsgd"} <= record["versions"].keys()
    assert {"commit", "dirty", "host"} <= record.keys()
    for name, row in record["results"].items():
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert name in job.out
    for check in record["checks"]:
        assert check.keys() == {"name", "value", "goal", "holds"}
        # Only what an emulation can tell is judged.
        assert check["holds"] is (True if "unlike" in check["name"] else None)
        assert check["name"] in job.out
    return record


def test_kernel(run: Run, tmp_path: Path) -> None:
    record = record_of(run, tmp_path, 0, "gpu/kernel", "--size", "9000")
    goals = [c["goal"] for c in record["checks"] if c["name"].startswith("fraction")]
    assert goals == [0.92] * 10 + [None] * 4
    for degree in (*range(9), 12):
        assert f"fused, degree {degree}" in record["results"]
    assert "fused, degree 4, bfloat16" in record["results"]
    assert "torch foreach, degree 8" in record["results"]
    assert record["skipped"].keys() == {"torch.compile", "CuPy"}
    assert set(record["unlike_the_host"].values()) == {0}


def test_exchange_starts_its_own_ranks(run: Run, tmp_path: Path) -> None:
    record = record_of(run, tmp_path, 0, "gpu/exchange", "--ranks", "2", "--size", "9000",
                       "--topologies", "ring")  # fmt: skip
    assert (record["ranks"], record["cards"]) == (2, 1)
    assert "mpi" in record["versions"]
    ways = {"direct", "staged", "passes at once", "passes alone"}
    assert record["results"].keys() == {f"ring: {way}" for way in ways}
    assert record["skipped"].keys() == {"neighbor"}
    assert {c["name"]: c["goal"] for c in record["checks"]}["ring: staged over direct"] == 5


def test_step(run: Run, tmp_path: Path) -> None:
    record = record_of(run, tmp_path, 2, "gpu/step", MPICDSGD_DATA="")
    ways = ("direct", "staged", "no exchange", "batches alone")
    assert record["results"].keys() == {f"{d}: {w}" for d in ("mnist", "cifar10") for w in ways}
    assert all(source.startswith("random images") for source in record["data"].values())


def test_one_table_of_all(run: Run, tmp_path: Path) -> None:
    check = {"name": "fast", "value": 2.0, "goal": 3.0, "holds": False}
    (tmp_path / "a.json").write_text(json.dumps({"gpu": "X", "checks": [check], "results": {}}))
    (tmp_path / "phases").write_text("build\tyes\tdone\t7\ntests\tNO\texit code 1, 2 failed\t9\n")
    common = str(BENCH / "common.py")
    job = run(0, common, "--phases", "phases", "--out", "all.json", "a.json", "b.json")
    assert job.code == 0, job.err
    rows = [line.split() for line in job.out.splitlines()]
    assert rows[0] == ["name", "value", "goal", "holds"]
    assert ["a:", "fast", "2.000", "3", "NO"] in rows
    assert ["build:", "done", "7", "s", "-", "yes"] in rows
    assert ["tests:", "exit", "code", "1,", "2", "failed", "9", "s", "-", "NO"] in rows
    assert ["b:", "no", "record", "-", "-", "NO"] in rows
    record = json.loads((tmp_path / "all.json").read_text())
    assert record["gpu"] == "X"
    assert record["checks"] == [check | {"bench": "a"}]
    assert [phase["holds"] for phase in record["phases"]] == [True, False]


@pytest.mark.skipif(gpu.why_not() == "", reason="there is a GPU")
def test_without_a_gpu(run: Run) -> None:
    job = run(0, str(BENCH / "gpu" / "kernel.py"))
    assert job.code == 1
    assert f"{gpu.why_not()}: --emulate tries the bench without a GPU" in job.err
