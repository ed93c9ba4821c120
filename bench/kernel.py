"""How close is the fused update to memory's speed, and how far ahead of NumPy and torch?

One pass with momentum, float32, for agents with 0 to 16 neighbours, against the plain NumPy
expression, torch in place and torch's foreach functions, all in one process and on the same
threads (NumPy has one); and one that measures the agents' disagreement and the gradient's norm
too, as run.theory = true asks. The yardstick is STREAM's triad, the faster of ordinary and
streaming stores. Bytes are those that no implementation can avoid: (degree + 6) * 4 per parameter.

    python bench/kernel.py [--quick] [--out FILE] [--threads N]
"""

import argparse
import ctypes
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import torch
from common import ALPHA, MU, Seconds, spread

from mpicdsgd.comm.exchange.buffer_layout import PAGE, staggered
from mpicdsgd.kernels import native

HERE = Path(__file__).parent
DEGREES = (0, 1, 2, 3, 4, 6, 8, 9, 12, 16)
COMPARED = (2, 4, 8)  # degrees at which NumPy and torch run too: they are slow
MEASURED = (2, 4)


def aligned(size: int, number: int = 0) -> np.ndarray:
    """Float32 values on a 64-byte boundary, touched; staggered as published buffers are."""
    raw = np.zeros(4 * size + 64 + PAGE, np.uint8)
    start = -raw.ctypes.data % 64 + staggered(number)
    x = raw[start : start + 4 * size].view(np.float32)
    x[:] = 0.5
    return x


