"""The GPU kernels, which the shim runs on the host, have the reference's bits: by DeviceUpdate."""

import ctypes
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from emulation import shim
from emulation.gpu import EmulatedGpu
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import WIRES, assert_same_bits, cases, from_case, make, run

from mpicdsgd.gpu import layouts, update
from mpicdsgd.gpu.update import DeviceUpdate
from mpicdsgd.native import SEGMENT, reference

pytestmark = pytest.mark.skipif(shim.compiler is None, reason="no C++ compiler")

TILE = layouts.TILE_ELEMENTS
LENGTHS = {
    "whole tiles": [2 * TILE],
    "tails": [TILE + 1, 3, 2 * TILE + 1023, 4 * 256 + 2, TILE - 1],
    "tiny": [1 + i % 7 for i in range(300)],
}


@pytest.fixture(autouse=True)
def _order():
    yield
    shim.library().set_order(0)


@pytest.fixture
def gpu():
    gpu = EmulatedGpu()
    yield gpu
    assert gpu.in_use == 0


def start(one, a, **more):
    """A pass of a DeviceUpdate with the arguments of `native.update`: host memory is the GPU's."""
    a = dict(a) | more
    del a["threads"], a["wire"]
    for name in ("out", "z", "at", "v", "y"):
        a[name] = None if a[name] is None else torch.from_numpy(a[name])
    for name in ("p", "q"):
        a[name] = None if a[name] is None else a[name].ctypes.data
    a["neighbours"] = [n.ctypes.data for n in a["neighbours"]]
    return one(**a)


def on(gpu, **more):
    """`native.update` by a DeviceUpdate of its own."""

    def call(**a):
        one = DeviceUpdate(gpu, a["wire"])
        outcome = start(one, a, **more)
        one.close()
        return outcome.finite()

    return call


@settings(max_examples=300, deadline=None)
@given(cases, st.integers(0, 5))
def test_bits(case, order):
    arguments, _kept = from_case(case)
    shim.library().set_order(order)
    got = run(on(EmulatedGpu()), arguments, case["shift"])
    assert_same_bits(got, run(reference.update, arguments))


def test_bits_of_every_kernel():
    """What hypothesis meets by chance: every kernel, in packs and element by element."""
    for wire in WIRES:
        for degree in range(12):
            for shift in (0, 1):
                a, _kept = make(np.random.default_rng(degree), 1100, degree, wire, shift=shift)
                got = run(on(EmulatedGpu()), a, shift)
                assert_same_bits(got, run(reference.update, a))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("degree", [0, 2, 8, 9, 14])
def test_tiles_do_not_show(gpu, wire, lengths, degree):
    size = sum(LENGTHS[lengths]) + 50
    a, _kept = make(np.random.default_rng(degree), size, degree, wire, lengths=LENGTHS[lengths])
    want = run(reference.update, a)
    for order in (0, 1, 7):
        shim.library().set_order(order)
        assert_same_bits(run(on(gpu), a), want)


def aligned(size, dtype, shift=0):
    """Random bits of finite values, on memory that begins ``shift`` elements after 64 bytes."""
    raw = np.random.default_rng(size).integers(0, 60, dtype().itemsize * (size + 64), np.uint8)
    start = -raw.ctypes.data % 64 + shift * dtype().itemsize
    return raw[start : start + size * dtype().itemsize].view(dtype)


