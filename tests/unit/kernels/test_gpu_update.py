"""DeviceUpdate on an emulated GPU: tables, slots and streams change hands, mistakes are refused."""

import ctypes
from collections import deque

import numpy as np
import pytest
import torch
from emulation import shim
from emulation.gpu import EmulatedGpu
from test_gpu_kernel import start
from test_native import WIRES, assert_same_bits, make, run

from mpicdsgd.kernels.gpu import layouts, update
from mpicdsgd.kernels.gpu.update import DeviceUpdate
from mpicdsgd.kernels.native import reference

pytestmark = pytest.mark.skipif(shim.compiler is None, reason="no C++ compiler")


@pytest.fixture
def gpu():
    gpu = EmulatedGpu()
    yield gpu
    assert gpu.in_use == 0


def copied(a):
    """Arguments on memory of their own, which keeps its place while passes run on it."""
    copies = {}

    def one(x):
        return copies.setdefault(id(x), x.copy())

    a = {name: one(x) if isinstance(x, np.ndarray) else x for name, x in a.items()}
    return a | {"neighbours": [one(n) for n in a["neighbours"]]}


@pytest.mark.parametrize("seed", range(4))
def test_many_passes_of_one_update(seed):
    """Layouts, tables and slots change hands while the GPU is behind."""
    rng = np.random.default_rng(seed)
    gpu = EmulatedGpu(main="threaded", seed=seed)
    wire = WIRES[seed % 3]
    one = DeviceUpdate(gpu, wire)
    sizes = [[int(n) for n in rng.integers(0, 90, 3)] for _ in range(layouts.KEPT + 2)]
    sizes[0] = [9000]
    kept, passes = [], deque()
    for _ in range(60):
        lengths = sizes[int(rng.integers(len(sizes)) * rng.integers(2))]
        degree = int(rng.choice([0, 1, 3, 9, 12]))
        a, gradients = make(rng, sum(lengths) + 5, degree, wire, lengths=lengths, special=True)
        want = run(reference.update, a)
        mine = copied(a)
        kept.append(gradients)
        passes.append((start(one, mine), mine, want))
        mine["segments"].view(np.uint8)[:] = 0xFF  # the caller's again
        mine["weights"][:] = np.nan
        while len(passes) > one.lag:
            outcome, mine, want = passes.popleft()
            got = {name: x for name, x in mine.items() if isinstance(x, np.ndarray)}
            outcome.wait()
            left = {name: x for name, x in want[1].items() if name not in ("segments", "weights")}
            assert_same_bits((outcome.finite(), got), (want[0], left))
    one.close()
    gpu.destroy_stream(1)
    assert gpu.in_use == 0


