"""The compiled kernels give the reference's bits, and the reference what its docstring says."""

import itertools
import logging
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicdsgd.kernels import native
from mpicdsgd.kernels.native import SEGMENT, Result, dispatch, reference

compiled = dispatch._compiled and SimpleNamespace(
    isa=dispatch._compiled.isa, update=lambda **a: Result(*dispatch._compiled.update(**a))
)
needs_compiled = pytest.mark.skipif(compiled is None, reason=f"no compiled kernel: {native.reason}")
ISAS = [] if compiled is None else sorted({"generic", compiled.isa})
WIRES = ["float32", "bfloat16", "float16"]
SPECIALS = np.array(
    [0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -3e-39, 1.5e-8, 65504, 65519.9, 65520, 3.4e38, 1],
    np.float32,
)


def make(rng, size, degree, wire, *, lengths=None, special=False, shift=0, **options):
    """Arguments of an update at random. Options: v, y, p, q, grad, decay, in_place (all bools)."""
    has = dict.fromkeys(("v", "y", "p", "q", "grad", "decay", "in_place"), True) | options

    def values(n):
        x = rng.standard_normal(n + shift).astype(np.float32)
        if special:
            where = rng.random(n + shift) < 0.3
            x[where] = rng.choice(SPECIALS, where.sum())
        return x[shift:]  # unaligned to the vectors

    def published():
        return reference.to_wire(values(size), wire).copy()

    lengths = [size] if lengths is None else lengths
    segments = np.zeros(len(lengths), SEGMENT)
    segments["length"] = lengths
    gaps = rng.multinomial(size - sum(lengths), np.full(len(lengths) + 1, 1 / (len(lengths) + 1)))
    segments["offset"] = np.cumsum(gaps[:-1]) + np.cumsum([0, *lengths[:-1]])
    kept = []  # the gradients, as long as the arguments are in use
    for s in segments:
        for name in ("alpha", "mu", "c_v", "c_g"):
            s[name] = rng.standard_normal()
        s["decay"] = rng.standard_normal() * (has["decay"] and rng.random() < 0.5)
        s["own"] = has["q"] and rng.integers(2)
        if has["grad"] and rng.random() < 0.8:
            kept.append(values(s["length"]))
            s["grad"] = kept[-1].ctypes.data
    a: dict[str, Any] = {name: values(size) for name in ("z", "at")}
    a |= {name: values(size) if has[name] else None for name in ("v", "y")}
    a |= {name: published() if has[name] else None for name in ("p", "q")}
    a |= {"neighbours": [published() for _ in range(degree)], "weights": values(degree)}
    a |= {"segments": segments, "wire": wire, "threads": 1, "out": values(size)}
    if has["in_place"]:
        a["out"] = a["z"]
        a["p"] = a["p"] if a["q"] is None else a["q"]
        a["y"] = None if a["y"] is None else a["at"]
    return a, kept


def run(function, arguments, shift=0, **more):
    """Update copies, unaligned by shift; returns what it returned, and all arrays afterwards."""
    copies: dict[int, Any] = {}
    a = dict(arguments)
    for name, x in arguments.items():  # the same memory stays the same memory
        if isinstance(x, np.ndarray):
            if id(x) not in copies:
                copies[id(x)] = np.empty(x.size + shift, x.dtype)[shift:]
                copies[id(x)][:] = x
            a[name] = copies[id(x)]
    result = function(**a, **more)
    return result, {name: x for name, x in a.items() if isinstance(x, np.ndarray)}


def finite(result):
    return getattr(result, "finite", result)


def assert_same_bits(got, want):
    assert finite(got[0]) == finite(want[0])
    for name, x in want[1].items():
        y = got[1][name]
        if x.dtype == np.float32:  # which NaN a NaN is depends on the compiler's operand order
            nan = np.isnan(x)
            np.testing.assert_array_equal(nan, np.isnan(y), err_msg=name)
            x, y = (np.where(nan, 0, a).view(np.uint32) for a in (x, y))
        np.testing.assert_array_equal(y, x, err_msg=name)


