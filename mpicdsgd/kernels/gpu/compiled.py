"""The kernels of native/kernel.cu, ready to start: built ahead by CMake, else compiled here."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpicdsgd.kernels import native

log = logging.getLogger("mpicdsgd")

NATIVE = Path(native.__file__).parent
SOURCES = ("kernel.cu", "update.h")
OPTIONS = ("--std=c++17", "--fmad=false")  # what update.h asks for

_said: set[str] = set()


def load() -> Callable[[str], int]:
    """A function from a kernel's name to its handle (CUfunction), on the current device. Local.

    The first call on a new kind of GPU may compile for some seconds; what it compiled is kept in
    CuPy's cache folder (CUPY_CACHE_DIR). Which kernels serve, and why, is said once in the log.

    Raises:
        Exception: CuPy's, with the compiler's or the driver's message.
    """
    from cupy.cuda import driver

    module, said = _module()
    if said not in _said:
        _said.add(said)
        log.info("%s", said)
    functions: dict[str, int] = {}

    def find(name: str) -> int:
        if name not in functions:
            functions[name] = int(driver.moduleGetFunction(module, name))
        return functions[name]

    return find


def built() -> Path | None:
    """What CMake built from these very sources, if it did.

    An editable install keeps what is built apart from the sources, and both are the package's
    folders then. The name holds the sources' checksum: a stale build is none.
    """
    name = f"kernel.{_checksum()}.fatbin"
    found = (Path(folder) / name for folder in native.__path__)
    return next((path for path in found if path.is_file()), None)


def source() -> str:
    """kernel.cu with what it includes in its place: one text for NVRTC, and for the cache's key."""
    header = (NATIVE / "update.h").read_text().replace("#pragma once\n", "")
    return (NATIVE / "kernel.cu").read_text().replace('#include "update.h"\n', header)


def _checksum() -> str:
    """As in CMakeLists.txt."""
    sums = [hashlib.sha256((NATIVE / name).read_bytes()).hexdigest() for name in SOURCES]
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:16]


def _module() -> tuple[int, str]:
    """A loaded module (CUmodule), and what the log must say of it."""
    from cupy.cuda import driver

    path = built()
    if path is None:
        reason = "none were built with the package"
    else:
        try:
            module = int(driver.moduleLoadData(path.read_bytes()))
            return module, f"GPU kernels: those built with the package ({path.name})"
        except driver.CUDADriverError as error:  # too old a driver, too new a GPU
            reason = f"those built with the package do not load here ({error})"
    image, how = _compiled()
    return int(driver.moduleLoadData(image)), f"GPU kernels: {how}, since {reason}"


def _compiled() -> tuple[bytes, str]:
    """The kernels compiled for the current device, from the cache if they are there."""
    from cupy.cuda import Device, nvrtc

    text = source()
    what = (text, OPTIONS, nvrtc.getVersion(), Device().compute_capability)
    key = hashlib.sha256(repr(what).encode()).hexdigest()
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    path = folder / f"mpicdsgd-{key[:32]}.cubin"
    image = _read(path)
    if image is not None:
        return image, f"compiled earlier ({path})"
    image = _compile(text)
    try:
        _write(path, image)
    except OSError as error:  # the next process compiles again, and nothing is wrong
        return image, f"compiled now, and not kept ({error})"
    return image, f"compiled now, and kept ({path})"


def _compile(text: str) -> bytes:
    # Not cupy.RawModule, which adds -ftz=true: subnormals would be flushed, and the bits differ.
    from cupy.cuda import compiler

    compile_using_nvrtc: Any = compiler.compile_using_nvrtc
    image, _names = compile_using_nvrtc(text, OPTIONS, filename="kernel.cu")
    return image if isinstance(image, bytes) else str(image).encode()


def _read(path: Path) -> bytes | None:
    """What `_write` wrote, if it is whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    checksum, image = data[:32], data[32:]
    return image if hashlib.sha256(image).digest() == checksum else None


def _write(path: Path, image: bytes) -> None:
    """Under a name of its own, then renamed: any number of processes may do it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(hashlib.sha256(image).digest() + image)
    os.replace(file.name, path)