def test_outcomes_outlive_their_slots(gpu):
    one = DeviceUpdate(gpu, "float32")
    outcomes = []
    for i in range(3 * update.SLOTS):
        a, kept = make(np.random.default_rng(0), 10, 1, "float32")
        a["z"][3] = np.inf if i % 2 else 0
        outcomes.append((start(one, a), a, kept))
    assert [o.finite() for o, *_ in outcomes] == [True, False] * (3 * update.SLOTS // 2)
    one.close()
    assert outcomes[1][0].finite() is False


def test_what_did_not_change_is_not_copied_again(gpu, monkeypatch):
    copies = []
    copy = gpu.copy

    def counted(to, source, size, stream):
        copies.append(size)
        copy(to, source, size, stream)

    monkeypatch.setattr(gpu, "copy", counted)
    one = DeviceUpdate(gpu, "float32")
    a, _kept = make(np.random.default_rng(0), 100, 9, "float32", lengths=[40, 60], special=True)
    expected = [[16 * 2, 48 * 2, 8 * 9, 4 * 9], [], [48 * 2], [4 * 9, 8 * 9]]
    for change in range(4):
        copies.clear()
        if change == 2:
            a["segments"]["alpha"] += 1
        if change == 3:
            a["weights"] = a["weights"] + np.float32(1)
        want = run(reference.update, a)
        mine = a | {"v": a["v"].copy(), "z": a["z"].copy(), "at": a["at"].copy()}
        mine |= {"p": a["p"].copy(), "out": a["out"].copy(), "y": a["y"].copy()}
        assert start(one, mine).finite() == want[0].finite
        np.testing.assert_array_equal(mine["out"], want[1]["out"])
        assert sorted(copies) == sorted(expected[change])
    one.close()


def test_another_stream_waits_for_the_last_pass():
    """Both use the same tables on the device."""
    gpu = EmulatedGpu(main="threaded", seed=1)
    streams = [1, gpu.new_stream()]
    one = DeviceUpdate(gpu, "float32")
    rng = np.random.default_rng(0)
    passes = []
    for i in range(40):
        gpu.stream = lambda i=i: streams[i % 2]
        a, kept = make(rng, 9000, 9, "float32", in_place=False)
        want = run(reference.update, a)
        passes.append((start(one, a), a, want, kept))
    for outcome, a, want, _ in passes:
        outcome.wait()
        np.testing.assert_array_equal(a["out"], want[1]["out"])
    one.close()


def test_measures_must_be_asked_for(gpu):
    one = DeviceUpdate(gpu, "float32")
    a, _kept = make(np.random.default_rng(0), 10, 1, "float32")
    outcome = start(one, a)
    for method in (outcome.disagreement, outcome.gradient, outcome.moved, outcome.penalty):
        with pytest.raises(ValueError, match="measure="):
            method()
    one.close()


def test_structures_are_those_of_the_kernels():
    layout_of = shim.library().layout_of
    for structure in (update.Arguments, update.Partials):
        name = structure.__name__
        assert layout_of(name.encode()) == ctypes.sizeof(structure)
        for field, *_ in structure._fields_:
            offset = getattr(structure, field).offset
            assert layout_of(f"{name}.{field}".encode()) == offset, field
    assert layout_of(b"Tile") == layouts.TILE.itemsize
    for field, (_, offset) in layouts.TILE.fields.items():
        assert layout_of(f"Tile.{field}".encode()) == offset
    assert (layout_of(b"THREADS"), layout_of(b"MOST")) == (update.THREADS, update.MOST)


def _set(name, value):
    return lambda a: a | {name: value(a) if callable(value) else value}


MISTAKES = {
    "None": _set("z", None),
    "float64": _set("z", lambda a: a["z"].double()),
    "strided": _set("z", lambda a: a["z"].repeat_interleave(2)[::2]),
    "short": _set("v", lambda a: a["v"][1:]),
    "long": _set("at", lambda a: torch.cat([a["at"], a["at"]])),
    "scale": _set("scale", torch.ones(2)),
    "overflow": _set("overflow", torch.ones(1, dtype=torch.float64)),
    "other device": _set("y", torch.empty(50, device="meta")),
    "weights": _set("weights", np.ones(1, np.float32)),
    "weights float64": _set("weights", np.ones(2)),
    "no neighbour": _set("neighbours", lambda a: [a["neighbours"][0], 0]),
    "odd address": _set("p", lambda a: a["p"] + 1),
    "no q": _set("q", None),
    "two written": _set("v", lambda a: a["out"]),
    "shifted": _set("p", lambda a: a["neighbours"][0] + 4),
    "same but read": _set("neighbours", lambda a: [a["z"].data_ptr(), a["out"].data_ptr() - 4]),
    "no segments": _set("segments", None),
    "measure": _set("measure", 2),
    "measure less": _set("measure", -1),
    "other segments": _set("segments", np.zeros(3, np.float32)),
    "overlap": _set("segments", lambda a: np.repeat(a["segments"], 2)),
}


def _device_arguments():
    a, kept = make(np.random.default_rng(0), 50, 2, "float32", in_place=False)
    a["segments"]["own"] = 1
    kept.append(a)
    seen = {}
    start(lambda **b: seen.update(b), a)
    return seen, kept


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused(gpu, mistake):
    one = DeviceUpdate(gpu, "float32")
    a, _kept = _device_arguments()
    with pytest.raises(ValueError) as error:  # noqa: PT011  the messages differ
        one(**MISTAKES[mistake](a))
    assert "\n" not in str(error.value)
    assert one(**a).finite()  # and it goes on
    one.close()


@pytest.mark.parametrize(("field", "value"), [("offset", 1), ("length", -1), ("own", 2),
                                              ("offset", 2**63 - 1), ("grad", 12345)])  # fmt: skip
def test_bad_segments_are_refused(gpu, field, value):
    one = DeviceUpdate(gpu, "float32")
    a, _kept = _device_arguments()
    good = a["segments"].copy()
    a["segments"][field] = value
    with pytest.raises(ValueError, match="segments"):
        one(**a)
    assert one(**a | {"segments": good}).finite()
    with pytest.raises(ValueError, match="segments"):
        one(**a)
    one.close()


def test_unknown_wire(gpu):
    with pytest.raises(ValueError, match="float8"):
        DeviceUpdate(gpu, "float8")
