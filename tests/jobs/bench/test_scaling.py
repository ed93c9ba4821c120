"""The scaling bench starts its own jobs, and what it counts is what the formula says."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from job import HERE, Ended

BENCH = HERE.parents[1] / "bench"
pytestmark = pytest.mark.slow

Run = Callable[..., Ended]

WAYS = ("direct", "neighbor")
MODES = ("weak", "strong")


@pytest.mark.full
def test_a_quick_round(run: Run, tmp_path: Path) -> None:
    files = {name: tmp_path / f"scaling.{name}" for name in ("json", "csv", "png")}
    job = run(
        0,
        str(BENCH / "scaling.py"),
        *("--quick", "--model", "logistic", "--network", "hdr100"),
        *("--out", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(files["png"])),
        timeout_s=360,
    )
    assert job.code == 0, job.err
    record = json.loads(files["json"].read_text())
    assert {"python", "torch", "numpy", "mpicdsgd", "mpi"} <= record["versions"].keys()
    assert {"commit", "dirty", "host", "cpu", "rounds", "steps", "launcher"} <= record.keys()
    assert (record["ranks"], record["parameters"], record["elements"]) == ([1, 3, 4], 7850, 7856)

    graphs = {1: ["ring"], 3: ["ring", "one-peer exponential"]}
    graphs[4] = ["ring", "torus", "one-peer exponential", "exponential", "complete"]
    cases = {f"{graph}, N={n}: {way}" for n in graphs for graph in graphs[n] for way in WAYS}
    locals_ = {f"local, N={n}" for n in graphs}
    results = record["results"]
    assert results.keys() == {f"{case}, {mode}" for case in cases | locals_ for mode in MODES}
    assert record["skipped"]["torus, N=3"] == "fewer than 4 agents"
    assert record["skipped"]["complete, N=3"] == "the same as ring"
    for name, row in results.items():
        assert name in job.out
        assert 0 < row["min_s"] <= row["q1_s"] <= row["median_s"] <= row["q3_s"] <= row["max_s"]
        assert row["wait_s"] >= 0
        for what in ("bytes", "messages", "message_bytes"):
            assert row[what] == row[f"{what}_formula"], (name, what)
        assert row["off"] == 0

    values = 64 * -(-4 * 7856 // 64)
    bytes_of = {name: results[f"{name}, weak"]["bytes"] for name in cases | locals_}
    for n in (3, 4):
        assert bytes_of[f"local, N={n}"] == 0
        for way in WAYS:  # an agent's, whatever their number
            assert bytes_of[f"ring, N={n}: {way}"] == 2 * (64 + values)
    assert bytes_of["complete, N=4: neighbor"] == 3 * (64 + values)
    assert bytes_of["exponential, N=4: direct"] == 3 * 64 + 2 * values  # three peers, two readers
    assert bytes_of["one-peer exponential, N=4: direct"] == 3 * 64 + values

    memory = record["memory"]
    assert cases <= memory.keys()
    variants = ("no momentum", "look-ahead", "2 rounds", "bfloat16")
    assert {f"ring, N=3: {way}, {v}" for way in WAYS for v in variants} == memory.keys() - cases
    for name, row in memory.items():
        assert row["formula"] == sum(row["parts"].values())
        assert row["measured"] == pytest.approx(row["formula"], rel=0.1), name

    assert {p["exchange"] for p in record["exchange"]} == set(WAYS)
    assert {"direct, used", "neighbor, used"} <= record["fits"].keys()
    assert record["link"]["source"] == "hdr100: example figures, not measured"
    assert record["predictions"].keys() == {"64", "256", "1024", "4096"}
    for row in record["predictions"].values():
        assert {"ring", "torus", "one-peer exponential", "complete", "Allreduce"} <= row.keys()
    assert "no congestion" in job.out

    lines = job.out.splitlines()
    ends = lines[lines.index("checks:") + 1 :]  # printed last
    assert len(ends) == len(record["checks"])
    for check, line in zip(record["checks"], ends, strict=True):
        assert check.keys() == {"name", "value", "goal", "holds"}
        assert check["name"] in line
        assert check["holds"] is not False or "memory" in check["name"], check
    exact = [c for c in record["checks"] if "bytes" in c["name"]]
    assert len(exact) == 3 + len(WAYS)
    assert all(c["holds"] for c in exact)

    rows = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert [row["name"] for row in rows] == list(results)
    assert files["png"].stat().st_size > 10_000


def test_it_starts_jobs_itself(run: Run, tmp_path: Path) -> None:
    job = run(2, str(BENCH / "scaling.py"), "--quick", "--out", str(tmp_path / "record.json"))
    assert job.code != 0
    assert "start it without mpiexec" in job.err