def by_hand(a):
    """One element after the other, from the docstring, each operation rounded to float32."""
    f, wire = np.float32, a["wire"]
    for s in a["segments"]:
        g = reference._gradient(s)
        for k in range(s["length"]):
            i = s["offset"] + k
            z, at = a["z"][i], a["at"][i]
            own = reference.from_wire(
                (a["q"] if s["own"] else reference.to_wire(a["z"], wire)), wire
            )
            acc = z
            for w, p in zip(a["weights"], a["neighbours"], strict=True):
                acc = f(acc + f(w * f(reference.from_wire(p, wire)[i] - own[i])))
            if g is not None:
                h = g[k] if s["decay"] == 0 else f(g[k] + f(s["decay"] * at))
                step = f(s["alpha"] * h)
                if a["v"] is not None:
                    a["v"][i] = f(f(s["mu"] * a["v"][i]) - step)
                    acc = f(acc + f(s["c_v"] * a["v"][i]))
                acc = f(acc - f(s["c_g"] * step))
            a["out"][i] = acc
            if a["y"] is not None:
                a["y"][i] = acc if a["v"] is None else f(acc + f(s["mu"] * a["v"][i]))
            if a["p"] is not None:
                a["p"][i] = reference.to_wire(np.array([acc]), wire)[0]
    return True


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "lengths": st.lists(st.integers(0, 70), min_size=1, max_size=4),
        "gap": st.integers(0, 20),
        "degree": st.integers(0, 28),
        "wire": st.sampled_from(WIRES),
        "special": st.booleans(),
        "shift": st.integers(0, 3),
        "options": st.fixed_dictionaries(
            {k: st.booleans() for k in ("v", "y", "p", "q", "grad", "decay", "in_place")}
        ),
    }
)


def from_case(c):
    size = sum(c["lengths"]) + c["gap"]
    return make(np.random.default_rng(c["seed"]), size, c["degree"], c["wire"],
                lengths=c["lengths"], special=c["special"], shift=c["shift"],
                **c["options"])  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(cases)
def test_reference_does_what_it_says(case):
    case = case | {"special": False, "lengths": [n % 12 for n in case["lengths"]]}
    arguments, _kept = from_case(case)
    assert_same_bits(run(reference.update, arguments), run(lambda **a: by_hand(a), arguments))


@needs_compiled
@settings(max_examples=300, deadline=None)
@given(cases)
def test_compiled_has_the_references_bits(case):
    arguments, _kept = from_case(case)
    want = run(reference.update, arguments)
    for isa, stream in itertools.product(ISAS, (0, 1)):
        got = run(compiled.update, arguments, case["shift"], isa=isa, stream=stream)
        assert_same_bits(got, want)


@needs_compiled
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("degree", [0, 3, 12, 13, 27])
def test_threads_and_tiles_do_not_show(wire, degree):
    lengths = [1, 8191, 4097, 60001, 0, 33333, 17]
    arguments, _kept = make(np.random.default_rng(degree), 106_000, degree, wire, lengths=lengths)
    want = run(reference.update, arguments)
    for isa in ISAS:
        for threads, stream in ((1, 0), (2, 1), (1000, 1)):
            got = run(compiled.update, arguments | {"threads": threads}, isa=isa, stream=stream)
            assert_same_bits(got, want)


def sums(a, written, measure):
    """The sums of the first segments in float64, and the sizes of what is added up.

    Weights and decays have both signs here: a sum may be much smaller than what it is made of.
    """
    disagreement = gradient = moved = penalty = apart = held = 0.0
    for s in a["segments"][:measure]:
        i = slice(s["offset"], s["offset"] + s["length"])
        own = a["q"][i] if s["own"] else reference.to_wire(a["z"][i], a["wire"])
        for weight, p in zip(a["weights"].astype(float), a["neighbours"], strict=True):
            near = reference.from_wire(p[i], a["wire"]).astype(float)
            squared = ((near - reference.from_wire(own, a["wire"])) ** 2).sum()
            disagreement += weight * squared
            apart += abs(weight) * squared
        if s["grad"] and s["length"]:
            # In float32, as the pass has it: where g and decay * x cancel it is little else.
            h = reference._gradient(s) + s["decay"] * a["at"][i]
            gradient += (h.astype(float) ** 2).sum()
        squared = (a["at"][i].astype(float) ** 2).sum()
        penalty += float(s["decay"]) * squared
        held += abs(float(s["decay"])) * squared
        moved += ((written["out"][i].astype(float) - a["out"][i]) ** 2).sum()
    sums = reference.Result(True, disagreement, gradient, moved, penalty)
    return sums, reference.Result(True, apart, gradient, moved, held)


