"""Takes the compiled kernel where there is one, else the NumPy reference, and says so once.

The environment variable MPICDSGD_KERNEL forces a choice: ``numpy``, ``generic`` (compiled, for any
CPU) or ``auto`` (the default).
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.kernels.native import reference
from mpicdsgd.kernels.native.reference import Result

log = logging.getLogger("mpicdsgd")

CHOICES = ("auto", "generic", "numpy")


def _choose() -> tuple[Any, str, str]:
    """The compiled module or None, the reason where it is None, and its instruction set."""
    choice = os.environ.get("MPICDSGD_KERNEL") or "auto"
    if choice == "numpy":
        return None, "MPICDSGD_KERNEL=numpy asks for it", "numpy"
    try:
        import mpicdsgd.kernels.native._native as _native
    except ImportError as error:
        return None, f"the compiled kernel cannot be imported ({error})", "numpy"
    return _native, "", "generic" if choice == "generic" else str(_native.isa)


_compiled, reason, isa = _choose()
backend = "numpy" if _compiled is None else "compiled"
_said = False


def fallback() -> str:
    """What a log must say of the kernel in use, "" where nothing; `update` leaves it out then."""
    global _said
    _said = True
    said = []
    choice = os.environ.get("MPICDSGD_KERNEL") or "auto"
    if choice not in CHOICES:
        said.append(f"MPICDSGD_KERNEL={choice} is ignored: use one of {', '.join(CHOICES)}")
    if _compiled is None:
        said.append(
            "the NumPy update kernel serves, several times slower than the compiled one: "
            f"{reason}; install a C++ compiler and reinstall mpicdsgd, or unset MPICDSGD_KERNEL"
        )
    return "; ".join(said)


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
    """Mix, step and publish in one pass; say whether all of ``out`` is finite, and measure.

    With a 16-bit wire, all of ``p`` too: a float32 may round to infinity there.

    For every element of every segment, in float32, each operation rounded once, in this order::

        q_  = q if own else Q(z)                     Q: to nearest even, in the wire's dtype
        acc = z + sum_l weights[l] * (neighbours[l] - q_)            l in the order given
        h   = g + decay * at;  a = alpha * h         only where there is a gradient, as are
        v   = mu * v - a                             these three lines; with decay == 0, `at`
        acc = acc + c_v * v - c_g * a                does not enter; without v, no v terms
        out = acc;  y = acc + mu * v;  p = Q(acc)    y is acc itself where there is no v

    All arrays are one-dimensional, contiguous, of D elements unless said otherwise, and on the
    host. One that is written may be the very same memory as one that is read (``out`` and ``z``,
    ``p`` and ``q``). Elements outside all segments are left alone. The bits depend neither on the
    backend nor on ``threads``, but for which NaN a NaN in ``out``, ``v`` and ``y`` is. What is
    measured, a sum, agrees to about 1e-6 of its terms' size, and is the same bits every time.

    Args:
        out: float32, written.
        z: float32, own values before mixing.
        at: float32, where the gradient was taken; read for weight decay only.
        v: float32 momentum, updated in place, or None.
        y: float32, the look-ahead point, written, or None.
        p: the published copy, written, in the wire's dtype (16-bit wires as uint16), or None.
        q: the own published copy that the neighbours saw, for segments with own = 1, or None.
        neighbours: the neighbours' published copies.
        weights: float32, one for each neighbour.
        segments: SEGMENT array; the segments do not overlap. The gradients that it points to must
            stay alive during the call.
        wire: float32, bfloat16 or float16.
        threads: the most threads to use, at least 1.
        measure: the first so many segments (an arena's parameters) count in the sums of `Result`;
            0: measure nothing.

    Raises:
        ValueError: for an array of the wrong dtype, size or layout, for overlaps, for segments
            that leave the arrays.
    """
    if not _said and (message := fallback()):
        log.warning("%s", message)
    if _compiled is None:
        run, more = reference.update, {}
    else:
        run, more = _compiled.update, {"isa": isa}
    result = run(
        out,
        z,
        at=at,
        v=v,
        y=y,
        p=p,
        q=q,
        neighbours=neighbours,
        weights=weights,
        segments=segments,
        wire=wire,
        threads=threads,
        measure=measure,
        **more,
    )
    return Result(*result)
