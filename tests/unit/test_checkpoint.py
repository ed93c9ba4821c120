"""Checkpoints: whatever is damaged or killed, the newest intact one is read, or an error says why.

Agents are threads here; ``tests/mpi/test_checkpoint.py`` runs the same over MPI.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpicdsgd import checkpoint, manifest, rankfile
from mpicdsgd.checkpoint import Snapshot
from mpicdsgd.errors import UserError


class Team:
    """``size`` threads that talk as ranks of a communicator do."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.slots: list[Any] = [None] * size

    def run(self, work: Callable[[Rank], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(work, [Rank(self, rank) for rank in range(self.size)]))


class Rank:
    def __init__(self, team: Team, rank: int) -> None:
        self.team, self.rank, self.size = team, rank, team.size

    def allgather(self, value: Any) -> list[Any]:
        self.team.slots[self.rank] = value
        self.team.barrier.wait()
        values = list(self.team.slots)
        self.team.barrier.wait()
        return values

    def gather(self, value: Any, root: int = 0) -> list[Any] | None:
        values = self.allgather(value)
        return values if self.rank == root else None

    def bcast(self, value: Any, root: int = 0) -> Any:
        return self.allgather(value)[root]


def snapshot(step: int, rank: int) -> Snapshot:
    rng = np.random.default_rng([step, rank])
    arrays = {
        "x": rng.normal(size=700).astype(np.float32),
        "momentum/layers.0.weight": rng.normal(size=(5, 4)),
        "rng": rng.integers(0, 256, 300).astype(np.uint8),
        "best": np.array(step / 3),
        "none": np.zeros((0, 3), np.int16),
        "mask": rng.random(9) < 0.5,
        "sampler": np.arange(5 + rank),
        "wire": rng.normal(size=8).astype(">f2"),
        "z": rng.normal(size=3) + 1j,
        "strided": rng.normal(size=(6, 6))[::2, ::-3],
    }
    return Snapshot(step, arrays, {"rank": rank, "text": "å" * 40_000}, {"model": "m", "pi": "p"})


def same(read: Snapshot | None, step: int, rank: int) -> bool:
    written = snapshot(step, rank)
    assert read is not None
    assert (read.step, read.meta, read.shared) == (step, written.meta, written.shared)
    assert read.arrays.keys() == written.arrays.keys()
    for name, array in written.arrays.items():
        found = read.arrays[name]
        assert (found.dtype, found.shape) == (array.dtype, array.shape), name
        assert np.array_equal(found, array), name
        found[...] = 0  # it is the reader's own
    return True


def anything(shared: dict[str, Any]) -> None:
    pass


def write(run: Path, generation: int, *steps: int, size: int = 2, keep: int = 9) -> list[Any]:
    def work(comm: Rank) -> Any:
        return [
            checkpoint.write(run, generation, snapshot(step, comm.rank), comm, keep)
            for step in steps
        ]

    return Team(size).run(work)


def read(run: Path, size: int = 2, expect: Any = anything) -> int | None:
    """The step that all ranks read, everything checked against what was written."""

    def work(comm: Rank) -> int | None:
        found = checkpoint.read_newest(run, comm, expect)
        return found.step if found is not None and same(found, found.step, comm.rank) else None

    steps = Team(size).run(work)
    assert len(set(steps)) == 1
    return steps[0]


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def listing(run: Path) -> dict[str, list[str]]:
    return {f.name: sorted(os.listdir(f)) for f in sorted((run / "checkpoints").iterdir())}


def files(generation: int, size: int = 2) -> list[str]:
    g = f"g{generation:04d}"
    ranks = [f"rank-{rank:04d}.{g}.h5" for rank in range(size)]
    return [f"index.{g}.h5", f"manifest.{g}.json", *ranks]


@pytest.mark.parametrize("size", [1, 3])
def test_round_trip(tmp_path: Path, size: int) -> None:
    assert read(tmp_path, size) is None
    assert write(tmp_path, 1, 5, size=size) == [[folder(tmp_path, 5)]] * size
    assert listing(tmp_path) == {"step-00000005": sorted(files(1, size))}
    assert read(tmp_path, size) == 5


def test_index_shows_all_agents_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, 5, size=3)
    moved = tmp_path / "moved"
    folder(tmp_path, 5).rename(moved)
    monkeypatch.chdir("/")
    with h5py.File(moved / "index.g0001.h5") as index:
        assert "sampler" not in index["arrays"], "not alike on all agents"
        for name in snapshot(5, 0).arrays.keys() - {"sampler"}:
            expected = np.stack([snapshot(5, rank).arrays[name] for rank in range(3)])
            assert np.array_equal(index["arrays"][name][()], expected), name


