"""Matrices from files: what the formats say, and that damage is a UserError and nothing else."""

import io
import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs import matrix_files
from mpicdsgd.graphs.matrix_files import read_matrix

PI = np.array([[0.5, 0.5, 0], [0.5, 0.25, 0.25], [0, 0.25, 0.75]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrices")


def refusal(path: Path, n: int, dataset: str = "") -> str:
    with pytest.raises(UserError) as caught:
        read_matrix(f"{path}{dataset}", n)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    assert len(message) < 400 + len(str(path))
    return message


def as_npy(values: np.ndarray, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


@pytest.mark.parametrize("gap", [",", " ", ";", " , ", "\t"])
def test_csv(folder: Path, gap: str) -> None:
    path = folder / "pi.csv"
    lines = [gap.join(repr(float(w)) for w in row) for row in PI]
    path.write_text("# weights\n\n" + " # row\n".join(lines))
    assert np.array_equal(read_matrix(str(path), 3), PI)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,0,0\n0,1,0\n", "expected 3 rows for 3 agents, got 2"),
        ("1,0,0\n0,1\n", "bad.csv:2: expected 3 numbers for 3 agents, got 2"),
        ("1,0,0\n0,one,0\n", "bad.csv:2: expected a number in column 2, got 'one'"),
        ("1,,0\n", "bad.csv:1: expected a number in column 2, got ''"),
        (b"1,0,0\n\xff", "bad.csv:2: not text in UTF-8"),
        ("", "got 0"),
        (b"0" * (1 << 21), "is it the right file"),
    ],
)
def test_bad_csv(folder: Path, text: str | bytes, words: str) -> None:
    path = folder / "bad.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    assert words in refusal(path, 3)


@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", "<f2", "i1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(folder: Path, dtype: str, order: str) -> None:
    values = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]], dtype=dtype, order=order)
    path = folder / "pi.npy"
    np.save(path, values)
    found = read_matrix(str(path), 3)
    assert found.dtype == np.float64
    assert np.array_equal(found, values.astype(np.float64))


def claiming(shape: str) -> bytes:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (as_npy(np.eye(3).astype(object), allow_pickle=True), "real numbers, got dtype object"),
        (as_npy(np.eye(3) + 0j), "real numbers, got dtype complex128"),
        (as_npy(np.eye(4)), "expected 3 x 3 numbers for 3 agents, got (4, 4)"),
        (as_npy(np.eye(3))[:-1], "cut short or damaged"),
        (as_npy(np.eye(3)) + b"\0", "cut short or damaged"),
        (claiming("(10**9, 10**9)"), "not a .npy file"),
        (claiming("(1000000000, 1000000000)"), "got (1000000000, 1000000000)"),
        (claiming("(3, 3)"), "expected 72 bytes of numbers, found 0"),
        (claiming("(" * 5000 + ")" * 5000), "not a .npy file"),
        (claiming("-" * 9000 + "1"), "not a .npy file"),
        (b"", "not a .npy file"),
        (b"PK\x03\x04", "not a .npy file"),
        (b"\x93NUMPY\x09\x00", "not a .npy file"),
    ],
)
def test_bad_npy(folder: Path, content: bytes, words: str) -> None:
    path = folder / "bad.npy"
    path.write_bytes(content)
    assert words in refusal(path, 3)


def test_pickle_in_npy_is_not_run(folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return (Path.touch, (folder / "sprung",))  # type: ignore[return-value]

    path = folder / "trap.npy"
    trap = np.empty((1, 1), dtype=object)
    trap[0, 0] = Trap()
    np.save(path, trap, allow_pickle=True)
    refusal(path, 1)
    assert not (folder / "sprung").exists()


def test_hdf5(folder: Path) -> None:
    path = folder / "pi.h5"
    with h5py.File(path, "w") as file:
        file["Pi"] = PI
        file["group/other"] = PI.T.astype(">f4")
        file["names"] = ["a", "b"]
    assert np.array_equal(read_matrix(str(path), 3), PI)
    assert np.array_equal(read_matrix(f"{path}:group/other", 3), PI.T)
    assert "no dataset 'group'" in refusal(path, 3, ":group")
    assert "no dataset 'missing'" in refusal(path, 3, ":missing")
    assert "expected 4 x 4 numbers for 4 agents, got (3, 3)" in refusal(path, 4)
    assert "must hold real numbers, got object" in refusal(path, 3, ":names")
    assert "no dataset can be called" in refusal(path, 3, ":a\0b")


def test_hdf5_needs_a_name_only_where_it_could_be_doubted(folder: Path) -> None:
    path = folder / "two.hdf5"
    with h5py.File(path, "w") as file:
        file["a"] = PI
    assert np.array_equal(read_matrix(str(path), 3), PI)
    with h5py.File(path, "a") as file:
        file["b"] = PI
    assert "which dataset? it has ['a', 'b']: name one after a colon" in refusal(path, 3)


def test_damaged_hdf5(folder: Path) -> None:
    whole, path = folder / "whole.h5", folder / "damaged.h5"
    with h5py.File(whole, "w") as file:
        file.create_dataset("Pi", data=PI, chunks=(3, 3), compression="gzip", fletcher32=True)
    content = whole.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "not an HDF5 file, or cut short or damaged" in refusal(path, 3)
    path.write_bytes(b"")
    assert "not an HDF5 file" in refusal(path, 3)
    # The data's own bytes: HDF5 checks their sum.
    with h5py.File(whole) as file:
        start = file["Pi"].id.get_chunk_info(0).byte_offset
    path.write_bytes(content[:start] + bytes([content[start] ^ 8]) + content[start + 1 :])
    assert "damaged" in refusal(path, 3)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import time; time.sleep(60)", "HDF5 hangs on this file"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "HDF5 fails on this file"),
        ("print('short')", "HDF5 fails on this file"),
    ],
)
def test_hdf5_reader_that_hangs_or_crashes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    stub = folder / "stub.py"
    stub.write_text(script)
    monkeypatch.setattr(matrix_files, "_HDF5_READER", stub)
    monkeypatch.setattr(matrix_files, "HDF5_TIMEOUT_S", 1.0)
    path = folder / "any.h5"
    path.write_bytes(b"")
    assert words in refusal(path, 3)


SEEDS = [("f.csv", b"0.5,0.5\n0.5,0.5\n"), ("f.npy", as_npy(np.full((2, 2), 0.5)))]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_damaged_files(folder: Path, seed: tuple[str, bytes], data: st.DataObject) -> None:
    name, content = seed
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 8)))
    content = content[:start] + data.draw(st.binary(max_size=6)) + content[end:]
    path = folder / name
    path.write_bytes(content)
    try:
        shape, message = read_matrix(str(path), 2).shape, ""
    except UserError as error:
        shape, message = (2, 2), str(error)
    assert shape == (2, 2)
    assert len(message.splitlines()) <= 1