@pytest.mark.parametrize("shift", [0, 1, 2, 4])
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_an_arena_is_read_in_packs(gpu, wire, shift):
    """But a tile whose gradient is an odd view into another is not."""
    wide = shim.library().wide_accesses
    size = 2 * TILE + 64
    a, _kept = make(np.random.default_rng(0), size, 3, wire, lengths=[size - 64], q=False)
    for name in ("z", "at", "v", "y"):
        a[name] = aligned(size, np.float32)
    stored = np.dtype(reference.WIRES[wire]).type
    a |= {"p": aligned(size, stored), "neighbours": [aligned(size, stored) for _ in range(3)]}
    gradient = aligned(size, np.float32, shift)
    a["segments"]["offset"], a["segments"]["grad"] = 64, gradient.ctypes.data
    a["segments"]["decay"], a["out"] = 0.5, a["z"]
    want = run(reference.update, a)
    one = DeviceUpdate(gpu, wire)
    before = wide()
    assert start(one, a).finite()
    # z, at, v, g and the neighbours are read, out, v, y and p written.
    assert wide() - before == (0 if shift % 4 else 2 * TILE // 4 * (4 + 3 + 4))
    for name in ("z", "v", "y", "p"):
        np.testing.assert_array_equal(a[name], want[1][name])
    one.close()


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
        assert start(one, mine).finite() == want[0]
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


@pytest.mark.parametrize("scale", [65536.0, 3.0, 1e-39, np.inf, 0.0, np.nan])
def test_scale_divides_the_gradient_as_torch_does(gpu, scale):
    for decay in (False, True):
        a, kept = make(np.random.default_rng(0), 3000, 2, "float32", decay=decay)
        scale = np.float32(scale)
        got = run(on(gpu, scale=torch.tensor([scale])), a)
        scaler = torch.amp.GradScaler("cpu", init_scale=float(scale))
        scaler.scale(torch.zeros(1))
        inverse = scaler._scale.double().reciprocal().float()
        for g in kept:
            torch.from_numpy(g).mul_(inverse)
        assert_same_bits(got, run(reference.update, a))


@pytest.mark.parametrize("found", [0.0, 1.0])
@pytest.mark.parametrize("degree", [0, 3, 9])
def test_overflow_leaves_the_gradient_out(gpu, found, degree):
    a, kept = make(np.random.default_rng(0), 3000, degree, "float16")
    kept[0][5] = np.inf
    one = DeviceUpdate(gpu, "float16")
    with_scale = {"scale": torch.tensor([2.0])} if degree else {}
    outcomes = []

    def call(**b):
        outcomes.append(start(one, b, overflow=torch.tensor([found]), **with_scale))
        return outcomes[0].finite()

    got = run(call, a)
    assert outcomes[0].skipped() is bool(found)
    if found:
        a["segments"]["grad"] = 0
    else:
        kept[0] *= np.float32(0.5) if degree else np.float32(1)
    want = run(reference.update, a)
    assert want[0] is bool(found)
    del want[1]["segments"]
    assert_same_bits(got, want)
    one.close()


def test_nothing_to_do_but_to_say_so(gpu):
    one = DeviceUpdate(gpu, "float32")
    for segments in (np.zeros(0, SEGMENT), np.zeros(2, SEGMENT)):
        a, _kept = make(np.random.default_rng(0), 0, 2, "float32", lengths=[])
        outcome = start(one, a | {"segments": segments}, overflow=torch.ones(1), disagreement=True)
        assert (outcome.finite(), outcome.skipped(), outcome.disagreement()) == (True, True, 0.0)
    one.close()


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("degree", [0, 1, 4, 11])
def test_disagreement(gpu, wire, degree):
    """To a tolerance, and the same in whatever order the blocks and threads run."""
    lengths = [TILE + 5, 0, 700, 3 * TILE, 11]
    a, _kept = make(np.random.default_rng(degree), 20_000, degree, wire, lengths=lengths)
    want = 0.0
    for s in a["segments"]:
        i = slice(s["offset"], s["offset"] + s["length"])
        q = a["q"][i] if s["own"] else reference.to_wire(a["z"][i], wire)
        for weight, p in zip(a["weights"], a["neighbours"], strict=True):
            apart = reference.from_wire(p[i], wire).astype(float) - reference.from_wire(q, wire)
            want += float(weight) * float((apart**2).sum())
    expected = run(reference.update, a)
    seen = set()
    for order in (0, 1, 3):
        shim.library().set_order(order)
        one = DeviceUpdate(gpu, wire)
        outcomes = []

        def call(one=one, outcomes=outcomes, **b):
            outcomes.append(start(one, b, disagreement=True))
            return outcomes[0].finite()

        assert_same_bits(run(call, a), expected)
        seen.add(outcomes[0].disagreement())
        one.close()
    assert len(seen) == 1
    assert seen.pop() == pytest.approx(want, rel=1e-5, abs=0 if degree else 1e-300)


def test_disagreement_must_be_asked_for(gpu):
    one = DeviceUpdate(gpu, "float32")
    a, _kept = make(np.random.default_rng(0), 10, 1, "float32")
    with pytest.raises(ValueError, match="disagreement=True"):
        start(one, a).disagreement()
    one.close()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 37, 98, TILE + 96])
def test_finite_flag(gpu, value, where):
    a, _kept = make(np.random.default_rng(0), TILE + 100, 1, "float32", lengths=[TILE + 99],
                    grad=False)  # fmt: skip
    a["segments"]["offset"] = a["segments"]["own"] = 0
    a["neighbours"][0][-1] = value  # outside the segment
    assert run(on(gpu), a)[0] is True
    a["z"][where] = value
    assert run(on(gpu), a)[0] is False


def test_finite_flag_knows_what_overflows_in_the_wire(gpu):
    for wire, largest, finite in [
        ("float32", 1e38, True), ("bfloat16", 1e38, True), ("bfloat16", 3.4e38, False),
        ("float16", 65504, True), ("float16", 65520, False),
    ]:  # fmt: skip
        for p in (True, False):
            a, _kept = make(np.random.default_rng(0), 100, 0, wire, grad=False, p=p, q=False)
            a["z"][41] = largest
            assert run(on(gpu), a)[0] is finite, (wire, largest, p)


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


# The shim itself: what it is to notice, it notices.


def _launch(**fields):
    tiles = np.zeros(1, layouts.TILE)
    segments = np.zeros(1, SEGMENT)
    values = np.zeros(64, np.float32)
    tiles["length"] = 8
    keep = SimpleNamespace(tiles=tiles, segments=segments, values=values)
    a = update.Arguments(
        out=values.ctypes.data, z=values.ctypes.data, tiles=tiles.ctypes.data,
        segments=segments.ctypes.data, aligned=1,
    )  # fmt: skip
    for name, shift in fields.items():
        setattr(a, name, getattr(a, name) + shift)
    return keep, a


def test_the_shim_refuses_what_a_gpu_would():
    _keep, a = _launch()
    shim.launch("update_float32_0", 1, update.THREADS, a)
    with pytest.raises(RuntimeError, match="unknown kernel"):
        shim.launch("update_float32_99", 1, update.THREADS, a)
    with pytest.raises(RuntimeError, match="wrong size"):
        shim.launch("add_partials", 1, update.THREADS, a)
    _keep, a = _launch(z=4)
    with pytest.raises(RuntimeError, match="misaligned"):
        shim.launch("update_float32_0", 1, update.THREADS, a)
