"""Runs that commit b885d96 had begun go on with its bits: tests/fixtures/old_checkpoints/make.py.

The bits are those of torch 2.13 (constraints.txt) with kernels that are the same on all x86 CPUs
(`SAME_BITS`), one thread, and NumPy's streams of random numbers, which shuffle and make up data.
Where a gradient on known numbers already has other bits (another torch or kind of CPU), results
are compared to rounding instead, the generators' states still bit by bit. To rounding always:
what is summed over agents in MPI's order and only measured.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fixtures.old_checkpoints.oldruns import HERE, NAMES, RANKS, SAME_BITS, command, reached
from job import Ended
from samerun import checkpoints, metrics

pytestmark = pytest.mark.slow

Run = Callable[..., Ended]
SUMMED = ("averaged_model/", "consensus/")


@pytest.fixture(scope="module")
def probe() -> str:
    """What tells this CPU's arithmetic with this torch from another's."""
    env = {**os.environ, **SAME_BITS, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "oldmodel.py")]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", NAMES)
def test_goes_on(run: Run, tmp_path: Path, probe: str, name: str) -> None:
    expected = json.loads((HERE / f"{name}.json").read_text())
    with tarfile.open(HERE / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for file in (f"{name}.toml", "oldmodel.py"):
        shutil.copy(HERE / file, tmp_path)
    step, run_dir = expected["from_step"], tmp_path / "run"
    assert [path.parent.name for path in checkpoints(run_dir)] == [f"step-{step:08d}"]
    before = (run_dir / "metrics.jsonl").read_text()

    ended = run(RANKS, *command(name), **SAME_BITS)
    assert ended.code == 0, ended.err
    assert f"going on from step {step} in run" in ended.err
    assert "not what it was" not in ended.err
    assert f"\n# resumed from step: {step}\n" in (run_dir / "config.g0002.toml").read_text()
    assert (run_dir / "metrics.jsonl").read_text().startswith(before)
    sent = [line["bytes_sent"] for line in metrics(run_dir)]
    assert sent == sorted(set(sent)), "counted on"

    found, floats = reached(run_dir, step)
    same_bits = probe.strip() == expected["probe"]
    assert found["step"] == expected["step"]
    assert found["random"] == expected["random"]
    arrays = {key: found["arrays"].get(key) for key in expected["arrays"]}
    with np.load(HERE / f"{name}.npz") as known:
        for key in known.files:
            np.testing.assert_allclose(floats[key], known[key], 1e-5, 1e-5, err_msg=key)
            if not same_bits:
                del arrays[key], expected["arrays"][key]
    assert arrays == expected["arrays"]
    assert len(found["metrics"]) == len(expected["metrics"])
    for line, known in zip(found["metrics"], expected["metrics"], strict=True):
        for key, number in known.items():
            exact = isinstance(number, str) or (same_bits and not key.startswith(SUMMED))
            if exact:  # a string is NaN: in a round without it an agent has no training loss
                assert line[key] == number, key
            else:  # an answer may turn out the other way: one of an epoch's first ten
                off = 0.11 if "accuracy" in key else 1e-5
                assert line[key] == pytest.approx(number, rel=1e-4, abs=off), key
