"""The fused update in NumPy: the oracle of the compiled kernels, and the fallback without one.

The same operations in the same order as update.h, hence the same bits.
"""

import ctypes
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Segment in update.h. `grad` is the address of a contiguous float32 gradient, 0 where there is
# none; offset and length count elements of the flat buffers.
SEGMENT = np.dtype(
    [
        ("offset", np.int64),
        ("length", np.int64),
        ("grad", np.uint64),
        ("alpha", np.float32),
        ("decay", np.float32),
        ("mu", np.float32),
        ("c_v", np.float32),
        ("c_g", np.float32),
        ("own", np.int32),
    ],
    align=True,
)

WIRES = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.uint16}
BLOCK = 1 << 15  # elements: the temporaries stay in the cache


class Result(NamedTuple):
    """What a pass says of itself.

    Attributes:
        finite: whether all that it wrote is finite, also as rounded to the wire.
        disagreement: sum_l w_l |p_l - q_|^2 over the segments measured; NaN if none was asked for.
        gradient: |h|^2 over them, h = g + decay * at, and 0 without a gradient; likewise.
        moved: |out - what stood there before|^2 over them; likewise.
        penalty: sum of decay |at|^2 over them, with a gradient or without; likewise.
    """

    finite: bool
    disagreement: float
    gradient: float
    moved: float
    penalty: float


def to_wire(x: NDArray[np.float32], wire: str) -> NDArray[Any]:
    """Round float32 values to the wire's dtype (16-bit ones as uint16), to nearest even."""
    if wire == "float32":
        return x
    if wire == "float16":
        with np.errstate(all="ignore"):
            h: NDArray[np.uint16] = x.astype(np.float16).view(np.uint16)
        nan = 0x7E00
    else:
        b = np.ascontiguousarray(x).view(np.uint32)
        rounded = b + np.uint32(0x7FFF) + (b >> np.uint32(16) & np.uint32(1))
        h = (rounded >> np.uint32(16)).astype(np.uint16)
        nan = 0x7FC0
    return np.where(np.isnan(x), np.uint16(nan), h)


def from_wire(h: NDArray[Any], wire: str) -> NDArray[np.float32]:
    """Widen the wire's values to float32, exactly."""
    if wire == "float32":
        return h
    if wire == "float16":
        with np.errstate(invalid="ignore"):
            return h.view(np.float16).astype(np.float32)
    return (h.astype(np.uint32) << np.uint32(16)).view(np.float32)


def update(
    out: NDArray[np.float32],
    z: NDArray[np.float32],
    *,
    at: NDArray[np.float32],
    v: NDArray[np.float32] | None,
    y: NDArray[np.float32] | None,
    p: NDArray[Any] | None,
    q: NDArray[Any] | None,
    neighbours: Sequence[NDArray[Any]],
    weights: NDArray[np.float32],
    segments: NDArray[np.void],
    wire: str,
    threads: int,
    measure: int = 0,
) -> Result:
    """The NumPy form of `kernels.native.update`; ``threads`` changes nothing here."""
    _check(out, z, at, v, y, p, q, neighbours, weights, segments, wire, threads)
    if not 0 <= measure <= len(segments):
        raise ValueError(f"measure: 0 to the {len(segments)} segments, got {measure}")
    finite = True
    disagreement = gradient = moved = penalty = 0.0 if measure else float("nan")
    for number, s in enumerate(segments):
        offset, length = int(s["offset"]), int(s["length"])
        g = _gradient(s)
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            i = slice(offset + start, offset + stop)
            with np.errstate(all="ignore"):
                own = from_wire(q[i] if s["own"] and q is not None else to_wire(z[i], wire), wire)
                near = [from_wire(n[i], wire) for n in neighbours]
                acc = _mixed(z[i], own, near, weights)
                if number < measure:
                    disagreement += _apart(own, near, weights)
                    penalty += float(s["decay"]) * _squared(at[i]) if s["decay"] != 0 else 0.0
                v_i = None if v is None else v[i]
                if g is not None:
                    h = g[start:stop] + s["decay"] * at[i] if s["decay"] != 0 else g[start:stop]
                    if number < measure:
                        gradient += _squared(h)
                    acc = _stepped(acc, h, v_i, s)
                ahead = acc if v_i is None else acc + s["mu"] * v_i
                if number < measure:
                    moved += _squared(acc - out[i])
            finite = finite and bool(np.isfinite(from_wire(to_wire(acc, wire), wire)).all())
            out[i] = acc
            if y is not None:
                y[i] = ahead
            if p is not None:
                p[i] = to_wire(acc, wire)
    return Result(finite, disagreement, gradient, moved, penalty)


