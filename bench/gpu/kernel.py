"""How close is the fused update on a GPU to the card's copy bandwidth, and how far ahead of others?

One pass with momentum for agents with 0 to 8 and 12 neighbours, gradients in 64 tensors of their
own, against torch in place, torch's foreach functions, torch.compile and plain CuPy. The yardstick
is a copy on the same card, measured just before each of them: the faster of the driver's and
torch's, bytes read and written. Bytes of a pass are those that none can avoid: in float32
(degree + 6) * 4 per parameter. Before anything is timed, its results are compared with the host's.

    python bench/gpu/kernel.py [--quick] [--size N] [--out FILE] [--emulate]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, whose modules all of it shares

import common
import numpy as np
import torch
from common import ALPHA, MU, Buffers, Seconds

from mpicdsgd.kernels import native
from mpicdsgd.kernels.gpu.update import DeviceUpdate
from mpicdsgd.kernels.native import SEGMENT

DEGREES = (*range(9), 12)
HALF_DEGREES = (2, 4)  # of the 16-bit wires
COMPARED = (2, 4, 8)  # degrees at which the others run too: they are slow
WIRES = {"float32": DEGREES, "bfloat16": HALF_DEGREES, "float16": HALF_DEGREES}
GOAL = 0.92
LAST = 1 << 20  # elements that are compared at the full size
CLOSE = 1e-5  # of others' results, whose operations come in another order

Pass = Callable[[], Any]


def bytes_of(degree: int, wire: str) -> int:
    """Per parameter: z, v, g read, x, v written in float32; neighbours read, p written."""
    return 20 + (degree + 1) * (4 if wire == "float32" else 2)


# Right results


def on_host(tensor: torch.Tensor) -> np.ndarray:
    """A copy, as `kernels.native.update` takes it."""
    halves = tensor.dtype != torch.float32
    values = (tensor.view(torch.int16) if halves else tensor).detach().cpu().clone().numpy()
    return values.view(np.uint16) if halves else values


def differing(b: Buffers, update: Any, degree: int, wire: str, most: int) -> int:
    """Elements of x, v, p that a pass makes unlike the host's: of each segment's last ``most``."""
    x, v, p, near = b.arena.flat, b.v, b.p[wire], b.near[wire][:degree]
    p.fill_(float("nan"))  # what is not written stays one
    before = []
    for row, parameter in zip(b.arena.segments, b.arena.parameters, strict=True):
        length = min(most, int(row["length"]))
        end = int(row["offset"] + row["length"])
        part = slice(end - length, end)
        arrays = [on_host(tensor[part]) for tensor in (x, v, p, *near)]
        before.append((row, part, arrays, on_host(parameter.grad[-length:])))
    assert b.fused(update, degree, wire)().finite()
    wrong = 0
    weights = np.full(degree, 1 / (degree + 1), np.float32)
    for row, part, (host_x, host_v, host_p, *host_near), grad in before:
        segment = np.zeros(1, SEGMENT)
        segment[0] = row
        segment["offset"], segment["length"], segment["grad"] = 0, len(grad), grad.ctypes.data
        native.update(host_x, host_x, at=host_x, v=host_v, y=None, p=host_p, q=None,
                      neighbours=host_near, weights=weights, segments=segment, wire=wire,
                      threads=1)  # fmt: skip
        for tensor, host in ((x, host_x), (v, host_v), (p, host_p)):
            bits = f"u{host.itemsize}"
            wrong += int((on_host(tensor[part]).view(bits) != host.view(bits)).sum())
    return wrong


# The others


def others(b: Buffers, degree: int, emulated: bool) -> tuple[dict[str, Pass], dict[str, str]]:
    """The same pass by other means, and why some of them are not there."""
    arena, p, near = b.arena, b.p["float32"], b.near["float32"][:degree]
    x, v, g = arena.flat, b.v, torch.zeros_like(arena.flat)
    for view, parameter in zip(arena.views_of(g), arena.parameters, strict=True):
        view.copy_(parameter.grad)
    whole = x, v, g, p, near
    in_x, in_v, in_p, *in_near = (arena.views_of(one) for one in (x, v, p, *near))
    pieces = in_x, in_v, [parameter.grad for parameter in arena.parameters], in_p, in_near
    found: dict[str, Pass] = {
        "torch in place": lambda: common.torch_in_place(*whole),
        "torch foreach": lambda: common.torch_foreach(*pieces),
    }
    missing = {}
    if emulated:
        missing["torch.compile"] = missing["CuPy"] = "the GPU is emulated"
        return found, missing
    compiled = torch.compile(common.torch_in_place, fullgraph=True, dynamic=False)
    try:
        compiled(*whole)
        found["torch.compile"] = lambda: compiled(*whole)
    except Exception as error:  # no Triton, no C compiler, ...
        missing["torch.compile"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    try:
        found["CuPy"] = cupy_plain(*whole)
    except Exception as error:
        missing["CuPy"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return found, missing


def cupy_plain(
    x: torch.Tensor, v: torch.Tensor, g: torch.Tensor, p: torch.Tensor, near: list[torch.Tensor]
) -> Pass:
    """The plain expression, as in `bench/kernel.py`; on the default stream, as torch is."""
    import cupy

    X, V, G, P, *Near = (cupy.asarray(one) for one in (x, v, g, p, *near))
    w, alpha, mu = np.float32(1 / (len(near) + 1)), np.float32(ALPHA), np.float32(MU)

    def run() -> None:
        step = alpha * G
        V[:] = mu * V - step
        X[:] = X + sum(w * (one - X) for one in Near) + mu * V - step
        P[:] = X

    return run


def check_others(b: Buffers, update: Any, emulated: bool) -> None:
    """They must compute the same, or it were no comparison."""
    x, v, p = b.arena.flat, b.v, b.p["float32"]
    kept = x.clone(), v.clone()

    def start_again() -> None:
        x.copy_(kept[0])
        v.copy_(kept[1])
        p.fill_(float("nan"))

    for degree in COMPARED:
        b.fused(update, degree, "float32")()
        expected = x.clone(), v.clone(), p.clone()
        for name, job in others(b, degree, emulated)[0].items():
            start_again()
            job()
            for parameter, *views in zip(
                b.arena.parameters, *map(b.arena.views_of, (x, v, p, *expected)), strict=True
            ):
                for got, want in zip(views[:3], views[3:], strict=True):
                    apart = float((got - want).abs().max())
                    if not apart < CLOSE:
                        raise RuntimeError(
                            f"{name}, {parameter.shape}: {apart} from the fused pass"
                        )
        start_again()


# Times


def measure(
    gpu: Any, jobs: dict[str, Pass], copies: dict[str, Pass], rounds: int, launches: int
) -> tuple[Seconds, Seconds]:
    """Seconds of every job in every round, and of the faster copy just before each of them."""
    seconds: Seconds = {name: [] for name in (*copies, *jobs)}
    yardstick: Seconds = {name: [] for name in jobs}
    for round_ in range(rounds + 1):  # the first one warms up
        for name, job in jobs.items():
            copied = {way: common.timed(gpu, one, 2 * launches) for way, one in copies.items()}
            job_s = common.timed(gpu, job, launches)
            if round_ > 0:
                for way, copy_s in copied.items():
                    seconds[way].append(copy_s)
                yardstick[name].append(min(copied.values()))
                seconds[name].append(job_s)
    return seconds, yardstick


def host_seconds(gpu: Any, job: Pass, calls: int) -> float:
    """The host's time for a call: of a pass so short that the GPU is always through."""
    job()
    gpu.finish(gpu.stream())
    start = time.perf_counter()
    for _ in range(calls):
        job()
    return (time.perf_counter() - start) / calls