def test_newest_is_by_generation_then_step(tmp_path: Path) -> None:
    write(tmp_path, 1, 5, 100)
    write(tmp_path, 2, 7, 6)
    assert read(tmp_path) == 7
    write(tmp_path, 1, 200)  # a zombie of the first generation
    assert read(tmp_path) == 7


def test_generations_share_a_folder(tmp_path: Path) -> None:
    write(tmp_path, 1, 5)
    before = {p: p.read_bytes() for p in folder(tmp_path, 5).iterdir()}
    write(tmp_path, 2, 5)
    assert listing(tmp_path) == {"step-00000005": sorted(files(1) + files(2))}
    assert all(path.read_bytes() == data for path, data in before.items())
    (folder(tmp_path, 5) / files(2)[0]).unlink()
    assert read(tmp_path) == 5


def test_a_step_written_already_is_not_written_again(tmp_path: Path) -> None:
    write(tmp_path, 1, 5)
    before = {p: p.stat().st_mtime_ns for p in folder(tmp_path, 5).iterdir()}
    assert write(tmp_path, 1, 5) == [[folder(tmp_path, 5)]] * 2
    assert before == {p: p.stat().st_mtime_ns for p in folder(tmp_path, 5).iterdir()}


def test_keep_counts_intact_ones_only(tmp_path: Path) -> None:
    write(tmp_path, 1, 10, 20, 30)
    os.truncate(folder(tmp_path, 30) / "rank-0001.g0001.h5", 100)
    write(tmp_path, 2, 40, keep=2)
    assert list(listing(tmp_path)) == ["step-00000020", "step-00000030", "step-00000040"]
    write(tmp_path, 2, 50, 60, keep=2)
    assert list(listing(tmp_path)) == ["step-00000050", "step-00000060"]
    assert read(tmp_path) == 60


def test_prune_removes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    unlink = Path.unlink

    def spy(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.name)
        unlink(path, missing_ok)

    write(tmp_path, 1, 10)
    monkeypatch.setattr(Path, "unlink", spy)
    write(tmp_path, 1, 20, keep=1)
    assert removed[0] == "manifest.g0001.json"
    assert sorted(removed) == sorted(files(1))


def test_prune_leaves_newer_generations_and_strangers(tmp_path: Path) -> None:
    write(tmp_path, 1, 10)
    write(tmp_path, 3, 20)
    (folder(tmp_path, 10) / "notes.txt").touch()
    write(tmp_path, 2, 30, keep=1)
    expected = {"step-00000010": ["notes.txt"], "step-00000020": sorted(files(3))}
    assert listing(tmp_path) == {**expected, "step-00000030": sorted(files(2))}
    (tmp_path / "generation-0004").touch()  # somebody newer may be reading now
    write(tmp_path, 3, 40, keep=1)
    assert listing(tmp_path).keys() == {*expected, "step-00000030", "step-00000040"}


def test_prune_clears_what_a_crash_left(tmp_path: Path) -> None:
    write(tmp_path, 1, 10, 20)
    (folder(tmp_path, 20) / "manifest.g0001.json").unlink()
    (folder(tmp_path, 20) / ".rank-0000.g0001.h5.tmp").touch()
    assert read(tmp_path) == 10
    write(tmp_path, 2, 15)
    assert listing(tmp_path) == {
        "step-00000010": sorted(files(1)),
        "step-00000015": sorted(files(2)),
    }


@pytest.mark.parametrize("target", [0, 1, "index", "manifest"])
def test_a_write_that_fails_leaves_the_one_before(
    tmp_path: Path,
    target: int | str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path, 1, 10, keep=1)
    before = listing(tmp_path)
    name = f"rank-{target:04d}" if isinstance(target, int) else target
    replace = os.replace

    def full(source: Any, destination: Any) -> None:
        if Path(destination).name.startswith(name):
            raise OSError(28, "No space left on device")
        replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert write(tmp_path, 1, 20, keep=1) == [[None], [None]]
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert f"rank {1 if target == 1 else 0}: No space left on device" in errors[0]
    assert listing(tmp_path) == before
    assert read(tmp_path) == 10
    write(tmp_path, 1, 20, keep=1)
    assert read(tmp_path) == 20


