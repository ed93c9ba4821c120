"""``mpicdsgd submit``: the script, what is refused before it is queued, how sbatch is called."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpi4py import MPI  # noqa: F401, before `script` would load it without starting it

from mpicdsgd import UserError
from mpicdsgd.cli.slurm_script import BODY, Request, default_site, script, seconds
from mpicdsgd.cli.slurm_script import submit as give

ROOT = Path(__file__).parents[3]
CONFIG = '[run]\ndir = "runs/net"\n[data]\nname = "digits"\n'
ASKED = ("--nodes=4", "--time=2:00:00")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MPICDSGD_SITE", raising=False)
    return tmp_path


def submit(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as it is to start no MPI."""
    return subprocess.run(
        [sys.executable, "-m", "mpicdsgd", "submit", "net.toml", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def sbatch(folder: Path, body: str) -> str:
    """A PATH with an sbatch of ours before everything else."""
    (folder / "bin").mkdir()
    path = folder / "bin" / "sbatch"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return f"{folder / 'bin'}:{os.environ['PATH']}"


def test_dry_run_shows_the_script_and_leaves_nothing(folder: Path) -> None:
    done = submit(*ASKED, "--dry-run", "optim.lr=0.3", PATH="/usr/bin:/bin")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--nodes=4", "--ntasks-per-node=1", "--time=2:00:00", "--requeue", "--job-name=net",
            "--output=runs/net/slurm-%j.out", "--signal=B:USR1@120"} <= options  # fmt: skip
    assert "set -- net.toml runs/net optim.lr=0.3" in lines
    assert not (folder / "runs").exists()


def test_the_script_of_jobs_does_the_same() -> None:
    text = (ROOT / "jobs" / "requeue.sbatch").read_text()
    assert text.endswith(f"\n{BODY}")
    assert "#SBATCH --requeue\n#SBATCH --open-mode=append\n#SBATCH --signal=B:USR1@120\n" in text


@pytest.mark.parametrize("given", [(), ("r.toml",), ("r.toml", "run.epochs=5")])
def test_a_forgotten_folder_is_no_override(folder: Path, given: tuple[str, ...]) -> None:
    (folder / "site.sh").write_text("launcher=(bash -c 'touch started')\n")

    def requeue(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(ROOT / "jobs" / "requeue.sbatch"), *words],
            env={**os.environ, "MPICDSGD_SITE": str(folder / "site.sh")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = requeue(*given)
    assert done.returncode == 2
    assert "RUN_DIR is missing: sbatch jobs/requeue.sbatch RUN.toml RUN_DIR" in done.stderr
    assert not (folder / "started").exists()
    assert requeue("r.toml", "runs/lr=0.1").returncode == 0
    assert (folder / "started").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.sbatch")), ids=lambda p: p.name)
def test_scripts_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40


def test_shellcheck_finds_nothing(folder: Path) -> None:
    (folder / "site.sh").write_text("# shellcheck shell=bash disable=SC2034\nlauncher=(mpirun)\n")
    words = ("run.seed=3", "data.path=/a b/c")
    for site in (None, Path("site.sh")):
        _, text = script(Path("net.toml"), words, Request(4, "90", 2, 2, site=site))
        (folder / "job.sbatch").write_text(text)
        done = subprocess.run(
            ["shellcheck", "-x", "job.sbatch"], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, "")


def test_what_the_script_calls(folder: Path) -> None:
    """Every word arrives as it was, and a run that has ended well is not sent back."""
    site = folder / "site.sh"
    site.write_text('launcher=(bash -c \'printf "%s|" "$@"\' launch)\n')
    words = ("run.seed=3", "data.path=/a b/$(c)'`", "data.name=digits")
    run_dir, text = script(Path("net.toml"), words, Request(2, "90", site=site))
    assert run_dir == Path("runs/net")
    (folder / "job.sbatch").write_text(text)
    done = subprocess.run(["bash", "job.sbatch"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"mpicdsgd|train|net.toml|run.dir=runs/net|{'|'.join(words)}|"


def test_a_marker_sends_it_back_and_an_old_one_does_not(folder: Path) -> None:
    """With a Slurm of a few lines; the real one's is ``tests/slurm``."""
    site = folder / "site.sh"
    marker = '{"generation": 1, "job": "%s"}'
    (folder / "own").write_text(marker % "7" + "\n")
    (folder / "nobodys").write_text(marker % "" + "\n")
    (folder / "anothers").write_text(marker % "77" + "\n")

    def leaves(whose: str, code: int = 80) -> str:
        return f"cp {whose} runs/net/requeue.json; exit {code}"

    path = sbatch(folder, "exit 1")
    programs = {
        "scontrol": SCONTROL,
        "squeue": 'case "$*" in *%e*) echo "$END" ;; *) echo "$STATE" ;; esac',
        "sleep": 'test "$1" -ge 0',
    }
    for name, body in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "runs" / "net").mkdir(parents=True)
    site.touch()
    _, text = script(Path("net.toml"), (), Request(2, "90", site=site))
    (folder / "job.sbatch").write_text(text)

    def ends(rank: str, state: str, away: int = 0, end: str = "NONE") -> tuple[int, str]:
        site.write_text(f"launcher=(bash -c '{rank}')\n")
        environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "STATE": state, "END": end}
        (folder / "away").write_text("x" * away)
        done = subprocess.run(
            ["bash", "job.sbatch"], env=environment, capture_output=True, text=True, check=False
        )
        assert "Killed" in done.stderr or done.stderr == ""
        return done.returncode, done.stdout

    echo = f"back to the queue: {marker % 7}\n"
    back = echo + "scontrol requeue 7\n"
    sent = -signal.SIGKILL, back
    assert ends(leaves("own"), "RUNNING None") == sent
    assert ends(leaves("own"), "COMPLETING TimeLimit") == sent
    assert ends(leaves("own"), "COMPLETING None") == (80, "ended by Slurm\n")
    assert ends(leaves("own", 137), "RUNNING None") == sent, "of a node that died, say"
    no = "not sent back to the queue: no runs/net/requeue.json\n"
    assert ends("exit 2", "RUNNING None") == (2, no), "the marker is of the start before"
    assert ends(leaves("nobodys"), "RUNNING None") == (sent[0], back.replace('"7"', '""'))
    assert ends("exit 1", "RUNNING None") == (1, no)
    assert ends(leaves("anothers"), "RUNNING None") == (80, no), "who has taken over the folder"
    assert ends("exit 1", "RUNNING None") == (1, no)
    assert (folder / "runs/net/requeue.json").read_text() == (folder / "anothers").read_text()
    # Slurm's controller is away for a while, or for long.
    assert ends(leaves("own"), "RUNNING None", away=2) == (sent[0], 2 * echo + back)
    assert ends(leaves("own", 9), "RUNNING None", away=99) == (9, 10 * echo)
    assert ends(leaves("own", 9), "") == (9, 10 * echo)
    # A signal of the batch shell reaches the launcher, whose code counts.
    moment = "/bin/sleep 0.3"  # "sleep" is none here
    wait = f"for _ in $(seq 99); do {moment}; done"
    forwarded = f'trap "{leaves("own")}" USR1; {moment}; kill -USR1 $PPID; {wait}'
    assert ends(forwarded, "RUNNING None") == sent
    ended = 'trap "exit 0" USR1; {0}; kill -USR1 $PPID; {0}'
    assert ends(ended.format(moment), "RUNNING None") == (0, ""), "the run's end, not the signal"
    # What hangs is killed before the limit, which Slurm would count as the job's end.
    hangs = f'cp own runs/net/requeue.json; trap "" USR1; {moment}; kill -USR1 $PPID; {wait}; >late'
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 60))
    assert ends(hangs, "RUNNING None", end=soon) == sent
    assert not (folder / "late").exists(), "it was not waited for"


