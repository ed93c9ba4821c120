"""Whatever is damaged or forged: the newest intact checkpoint is read, or an error says why."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from team import files, folder, read, write

from mpicdsgd.checkpoints import inspect, manifest, rank_file
from mpicdsgd.common.errors import UserError


def test_no_bit_flip_is_missed(tmp_path: Path) -> None:
    write(tmp_path, 1, 10)
    rng = random.Random(3)
    (place,) = manifest.places(tmp_path)
    whole = manifest.read_manifest(place)
    for entry in whole.files:
        path = place.folder / entry.name
        assert manifest.check_file(place.folder, entry) == ""
        with open(path, "r+b") as file:
            for i in [0, entry.size_bytes - 1, *rng.choices(range(entry.size_bytes), k=200)]:
                (byte,) = os.pread(file.fileno(), 1, i)
                os.pwrite(file.fileno(), bytes([byte ^ 1 << rng.randrange(8)]), i)
                assert entry.name in manifest.check_file(place.folder, entry)
                os.pwrite(file.fileno(), bytes([byte]), i)
    data = place.manifest.read_bytes()
    for i in rng.sample(range(len(data)), 400):
        place.manifest.write_bytes(
            data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]
        )
        with contextlib.suppress(manifest.Damaged):
            assert manifest.read_manifest(place) == whole


def test_bit_flips_anywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every file of the newest checkpoint, at many random places, and at its ends."""
    write(tmp_path, 1, 10, 20)
    rng = random.Random(1)
    for path in sorted(folder(tmp_path, 20).iterdir()):
        data = path.read_bytes()
        for i in [0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(8))]:
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


def test_hostile_files_with_right_checksums(tmp_path: Path) -> None:
    """Whoever made the file: it says what is wrong, follows no link and allocates no terabyte."""
    (tmp_path / "secret.h5").touch()
    about = rank_file.About(20, 1, 0, 1, {}, {"x": {"shape": [4], "dtype": "<f4"}})
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
        reason = "larger than the file" if make is huge else make.__name__
        with pytest.raises(manifest.Damaged, match=reason):
            rank_file.read_rank(path)


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
        {"format": 1},
        {"arrays": {"x": {"shape": [-1], "dtype": "<f4"}}},
        {"arrays": {"x": 1}},
        {"shared": []},
        {"stays": 1},
        *(
            {key: ...}
            for key in ("step", "generation", "agents", "files", "arrays", "shared", "stays")
        ),
    ]
    for changes in cases:
        reseal(path, **changes)
        assert read(tmp_path) == 10, changes
        assert not inspect.inspect(path)["checkpoints"][0]["intact"]
        path.write_bytes(good)
    for text in (b"[]", b"{}", b"null", b"[" * 100_000, b"9" * 10_000, b"\xff", b'{"sha256": 1}'):
        path.write_bytes(text)
        assert read(tmp_path) == 10
    path.write_bytes(good)
    reseal(path)
    assert read(tmp_path) == 20, "the resealing itself is right"
