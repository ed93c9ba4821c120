"""The GPU kernels, which the shim runs on the host, have the reference's bits: by DeviceUpdate."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from emulation import shim
from emulation.gpu import EmulatedGpu
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import (
    WIRES,
    assert_measured,
    assert_same_bits,
    cases,
    from_case,
    make,
    run,
    sums,
)  # fmt: skip

from mpicdsgd.kernels.gpu import layouts, update
from mpicdsgd.kernels.gpu.update import DeviceUpdate
from mpicdsgd.kernels.native import SEGMENT, reference

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
    """`kernels.native.update` by a DeviceUpdate of its own."""

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
    assert want[0].finite is bool(found)
    del want[1]["segments"]
    assert_same_bits(got, want)
    one.close()


def test_nothing_to_do_but_to_say_so(gpu):
    one = DeviceUpdate(gpu, "float32")
    for segments in (np.zeros(0, SEGMENT), np.zeros(2, SEGMENT)):
        a, _kept = make(np.random.default_rng(0), 0, 2, "float32", lengths=[])
        more = {"overflow": torch.ones(1), "measure": len(segments)}
        outcome = start(one, a | {"segments": segments}, **more)
        assert (outcome.finite(), outcome.skipped()) == (True, True)
        if len(segments):
            assert said(outcome) == (0.0, 0.0, 0.0, 0.0)
    one.close()


def said(outcome):
    return outcome.disagreement(), outcome.gradient(), outcome.moved(), outcome.penalty()


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("degree", [0, 1, 4, 11])
@pytest.mark.parametrize("measure", [1, 3, 5])
def test_what_is_measured(gpu, wire, degree, measure):
    """To a tolerance, and the same in whatever order the blocks and threads run."""
    lengths = [TILE + 5, 0, 700, 3 * TILE, 11]
    a, _kept = make(np.random.default_rng(degree), 20_000, degree, wire, lengths=lengths)
    last = np.full(11, 100.0, np.float32)  # counts where all are measured
    a["segments"]["grad"][-1] = last.ctypes.data
    expected = run(reference.update, a)
    seen = set()
    for order in (0, 1, 3):
        shim.library().set_order(order)
        one = DeviceUpdate(gpu, wire)
        outcomes = []

        def call(one=one, outcomes=outcomes, **b):
            outcomes.append(start(one, b, measure=measure))
            return outcomes[0].finite()

        assert_same_bits(run(call, a), expected)
        seen.add(said(outcomes[0]))
        one.close()
    (found,) = seen
    assert_measured(reference.Result(True, *found), a, expected[1], measure)


@pytest.mark.parametrize("overflow", [0.0, 1.0])
def test_the_gradient_measured_is_the_one_applied(gpu, overflow):
    a, _kept = make(np.random.default_rng(0), 3000, 2, "float32")
    one = DeviceUpdate(gpu, "float32")
    more = {"scale": torch.tensor([4.0]), "overflow": torch.tensor([overflow])}
    a["segments"]["decay"] = 0
    want = 0.0 if overflow else sums(a, a, 1)[0].gradient / 16
    assert start(one, a, measure=1, **more).gradient() == pytest.approx(want, rel=1e-6)
    assert want > 0 or overflow
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
