"""Which GPU kernels are taken: those built ahead, else compiled ones, from the cache if there."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from mpicdsgd.kernels import native
from mpicdsgd.kernels.gpu import compiled


class DriverError(Exception):
    pass


@pytest.fixture
def cupy(monkeypatch, tmp_path):
    """As much of CuPy as is used, which says what was done: images loaded, texts compiled."""
    done = SimpleNamespace(loaded=[], compiled=[], refused=set(), capability="90", asked=[])

    def load_data(image):
        assert isinstance(image, bytes)
        if image in done.refused:
            raise DriverError("CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image")
        done.loaded.append(image)
        return len(done.loaded)

    def get_function(module, name):
        done.asked.append(name)
        return 1000 * module + len(name)

    def compile_using_nvrtc(text, options, filename):
        done.compiled.append((text, options))
        return b"cubin for " + done.capability.encode(), None

    driver = SimpleNamespace(
        moduleLoadData=load_data, moduleGetFunction=get_function, CUDADriverError=DriverError
    )
    cuda = ModuleType("cupy.cuda")
    cuda.driver = driver
    cuda.compiler = SimpleNamespace(compile_using_nvrtc=compile_using_nvrtc)
    cuda.nvrtc = SimpleNamespace(getVersion=lambda: (13, 0))
    cuda.Device = lambda: SimpleNamespace(compute_capability=done.capability)
    package = ModuleType("cupy")
    package.cuda = cuda
    monkeypatch.setitem(sys.modules, "cupy", package)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "__path__", [str(tmp_path / "no such folder"), str(tmp_path)])
    monkeypatch.setattr(compiled, "_said", set())
    return done


@pytest.fixture
def fatbin(tmp_path):
    path = tmp_path / f"kernel.{compiled._checksum()}.fatbin"
    path.write_bytes(b"\x50\xed fatbin")
    return path


def test_what_was_built_ahead_comes_first(cupy, fatbin, caplog):
    with caplog.at_level(logging.INFO, "mpicdsgd"):
        find = compiled.load()
        compiled.load()
    assert cupy.loaded == [fatbin.read_bytes()] * 2
    assert cupy.compiled == []
    assert [find("update"), find("add"), find("update")] == [1006, 1003, 1006]
    assert cupy.asked == ["update", "add"]
    (said,) = caplog.messages
    assert "built with the package" in said


def test_a_build_from_other_sources_is_not_taken(cupy, tmp_path, caplog):
    (tmp_path / "kernel.0123456789abcdef.fatbin").write_bytes(b"stale")
    with caplog.at_level(logging.INFO, "mpicdsgd"):
        compiled.load()
    assert cupy.loaded == [b"cubin for 90"]
    assert "compiled now" in caplog.text
    assert "none were built" in caplog.text


def test_what_does_not_load_is_compiled(cupy, fatbin, caplog):
    cupy.refused.add(fatbin.read_bytes())
    with caplog.at_level(logging.INFO, "mpicdsgd"):
        compiled.load()
    assert cupy.loaded == [b"cubin for 90"]
    assert "NO_BINARY_FOR_GPU" in caplog.text


def test_compiled_once_for_each_kind_of_gpu(cupy, tmp_path):
    for capability in ("90", "90", "100", "90"):
        cupy.capability = capability
        compiled.load()
    assert len(cupy.compiled) == 2
    assert cupy.loaded == [b"cubin for 90"] * 2 + [b"cubin for 100", b"cubin for 90"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_options_keep_the_bits(cupy):
    compiled.load()
    ((text, options),) = cupy.compiled
    assert "--fmad=false" in options
    assert not any("ftz" in option or "fast" in option for option in options)
    assert "#include" not in text
    assert "#pragma once" not in text
    assert "update_##NAME" in text
    assert "looked_ahead" in text


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * 100])
def test_a_damaged_cache_is_compiled_anew(cupy, tmp_path, damage):
    compiled.load()
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(damage)
    compiled.load()
    assert cupy.loaded == [b"cubin for 90"] * 2
    assert len(cupy.compiled) == 2
    compiled.load()
    assert len(cupy.compiled) == 2


def test_without_a_cache(cupy, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file in the way")
    with caplog.at_level(logging.INFO, "mpicdsgd"):
        compiled.load()
    assert cupy.loaded == [b"cubin for 90"]
    assert "not kept" in caplog.text
