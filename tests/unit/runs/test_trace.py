"""The trace: what a recorder writes is what `read` gives, and damage is told."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpicdsgd.algorithms.measured import Measured
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.run_folder import newest_generation
from mpicdsgd.runs import trace
from mpicdsgd.runs.trace import Recorder


class Comm:
    """Rank 0 of three agents, of which agent j has j + 1 times what rank 0 has."""

    rank, size = 0, 3

    def Gather(self, mine: Any, everyone: Any, root: int) -> None:
        everyone[:] = mine * np.arange(1, 4)[:, None, None]


def recorder(folder: Path, generation: int = 1, *resume: int) -> Any:
    return Recorder(Comm(), folder, generation, *resume)  # type: ignore[arg-type]


def fill(one: Any, steps: range) -> None:
    for k in steps:
        one.add(0.5 / (k + 1), 10.0 * k, 4)
    one.flush([Measured(k, 0.25 * k, 2.0, 0.0, 1.0) for k in steps])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    fill(one, range(3))
    fill(one, range(3, 4))
    one.flush([])
    one.close()
    found = trace.read(tmp_path)
    k = np.arange(4)
    assert found.step.tolist() == k.tolist()
    assert found.lr.tolist() == (0.5 / (k + 1)).tolist()
    assert found.loss.tolist() == (60.0 * k).tolist()
    assert found.disagreement.tolist() == (1.5 * k).tolist()
    assert found.gradient.tolist() == [12.0] * 4
    assert found.batch.tolist() == [24.0] * 4
    first, second = (tmp_path / "trace.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in (first, second)] == [3, 4]
    assert json.loads(second) == {
        "step": 4, "first": 3, "lr": [0.125], "loss": [180.0], "disagreement": [4.5],
        "gradient": [12.0], "batch": [24], "penalty": [0.0],
    }  # fmt: skip


def test_tensors_and_what_is_no_number(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    one.add(0.5, torch.tensor(math.nan, dtype=torch.float64), 4)
    one.add(0.5, torch.tensor(2.0, dtype=torch.float64), 4)
    one.flush([Measured(0, math.inf, 3.0, 0.0, 1.0), Measured(1, 0.0, 0.0, 0.0, 1.0)])
    found = trace.read(tmp_path)
    assert math.isnan(found.loss[0])
    assert (found.loss[1], found.disagreement[0]) == (12.0, math.inf)
    assert found.gradient.tolist() == [18.0, 0.0]


def test_penalty_and_movement(tmp_path: Path) -> None:
    """What a step moved is known of CDSGD alone."""
    for knows in (False, True):
        folder = tmp_path / str(knows)
        folder.mkdir()
        one = Recorder(Comm(), folder, 1, knows_moved=knows)  # type: ignore[arg-type]
        for _ in range(2):
            one.add(0.5, 1.0, 4)
        one.flush([Measured(0, 0.0, 2.0, 0.25, 2.0), Measured(1, 0.0, 2.0, 0.5, 0.0)])
        one.close()
        found = trace.read(folder)
        assert found.penalty.tolist() == [1.5, 3]
        assert found.moved.tolist() == [12, 0] if knows else np.isnan(found.moved).all()


def test_a_trace_of_before_has_neither(tmp_path: Path) -> None:
    (tmp_path / "trace.g0001.jsonl").write_text(json.dumps(GOOD) + "\n")
    found = trace.read(tmp_path)
    assert np.isnan(found.penalty).all()
    assert np.isnan(found.moved).all()
    assert found.penalty.shape == found.step.shape == (1,)


def test_a_line_of_sums() -> None:
    """What another writer of traces hands over: agents, steps, columns."""
    agents_NKS = np.arange(24.0).reshape(2, 2, 6)
    agents_NKS[..., 5] = math.nan
    assert trace.line_of(7, [0.1, 0.2], agents_NKS) == {
        "step": 9, "first": 7, "lr": [0.1, 0.2], "loss": [12, 24], "disagreement": [14, 26],
        "gradient": [16, 28], "batch": [18, 30], "penalty": [20, 32],
    }  # fmt: skip


def test_a_restart_has_each_step_once(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    for steps in (range(4), range(4, 8), range(8, 10)):
        fill(one, steps)
    one.close()
    kept = (tmp_path / "trace.g0001.jsonl").read_bytes()
    again = recorder(tmp_path, 2, 8)
    fill(again, range(8, 11))
    again.close()
    assert trace.read(tmp_path).step.tolist() == list(range(11))
    assert os.readlink(tmp_path / "trace.jsonl") == "trace.g0002.jsonl"
    assert (tmp_path / "trace.g0001.jsonl").read_bytes() == kept
    # The checkpoint of an earlier generation: its lines go on.
    recorder(tmp_path, 3, 10, 1).close()
    assert trace.read(tmp_path).step.tolist() == list(range(10))
    recorder(tmp_path, 4).close()
    with pytest.raises(trace.NoStepsYet, match="no step is in the trace"):
        trace.read(tmp_path)
    assert newest_generation(tmp_path) == 4


def test_a_gap_is_no_damage(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    fill(one, range(5, 7))
    fill(one, range(9, 10))
    one.close()
    assert trace.read(tmp_path).step.tolist() == [5, 6, 9]


def test_no_trace(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"no trace in .*: run with run.theory = true"):
            trace.read(folder)
    os.mkfifo(tmp_path / "trace.g0001.jsonl")
    with pytest.raises(UserError, match="no trace"):
        trace.read(tmp_path)


GOOD = {
    "step": 7, "first": 6, "lr": [1], "loss": [2], "disagreement": [3], "gradient": [4],
    "batch": [5],
}  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"step": 7',
        *(json.dumps(GOOD | change).encode() for change in (
            {"lr": []}, {"lr": [1, 2]}, {"loss": 2}, {"loss": ["2"]}, {"loss": [True]},
            {"batch": None}, {"first": 4}, {"first": 7}, {"first": True}, {"first": -1},
            {"step": 10**9}, {"step": 6.5},
            {"penalty": [1, 2]}, {"moved": 3}, {"moved": [None]},
        )),
    ],
)  # fmt: skip
def test_damage_is_told(tmp_path: Path, line: bytes) -> None:
    one = recorder(tmp_path)
    fill(one, range(6))
    one.close()
    good = json.dumps(GOOD).encode()
    path = tmp_path / "trace.g0001.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + good + b"\n")
    assert trace.read(tmp_path).gradient[-1] == 4
    path.write_bytes(before + line + b"\n" + good + b"\n")
    with pytest.raises(UserError, match=re.escape(f"{path}, line 2 is damaged")):
        trace.read(tmp_path)


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    fill(one, range(6))
    one.close()
    with open(tmp_path / "trace.g0001.jsonl", "ab") as file:
        file.write(json.dumps(GOOD).encode()[:20])
    assert trace.read(tmp_path).step.tolist() == list(range(6))


def test_a_step_that_was_not_measured_is_a_mistake_of_ours(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    one.add(0.5, 1.0, 4)
    with pytest.raises(AssertionError, match="measured once"):
        one.flush([])
    one.close()
