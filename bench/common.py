"""What the benches share: the record's beginning, checks and their table, files; GPUs and ranks.

    python bench/common.py [--phases PHASES] [--out FILE] RECORD...

prints one table of the checks in several records (`gpu/suite.sh` ends with it). PHASES has a line
for each phase: its name, whether it went well (yes, NO, -), what became of it, seconds; separated
by tabs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mpicdsgd
from mpicdsgd.kernels import gpu as gpus
from mpicdsgd.kernels import native
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.kernels.coefficients import Coefficients
from mpicdsgd.kernels.gpu import compiled

HERE = Path(__file__).parent
ALPHA, MU = 0.01, 0.9
TENSORS = 64
UNJUDGED = "the GPU is emulated: the times mean nothing, and no goal is judged by them"
# Each is set for the ranks of a job, and nowhere else.
_RANK = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "PALS_RANKID")

Record = dict[str, Any]
Seconds = dict[str, list[float]]


# The record's beginning


def provenance() -> Record:
    """The machine, the versions and the commit. MPICDSGD_COMMIT: where there is no checkout."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False
            )
        except OSError:
            return ""
        return done.stdout.strip()

    cpu = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
    commit = git("rev-parse", "HEAD")
    return {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "cores": len(cpu),
        "host": platform.node(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        },
        "commit": commit or os.environ.get("MPICDSGD_COMMIT", "unknown"),
        "dirty": git("status", "--porcelain", "--", ".", ":!bench/results") != ""
        if commit
        else None,
        "quick": "--quick" in sys.argv,
    }


def gpu_provenance(gpu: Any, emulated: bool) -> Record:
    """`provenance` with the GPU, its driver, CUDA, CuPy and, in a job, the MPI library."""
    record = provenance()
    versions = record["versions"] | {"mpicdsgd": mpicdsgd.__version__}
    record |= {"gpu": gpu.name, "emulated": emulated, "versions": versions}
    record["host kernel"] = f"{native.backend}, {native.isa}"
    if not emulated:
        import cupy

        runtime = cupy.cuda.runtime
        versions |= {
            "cupy": cupy.__version__,
            "cuda of torch": torch.version.cuda,
            "cuda of cupy": runtime.runtimeGetVersion(),
            "cuda of the driver": runtime.driverGetVersion(),
            "driver": _driver(),
        }
        built = compiled.built()
        record["kernels"] = "compiled at first use" if built is None else built.name
    if (mpi := sys.modules.get("mpi4py.MPI")) is not None:
        versions["mpi"] = mpi.Get_library_version().split("\n")[0].strip("\0 ")
    return record


_BEGINNING = ("cpu", "cores", "host", "versions", "commit", "dirty", "gpu", "emulated", "kernels")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().split("\n")[0] or "unknown"


# Times, checks, files


def spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios within a round: what else the machine does slows both."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def check(
    name: str, value: float, goal: float | None, *, at_most: bool = False, judged: bool = True
) -> Record:
    """A line of the checks; without a goal, or not judged, it is there to be read."""
    holds = None
    if goal is not None and judged:
        holds = value <= goal if at_most else value >= goal
    return {"name": name, "value": value, "goal": goal, "holds": holds}


def print_checks(checks: Sequence[Record]) -> None:
    if any(c["holds"] is None and c["goal"] is not None for c in checks):
        print("(a goal beside - is not judged in a round of this size)")
    print("checks:")
    width = max([36, *(len(c["name"]) for c in checks)])
    for c in checks:
        goal = "" if c["goal"] is None else f"  (goal {c['goal']})"
        value = f"{c['value']:6.2f}" if abs(c["value"]) >= 0.005 else f"{c['value']:6.1g}"
        print(f"  {_MARK[c['holds']]}  {c['name']:{width}} {value}{goal}")


_MARK = {True: "holds", False: "FAILS", None: "-    "}


def print_times(results: dict[str, Record], more: Callable[[Record], str] = lambda row: "") -> None:
    """Milliseconds; ``more`` is put behind them."""
    width = max(map(len, results), default=0)
    for name, row in results.items():
        print(f"  {name:{width}} {row['median_s'] * 1e3:9.3f} ms  "
              f"({row['min_s'] * 1e3:.3f} to {row['max_s'] * 1e3:.3f}){more(row)}")  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return ["| " + " | ".join(cells) + " |"
            for cells in (head, ["---"] * len(head), *rows)]  # fmt: skip


def place(name: str, args: argparse.Namespace) -> Path:
    """Where the JSON goes: to --out, or to the results; a quick round replaces no record."""
    folder = HERE / "results" / "quick" if args.quick else HERE / "results"
    return args.out or folder / f"{name}.json"


