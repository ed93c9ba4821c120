"""The bench of 16-bit wires runs to its end on few real samples, and its record is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from job import HERE, Ended

BENCH = HERE.parents[1] / "bench"
pytestmark = pytest.mark.slow

WIRES = ("float32", "bfloat16", "float16")
READERS = {"mlp, exponential": 3, "mlp, ring, falling": 2}  # of five agents
METRICS = ("accuracy, %", "averaged, %", "train loss", "apart")


@pytest.mark.full
def test_wire(run: Callable[..., Ended], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    path = tmp_path / "record.json"
    script = str(BENCH / "wire.py")
    # With --quick it is the digits, also where there is MNIST.
    job = run(0, script, "--quick", "--out", str(path), timeout_s=280, MPICDSGD_DATA=str(tmp_path))
    assert job.code == 0, job.err
    record = json.loads(path.read_text())
    assert {"python", "torch", "numpy", "mpicdsgd", "mpi"} <= record["versions"].keys()
    assert {"commit", "dirty", "host", "cpu", "cores", "config"} <= record.keys()
    assert (record["ranks"], record["data"]) == (5, "digits")
    assert job.out.startswith("data: digits, scikit-learn's")

    cases = record["cases"]
    assert {name: case["readers"] for name, case in cases.items()} == READERS
    assert record["results"].keys() == {f"{name}: {wire}" for name in cases for wire in WIRES}
    for name, case in cases.items():
        assert f"{name}: {case['steps']} steps, {case['parameters']:,} parameters" in job.out
        assert "exchange.transport=neighbor" in case["settings"]
        for wire in WIRES:
            row = record["results"][f"{name}: {wire}"]
            for metric in METRICS:
                one = row[metric]
                assert len(one["seeds"]) == case["seeds"] == 2
                assert one["mean"] == pytest.approx(sum(one["seeds"]) / 2)
                assert one["error"] >= 0
                assert wire != "float32" or one["difference"] == one["error"] == 0
            assert 10 < row["accuracy, %"]["mean"] <= 100  # it was trained at all
            assert row["apart"]["mean"] > 0
            # What is beside the values: a header of 64 bytes, and less than 64 to round them up;
            # every tensor begins at a multiple of 64 bytes of float32.
            size = 4 if wire == "float32" else 2
            beside = row["bytes a step"] / case["readers"] - size * case["parameters"]
            assert 64 <= beside < 128 + 64 * 6
        distances = [record["results"][f"{name}: {wire}"]["apart"]["seeds"] for wire in WIRES]
        assert len({tuple(seeds) for seeds in distances}) == len(WIRES)  # each was rounded its way

    lines = job.out.splitlines()
    ends = lines[lines.index("checks:") + 1 :]  # printed last
    assert len(ends) == len(record["checks"]) == len(cases) * 2 * 4
    for check, line in zip(record["checks"], ends, strict=True):
        assert check.keys() == {"name", "value", "goal", "holds"}
        assert check["name"] in line
        is_bytes = "bytes a message" in check["name"]  # the one thing that so short a run can tell
        assert check["holds"] is (True if is_bytes else None), check
        assert (check["goal"] == 64) == is_bytes
        assert not is_bytes or 0 < check["value"] <= 64