def speed(row: common.Record) -> str:
    of_copy = "" if row["of_copy"] is None else f"  {row['of_copy']:5.2f} of the copy"
    return f"  {row['gb_per_s']:7.1f} GB/s{of_copy}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", type=int, default=None, help="parameters; default 1e8")
    common.add_arguments(parser, "gpu-kernel")
    args = parser.parse_args()
    size = args.size or (20_000 if args.emulate else 10_000_000 if args.quick else 100_000_000)
    rounds, launches = (2, 1) if args.emulate else (7, 10) if args.quick else (15, 5)
    gpu = common.open_gpu(args.emulate)
    device = gpu.torch_device
    updates = {wire: DeviceUpdate(gpu, wire) for wire in WIRES}
    degrees = {wire: max(WIRES[wire]) for wire in WIRES}

    small = Buffers(gpu, min(size, 1_000_003), degrees)
    wrong = {(wire, degree): differing(small, updates[wire], degree, wire, size)
             for wire in WIRES for degree in WIRES[wire]}  # fmt: skip
    check_others(small, updates["float32"], args.emulate)
    host_s = host_seconds(
        gpu, small.fused(updates["float32"], 2, "float32"), 5 if args.emulate else 500
    )
    del small

    b = Buffers(gpu, size, degrees)
    for wire, degree in wrong:
        wrong[wire, degree] += differing(b, updates[wire], degree, wire, LAST // common.TENSORS)
    source, to = (torch.randn(size, device=device) for _ in range(2))
    copies: dict[str, Pass] = {
        "copy": lambda: gpu.copy(to.data_ptr(), source.data_ptr(), 4 * size, gpu.stream()),
        "torch copy_": lambda: to.copy_(source),
    }
    jobs: dict[str, Pass] = {}
    moved: dict[str, float] = dict.fromkeys(copies, 8 * size)  # bytes of each
    skipped: dict[str, str] = {}
    for wire, some in WIRES.items():
        for degree in some:
            ways = {"fused": b.fused(updates[wire], degree, wire)}
            if wire == "float32" and degree in COMPARED:
                more, missing = others(b, degree, args.emulate)
                ways |= more
                skipped |= missing
            for way, job in ways.items():
                name = f"{way}, degree {degree}" + f", {wire}" * (wire != "float32")
                jobs[name] = job
                moved[name] = bytes_of(degree, wire) * size
    seconds, yardstick = measure(gpu, jobs, copies, rounds, launches)
    for update in updates.values():
        update.close()

    def fraction(name: str) -> float:
        pairs = zip(seconds[name], yardstick[name], strict=True)
        return statistics.median(moved[name] / t / (8 * size / t0) for t, t0 in pairs)

    results = {
        name: {
            **common.spread(t),
            "gb_per_s": moved[name] / statistics.median(t) / 1e9,
            "of_copy": fraction(name) if name in jobs else None,
        }
        for name, t in seconds.items()
    }
    check = partial(common.check, judged=not args.emulate)
    bits = sum(wrong.values())
    checks = [
        common.check("elements unlike the host's, all degrees and wires", bits, 0, at_most=True)
    ]
    checks += [check(f"fraction of the copy, degree {degree}",
                     fraction(f"fused, degree {degree}"), GOAL) for degree in DEGREES]  # fmt: skip
    for wire in ("bfloat16", "float16"):
        for degree in HALF_DEGREES:
            name = f"degree {degree}, {wire}"
            checks.append(check(f"fraction of the copy, {name}", fraction(f"fused, {name}"), None))
    for name in jobs:
        way, rest = name.split(", ", 1)
        if way != "fused":
            times = common.ratio(seconds[name], seconds[f"fused, {rest}"])
            checks.append(check(f"times {way}, {rest}", times, None))
    checks.append(check("host's microseconds per pass", host_s * 1e6, None))

    record = {
        **common.gpu_provenance(gpu, args.emulate),
        "parameters": size,
        "tensors": common.TENSORS,
        "rounds": rounds,
        "launches": launches,
        "skipped": skipped,
        "unlike_the_host": {f"{wire}, degree {d}": n for (wire, d), n in wrong.items()},
        "results": results,
        "checks": checks,
    }
    print(f"{gpu.name}, {size:,} parameters in {common.TENSORS} tensors")
    common.print_times(results, speed)
    for way, why in skipped.items():
        print(f"skipped: {way}: {why}")
    common.finish(args, record)
    return 1 if bits else 0


if __name__ == "__main__":
    sys.exit(main())