def write(record: Record, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """What all GPU benches take."""
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    parser.add_argument("--emulate", action="store_true",
                        help="tiny sizes on an emulated GPU, to try the bench itself")  # fmt: skip
    parser.add_argument("--out", type=Path, default=None,
                        help=f"default: bench/results/{name}.json; emulated: nowhere")  # fmt: skip
    parser.set_defaults(name=name)


def finish(args: argparse.Namespace, record: Record) -> None:
    """Print the checks, after what else there was, and write the record. On one rank."""
    print_checks(record["checks"])
    if args.emulate:
        print(UNJUDGED)
    if args.out is not None or not args.emulate:
        write(record, place(args.name, args))


# GPUs and ranks


def emulated_gpu() -> Any:
    """The tests' emulated GPU, which runs the kernels' source on the host."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from emulation.gpu import EmulatedGpu

    gpu = EmulatedGpu()
    gpu.prepare()
    return gpu


def open_gpu(emulate: bool) -> Any:
    """The first GPU, with its kernels loaded; without one the program ends and says so."""
    if emulate:
        return emulated_gpu()
    if reason := gpus.why_not():
        sys.exit(f"{reason}: --emulate tries the bench without a GPU")
    gpu = gpus.open_gpu(0)
    gpu.prepare()
    return gpu


def start_ranks(ranks: int) -> None:
    """Where this is no rank of a job: become ``mpiexec`` of this very command."""
    if not in_job():
        command = [*mpiexec(ranks), sys.executable, *sys.argv]
        sys.stdout.flush()
        os.execv(command[0], command)


def in_job() -> bool:
    return any(name in os.environ for name in _RANK)


def mpiexec(ranks: int) -> list[str]:
    """The command that starts what follows it on ``ranks`` ranks."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        sys.exit("there is no mpiexec beside this Python or in PATH: pip install mpich")
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    return [found, "-n", str(ranks), *(["--oversubscribe"] if "Open MPI" in said else [])]


def agents_on(topology: str, emulate: bool) -> Any:
    """The job's agents, each with a GPU. Collective over COMM_WORLD."""
    from mpi4py import MPI  # which starts MPI: not before start_ranks

    mixing = mpicdsgd.metropolis(mpicdsgd.graph_from_spec(topology, MPI.COMM_WORLD.size))
    if not emulate and MPI.COMM_WORLD.rank == 0 and (reason := gpus.why_not()):
        print(f"{reason}: --emulate tries the bench without a GPU", file=sys.stderr)
    agents = mpicdsgd.Agents(MPI.COMM_WORLD, mixing, device="cpu" if emulate else "cuda")
    if emulate:
        agents.gpu = emulated_gpu()
    return agents


def block(agents: Any, step: Callable[[], None], steps: int) -> float:
    """Seconds per step of ``steps`` of them on the slowest rank. Collective.

    One more before them leaves an exchange under way, as each of them does.
    """
    gpu = agents.gpu
    agents.comm.Barrier()
    step()
    gpu.finish(gpu.stream())
    start = time.perf_counter()
    for _ in range(steps):
        step()
    gpu.finish(gpu.stream())
    return float(max(agents.comm.allgather((time.perf_counter() - start) / steps)))


def timed(gpu: Any, job: Callable[[], object], launches: int) -> float:
    """Seconds per launch, by the GPU's clock. One more before them keeps the host ahead."""
    stream = gpu.stream()
    begin, end = gpu.event(timing=True), gpu.event(timing=True)
    job()
    gpu.record(begin, stream)
    for _ in range(launches):
        job()
    gpu.record(end, stream)
    gpu.synchronize(end)
    seconds = gpu.elapsed_s(begin, end) / launches
    gpu.destroy_event(begin)
    gpu.destroy_event(end)
    return float(seconds)


# What a pass works on


def parameters(size: int, device: torch.device, seed: int) -> list[torch.nn.Parameter]:
    """Random tensors of ``size`` elements together, and random gradients, as a model has them.

    Weights that grow from layer to layer, and a bias with each; few lengths are multiples of 4.
    """
    layers = TENSORS // 2
    biases = [max(1, min(64 + 32 * i + i % 3, size // 1000)) for i in range(layers)]
    growing = 1.15 ** np.arange(layers)
    weights = ((size - sum(biases)) * growing / growing.sum()).astype(int).tolist()
    weights[-1] += size - sum(biases) - sum(weights)
    lengths = [n for pair in zip(weights, biases, strict=True) for n in pair]
    random = torch.Generator(device).manual_seed(seed)
    made = []
    for n in lengths:
        made.append(torch.nn.Parameter(torch.randn(n, device=device, generator=random)))
        made[-1].grad = torch.randn(n, device=device, generator=random)
    return made


class Buffers:
    """One agent's device memory, as an optimizer has it, and its neighbours' published copies.

    Args:
        degrees: by wire type, neighbours that there are buffers for, each an allocation of its own.

    Attributes:
        size: parameters, without the arena's padding.
        p, near: by wire type.
    """

    def __init__(self, gpu: Any, size: int, degrees: dict[str, int], seed: int = 0) -> None:
        device = gpu.torch_device
        self.size = size
        self.arena = Arena(parameters(size, device, seed), (), device)
        self.arena.fill_segments([Coefficients(ALPHA, 0.0, MU, MU, 1.0)] * TENSORS)
        random = torch.Generator(device).manual_seed(seed + 1)

        def values(wire: str) -> torch.Tensor:
            made = torch.randn(self.arena.size, device=device, generator=random)
            return made.to(getattr(torch, wire))

        self.v = values("float32")
        self.p = {wire: values(wire) for wire in degrees}
        self.near = {wire: [values(wire) for _ in range(n)] for wire, n in degrees.items()}

    def fused(self, update: Any, degree: int, wire: str) -> Callable[[], Any]:
        """A function that gives the pass with momentum to the stream and returns its outcome."""
        x, arena = self.arena.flat, self.arena
        weights = np.full(degree, 1 / (degree + 1), np.float32)
        near = [n.data_ptr() for n in self.near[wire][:degree]]
        p = self.p[wire].data_ptr()
        return lambda: update(
            x, x, at=x, v=self.v, y=None, p=p, q=None, neighbours=near, weights=weights,
            segments=arena.segments,
        )  # fmt: skip


# The same pass by what others offer


def torch_in_place(
    x: torch.Tensor, v: torch.Tensor, g: torch.Tensor, p: torch.Tensor, near: Sequence[torch.Tensor]
) -> None:
    w = 1 / (len(near) + 1)
    v.mul_(MU).add_(g, alpha=-ALPHA)
    x.mul_(1 - len(near) * w)
    for one in near:
        x.add_(one, alpha=w)
    x.add_(v, alpha=MU).add_(g, alpha=-ALPHA)
    p.copy_(x)


def torch_foreach(
    x: list[torch.Tensor],
    v: list[torch.Tensor],
    g: list[torch.Tensor],
    p: list[torch.Tensor],
    near: Sequence[list[torch.Tensor]],
) -> None:
    """As above on many tensors, the way torch's own optimizers run over a model's parameters."""
    w = 1 / (len(near) + 1)
    torch._foreach_mul_(v, MU)
    torch._foreach_add_(v, g, alpha=-ALPHA)
    torch._foreach_mul_(x, 1 - len(near) * w)
    for one in near:
        torch._foreach_add_(x, one, alpha=w)
    torch._foreach_add_(x, v, alpha=MU)
    torch._foreach_add_(x, g, alpha=-ALPHA)
    torch._foreach_copy_(p, x)


# One table of several records


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--phases", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("records", type=Path, nargs="*")
    args = parser.parse_args()
    rows = []
    phases = []
    lines = args.phases.read_text().splitlines() if args.phases else []
    for name, well, became, seconds in (line.split("\t") for line in lines):
        holds = {"yes": True, "NO": False}.get(well)
        phases.append({"name": name, "holds": holds, "became": became, "seconds": float(seconds)})
        rows.append((f"{name}: {became}", f"{seconds} s", "-", well))
    records = {path.stem: json.loads(path.read_text()) for path in args.records if path.exists()}
    rows += [(f"{path.stem}: no record", "-", "-", "NO") for path in args.records
             if path.stem not in records]  # fmt: skip
    for stem, record in records.items():
        for c in record["checks"]:
            goal = "-" if c["goal"] is None else f"{c['goal']:g}"
            holds = {True: "yes", False: "NO", None: "-"}[c["holds"]]
            rows.append((f"{stem}: {c['name']}", f"{c['value']:.3f}", goal, holds))
    width = max((len(row[0]) for row in rows), default=0)
    print(f"{'name':{width}} {'value':>10} {'goal':>8}  holds")
    for name, value, goal, holds in rows:
        print(f"{name:{width}} {value:>10} {goal:>8}  {holds}")
    if args.out:
        first = next(iter(records.values()), provenance())
        start = {k: v for k, v in first.items() if k in _BEGINNING}
        checks = [c | {"bench": stem} for stem, r in records.items() for c in r["checks"]]
        write({**start, "phases": phases, "checks": checks}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
