"""What the ranks of a job of `run.py` measure, as JSON in a file of rank 0's.

    mpiexec -n 4 python bench/checkpoints/job.py steps|write|start CASE RESULT

CASE is JSON: settings of `mpicdsgd train jobs/mnist.toml`, and rounds, steps and the like.
Everything goes through `runs.run.Run`, as in `mpicdsgd train`.
"""

import time

ENTERED = time.monotonic()

import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, whose modules all of it shares

import common  # noqa: E402
import contenders  # noqa: E402
import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

from mpicdsgd.checkpoints import manifest, reading  # noqa: E402
from mpicdsgd.data.prefetch import to_device  # noqa: E402
from mpicdsgd.runs import agent_state  # noqa: E402
from mpicdsgd.runs.config import load_config  # noqa: E402
from mpicdsgd.runs.run import Run  # noqa: E402

IMPORTED = time.monotonic()
CONFIG = common.HERE.parent / "jobs" / "mnist.toml"
STARTED = "MPICDSGD_BENCH_STARTED"  # time.monotonic() before the launcher was started

Case = dict[str, Any]


def noise(path: str, seed: int, samples: int) -> Any:
    """Pictures as large as MNIST's: what they show does not matter."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((samples, 1, 28, 28), np.float32)
    y = random.integers(0, 10, samples)
    return (x, y), (x[:64], y[:64])


class Trainer:
    """A run, and its steps without end."""

    def __init__(self, case: Case) -> None:
        self.run = Run(load_config(CONFIG, case["settings"]), MPI.COMM_WORLD)
        self.comm = self.run.agents.comm
        self._batches = self._forever()

    def _forever(self) -> Iterator[Any]:
        run = self.run
        for epoch in itertools.count():
            made = run.data.train.batches(run.shuffler.batches(epoch, 0), epoch)
            yield from to_device(made, run.agents.device)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.run._step(*next(self._batches))
            self.run._writer.progress()

    def save(self) -> None:
        self.run._save()

    def finish(self) -> None:
        self.run._writer.finish()

    def settle(self) -> None:
        """Wait for the checkpoint, and for the removal of the one before it."""
        self.finish()
        self.run._writer._settle()

    def most(self, *values: float) -> list[float]:
        """The largest of all ranks. Collective."""
        rows: list[float] = contenders.gather(self.comm, values).max(axis=0).tolist()
        return rows

    def together(self) -> float:
        """Now, on all ranks. Collective."""
        contenders.wait(self.comm.Ibarrier())
        return time.perf_counter()

    def written(self) -> tuple[int, int]:
        """Files and bytes of the newest checkpoint."""
        place = manifest.places(self.run._dir)[0]
        sizes = [path.stat().st_size for path in place.folder.iterdir()]
        return len(sizes), sum(sizes)

    def close(self) -> None:
        self.run._writer.close()
        self.run.optimizer.close()


def steps(case: Case) -> Case:
    """Seconds per step of blocks without and with a checkpoint, in turn.

    A block with one begins with `save`, and ends when the manifest is there and the checkpoint
    before it is removed.
    """
    made = Trainer(case)
    count = case["steps"]
    seconds: common.Seconds = {"without": [], "with": [], "save": []}
    for round_ in range(case["rounds"] + 1):
        for way in ("without", "with"):
            start = made.together()
            if way == "with":
                made.save()
            saved = time.perf_counter()
            made.steps(count)
            if way == "with":
                made.settle()
            took_s, save_s = made.most((time.perf_counter() - start) / count, saved - start)
            if round_ > 0:  # the first one starts writers and touches memory
                seconds[way].append(took_s)
                if way == "with":
                    seconds["save"].append(save_s)
    files, size = made.written()
    made.close()
    return {"seconds": seconds, "files": files, "size_bytes": size,
            "parameters": sum(p.numel() for p in made.run.model.parameters())}  # fmt: skip


def write(case: Case) -> Case:
    """Seconds from `save` to the manifest, and of NumPy's tofile and fsync of the same arrays."""
    made = Trainer(case)
    run = made.run
    path = Path(run._dir) / f"plain-{made.comm.rank}"
    seconds: common.Seconds = {"checkpoint": [], "tofile": []}
    plain = 0
    for round_ in range(case["rounds"] + 1):
        made.steps(1)  # a step is written once
        start = made.together()
        made.save()
        made.finish()
        (checkpoint_s,) = made.most(time.perf_counter() - start)
        made.settle()
        arrays = agent_state.capture_arrays(run.optimizer, run.model)
        start = made.together()
        with open(path, "wb") as file:
            for array in arrays.values():
                array.tofile(file)
            file.flush()
            os.fsync(file.fileno())
        (plain_s,) = made.most(time.perf_counter() - start)
        plain = sum(array.nbytes for array in arrays.values())
        path.unlink()
        if round_ > 0:
            seconds["checkpoint"].append(checkpoint_s)
            seconds["tofile"].append(plain_s)
    files, size = made.written()
    plain = int(contenders.gather(made.comm, [float(plain)]).sum())
    made.close()
    return {"seconds": seconds, "files": files, "size_bytes": size, "plain_bytes": plain}


def start(case: Case) -> Case:
    """Seconds from the start of the launcher to marks on the way to the first step, by rank.

    With "save" a checkpoint is written then.
    """
    reading_s = [0.0]
    read = reading.read_newest

    def timed(*args: Any, **more: Any) -> Any:
        began = time.perf_counter()
        found = read(*args, **more)
        reading_s[0] += time.perf_counter() - began
        return found

    reading.read_newest = timed
    made = Trainer(case)
    ready = time.monotonic()
    made.steps(1)
    stepped = time.monotonic()
    began = float(os.environ[STARTED])
    marks = [t - began for t in (ENTERED, IMPORTED, ready, stepped)]
    rows = contenders.gather(made.comm, [*marks, reading_s[0]])
    names = ("entered", "imported", "ready", "first step", "reading")
    result: Case = {name: column.tolist() for name, column in zip(names, rows.T, strict=True)}
    result["step"] = made.run.optimizer.steps
    if case.get("save"):
        then = made.together()
        made.save()
        saved = time.perf_counter()
        made.finish()
        save_s, whole_s = made.most(saved - then, time.perf_counter() - then)
        files, size = made.written()
        result["checkpoint"] = {"save_s": save_s, "seconds": whole_s, "files": files,
                                "size_bytes": size}  # fmt: skip
    made.close()
    return result


def main() -> int:
    name, case, out = sys.argv[1:]
    result = {"steps": steps, "write": write, "start": start}[name](json.loads(case))
    if MPI.COMM_WORLD.rank == 0:
        Path(out).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
