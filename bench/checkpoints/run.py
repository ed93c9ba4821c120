"""What do checkpoints cost, and what does a start? On the authors' CNN and an MLP of 25M.

- steps: seconds per training step with a checkpoint every 50 steps beside none, in blocks of 50
  steps in turn; a block with one ends when its manifest is there and the one
  before it is removed.
- write: bytes per second from the call to the manifest, beside NumPy's tofile and fsync of the same
  arrays by the same ranks at the same time, in turn.
- restart: from the launcher's start to the first step done, without a checkpoint and with one,
  which lies in the page cache or, as far as the kernel forgets it, on the disk only.
- startup, only where --only names it: many ranks on few cores, with a small model: start, one
  checkpoint, restart; and how many files a rank opens before it trains.

Ranks and settings are those of `mpicdsgd train`. Sections that are not run keep their figures in
checkpoints.json; the page checkpoints.md is made from all of them.

    python bench/checkpoints/run.py [--only steps,write,restart,startup] [--ranks N]
                                    [--folder FOLDER] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, whose modules all of it shares

import common
from mpi4py import MPI

import mpicdsgd
from checkpoints import files, page
from mpicdsgd.kernels import native

SECTIONS = ("steps", "write", "restart", "startup")
EVERY = 50  # steps between checkpoints
BATCH = 32
RANKS, MANY = 4, 64
JOB_S = 3000
MODELS = {
    "cnn": ["model.name=cnn"],
    "mlp of 25M": ["model.name=mlp", "model.args.hidden=[4600,4600]"],
}
QUICK_MODELS = {"mlp": ["model.name=mlp", "model.args.hidden=[64]"]}
SMALL = [
    "model.name=mlp", "model.args.hidden=[128,64]", "data.name=digits", "data.batch_size=4",
]  # fmt: skip
COMMON = ["run.keep=1", "agents.threads=1"]
STARTED = "MPICDSGD_BENCH_STARTED"  # `checkpoints/job.py` reads it


def job(kind: str, case: common.Record, ranks: int, folder: Path) -> common.Record:
    """What the ranks measured."""
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    script = str(common.HERE / "checkpoints" / "job.py")
    command = [*common.mpiexec(ranks), sys.executable, script, kind, json.dumps(case), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", STARTED: repr(time.monotonic())}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=JOB_S, check=False
    )
    if done.returncode or not out.exists():
        sys.exit(f"the job {kind} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    found: common.Record = json.loads(out.read_text())
    return found


class Bench:
    """Where and how large.

    Args:
        folder: for runs and their checkpoints; the disk that is measured.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        quick = self.quick = args.quick
        self.folder = folder
        self.ranks = args.ranks or (2 if quick else RANKS)
        self.many = args.ranks or (3 if quick else MANY)
        self.models = QUICK_MODELS if quick else MODELS
        self.every = 4 if quick else EVERY

    def rounds(self, full: int) -> int:
        return 1 if self.quick else full

    def settings(self, model: str, run_dir: str) -> list[str]:
        samples = self.ranks * BATCH * self.every
        return [
            *COMMON,
            *self.models[model],
            "data.name=checkpoints.job:noise",
            f"data.args.samples={samples}",
            f"data.batch_size={BATCH}",
            f"run.dir={self.folder / run_dir}",
        ]

    def on_ranks(self, kind: str, model: str, **more: Any) -> common.Record:
        """One job that begins anew, and leaves nothing."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        case = {"settings": self.settings(model, "run"), **more}
        found = job(kind, case, self.ranks, self.folder)
        shutil.rmtree(self.folder / "run")
        return found

    def steps(self) -> common.Record:
        rounds = self.rounds(5)
        return {
            model: self.on_ranks("steps", model, steps=self.every, rounds=rounds)
            for model in self.models
        }

    def write(self) -> common.Record:
        rounds = self.rounds(9)
        return {model: self.on_ranks("write", model, rounds=rounds) for model in self.models}

    def restart(self) -> common.Record:
        return {model: self._restart(self.settings(model, "with")) for model in self.models}

    def startup(self) -> common.Record:
        with_dir = self.folder / "with"
        settings = [*COMMON, *SMALL, "data.limit=1280", f"run.dir={with_dir}"]
        case = {"settings": settings, "save": True}
        starts = []
        for _ in range(self.rounds(2)):
            shutil.rmtree(with_dir, ignore_errors=True)
            new = job("start", case, self.many, self.folder)
            again = job("start", {"settings": settings}, self.many, self.folder)
            assert (new["step"], again["step"]) == (1, 2), "a restart goes on from its checkpoint"
            starts.append({"new": new, "again": again})
        return {"ranks": self.many, "starts": starts,
                "files": files.measure(self.rounds(5))}  # fmt: skip

    def _restart(self, settings: list[str]) -> common.Record:
        """Starts without a checkpoint and with one, in turn."""
        with_dir, without = self.folder / "with", self.folder / "without"
        shutil.rmtree(with_dir, ignore_errors=True)
        made = job("start", {"settings": settings, "save": True}, self.ranks, self.folder)
        paths = [str(p) for p in with_dir.glob("checkpoints/*/*")]
        starts: dict[str, list[common.Record]] = {"without": [], "cached": [], "disk": []}
        for _ in range(self.rounds(5)):
            for way, found in starts.items():
                shutil.rmtree(without, ignore_errors=True)
                there = without if way == "without" else with_dir
                if way == "disk":
                    files.forget(paths)
                case = {"settings": [*settings, f"run.dir={there}"]}
                found.append(job("start", case, self.ranks, self.folder))
                assert found[-1]["step"] == (1 if way == "without" else 2)
        return {"starts": starts, "size_bytes": made["checkpoint"]["size_bytes"]}


def file_system(folder: Path) -> str:
    """Its type, and where it is mounted."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if folder.resolve().is_relative_to(where) and len(where) >= len(best[0]):
            best = (where, kind)
    return best[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--only", default="steps,write,restart", help="sections; default: %(default)s")
    add("--ranks", type=int, help=f"default: {RANKS}, of startup {MANY}")
    add("--folder", type=Path, help="on the disk to be measured; default: where /tmp is")
    add("--quick", action="store_true", help="a small model, one round")
    add("--out", type=Path, help="default: bench/results/checkpoints.json; the page lies beside it")
    args = parser.parse_args()
    only = args.only.split(",")
    if unknown := set(only) - set(SECTIONS):
        parser.error(f"--only: {', '.join(unknown)}: known are {', '.join(SECTIONS)}")
    if common.in_job():
        sys.exit("start it without mpiexec: it starts its jobs itself")
    out = common.place("checkpoints", args)
    record: common.Record = json.loads(out.read_text()) if out.exists() else {"sections": {}}
    with tempfile.TemporaryDirectory(prefix="mpicdsgd-checkpoints-", dir=args.folder) as name:
        bench = Bench(args, Path(name))
        about = common.provenance()
        about["versions"] |= {
            "mpicdsgd": mpicdsgd.__version__,
            "mpi": MPI.Get_library_version().split("\n")[0].strip("\0 "),
        }
        about["kernel"] = {"backend": native.backend, "isa": native.isa}
        about |= {
            "file system": file_system(Path(name)),
            "ranks": bench.ranks,
            "every": bench.every,
        }
        for section in only:
            load = os.getloadavg()[0]
            found = getattr(bench, section)()
            record["sections"][section] = {**about, "load before": load, "results": found}
            record["checks"] = page.checks(record["sections"])
            common.write(record, out)
            text = page.page(record)
            out.with_suffix(".md").write_text(text)
    print(text, end="")
    common.print_checks(record["checks"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
