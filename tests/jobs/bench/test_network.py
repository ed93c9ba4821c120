"""bench/network/run.sh on hosts of its own: its record is whole, and no host outlives it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from job import HERE

import mpicdsgd

BENCH = HERE.parents[1] / "bench"
SCRIPT = BENCH / "network" / "run.sh"
TOOLS = ("ip", "tc", "nsenter", "unshare", "hostname", "setsid")
LAUNCHERS = ("PMI_", "PMIX_", "OMPI_", "HYDRA_", "MPI_LOCAL")  # an outer job's settings
pytestmark = pytest.mark.slow


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    package = str(Path(mpicdsgd.__file__).parents[1])
    return own | {"PYTHONPATH": package, "PYTHON": sys.executable, "TMPDIR": str(tmp_path)} | more


def spaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in listed.stdout.splitlines() if "mpicdsgd-hosts." in line}


def why_no_hosts(folder: Path) -> str:
    """Why none can be made here, "" where they can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"no {missing[0]}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    hosts = str(BENCH / "network" / "hosts.sh")
    own = os.environ | {"MPICDSGD_HOSTS": str(folder / "hosts.try")}
    made = subprocess.run(
        ["bash", hosts, "up", "2", "100mbit"], env=own, capture_output=True, text=True, check=False
    )
    subprocess.run(["bash", hosts, "down"], env=own, capture_output=True, check=False)
    return made.stderr.strip().split("\n")[-1] if made.returncode else ""


@pytest.fixture
def hosts(tmp_path: Path) -> None:
    if why := why_no_hosts(tmp_path):
        pytest.skip(f"no hosts can be made on this machine: {why}")


def start(tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *options],
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(job: subprocess.Popen[str], timeout_s: float) -> tuple[str, str]:
    """Its output. It removes its hosts itself, so it is asked to end, not killed."""
    try:
        return job.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        job.terminate()
        out, err = job.communicate(timeout=30)
        pytest.fail(f"the job hung for {timeout_s:g} s\n{out[-3000:]}\n{err[-3000:]}")


@pytest.mark.full
@pytest.mark.usefixtures("hosts")
def test_quick_round(tmp_path: Path) -> None:
    before = spaces()
    path = tmp_path / "record.json"
    job = start(tmp_path, "--quick", "--out", str(path))
    out, err = ended(job, 240)
    assert job.returncode == 0, err
    assert not spaces() - before
    assert not list(tmp_path.glob("mpicdsgd-hosts.*"))
    record = json.loads(path.read_text())
    assert {"python", "torch", "numpy", "mpicdsgd", "mpi"} <= record["versions"].keys()
    assert {"commit", "dirty", "host", "cpu", "cores", "rounds", "steps"} <= record.keys()
    assert record["ranks"] == [4]
    assert "100mbit" in record["network"]
    ways = {f"ours, {graph}, {wire}" for graph in ("ring", "one-peer")
            for wire in ("float32", "bfloat16")}  # fmt: skip
    ways |= {"one-way shift", "local", "DDP", "DDP, float16", "parameter server"}
    names = {f"{model}, 4 hosts: {way}" for model in ("mlp", "cnn") for way in ways}
    assert record["results"].keys() == names
    for name, row in record["results"].items():
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert name in out
    for model, size in record["parameters"].items():
        shift_s = record["results"][f"{model}, 4 hosts: one-way shift"]["min_s"]
        assert shift_s > 0.9 * size * 32 / 100e6  # the links are as slow as they are said to be
    lines = out.splitlines()
    ends = lines[lines.index("checks:") + 1 :]  # printed last
    assert len(ends) == len(record["checks"])
    for check, line in zip(record["checks"], ends, strict=True):
        assert check["name"] in line
        assert check["holds"] is None


@pytest.mark.usefixtures("hosts")
def test_hosts_are_removed_when_it_is_stopped(tmp_path: Path) -> None:
    before = spaces()
    job = start(tmp_path, "--quick", "--out", str(tmp_path / "record.json"))
    deadline = time.monotonic() + 60
    while len(spaces() - before) < 9:  # eight and the switch
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1.0)
    job.terminate()
    ended(job, 30)
    assert job.returncode == 128 + signal.SIGTERM
    assert not spaces() - before


@pytest.mark.usefixtures("hosts")
def test_hosts_are_removed_when_the_job_fails(tmp_path: Path) -> None:
    before = spaces()
    job = start(tmp_path, "--quick", "--hosts", "9", "--out", str(tmp_path / "record.json"))
    _, err = ended(job, 120)
    assert job.returncode == 2
    assert "there are no 9 hosts" in err
    assert not spaces() - before


@pytest.mark.parametrize("lacking", ["ip", "PYTHON"])
def test_says_in_one_line_what_is_missing(tmp_path: Path, lacking: str) -> None:
    own = environment(tmp_path)
    if lacking == "ip":
        own["PATH"] = str(tmp_path)
        for tool in ("realpath", "dirname"):
            (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    else:
        own["PYTHON"] = "no-such-python"
    bash = shutil.which("bash") or "bash"
    done = subprocess.run(
        [bash, str(SCRIPT)], env=own, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("bench/network/run.sh needs")
    assert len(done.stderr.splitlines()) == 1
