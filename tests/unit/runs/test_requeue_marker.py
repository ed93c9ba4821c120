"""What sends a job back to the queue, and what does not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpicdsgd import UserError
from mpicdsgd.runs import requeue_marker
from mpicdsgd.runs.requeue_marker import COUNT, MARKER, STARTS, Marker, remove_marker, withdraw_all


def found(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / MARKER
    return json.loads(path.read_text()) if path.exists() else None


def owns(is_taken_over: bool = False) -> Any:
    return SimpleNamespace(is_taken_over=is_taken_over)


def begun(run_dir: Path, generation: int = 1, step: int | None = None, **more: Any) -> Marker:
    """Of a start that begins to train."""
    one = Marker(run_dir, generation, owns(), step, resumes=True)
    one.begin(**more)
    return one


def test_it_says_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch script looks for its own job's, or for one that names none."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    begun(tmp_path, 3)
    assert (tmp_path / MARKER).read_text() == (
        '{"generation": 3, "job": "", "reason": "ended before it could say why"}\n'
    )
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    Marker(tmp_path, 3, owns(), 2, resumes=True).write(step=4, reason="USR1 on rank 0")
    assert (tmp_path / MARKER).read_text() == (
        '{"generation": 3, "job": "17", "step": 4, "reason": "USR1 on rank 0"}\n'
    )


@pytest.mark.parametrize("step", [None, 20])
def test_a_start_is_tried_again_a_few_times(
    tmp_path: Path, step: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """From the same checkpoint, or from the beginning; then only if there is another one."""
    for tries in range(1, STARTS + 3):
        remove_marker(tmp_path)
        one = begun(tmp_path, 10 * tries, step)
        assert (found(tmp_path) is not None) == (tries <= STARTS), tries
        assert ("3 starts from " in caplog.text) == (tries > STARTS)
    assert f"3 starts from {'the beginning' if step is None else 'step 20'} have" in caplog.text
    one.keep(step)
    assert found(tmp_path) is None
    one.keep(25)
    assert found(tmp_path) is not None
    remove_marker(tmp_path)
    begun(tmp_path, 70, 25)
    assert found(tmp_path) is not None, "from another one it may be tried anew"
    for _ in range(STARTS):
        remove_marker(tmp_path)
        begun(tmp_path, 80, 20 if step is None else None)
        assert found(tmp_path) is not None, "from an older one, too: the newest may be damaged"


def test_a_start_that_was_refused_does_not_count(tmp_path: Path) -> None:
    """Generations are claimed by starts that end with a mistake, too."""
    assert begun(tmp_path, 9) is not None
    assert found(tmp_path) is not None


def test_heirs_are_the_same_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """However many of its ranks die, one after the other."""
    for tries in range(1, STARTS + 2):
        remove_marker(tmp_path)
        begun(tmp_path, 10 * tries, 20)
        heirs = [begun(tmp_path, 10 * tries + k, 20 + k, is_heir=True) for k in (1, 2)]
        assert (found(tmp_path) is not None) == (tries <= STARTS), tries
    assert caplog.text.count("3 starts from") == 1
    heirs[-1].keep(20)
    assert found(tmp_path) is None, "what they have begun with is in their memory only"
    heirs[-1].keep(21)
    assert found(tmp_path) is not None


def test_what_is_lost_comes_back_with_the_next_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody removed the folder, or the disk was full for a while."""
    caplog.set_level(logging.WARNING, "mpicdsgd")
    folder = tmp_path / "gone"
    one = begun(folder)
    assert "requeue.json cannot be written: No such file or directory" in caplog.text
    folder.mkdir()
    one.keep(None)
    assert found(folder) is None
    one.keep(5)
    assert found(folder) is not None
    (folder / MARKER).write_text('{"generation": 1, "job": ""}')
    one.keep(7)
    assert found(folder) == {"generation": 1, "job": ""}, "what is there is not written again"
    one.withdraw()
    one.keep(10)
    assert found(folder) is None, "but not where it was taken away on purpose"


def test_who_leaves_none(tmp_path: Path) -> None:
    for one in (
        Marker(tmp_path, 1, None, None, resumes=True),
        Marker(tmp_path, 1, owns(), None, resumes=False),
    ):
        one.begin()
        one.keep(5)
        assert list(tmp_path.iterdir()) == []
    one = Marker(tmp_path, 1, owns(is_taken_over=True), None, resumes=True)
    one.begin()
    one.keep(5)
    assert found(tmp_path) is None, "it is the newer start's folder"


def test_a_newer_starts_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_rank, newer = (Marker(tmp_path, k, None, None, resumes=True) for k in (1, 2))
    begun(tmp_path, 2)
    other_rank.remove()
    assert found(tmp_path) is not None
    newer.remove()
    assert found(tmp_path) is None
    newer.remove()
    begun(tmp_path, 1)
    newer.remove()
    assert found(tmp_path) is None, "of an heir's before it has left its own"
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    begun(tmp_path, 1)
    other_rank.remove()
    assert found(tmp_path) is not None, "of a folder that was removed, and is another job's"
    for text in ("", "[]", "{", "{}", '{"generation": null, "job": ""}'):
        (tmp_path / MARKER).write_text(text)
        other_rank.remove()
        assert found(tmp_path) is None


def test_all_of_a_process_are_withdrawn(tmp_path: Path) -> None:
    held = []
    for name in "ab":
        (tmp_path / name).mkdir()
        held.append(begun(tmp_path / name))
    withdraw_all()
    assert [found(tmp_path / name) for name in "ab"] == [None, None]
    assert len(held) == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"from_step": "x", "starts": 9}', '{"from_step": null}', "[" * 9999]
)
def test_a_count_that_says_nothing_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / COUNT).write_text(text)
    begun(tmp_path)
    assert found(tmp_path) is not None
    assert json.loads((tmp_path / COUNT).read_text()) == {"from_step": None, "starts": 1}


def test_what_cannot_be_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    remove_marker(tmp_path)
    (tmp_path / MARKER).mkdir()
    one = Marker(tmp_path, 1, owns(), None, resumes=True)
    for remove in (one.remove, lambda: remove_marker(tmp_path)):
        with pytest.raises(UserError, match=r"requeue\.json cannot be removed .*: remove it by"):
            remove()
    one.withdraw()
    assert "requeue.json cannot be removed" in caplog.text
    assert requeue_marker.MARKER == "requeue.json", "batch scripts look for it"
