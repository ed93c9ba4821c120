"""Files appear whole or not at all."""

import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicdsgd.common import files, strict_json


def test_write_whole_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"one", b"two and more", b""):
        files.write_whole(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["file"]


def test_write_whole_that_fails_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    files.write_whole(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_link_is_relative_and_swings(tmp_path: Path) -> None:
    link = tmp_path / "metrics.jsonl"
    for generation in (1, 2):
        files.swing_link(link, f"metrics.g{generation:04d}.jsonl", generation)
        assert os.readlink(link) == f"metrics.g{generation:04d}.jsonl"
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_link_leaves_a_users_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("mine")
    files.swing_link(tmp_path / "metrics.jsonl", "metrics.g0001.jsonl", 1)
    assert (tmp_path / "metrics.jsonl").read_text() == "mine"


def test_only_plain_files_are_regular(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    names = ("fifo", "file", "link", "none", "nul\0")
    found = {name for name in names if files.is_regular(tmp_path / name)}
    assert found == {"file", "link"}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(deadline=None, max_examples=50)
@given(values)
def test_strict_is_strict(value: object) -> None:
    json.dumps(strict_json.strict(value), allow_nan=False)


def test_strict_values() -> None:
    given = {"a": (math.nan, math.inf, -math.inf, 1.5), "b": np.float32(2), "c": np.arange(2)}
    expected = {"a": ["NaN", "Infinity", "-Infinity", 1.5], "b": 2.0, "c": [0, 1]}
    assert strict_json.strict(given) == expected