def _mixed(
    z: NDArray[np.float32],
    own: NDArray[np.float32],
    near: list[NDArray[np.float32]],
    weights: NDArray[np.float32],
) -> NDArray[np.float32]:
    acc = z
    for weight, p in zip(weights, near, strict=True):
        acc = acc + weight * (p - own)
    return acc


def _apart(
    own: NDArray[np.float32], near: list[NDArray[np.float32]], weights: NDArray[np.float32]
) -> float:
    return sum(
        float(weight) * _squared(p.astype(np.float64) - own)
        for weight, p in zip(weights, near, strict=True)
    )


def _squared(x: NDArray[Any]) -> float:
    x_64 = x.astype(np.float64, copy=False)
    return float(np.dot(x_64, x_64))


def _stepped(
    acc: NDArray[np.float32],
    h: NDArray[np.float32],
    v: NDArray[np.float32] | None,
    s: np.void,
) -> NDArray[np.float32]:
    """The gradient's part; ``v`` is updated in place."""
    a = s["alpha"] * h
    if v is not None:
        v[:] = s["mu"] * v - a
        acc = acc + s["c_v"] * v
    stepped: NDArray[np.float32] = acc - s["c_g"] * a
    return stepped


def _gradient(s: np.void) -> NDArray[np.float32] | None:
    """The gradient that a segment points to, as an array over that memory."""
    if s["grad"] == 0 or s["length"] == 0:
        return None
    memory = (ctypes.c_float * int(s["length"])).from_address(int(s["grad"]))
    return np.ctypeslib.as_array(memory)


def _check(
    out: Any, z: Any, at: Any, v: Any, y: Any, p: Any, q: Any,
    neighbours: Sequence[Any], weights: Any, segments: Any, wire: str, threads: int,
) -> None:  # fmt: skip
    """The checks of host.cpp."""
    if wire not in WIRES:
        raise ValueError(f"wire: float32, bfloat16 or float16, got {wire!r}")
    if threads < 1:
        raise ValueError(f"threads: at least 1, got {threads}")
    stored = WIRES[wire]
    _check_array("z", z, np.float32)
    size = z.size
    read = {"z": z, "at": at, "q": q} | {f"neighbours[{i}]": n for i, n in enumerate(neighbours)}
    written = {"out": out, "v": v, "y": y, "p": p}
    read = {k: a for k, a in read.items() if a is not None or k != "q"}
    written = {k: a for k, a in written.items() if a is not None or k == "out"}
    for name, array in (read | written).items():
        on_wire = name in ("p", "q") or name.startswith("neighbours")
        _check_array(name, array, stored if on_wire else np.float32, size, name in written)
    _check_array("weights", weights, np.float32, len(neighbours))
    for (a, x), (b, other) in combinations(written.items(), 2):
        if np.may_share_memory(x, other):
            raise ValueError(f"{a} and {b}: both are written, and overlap")
    for a, x in written.items():
        for b, other in read.items():
            same = x.ctypes.data == other.ctypes.data and x.nbytes == other.nbytes
            if not same and np.may_share_memory(x, other):
                raise ValueError(f"{a} and {b}: overlap without being the same array")
    _check_array("segments", segments, SEGMENT)
    check_layout(segments, size)
    check_values(segments, q is not None)


def _check_array(
    name: str, array: Any, dtype: Any, size: int | None = None, written: bool = False
) -> None:
    kind = f"a contiguous{' writable' if written else ''} 1-D {np.dtype(dtype).name} array"
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
        raise ValueError(f"{name}: {kind} is needed")
    flags = array.flags
    if not (flags.c_contiguous and flags.aligned) or (written and not flags.writeable):
        raise ValueError(f"{name}: {kind} is needed")
    if size is not None and array.size != size:
        raise ValueError(f"{name}: has {array.size} elements, {size} are needed")


def check_layout(segments: NDArray[np.void], size: int) -> None:
    """Raise ValueError for segments that leave ``size`` elements, or overlap."""
    offset, length = segments["offset"], segments["length"]
    outside = (length < 0) | (length > size) | (offset < 0) | (offset > size - length)
    if outside.any():
        raise ValueError(f"segments[{outside.argmax()}]: leaves the {size} elements of z")
    filled = segments[length > 0]
    filled = filled[np.argsort(filled["offset"], kind="stable")]
    if (filled["offset"][:-1] + filled["length"][:-1] > filled["offset"][1:]).any():
        raise ValueError("segments: overlap")


def check_values(segments: NDArray[np.void], has_q: bool) -> None:
    """Raise ValueError for what else `SEGMENT` does not allow."""
    own = segments["own"]
    if ((own != 0) & (own != 1)).any():
        raise ValueError("segments: own must be 0 or 1")
    if own.any() and not has_q:
        raise ValueError("segments: own = 1 needs q")
    if (segments["grad"] % np.uint64(4)).any():
        raise ValueError("segments: a gradient's address is not aligned to 4 bytes")
