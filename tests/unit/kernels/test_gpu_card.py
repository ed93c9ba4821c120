"""The kernels on a card give the host's bits: every kernel, odd addresses, values that are none.

Without a card (marker `gpu`) the same tests run on the emulated one, for their own sake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from emulation import shim
from emulation.gpu import EmulatedGpu
from numpy.typing import NDArray
from test_native import WIRES, assert_same_bits, make, run

from mpicdsgd.kernels import gpu
from mpicdsgd.kernels.gpu.update import DeviceUpdate
from mpicdsgd.kernels.native import reference, update

CARDS = [
    pytest.param("emulated", marks=pytest.mark.skipif(shim.compiler is None, reason="no compiler")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(gpu.why_not() != "", reason=gpu.why_not())],
    ),
]


@pytest.fixture(params=CARDS)
def card(request: pytest.FixtureRequest) -> Any:
    if request.param == "emulated":
        return EmulatedGpu()
    real = gpu.open_gpu(0)
    real.prepare()
    return real


def on(
    card: Any, shift: int = 0, before: Callable[..., None] | None = None, **more: Any
) -> Callable[..., Any]:
    """`native.update` by the card: everything goes there, ``shift`` elements off, and back."""

    def call(**a: Any) -> Any:
        tensors: dict[int, torch.Tensor] = {}

        def there(x: NDArray[Any]) -> torch.Tensor:
            if x.ctypes.data not in tensors:
                signed = x.view(np.int16) if x.dtype == np.uint16 else x
                room = torch.zeros(x.size + shift, dtype=torch.from_numpy(signed).dtype)
                room = room.to(card.torch_device)
                room[shift:] = torch.from_numpy(signed.copy()).to(card.torch_device)
                tensors[x.ctypes.data] = room[shift:]
            return tensors[x.ctypes.data]

        wire = a.pop("wire")
        del a["threads"]
        given = {name: a[name] for name in ("out", "z", "at", "v", "y", "p", "q")}
        moved = {name: None if x is None else there(x) for name, x in given.items()}
        for name in ("p", "q"):
            t = moved[name]
            moved[name] = None if t is None else t.data_ptr()
        segments = a["segments"].copy()
        for s in segments:
            gradient = reference._gradient(s)
            s["grad"] = 0 if gradient is None else there(gradient).data_ptr()
        near = [there(n).data_ptr() for n in a["neighbours"]]
        one = DeviceUpdate(card, wire)
        outcome = one(**moved, neighbours=near, weights=a["weights"], segments=segments, **more)  # type: ignore[arg-type]
        one.close()
        for x in given.values():
            if x is not None:
                back = there(x).cpu().numpy()
                x[:] = back.view(x.dtype)
        call.outcome = outcome  # type: ignore[attr-defined]
        return outcome.finite()

    return call


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("degree", [*range(10), 12])
def test_every_kernel(card: Any, wire: str, degree: int) -> None:
    for shift in (0, 1):
        for special in (False, True):
            rng = np.random.default_rng(degree)
            lengths = [5000, 3, 4097, 700]
            a, _kept = make(rng, 9900, degree, wire, lengths=lengths, special=special)
            assert_same_bits(run(on(card, shift), a), run(update, a))


@pytest.mark.parametrize("scale", [1024.0, 3.0, 1e-39, 3e38])
def test_scale(card: Any, scale: float) -> None:
    a, kept = make(np.random.default_rng(0), 3000, 2, "float32")
    there = torch.tensor(scale, device=card.torch_device)
    got = run(on(card, scale=there), a)
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / np.float32(scale)
        for g in kept:
            g *= inverse
    assert_same_bits(got, run(update, a))


@pytest.mark.parametrize("overflow", [0.0, 1.0, float("nan")])
def test_overflow(card: Any, overflow: float) -> None:
    a, _kept = make(np.random.default_rng(0), 3000, 2, "float32")
    call = on(card, overflow=torch.tensor(overflow, device=card.torch_device))
    got = run(call, a)
    assert call.outcome.skipped() == (overflow != 0)  # type: ignore[attr-defined]
    if overflow != 0:
        a["segments"]["grad"] = 0
    want = run(update, a)
    del want[1]["segments"]
    assert_same_bits(got, want)


@pytest.mark.parametrize("wire", WIRES)
def test_what_is_measured(card: Any, wire: str) -> None:
    for degree in (0, 1, 3, 9):
        a, _kept = make(np.random.default_rng(degree), 20_000, degree, wire, grad=False, v=False,
                        q=False, in_place=False)  # fmt: skip
        call = on(card, measure=1)
        got = run(call, a)
        assert_same_bits(got, run(update, a))
        own = reference.from_wire(reference.to_wire(a["z"], wire), wire).astype(np.float64)
        inside = np.zeros(20_000, bool)
        for s in a["segments"]:
            inside[s["offset"] : s["offset"] + s["length"]] = True
        terms = [
            w * ((reference.from_wire(n, wire) - own)[inside] ** 2).sum()
            for w, n in zip(a["weights"].astype(float), a["neighbours"], strict=True)
        ]
        size = sum(map(abs, terms)) or 1.0
        assert abs(call.outcome.disagreement() - sum(terms)) <= 1e-5 * size  # type: ignore[attr-defined]