def test_a_disk_that_is_full_within_hdf5(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1, 10)
    before = listing(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit_bytes in (0, 1000, 5000, 20_000, 120_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
        try:
            assert write(tmp_path, 1, 20) == [[None], [None]], limit_bytes
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert listing(tmp_path) == before
    assert caplog.text.count("was not written") == 5
    write(tmp_path, 1, 20)
    assert read(tmp_path) == 20


def test_bit_flips_anywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every file of the newest checkpoint, at many random places, and at its ends."""
    write(tmp_path, 1, 10, 20)
    rng = random.Random(1)
    for path in sorted(folder(tmp_path, 20).iterdir()):
        data = path.read_bytes()
        for i in [0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(12))]:
            flipped = bytearray(data)
            flipped[i] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            caplog.clear()
            step = read(tmp_path)
            if step == 20:  # only what does not matter: white space in the manifest
                assert path.suffix == ".json"
                assert json.loads(flipped) == json.loads(data)
            else:
                assert step == 10
                assert len(caplog.records) == 1
                assert path.name in caplog.text
        path.write_bytes(data)
    assert read(tmp_path) == 20


def test_no_bit_flip_is_missed(tmp_path: Path) -> None:
    write(tmp_path, 1, 10)
    rng = random.Random(3)
    (place,) = manifest.places(tmp_path)
    whole = manifest.read_manifest(place)
    for entry in whole.files:
        path = place.folder / entry.name
        assert manifest.check_file(place.folder, entry) == ""
        with open(path, "r+b") as file:
            for i in [0, entry.size_bytes - 1, *rng.choices(range(entry.size_bytes), k=300)]:
                (byte,) = os.pread(file.fileno(), 1, i)
                os.pwrite(file.fileno(), bytes([byte ^ 1 << rng.randrange(8)]), i)
                assert entry.name in manifest.check_file(place.folder, entry)
                os.pwrite(file.fileno(), bytes([byte]), i)
    data = place.manifest.read_bytes()
    for i in range(len(data)):
        place.manifest.write_bytes(
            data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]
        )
        with contextlib.suppress(manifest.Damaged):
            assert manifest.read_manifest(place) == whole


@pytest.mark.parametrize("name", files(1))
def test_cut_missing_and_strange_files(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1, 10, 20)
    path = folder(tmp_path, 20) / name
    data = path.read_bytes()
    for size in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert read(tmp_path) == 10
    path.write_bytes(data + b"x")
    assert read(tmp_path) == 10
    path.unlink()
    assert read(tmp_path) == 10
    os.mkfifo(path)
    assert read(tmp_path) == 10
    path.unlink()
    path.mkdir()
    assert read(tmp_path) == 10


def test_files_of_other_ranks_steps_and_generations_are_not_taken(tmp_path: Path) -> None:
    write(tmp_path, 1, 10, 20, 30)
    newest = folder(tmp_path, 30)
    good = (newest / "rank-0000.g0001.h5").read_bytes()
    for other in (newest / "rank-0001.g0001.h5", folder(tmp_path, 20) / "rank-0000.g0001.h5"):
        (newest / "rank-0000.g0001.h5").write_bytes(other.read_bytes())
        assert read(tmp_path) == 20
    (newest / "rank-0000.g0001.h5").write_bytes(good)
    assert read(tmp_path) == 30
    shutil.copytree(folder(tmp_path, 20), folder(tmp_path, 40))  # a folder that lies about its step
    assert read(tmp_path) == 30
    (newest / "manifest.g0001.json").rename(newest / "manifest.g0002.json")
    assert read(tmp_path) == 20


def test_none_intact(tmp_path: Path) -> None:
    write(tmp_path, 1, 10, 20)
    for step in (10, 20):
        os.truncate(folder(tmp_path, step) / "rank-0001.g0001.h5", 7)
    with pytest.raises(
        UserError, match=r"none of the 2 checkpoints .*00000020.*rank-0001.*7 bytes"
    ):
        read(tmp_path)


def test_another_number_of_agents(tmp_path: Path) -> None:
    write(tmp_path, 1, 10)
    with pytest.raises(UserError, match="2 agents, the job has 3 ranks"):
        read(tmp_path, size=3)


def test_expect_refuses_on_every_rank(tmp_path: Path) -> None:
    write(tmp_path, 1, 10)

    def work(comm: Rank) -> str:
        def expect(shared: dict[str, Any]) -> None:
            assert shared == {"model": "m", "pi": "p"}
            if comm.rank == 1:
                raise UserError("another model")

        with pytest.raises(UserError) as caught:
            checkpoint.read_newest(tmp_path, comm, expect)
        return str(caught.value)

    assert Team(2).run(work) == ["another model"] * 2


def test_nothing_but_an_unfinished_first_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1, 10)
    (folder(tmp_path, 10) / "manifest.g0001.json").unlink()
    assert read(tmp_path) is None


def test_names_and_dtypes_that_cannot_be_stored() -> None:
    a = np.zeros(1)
    for arrays in ({"a": a, "a/b": a}, {"a//b": a}, {"": a}, {"./a": a}, {"a": a.astype(object)}):
        with pytest.raises(AssertionError):
            rankfile.layout(arrays)


CHILD = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from test_checkpoint import Rank, Team, snapshot
from mpicdsgd import checkpoint
run = Path(sys.argv[1])
generation = checkpoint.claim_generation(run)
newest = checkpoint.read_newest(run, Rank(Team(1), 0), lambda shared: None)
step = newest.step if newest else 0
print(step, flush=True)
while True:
    step += 1
    assert checkpoint.write(run, generation, snapshot(step, 0), Rank(Team(1), 0), 2)
    print(step, flush=True)
"""


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """Each incarnation is killed while it writes; none loses a checkpoint that was finished."""
    rng = random.Random(2)
    here = Path(__file__).resolve().parent
    finished = 0
    for _ in range(6):
        command = [sys.executable, "-c", CHILD, str(tmp_path), str(here), str(here.parents[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            resumed = int(child.stdout.readline())
            assert resumed in (finished, finished + 1), "the last that was said, or one more"
            select.select([], [], [], rng.random() * 0.15)
            child.send_signal(signal.SIGKILL)
            said = child.stdout.read().split()
        finished = int(said[-1]) if said else resumed
        step = read(tmp_path, size=1)
        assert (step or 0) in (finished, finished + 1)
        finished = step or 0
    assert finished > 0


def test_inspect(tmp_path: Path) -> None:
    write(tmp_path, 1, 10, 20, size=3)
    folder(tmp_path, 30).mkdir()
    with open(folder(tmp_path, 10) / "rank-0001.g0001.h5", "r+b") as file:
        file.seek(3000)
        file.write(b"\1\2\3")
    report = checkpoint.inspect(tmp_path)
    json.dumps(report, allow_nan=False)
    newest, older, unfinished = report["checkpoints"]
    assert (newest["step"], newest["generation"], newest["agents"]) == (20, 1, 3)
    assert newest["intact"]
    assert newest["arrays"]["momentum/layers.0.weight"] == {"shape": [5, 4], "dtype": "<f8"}
    assert {f["name"] for f in newest["files"]} == set(files(1, 3)) - {"manifest.g0001.json"}
    assert {f["health"] for f in newest["files"]} == {"ok"}
    x = np.stack([snapshot(20, rank).arrays["x"] for rank in range(3)]).astype(np.float64)
    distance = np.linalg.norm(x - x.mean(axis=0), axis=1)
    rms = np.sqrt((distance**2).mean())
    assert newest["consensus"] == pytest.approx({"max": distance.max(), "rms": rms}, rel=1e-12)
    assert not older["intact"]
    assert older["consensus"] is None
    (bad,) = [f for f in older["files"] if f["health"] != "ok"]
    assert bad["name"] == "rank-0001.g0001.h5"
    assert "checksum" in bad["health"]
    assert "never finished" in unfinished["problems"][0]
    for path in (folder(tmp_path, 20), folder(tmp_path, 20) / "manifest.g0001.json"):
        assert checkpoint.inspect(path)["checkpoints"] == [newest]


def test_inspect_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 10)
    whole = checkpoint.inspect(tmp_path)["checkpoints"][0]["consensus"]
    monkeypatch.setattr("mpicdsgd.inspection._BLOCK", 26)
    assert checkpoint.inspect(tmp_path)["checkpoints"][0]["consensus"] == pytest.approx(whole)


def test_inspect_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "none", tmp_path / "file", tmp_path / "checkpoints"):
        with pytest.raises(UserError, match="holds no checkpoint"):
            checkpoint.inspect(path)


def test_inspect_needs_no_mpi() -> None:
    code = "import mpicdsgd.checkpoint, sys; sys.exit('mpi4py' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_hostile_files_with_right_checksums(tmp_path: Path) -> None:
    """Whoever made the file: it says what is wrong, follows no link and allocates no terabyte."""
    (tmp_path / "secret.h5").touch()
    about = rankfile.About(20, 1, 0, 1, {}, {"x": {"shape": [4], "dtype": "<f4"}})
    far = {"x": {"shape": [1 << 40], "dtype": "<f4"}}
    text = np.bytes_(json.dumps(vars(about)))
    source = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", (4,), "f4")
    virtual = h5py.VirtualLayout((4,), "f4")
    virtual[:] = source

    def link(file: h5py.File) -> None:
        file["about"] = text
        file["arrays/x"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "x")

    def outside(file: h5py.File) -> None:
        file["about"] = text
        raw = [(str(tmp_path / "secret.h5"), 0, 16)]
        file.create_dataset("arrays/x", (4,), "f4", external=raw)

    def maps(file: h5py.File) -> None:
        file["about"] = text
        file.create_virtual_dataset("arrays/x", virtual)

    def huge(file: h5py.File) -> None:
        file["about"] = np.bytes_(json.dumps({**vars(about), "arrays": far}))
        file.create_dataset("arrays/x", (1 << 40,), "f4", chunks=(1 << 20,))

    def strings(file: h5py.File) -> None:
        file["about"] = text
        file.create_dataset("arrays/x", (4,), h5py.string_dtype())

    def nothing(file: h5py.File) -> None:
        file["about"] = text

    def unsaid(file: h5py.File) -> None:
        file["x"] = 1

    def nested(file: h5py.File) -> None:
        file["about"] = np.bytes_("[" * 100_000)

    for make in (link, outside, maps, huge, strings, nothing, unsaid, nested):
        path = tmp_path / f"{make.__name__}.h5"
        with h5py.File(path, "w") as file:
            make(file)
        with pytest.raises(manifest.Damaged, match=make.__name__):
            rankfile.read_rank(path)


def reseal(path: Path, **changes: Any) -> None:
    """Change a manifest's fields and make its checksum fit."""
    body = {**json.loads(path.read_text()), **changes}
    body.pop("sha256")
    kept = {key: value for key, value in body.items() if value is not ...}
    path.write_text(json.dumps({**kept, "sha256": manifest._checksum(kept)}))


def test_hostile_manifests_with_right_checksums(tmp_path: Path) -> None:
    write(tmp_path, 1, 10, 20)
    path = folder(tmp_path, 20) / "manifest.g0001.json"
    good = path.read_bytes()
    listed = json.loads(good)["files"]
    escape = [{**listed[0], "name": "../step-00000010/rank-0000.g0001.h5"}, *listed[1:]]
    cases: list[dict[str, Any]] = [
        {"files": escape},
        {"files": listed[:-1]},
        {"files": listed[::-1]},
        {"files": [*listed[:-1], {**listed[-1], "size_bytes": "1"}]},
        {"files": [*listed[:-1], 3]},
        {"agents": 10**15},
        {"agents": 2.0},
        {"agents": True},
        {"step": -20},
        {"step": 21},
        {"step": 10**30},
        {"generation": 2},
        {"format": 2},
        {"arrays": {"x": {"shape": [-1], "dtype": "<f4"}}},
        {"arrays": {"x": 1}},
        {"shared": []},
        *({key: ...} for key in ("step", "generation", "agents", "files", "arrays", "shared")),
    ]
    for changes in cases:
        reseal(path, **changes)
        assert read(tmp_path) == 10, changes
        assert not checkpoint.inspect(path)["checkpoints"][0]["intact"]
        path.write_bytes(good)
    for text in (b"[]", b"{}", b"null", b"[" * 100_000, b"9" * 10_000, b"\xff", b'{"sha256": 1}'):
        path.write_bytes(text)
        assert read(tmp_path) == 10
    path.write_bytes(good)
    reseal(path)
    assert read(tmp_path) == 20, "the resealing itself is right"
