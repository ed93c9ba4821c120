"""The host benches run to their end on tiny sizes, and their records are whole."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job import HERE, Ended

BENCH = HERE.parents[1] / "bench"
pytestmark = pytest.mark.slow
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))

Run = Callable[..., Ended]


def record_of(run: Run, path: Path, ranks: int, bench: str, *options: str) -> dict[str, Any]:
    """The record of a run, of which what all records have in common is checked."""
    script = str(BENCH / f"{bench}.py")
    job = run(ranks, script, "--quick", "--out", str(path), *options, timeout_s=100)
    assert job.code == 0, job.err
    record = json.loads(path.read_text())
    assert {"python", "torch", "numpy", "mpicdsgd", "mpi"} <= record["versions"].keys()
    assert {"commit", "dirty", "host", "cpu", "cores", "rounds", "steps"} <= record.keys()
    for name, row in record["results"].items():
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert name in job.out
    lines = job.out.splitlines()
    ends = lines[lines.index("checks:") + 1 :]  # printed last
    assert len(ends) == len(record["checks"])
    for check, line in zip(record["checks"], ends, strict=True):
        assert check.keys() == {"name", "value", "goal", "holds"}
        assert check["name"] in line
        assert check["holds"] is None or check["goal"] is not None
    return record


@pytest.mark.full
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_exchange_starts_its_own_ranks(run: Run, tmp_path: Path) -> None:
    record = record_of(run, tmp_path / "record.json", 0, "exchange", "--size", "9000")
    assert (record["ranks"], record["parameters"]) == ([2, 4], 9000)
    wheres = {name.split(":")[0] for name in record["results"]}
    ours = {f"{graph}, 4 ranks" for graph in ("ring", "complete", "one-peer")}
    assert wheres == {"ring, 2 ranks", *ours}
    ways = {
        "a step's bytes at the triad's bandwidth",
        "ours, direct",
        "ours, neighbor",
        "Ineighbor_alltoallv + NumPy",
        "Isend, Irecv + NumPy",
        "gloo batch_isend_irecv + torch",
        "Allreduce + torch SGD",
        "gloo all_reduce + torch SGD",
    }
    assert record["results"].keys() == {f"{where}: {way}" for where in wheres for way in ways}
    checks = {c["name"]: c for c in record["checks"]}
    for where in wheres:
        same = checks[f"{where}: largest difference from the plain script"]
        assert same["holds"], same
    goals = {name: c["goal"] for name, c in checks.items() if "difference" not in name}
    assert {name: goal for name, goal in goals.items() if goal is not None} == {
        "ring, 4 ranks: Ineighbor_alltoallv + NumPy over ours, direct": 4.0,
        "ring, 4 ranks: gloo all_reduce + torch SGD over ours, direct": 2.5,
        "ring, 4 ranks: ours, direct over a step's bytes at the triad's bandwidth": 1.3,
    }


def test_step_in_a_job(run: Run, tmp_path: Path) -> None:
    record = record_of(
        run, tmp_path / "record.json", 2, "step", "--size", "9000", "--models", "layer,cnn"
    )
    assert record["ranks"] == [2]
    assert record["parameters"].keys() == {"layer", "cnn"}
    ways = {"local", "local, fused=True", "ours, direct", "ours, neighbor", "DDP"}
    ways |= {"DDP, PostLocalSGD"}
    peers = {"Decent-DP, ring", "Decent-DP, one-peer"}
    if importlib.util.find_spec("decent_dp") and importlib.util.find_spec("loguru"):
        ways |= peers
        assert record["skipped"] == {}
    else:
        assert "pip install" in record["skipped"]["Decent-DP"]
    wheres = {f"{model}, 2 ranks" for model in ("layer", "cnn")}
    assert record["results"].keys() == {f"{where}: {way}" for where in wheres for way in ways}
    assert record["losses"].keys() == record["results"].keys()
    for row in record["results"].values():
        assert row["system_s"] >= 0
        assert row["cpu_s"] > 0
    goals = {c["name"]: c["goal"] for c in record["checks"] if c["goal"] is not None}
    assert goals == {
        "layer, 2 ranks: ours, direct over local, wall": 1.03,
        "cnn, 2 ranks: ours, direct over local, CPU": 1.02,
        "cnn, 2 ranks: ours, neighbor over local, CPU": 1.06,
    } | {f"layer, 2 ranks: {w} over ours, direct, wall": 1.0 for w in ways if w[0] == "D"}


def test_a_step_that_measures(run: Run, tmp_path: Path) -> None:
    options = ("--measuring", "--size", "9000", "--models", "mlp")
    record = record_of(run, tmp_path / "record.json", 2, "step", *options)
    ways = [f"mlp, 2 ranks: ours, direct{more}" for more in ("", ", measuring")]
    assert list(record["results"]) == ways
    assert record["losses"][ways[0]] == record["losses"][ways[1]], "it changes no bit"
    assert [check["goal"] for check in record["checks"]] == [1.02, 1.02]