def assert_measured(result, a, written, measure):
    want, size = sums(a, written, measure)
    for name in ("disagreement", "gradient", "moved", "penalty"):
        error = abs(getattr(result, name) - getattr(want, name))
        assert error <= 1e-6 * getattr(size, name), name


@settings(max_examples=150, deadline=None)
@given(cases, st.integers(0, 4))
def test_what_is_measured(case, measure):
    """And measuring changes no bit of what is written."""
    case = case | {"special": False}
    measure = min(measure, len(case["lengths"]))
    arguments, _kept = from_case(case)
    want = run(reference.update, arguments)
    functions = [(reference.update, {})]
    functions += [(compiled.update, {"isa": isa, "stream": s}) for isa in ISAS for s in (0, 1)]
    for function, more in functions:
        got = run(function, arguments, case["shift"], measure=measure, **more)
        assert_same_bits(got, want)
        if measure:
            assert_measured(got[0], arguments, want[1], measure)
        else:
            assert np.isnan(got[0][1:]).all()


@needs_compiled
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("degree", [0, 2, 12, 13, 27])
def test_what_is_measured_with_threads_and_tiles(wire, degree):
    lengths = [1, 8191, 4097, 60001, 0, 33333, 17]
    arguments, _kept = make(np.random.default_rng(degree), 106_000, degree, wire, lengths=lengths)
    want = run(reference.update, arguments)
    for isa, threads, measure in itertools.product(ISAS, (1, 3), (1, 4, 7)):
        a = arguments | {"threads": threads}
        got = [run(compiled.update, a, isa=isa, measure=measure) for _ in range(3)]
        assert_same_bits(got[0], want)
        assert_measured(got[0][0], arguments, want[1], measure)
        assert got[0][0] == got[1][0] == got[2][0]


@pytest.mark.parametrize("isa", ["numpy", *ISAS])
def test_small_differences_of_large_values_are_measured(isa):
    """<x, x - mix> would have no digit of it; nor would a sum in float32 over so many elements."""
    update = reference.update if isa == "numpy" else compiled.update
    size = 3_000_000
    a, _kept = make(np.random.default_rng(0), size, 1, "float32", lengths=[size], q=False,
                    v=False, y=False, grad=False, in_place=False)  # fmt: skip
    a["z"][:], a["weights"][:] = 1.0, 0.3
    a["neighbours"][0][:] = np.float32(1 + 2.0**-23)
    more = {} if isa == "numpy" else {"isa": isa}
    found = update(**a, measure=1, **more).disagreement
    assert found == pytest.approx(0.3 * size * 2.0**-46, rel=1e-5)


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
@pytest.mark.parametrize("isa", ["numpy", *ISAS])
def test_wires_against_torch(wire, isa):
    """All 65,536 values widened; float32 values around every one of them, and others, rounded."""
    dtype = getattr(torch, wire)
    stored = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    wide = torch.from_numpy(stored.view(np.int16)).view(dtype).float().numpy()
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32)
    half = np.uint32(0x8000 if wire == "bfloat16" else 0x1000)
    near = (
        wide.view(np.uint32)[None] + np.array([0, 1, half - 1, half, half + 1], np.uint32)[:, None]
    )
    x = np.concatenate([bits.view(np.float32), near.ravel().view(np.float32), SPECIALS])

    def update(z, neighbours):
        segments = np.zeros(1, SEGMENT)
        segments["length"], segments["own"] = z.size, 1
        a = {"out": np.empty_like(z), "z": z, "at": z, "v": None, "y": None, "wire": wire}
        a |= {"p": np.empty(z.size, np.uint16), "q": np.zeros(z.size, np.uint16)}
        a |= {"neighbours": neighbours, "weights": np.ones(len(neighbours), np.float32)}
        a |= {"segments": segments, "threads": 1}
        if isa == "numpy":
            reference.update(**a)
        else:
            compiled.update(**a, isa=isa)
        return a["out"], a["p"]

    out, _ = update(np.zeros(stored.size, np.float32), [stored])
    np.testing.assert_array_equal(out, wide)  # equal_nan
    _, p = update(x, [])
    want = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    quiet = np.uint16(0x7FC0 if wire == "bfloat16" else 0x7E00)
    np.testing.assert_array_equal(p, np.where(np.isnan(x), quiet, want))


