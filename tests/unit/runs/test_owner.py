"""One living owner of a run's folder: claims, signs of life, and who is taken for dead.

Other owners are processes that this file starts, or claims as another host would have written them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mpicdsgd.common.errors import UserError
from mpicdsgd.runs import owner, process_identity

OTHER = """
import sys, time
from pathlib import Path
from mpicdsgd.runs import owner
from mpicdsgd.common.errors import UserError
owner.BEAT_S, owner.SILENT_S, owner.PATIENCE_S = 0.05, 30.0, float(sys.argv[3])
try:
    held = owner.claim(Path(sys.argv[1]))
except UserError as error:
    print("refused", flush=True)
    sys.exit(2)
print(held.generation, flush=True)
deadline = time.monotonic() + float(sys.argv[2])
while time.monotonic() < deadline:
    time.sleep(0.05)
    if held.is_taken_over:
        print("taken over", flush=True)
        break
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "BEAT_S": 0.05,
        "SILENT_S": 3.0,
        "PATIENCE_S": 1.0,
        "_LOOK_S": 0.02,
    }.items():
        monkeypatch.setattr(owner, name, value)


def start(run: Path, seconds: float, patience_s: float = 1.0) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", OTHER, str(run), str(seconds), str(patience_s)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns the folder as generation 1 for a minute."""
    with start(tmp_path, 60) as process:
        assert said(process) == "1"
        yield process
        process.kill()


def test_generations_are_consecutive(tmp_path: Path) -> None:
    """One process may leave a run and begin it again: it does not wait for itself."""
    run = tmp_path / "a" / "b"
    assert [owner.claim(run).generation for _ in range(3)] == [1, 2, 3]
    assert sorted(os.listdir(run)) == ["generation-0001", "generation-0002", "generation-0003"]
    claims = [json.loads((run / f"generation-000{k}").read_text()) for k in (1, 2, 3)]
    assert {claim["pid"] for claim in claims} == {os.getpid()}
    assert ["until" in claim for claim in claims] == [True, True, False]


def test_threads_at_once_get_different_generations(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: owner.claim(tmp_path).generation, range(24)))
    assert sorted(claimed) == list(range(1, 25))


def test_of_processes_at_once_one_is_the_owner(tmp_path: Path) -> None:
    some = [start(tmp_path, 60, patience_s=2.0) for _ in range(5)]
    try:
        words = sorted(said(process) for process in some)
        assert words == ["1", "refused", "refused", "refused", "refused"]
    finally:
        for process in some:
            process.kill()
            process.communicate()


def test_claim_goes_beyond_files_whose_claim_was_deleted(tmp_path: Path) -> None:
    (tmp_path / "metrics.g0007.jsonl").touch()
    assert owner.claim(tmp_path).generation == 8


def test_claim_goes_beyond_checkpoints_that_were_put_there(tmp_path: Path) -> None:
    """Copied from another run, say: a restart would read them again instead of this one's."""
    folder = tmp_path / "checkpoints/step-00000020"
    folder.mkdir(parents=True)
    (folder / "manifest.g0007.json").touch()
    assert owner.claim(tmp_path).generation == 8
    assert owner.claim(tmp_path).generation == 9


def test_claim_where_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    for run in (tmp_path / "run", tmp_path / "run" / "below", Path("/proc/nowhere")):
        with pytest.raises(UserError, match=r"cannot be made or written .*run\.dir") as caught:
            owner.claim(run)
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_and_leaves_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:

        def fsync(file: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        full.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"No space left on device.*with room, or make some"):
            owner.claim(tmp_path)
    assert os.listdir(tmp_path) == []
    assert owner.claim(tmp_path).generation == 1