def compile_triad(folder: str) -> ctypes.CDLL | None:
    """The triad as a library, or None where there is no compiler or no x86."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    library = Path(folder, "triad.so")
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    source = str(HERE / "triad.cpp")
    if subprocess.run([compiler, *flags, source, "-o", str(library)], check=False).returncode:
        return None
    triad = ctypes.CDLL(str(library))
    for function in (triad.triad, triad.triad_streaming):
        function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_float, ctypes.c_long, ctypes.c_int]
        function.restype = None
    return triad


class Buffers:
    """One agent's buffers and its neighbours'."""

    def __init__(self, size: int, degree: int) -> None:
        self.x, self.v, self.g, self.p = (aligned(size) for _ in range(4))
        self.near = [aligned(size, 1 + i) for i in range(degree)]
        self.segments = np.zeros(1, native.SEGMENT)
        self.segments["length"], self.segments["grad"] = size, self.g.ctypes.data
        self.segments["alpha"], self.segments["mu"] = ALPHA, MU
        self.segments["c_v"], self.segments["c_g"] = MU, 1.0


def fused(b: Buffers, degree: int, threads: int, measure: int = 0) -> None:
    weights = np.full(degree, 1 / (degree + 1), np.float32)
    native.update(b.x, b.x, at=b.x, v=b.v, y=None, p=b.p, q=None, neighbours=b.near[:degree],
                  weights=weights, segments=b.segments, wire="float32",
                  threads=threads, measure=measure)  # fmt: skip


def numpy_plain(b: Buffers, degree: int) -> None:
    w, alpha, mu = np.float32(1 / (degree + 1)), np.float32(ALPHA), np.float32(MU)
    step = alpha * b.g
    b.v[:] = mu * b.v - step
    b.x[:] = b.x + sum(w * (p - b.x) for p in b.near[:degree]) + mu * b.v - step
    b.p[:] = b.x


def torch_in_place(b: Buffers, degree: int) -> None:
    x, v, g, p, *near = (torch.from_numpy(a) for a in (b.x, b.v, b.g, b.p, *b.near[:degree]))
    common.torch_in_place(x, v, g, p, near)


def torch_foreach(b: Buffers, degree: int) -> None:
    """As above on 64 tensors, the way torch's own optimizers run over a model's parameters."""
    x, v, g, p, *near = (
        list(torch.from_numpy(a).tensor_split(64)) for a in (b.x, b.v, b.g, b.p, *b.near[:degree])
    )
    common.torch_foreach(x, v, g, p, near)


def measure(
    jobs: dict[str, Callable[[], None]], triads: list[Callable[[], None]], rounds: int
) -> tuple[Seconds, Seconds]:
    """Seconds of every job in every round, and of the faster triad just before each of them."""

    def timed(job: Callable[[], None]) -> float:
        start = time.perf_counter()
        job()
        return time.perf_counter() - start

    seconds: Seconds = {name: [] for name in jobs}
    yardstick: Seconds = {name: [] for name in jobs}
    for round_ in range(rounds + 1):  # the first one warms up
        for name, job in jobs.items():
            triad_s = min(timed(triad) for triad in triads)
            job_s = timed(job)
            if round_ > 0:
                yardstick[name].append(triad_s)
                seconds[name].append(job_s)
    return seconds, yardstick


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer parameters and rounds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    size, rounds = (8_000_000, 5) if args.quick else (25_000_000, 15)
    torch.set_num_threads(args.threads)

    b = Buffers(size, max(DEGREES))
    jobs: dict[str, Callable[[], None]] = {}
    names: dict[str, float] = {}  # bytes of each job
    with tempfile.TemporaryDirectory() as folder:
        triad = compile_triad(folder)
    if triad is None:
        print("no triad: a C++ compiler and an x86-64 CPU are needed", file=sys.stderr)
        return 1
    one, two, three = (aligned(size) for _ in range(3))
    ends = (one.ctypes.data, two.ctypes.data, three.ctypes.data, 0.5, size, args.threads)
    triads = [lambda: triad.triad(*ends), lambda: triad.triad_streaming(*ends)]
    jobs |= {"triad": triads[0], "triad, streaming": triads[1]}
    names |= {"triad": 12 * size, "triad, streaming": 12 * size}
    for degree in DEGREES:
        ways = {"fused": lambda d=degree: fused(b, d, args.threads)}
        if degree in MEASURED:
            ways["fused, measuring"] = lambda d=degree: fused(b, d, args.threads, 1)
        if degree in COMPARED:
            ways["numpy"] = lambda d=degree: numpy_plain(b, d)
            ways["torch in place"] = lambda d=degree: torch_in_place(b, d)
            ways["torch foreach"] = lambda d=degree: torch_foreach(b, d)
        for way, job in ways.items():
            jobs[f"{way}, degree {degree}"] = job
            names[f"{way}, degree {degree}"] = (degree + 6) * 4 * size
    seconds, yardstick = measure(jobs, triads, rounds)

    # Ratios within a round, of neighbours in time: what else the machine does slows both.
    def fraction(name: str) -> float:
        pairs = zip(seconds[name], yardstick[name], strict=True)
        return statistics.median(names[name] / t / (12 * size / t0) for t, t0 in pairs)

    def speedup(other: str, degree: int) -> float:
        return common.ratio(
            seconds[f"{other}, degree {degree}"], seconds[f"fused, degree {degree}"]
        )

    results = {
        name: {
            **spread(t),
            "gb_per_s": names[name] / statistics.median(t) / 1e9,
            "of_triad": fraction(name),
        }
        for name, t in seconds.items()
    }
    checks = []

    def check(name: str, value: float, goal: float) -> None:
        checks.append(common.check(name, value, goal))

    for degree in DEGREES:
        check(f"fraction of the triad, degree {degree}", fraction(f"fused, degree {degree}"), 0.9)
    for degree in COMPARED:
        check(f"times NumPy, degree {degree}", speedup("numpy", degree), 4.0)
        for way in ("torch in place", "torch foreach"):
            check(f"times {way}, degree {degree}", speedup(way, degree), 1.8)

    for degree in MEASURED:
        name = f"time of a pass that measures, degree {degree}"
        checks.append(common.check(name, speedup("fused, measuring", degree), 1.03, at_most=True))

    record = {
        **common.provenance(),
        "kernel": {"backend": native.backend, "isa": native.isa},
        "parameters": size,
        "rounds": rounds,
        "threads": args.threads,
        "results": results,
        "checks": checks,
    }
    common.write(record, common.place("kernel", args))
    print(f"{record['cpu']}, {size:,} parameters, {args.threads} thread(s), {native.isa}")
    for name, row in results.items():
        print(f"  {name:28} {row['median_s'] * 1e3:8.1f} ms  "
              f"({row['min_s'] * 1e3:.1f} to {row['max_s'] * 1e3:.1f})  "
              f"{row['gb_per_s']:6.1f} GB/s  {row['of_triad']:5.2f} of the triad")  # fmt: skip
    common.print_checks(checks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
