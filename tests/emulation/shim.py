"""The GPU kernels on the host: compiles native/kernel.cu with g++ and shim.h, once per source."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "mpicdsgd" / "kernels" / "native"
SOURCES = [HERE / "shim.cpp", HERE / "shim.h", NATIVE / "kernel.cu", NATIVE / "update.h"]
# The flags that update.h asks for.
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]
FAILURES = {1: "unknown kernel", 2: "argument of the wrong size", 3: "misaligned address",
            4: "threads wait for each other for ever"}  # fmt: skip

compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels: ``launch``, ``set_order`` and the other functions of shim.cpp.

    Several processes may call it at once: each compiles under a name of its own and renames.
    """
    return load(NATIVE)


def load(native: Path) -> ctypes.CDLL:
    """The kernels of the kernel.cu in a folder."""
    sources = [native / path.name if path.parent == NATIVE else path for path in SOURCES]
    text = b"\0".join(path.read_bytes() for path in sources) + " ".join(FLAGS).encode()
    key = hashlib.sha256(text).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"mpicdsgd-shim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is somebody else's"
    built = folder / f"{key}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as here:
            made = Path(here) / "shim.so"
            command = [str(compiler), *FLAGS, f"-I{HERE}", f"-I{native}", str(HERE / "shim.cpp")]
            done = subprocess.run(
                [*command, "-o", str(made), "-ldl"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            os.replace(made, built)
    found = ctypes.CDLL(str(built))
    found.launch.argtypes = [ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p,
                             ctypes.c_size_t]  # fmt: skip
    found.launch.restype = ctypes.c_int
    found.set_order.argtypes = [ctypes.c_uint]
    found.set_order.restype = None
    found.wide_accesses.argtypes = []
    found.wide_accesses.restype = ctypes.c_longlong
    found.layout_of.argtypes = [ctypes.c_char_p]
    found.layout_of.restype = ctypes.c_longlong
    return found


def launch(name: str, blocks: int, threads: int, arguments: ctypes.Structure) -> None:
    """Run a kernel to its end."""
    failure = library().launch(
        name.encode(), blocks, threads, ctypes.addressof(arguments), ctypes.sizeof(arguments)
    )
    if failure:
        raise RuntimeError(f"{name}: {FAILURES[failure]}")
