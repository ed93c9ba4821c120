"""What `Gpu` asks of CuPy, which is played here: rounding, errors, threads, arguments by value."""

from __future__ import annotations

import ctypes
import sys
import threading
import types
from typing import Any

import numpy as np
import pytest
import torch

from mpicdsgd.kernels import gpu as gpus
from mpicdsgd.kernels.gpu import cuda

MIB = 1 << 20


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class Runtime(types.ModuleType):
    """`cupy.cuda.runtime` as far as it goes: host memory, and a list of the calls."""

    CUDARuntimeError = CUDARuntimeError
    hostAllocMapped, hostAllocPortable, memcpyDefault, streamNonBlocking = 2, 1, 4, 1  # noqa: N815
    eventDefault, eventDisableTiming, eventInterprocess = 0, 2, 4  # noqa: N815

    def __init__(self) -> None:
        super().__init__("runtime")
        self.calls: list[tuple[Any, ...]] = []
        self.full = 0  # so many allocations fail
        self.status = 0
        self._kept: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, *arguments))
            return 77

        return call

    def malloc(self, size: int) -> int:
        self.calls.append(("malloc", size))
        if self.full:
            self.full -= 1
            raise CUDARuntimeError(2)
        return 4096

    def hostAlloc(self, size: int, flags: int) -> int:
        self.calls.append(("hostAlloc", size, flags))
        self._kept.append(ctypes.create_string_buffer(b"\x01" * size, size))
        return ctypes.addressof(self._kept[-1])

    def eventQuery(self, event: int) -> int:
        return self.status

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


class Driver(types.ModuleType):
    """`cupy.cuda.driver`: notes what a launch was given, as the driver copies it."""

    def __init__(self) -> None:
        super().__init__("driver")
        self.launched: list[tuple[Any, ...]] = []
        self.size = 0

    def launchKernel(self, *arguments: Any) -> None:
        *rest, parameters, extra = arguments
        first = ctypes.c_void_p.from_address(parameters).value
        assert first is not None
        assert extra == 0
        self.launched.append((*rest, ctypes.string_at(first, self.size)))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    package, inner = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
    package.cuda = inner  # type: ignore[attr-defined]
    inner.runtime, inner.driver = Runtime(), Driver()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", package)
    monkeypatch.setitem(sys.modules, "cupy.cuda", inner)
    for name in ("set_device", "init", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    properties = types.SimpleNamespace(name="card", uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    stream = types.SimpleNamespace(cuda_stream=5)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(cuda.compiled, "load", lambda: lambda name: 1000 + len(name))
    return inner


def test_memory_is_rounded_to_what_a_handle_opens(cupy: Any) -> None:
    gpu = cuda.Gpu(3)
    assert gpu.torch_device == torch.device("cuda", 3)
    gpu.malloc(1)
    gpu.malloc(0)
    gpu.malloc(2 * MIB + 1)
    assert cupy.runtime.named("malloc") == [(2 * MIB,), (2 * MIB,), (4 * MIB,)]
    assert cupy.runtime.named("memset") == [(4096, 0, n * MIB) for n in (2, 2, 4)]


def test_torch_gives_back_what_it_keeps(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    gpu = cuda.Gpu(0)
    cupy.runtime.full = 1
    assert gpu.malloc(10) == 4096
    assert emptied == [1]
    cupy.runtime.full = 2
    with pytest.raises(CUDARuntimeError, match="status 2"):
        gpu.malloc(10)


def test_pinned_memory_is_zeroed_and_given_back(cupy: Any) -> None:
    gpu = cuda.Gpu(0)
    array = gpu.pinned(100)
    assert (array.dtype, array.shape) == (np.uint8, (100,))
    assert not array.any()
    gpu.unpin(array)
    assert cupy.runtime.named("freeHost") == [(array.ctypes.data,)]
    assert gpu.pinned(0).size == 0  # CUDA would refuse it
    assert cupy.runtime.named("hostAlloc") == [(100, 3), (1, 3)]


def test_an_event_that_failed_is_not_one_that_is_not_done(cupy: Any) -> None:
    gpu = cuda.Gpu(0)
    for status, done in ((0, True), (600, False)):
        cupy.runtime.status = status
        assert gpu.done(9) is done
    cupy.runtime.status = 700
    with pytest.raises(CUDARuntimeError, match="status 700"):
        gpu.done(9)


def test_events_for_other_processes_keep_no_time(cupy: Any) -> None:
    gpu = cuda.Gpu(0)
    gpu.event()
    gpu.event(shared=True)
    gpu.event(timing=True)
    assert cupy.runtime.named("eventCreateWithFlags") == [(2,), (6,), (0,)]


def test_arguments_go_by_value(cupy: Any) -> None:
    class Two(ctypes.Structure):
        _fields_ = [("a", ctypes.c_uint64), ("b", ctypes.c_int)]

    gpu = cuda.Gpu(0)
    gpu.prepare()
    given = Two(2**40, -3)
    cupy.driver.size = ctypes.sizeof(given)
    gpu.launch("name", 7, 256, given, gpu.stream())
    assert cupy.driver.launched == [(1004, 7, 1, 1, 256, 1, 1, 0, 5, bytes(given))]


def test_every_thread_is_told_the_card_once(cupy: Any) -> None:
    gpu = cuda.Gpu(2)
    for _ in range(3):
        gpu.copy(1, 2, 8, 0)
    thread = threading.Thread(target=gpu.record, args=(1, 2))
    thread.start()
    thread.join()
    assert cupy.runtime.named("setDevice") == [(2,), (2,)]
    gpu.copy(1, 2, 0, 0)
    assert cupy.runtime.named("memcpyAsync") == [(1, 2, 8, 4, 0)] * 3


def test_why_not(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is not a CUDA build" in gpus.why_not()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpus.why_not() == "torch finds no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpus.why_not() == ""

    def fail() -> int:
        raise CUDARuntimeError(35)

    cupy.runtime.getDeviceCount = fail
    assert gpus.why_not() == (
        "CuPy finds no GPU (status 35): it must be for torch's CUDA, 'mpicdsgd[cuda13]'"
    )
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    assert "CuPy cannot be imported" in gpus.why_not()
    assert "pip install 'mpicdsgd[cuda13]'" in gpus.why_not()