@needs_compiled
def test_subnormals_survive_a_caller_who_flushes_them():
    a, _kept = make(np.random.default_rng(0), 100_000, 2, "float16", grad=False, v=False)
    a["z"][:] = 3e-39
    want = run(reference.update, a)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        got = [run(compiled.update, a | {"threads": t}, isa=i) for t in (1, 2) for i in ISAS]
        assert np.float32(1e-39) * np.float32(1) == 0  # the caller's mode is as it was
    finally:
        torch.set_flush_denormal(False)
    for one in got:
        assert_same_bits(one, want)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 37, 98])
@pytest.mark.parametrize("isa", ["numpy", *ISAS])
def test_finite_flag(value, where, isa):
    a, _kept = make(np.random.default_rng(0), 100, 1, "float32", lengths=[99], grad=False)
    update = reference.update if isa == "numpy" else compiled.update
    more = {} if isa == "numpy" else {"isa": isa}
    a["segments"]["offset"] = 0
    a["neighbours"][0][99] = value  # outside the segment
    assert run(update, a, **more)[0].finite is True
    a["neighbours"][0][:99] = a["z"][:99]
    a["segments"]["own"], a["z"][where] = 0, value
    assert run(update, a, **more)[0].finite is False


@pytest.mark.parametrize("isa", ["numpy", *ISAS])
def test_finite_flag_knows_what_overflows_in_the_wire(isa):
    update = reference.update if isa == "numpy" else compiled.update
    more = {} if isa == "numpy" else {"isa": isa}
    for wire, largest, finite in [
        ("float32", 1e38, True), ("bfloat16", 1e38, True), ("bfloat16", 3.4e38, False),
        ("float16", 65504, True), ("float16", 65520, False),
    ]:  # fmt: skip
        a, _kept = make(np.random.default_rng(0), 100, 0, wire, lengths=[100], grad=False)
        a["segments"]["own"] = 0
        a["z"][41] = largest
        assert run(update, a, **more)[0].finite is finite, (wire, largest)


def _seg(name, value):
    def change(a):
        a["segments"][name] = value

    return change


def _set(name, value):
    def change(a):
        a[name] = value(a) if callable(value) else value

    return change


