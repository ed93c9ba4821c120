"""What sends a job back to the queue, and what does not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mpicdsgd import UserError
from mpicdsgd.marker import MARKER, STARTS, Marker, remove_marker, withdraw_all


def found(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / MARKER
    return json.loads(path.read_text()) if path.exists() else None


def test_it_says_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch script looks for its own job's, or for one that names none."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    Marker(tmp_path, 3, None, 2, leaves=True).keep(None)
    about = found(tmp_path)
    assert about is not None
    assert (about["generation"], about["job"]) == (3, "")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    Marker(tmp_path, 3, None, 2, leaves=True).write(step=4, reason="USR1 on rank 0")
    assert (tmp_path / MARKER).read_text() == (
        '{"generation": 3, "job": "17", "step": 4, "reason": "USR1 on rank 0"}\n'
    )


@pytest.mark.parametrize("step", [None, 20])
def test_a_start_is_tried_again_a_few_times(tmp_path: Path, step: int | None) -> None:
    """From generation 4's checkpoint, or from the beginning; then only if there is another one."""
    since = 0 if step is None else 4
    for tries in range(1, STARTS + 3):
        remove_marker(tmp_path)
        one = Marker(tmp_path, since + tries, step, since, leaves=True)
        one.keep(step)
        assert (found(tmp_path) is not None) == (tries <= STARTS), tries
    one.keep(step)
    assert found(tmp_path) is None
    one.keep(25)
    assert found(tmp_path) is not None
    remove_marker(tmp_path)
    one.keep(30)
    assert found(tmp_path) is None, "once is enough, and it costs a write"


def test_one_rank_leaves_it(tmp_path: Path) -> None:
    Marker(tmp_path, 1, None, 0, leaves=False).keep(None)
    assert found(tmp_path) is None


def test_only_its_own_is_withdrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_rank, newer = (Marker(tmp_path, k, None, 0, leaves=False) for k in (1, 2))
    Marker(tmp_path, 1, None, 0, leaves=True).keep(None)
    newer.withdraw()
    assert found(tmp_path) is not None
    other_rank.withdraw()
    assert found(tmp_path) is None
    other_rank.withdraw()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    Marker(tmp_path, 1, None, 0, leaves=True).keep(None)
    other_rank.withdraw()
    assert found(tmp_path) is not None, "of a folder that was removed, and is another job's"
    for text in ("", "[]", "{"):
        (tmp_path / MARKER).write_text(text)
        other_rank.withdraw()
        assert (tmp_path / MARKER).read_text() == text


def test_all_of_a_process_are_withdrawn(tmp_path: Path) -> None:
    held = [Marker(tmp_path / name, 1, None, 0, leaves=True) for name in "ab"]
    for one in held:
        one._path.parent.mkdir()
        one.keep(None)
    withdraw_all()
    assert [found(tmp_path / name) for name in "ab"] == [None, None]


def test_what_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "mpicdsgd")
    one = Marker(tmp_path / "gone", 1, None, 0, leaves=True)
    one.keep(None)
    one.keep(None)
    assert caplog.text.count("requeue.json cannot be written: No such file or directory") == 1


def test_it_is_removed(tmp_path: Path) -> None:
    remove_marker(tmp_path)
    (tmp_path / MARKER).write_text("{}")
    remove_marker(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / MARKER).mkdir()
    with pytest.raises(UserError, match=r"requeue\.json cannot be removed .*: remove it by hand"):
        remove_marker(tmp_path)