# Away as often as there are letters in that file; else Slurm ends the script.
SCONTROL = """if grep -q x away; then
    sed -i s/x// away
    exit 1
fi
echo "scontrol $@"
kill -KILL $PPID"""


def test_sbatch_is_called_with_the_script_and_the_sites_values(folder: Path) -> None:
    path = sbatch(folder, 'echo "Submitted $# $1 to $SBATCH_PARTITION"')
    site = folder / "my site.sh"
    site.write_text("export SBATCH_PARTITION=gpu\nlauncher=(mpirun)\n")
    done = submit(*ASKED, f"--site={site}", "--sbatch=--mem=0", "optim.lr=0.3", PATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    written = (folder / "runs/net/job.sbatch").read_text()
    assert done.stdout == written + "Submitted 1 runs/net/job.sbatch to gpu\n"
    assert f"source '{site}' || exit 1\n" in written
    assert "#SBATCH --mem=0\n" in written


def test_a_sites_file_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_site() is None
    (folder / "jobs").mkdir()
    (folder / "jobs/site.sh").touch()
    assert default_site() == Path("jobs/site.sh")
    monkeypatch.setenv("MPICDSGD_SITE", "mine.sh")
    assert default_site() == Path("mine.sh")


FOUR = Request(4, "2:00:00")
REFUSED = [
    (Request(4, "soon"), [], '--time must be like "90" (minutes), "2:00:00" or'),
    (Request(4, "2"), [], "--time 2 is not more than the 120 s before the limit"),
    (Request(0, "90"), [], "--nodes must be at least 1, got 0"),
    (Request(4, "90", 0), [], "--ranks-per-node must be at least 1, got 0"),
    (Request(4, "90", 1, -1), [], "--gpus-per-node must be at least 0, got -1"),
    (Request(4, "90", 1, 0, 0), [], "--stop-before must be at least 1, got 0"),
    (FOUR, ["optim.lrr=0.1"], "unknown config key optim.lrr: did you mean optim.lr?"),
    (FOUR, ["nonsense"], '"nonsense" is not of the form section.key=value'),
    (FOUR, ["run.resume=never"], 'run.resume = "never" would begin the run anew'),
    (FOUR, ["run.keep=0"], "run.keep must be at least 1"),
    (FOUR, ["agents.topology=torus:4x4"], "torus:4x4 does not have 4 agents"),
    (Request(1, "90"), ["optim.name=downpour"], "no rank is left for agents"),
    (FOUR, ["run.dir=a b"], 'run.dir = "a b" cannot stand in a line of #SBATCH'),
    (
        Request(4, "90", site=Path("nowhere.sh")),
        [],
        "there is no file nowhere.sh: see jobs/site.sh",
    ),
]


@pytest.mark.parametrize(("request_", "words", "text"), REFUSED, ids=[r[2][:30] for r in REFUSED])
def test_refused(folder: Path, request_: Request, words: list[str], text: str) -> None:
    with pytest.raises(UserError) as raised:
        script(Path("net.toml"), words, request_)
    assert str(raised.value).startswith(text)
    assert not (folder / "runs").exists()


def test_without_slurm(folder: Path) -> None:
    done = submit(*ASKED, PATH=str(folder))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("mpicdsgd: there is no sbatch in PATH: submit on a login node")
    assert not (folder / "runs").exists()


def test_what_sbatch_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", sbatch(folder, "echo 'sbatch: error: Invalid account' >&2; exit 1"))
    with pytest.raises(UserError) as raised:
        give(Path("runs/net"), "text", None)
    expected = "sbatch refused runs/net/job.sbatch: sbatch: error: Invalid account"
    assert str(raised.value) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:30:15", 131415),
    ],
)
def test_times(text: str, expected: int) -> None:
    """As man sbatch has them."""
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0:00:00", "2h", "1:2:3:4", "-1", "1-", "1:\n2", "٣"])
def test_no_times(text: str) -> None:
    with pytest.raises(UserError, match="--time must be like"):
        seconds(text)