MISTAKES = {
    "None": _set("z", None),
    "no out": _set("out", None),
    "float64": _set("z", lambda a: a["z"].astype(np.float64)),
    "big endian": _set("at", lambda a: a["at"].astype(">f4")),
    "list": _set("out", [0.0] * 50),
    "2-D": _set("v", lambda a: a["v"].reshape(5, 10)),
    "strided": _set("z", lambda a: np.repeat(a["z"], 2)[::2]),
    "short": _set("p", lambda a: a["p"][:-1]),
    "wire's dtype": _set("wire", "bfloat16"),
    "wire unknown": _set("wire", "float8"),
    "threads": _set("threads", 0),
    "measure": _set("measure", 2),
    "measure less": _set("measure", -1),
    "weights": _set("weights", np.ones(1, np.float32)),
    "neighbour": _set("neighbours", lambda a: [a["z"], a["z"][1:]]),
    "no neighbour": _set("neighbours", lambda a: [a["z"].copy(), None]),
    "segments": _set("segments", np.zeros(3, np.float32)),
    "no segments": _set("segments", None),
    "unaligned": _set("at", lambda a: np.zeros(204, np.uint8)[1:201].view(np.float32)),
    "no q": _set("q", None),
    "two written": _set("v", lambda a: a["out"]),
    "shifted": _set("out", lambda a: np.concatenate([a["z"], a["z"]])[:50]),
    "past the end": _seg("offset", 1),
    "negative": _seg("length", -1),
    "wraps round": _seg("offset", 2**63 - 1),
    "own": _seg("own", 2),
    "odd address": _seg("grad", 12345),
    "overlap": _set("segments", lambda a: np.repeat(a["segments"], 2)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("backend", ["numpy", pytest.param("compiled", marks=needs_compiled)])
def test_mistakes_are_refused(mistake, backend):
    a, _kept = make(np.random.default_rng(0), 50, 2, "float32", in_place=False)
    a["segments"]["own"] = 1
    MISTAKES[mistake](a)
    if mistake == "shifted":
        a["z"] = a["out"].base[1:51]
    with pytest.raises(ValueError) as error:  # noqa: PT011  the messages differ
        (reference if backend == "numpy" else compiled).update(**a)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["numpy", pytest.param("compiled", marks=needs_compiled)])
def test_read_only_inputs_are_taken_and_outputs_refused(backend):
    a, _kept = make(np.random.default_rng(0), 50, 2, "float32", in_place=False)
    for x in (a["z"], a["at"], a["q"], a["weights"], a["segments"], *a["neighbours"]):
        x.flags.writeable = False
    update = (reference if backend == "numpy" else compiled).update
    assert update(**a).finite
    for name in ("out", "v", "y", "p"):
        kept, a[name] = a[name], a[name].copy()
        a[name].flags.writeable = False
        with pytest.raises(ValueError, match=f"^{name}: "):
            update(**a)
        a[name] = kept


def test_empty():
    a, _kept = make(np.random.default_rng(0), 0, 3, "float32", lengths=[0, 0])
    assert native.update(**a).finite
    assert native.update(**a | {"segments": np.zeros(0, SEGMENT)}).finite
    assert native.update(**a, measure=2) == (True, 0.0, 0.0, 0.0, 0.0)


FALLBACK = """
import logging, sys
import numpy as np
{before}
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(name)s %(message)s")
from mpicdsgd.kernels import native
assert (native.backend, native.isa) == ("numpy", "numpy"), native.backend
x = np.ones(4, np.float32)
s = np.zeros(1, native.SEGMENT)
s["length"] = 4
for _ in range(3):
    assert native.update(x, x, at=x, v=None, y=None, p=None, q=None, neighbours=[],
                         weights=x[:0], segments=s, wire="float32", threads=1).finite
print(native.reason)
"""


@pytest.mark.parametrize(
    ("kernel", "before", "reason"),
    [
        ("numpy", "", "MPICDSGD_KERNEL=numpy"),
        ("", "sys.modules['mpicdsgd.kernels.native._native'] = None", "cannot be imported"),
    ],
)
def test_the_fallback_is_said_once(kernel, before, reason):
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK.format(before=before)],
        env=os.environ | {"MPICDSGD_KERNEL": kernel},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    warning, said = done.stdout.splitlines()
    assert warning.startswith("WARNING mpicdsgd ")
    assert reason in warning
    assert reason in said


def test_an_unknown_choice_is_said(monkeypatch, caplog):
    monkeypatch.setenv("MPICDSGD_KERNEL", "fortran")
    monkeypatch.setattr(dispatch, "_said", False)
    a, _kept = make(np.random.default_rng(0), 100, 1, "float32", lengths=[99], grad=False)
    with caplog.at_level(logging.WARNING, "mpicdsgd"):
        run(dispatch.update, a)
        run(dispatch.update, a)
    assert caplog.text.count("fortran") == 1