def test_a_living_owner_is_named(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    who = f"^run folder [^(]* is in use by process {other.pid} on .*generation 1, since"
    with pytest.raises(UserError, match=who):
        owner.claim(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["generation-0001"]


def test_an_owner_that_ends_is_waited_for(
    tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "PATIENCE_S", 60.0)
    threading.Timer(0.5, other.kill).start()
    assert owner.claim(tmp_path).generation == 2


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_killed_owner_is_not_waited_for(
    tmp_path: Path,
    other: subprocess.Popen[str],
    monkeypatch: pytest.MonkeyPatch,
    is_reaped: bool,
) -> None:
    """Nor one that nobody has asked about: in a container without init it stays a zombie."""
    monkeypatch.setattr(time, "sleep", lambda s: pytest.fail("it waits"))
    other.kill()
    if is_reaped:
        other.wait()
    else:
        while f"{other.pid} (python) Z" not in Path(f"/proc/{other.pid}/stat").read_text():
            pass
    assert owner.claim(tmp_path).generation == 2


def test_a_stopped_owner_is_taken_for_dead_and_learns_of_it(
    tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "SILENT_S", 0.7)
    other.send_signal(signal.SIGSTOP)
    assert owner.claim(tmp_path).generation == 2
    other.send_signal(signal.SIGCONT)
    assert said(other) == "taken over"


def test_an_end_is_written_down(tmp_path: Path) -> None:
    with start(tmp_path, 0.2) as process:
        assert said(process) == "1"
    assert process.returncode == 0
    assert "until" in json.loads((tmp_path / "generation-0001").read_text())


def elsewhere(run: Path, **more: Any) -> Path:
    """A claim of a process of another host."""
    path = run / "generation-0001"
    about = {**process_identity.identity(), "machine": "another", "host": "node7", "pid": 1, **more}
    path.write_text(json.dumps(about))
    return path


@pytest.fixture
def beating(tmp_path: Path) -> Iterator[None]:
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            os.utime(tmp_path / "generation-0001")

    thread = threading.Thread(target=beat)
    elsewhere(tmp_path)
    thread.start()
    yield
    over.set()
    thread.join()


def test_on_another_host_it_shows_by_its_beats(tmp_path: Path, beating: None) -> None:
    with pytest.raises(UserError, match="in use by process 1 on node7 "):
        owner.claim(tmp_path)


@pytest.mark.parametrize("content", ["whole", "", "[1", "[]", '{"pid": "x", "machine": 3}'])
def test_a_silent_one_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one whose claim cannot be read: it was written by a crash, or by nobody here."""
    monkeypatch.setattr(owner, "SILENT_S", 0.3)
    path = elsewhere(tmp_path)
    if content != "whole":
        path.write_text(content)
    began = time.monotonic()
    assert owner.claim(tmp_path).generation == 2
    assert time.monotonic() - began >= 0.3
    assert "has given no sign of life: its run is taken over" in caplog.text


@pytest.mark.parametrize(
    ("mine", "there"), [({}, {"until": "2026"}), ({"SLURM_RESTART_COUNT": "2"}, {"restart": 1})]
)
def test_known_to_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: dict[str, str], there: dict[str, Any]
) -> None:
    """By its own word, or as Slurm has started its job anew."""
    monkeypatch.setattr(time, "sleep", lambda s: pytest.fail("it waits"))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    elsewhere(tmp_path, **there)
    assert owner.claim(tmp_path).generation == 2


def test_a_later_start_of_its_job_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beating: None
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    elsewhere(tmp_path, restart=2)
    with pytest.raises(UserError, match="Slurm job 77"):
        owner.claim(tmp_path)


def test_one_silent_for_hours_is_not_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda s: pytest.fail("it waits"))
    long_ago = time.time() - 4000
    os.utime(elsewhere(tmp_path), (long_ago, long_ago))
    assert owner.claim(tmp_path).generation == 2


def test_an_heir_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beating: None
) -> None:
    """Its agents know that rank 0 is dead, and hold the folder together."""
    monkeypatch.setattr(time, "sleep", lambda s: pytest.fail("it waits"))
    assert owner.claim(tmp_path, heir_of=1).generation == 2


def test_an_heir_of_another_is_none(tmp_path: Path, beating: None) -> None:
    with pytest.raises(UserError, match="in use by"):
        owner.claim(tmp_path, heir_of=7)


def test_a_folder_that_somebody_removes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is made anew, with the config; who released it leaves it removed."""
    run, config = tmp_path / "a" / "run", tmp_path / "a" / "run" / "config.g0001.toml"
    held = owner.claim(run)
    config.write_text("x = 1\n")
    held.restores(config, config.read_bytes())
    shutil.rmtree(tmp_path / "a")
    deadline = time.monotonic() + 20
    while "made anew" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.02)
    assert config.read_text() == "x = 1\n"
    assert json.loads((run / "generation-0001").read_text())["pid"] == os.getpid()
    assert not held.is_taken_over
    shutil.rmtree(run)
    held.release()
    assert not run.exists()


def test_a_folder_removed_just_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics or a checkpoint were written anew there since: claim and config belong to them."""
    monkeypatch.setattr(owner, "BEAT_S", 60.0)
    run = tmp_path / "run"
    held = owner.claim(run)
    held.restores(run / "config.g0001.toml", b"x = 1\n")
    shutil.rmtree(run)
    run.mkdir()
    held.release()
    assert (run / "config.g0001.toml").read_text() == "x = 1\n"
    assert "until" in json.loads((run / "generation-0001").read_text())


def test_another_run_in_a_folder_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first learns that its folder, and even its generation, are another's now."""
    monkeypatch.setattr(owner, "BEAT_S", 4.0)  # the other one is to come before the next
    run = tmp_path / "run"
    held = owner.claim(run)
    os.rename(run, tmp_path / "elsewhere")
    with start(run, 60) as process:
        assert said(process) == "1"
        deadline = time.monotonic() + 20
        while not held.is_taken_over and time.monotonic() < deadline:
            time.sleep(0.02)
        assert held.is_taken_over
        held.release()
        assert "until" not in json.loads((run / "generation-0001").read_text())
        process.kill()


def test_release_twice(tmp_path: Path) -> None:
    held = owner.claim(tmp_path)
    held.release()
    before = (tmp_path / "generation-0001").read_bytes()
    held.release()
    assert (tmp_path / "generation-0001").read_bytes() == before
    assert "until" in json.loads(before)
