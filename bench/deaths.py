"""Do runs survive their ranks' deaths, how fast, and where do they arrive?

Twenty runs of 4, 5 and 6 agents on rings, tori and complete graphs, on scikit-learn's handwritten
digits. In each one or two ranks get ``kill -9`` at a random moment, together or one after another,
rank 0 among them in every other run. Beside them runs that nothing happens to, two seeds for each
number of agents and graph, simulated, which makes a job's parameters: what a run
reaches is held against the mean of these two, and how far these are apart is the noise.

    python bench/deaths.py [--runs 20] [--seed 0] [--epochs 8]

Needs Open MPI with ULFM, see tests/openmpi.py. Writes bench/results/deaths.json and deaths.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

TESTS = common.HERE.parent / "tests"
sys.path.insert(0, str(TESTS))
import openmpi  # noqa: E402, in the tests' folder

from mpicdsgd.runs import metrics_file  # noqa: E402
from mpicdsgd.runs.config import load_config  # noqa: E402
from mpicdsgd.simulation.simulation import Simulation  # noqa: E402

GRAPHS = [("ring", 4), ("complete", 5), ("torus:2x3", 6), ("ring", 6), ("torus:2x2", 4)]
GRAPHS += [("complete", 4), ("ring", 5), ("complete", 6)]
LIMIT_S = 400.0  # of a run: then it is called a hang
CONFIG = """
run = {{epochs = {epochs}, checkpoint_every = "20 steps"}}
agents = {{device = "cpu", on_death = "continue"}}
model = {{name = "mlp", loss = "mortal:loss"}}
data = {{name = "digits", batch_size = 16}}
optim = {{lr = 0.02, momentum = 0.9}}
"""
_WENT_ON = re.compile(
    r"agents? ([\d, ]+) died: (\d+) agents? go on from step (\d+) after ([\d.]+) s"
)


def plan_of(n: int, run: int, epochs: int, chance: random.Random) -> list[common.Record]:
    """Who dies when: of every four runs two have two deaths, one of them both at once."""
    steps = epochs * -(-1437 // n // 16)  # the digits' training samples
    deaths = 2 if run % 2 and n > 3 else 1
    victims = chance.sample(range(1, n), deaths)
    if run % 4 in (1, 2):
        victims[0] = 0
    whens = sorted(chance.randrange(3, int(0.9 * steps)) for _ in victims)
    if deaths == 2:  # half of four agents without rank 0 would be too few to go on
        whens[1] = whens[0] if run % 4 == 3 else max(whens[1], whens[0] + 10)
    return [
        {"rank": rank, "at": "step", "nth": when, "delay_s": chance.choice([0.0, 0.004, 0.03])}
        for rank, when in zip(victims, whens, strict=True)
    ]


def train(graph: str, n: int, plan: list[common.Record], seed: int, epochs: int) -> common.Record:
    """A run's record: whether it came to its end, what it reached, how long it took to go on."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "r.toml").write_text(CONFIG.format(epochs=epochs))
        arguments = ["r.toml", f"agents.topology={graph}", f"run.seed={seed}", "run.dir=run"]
        command = [*openmpi.launcher(n, "--with-ft", "ulfm"), "-m", "mpicdsgd", "train"]
        environment = {
            **os.environ,
            **openmpi.ENVIRONMENT,
            "MORTAL": json.dumps(plan),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(common.HERE.parent), str(TESTS / "jobs")]),
        }
        start = time.monotonic()
        code: int | None = None
        try:
            done = subprocess.run(
                [*command, *arguments], cwd=folder, env=environment, timeout=LIMIT_S,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            code, told = done.returncode, done.stderr
        except subprocess.TimeoutExpired as late:
            told = (late.stderr or b"").decode(errors="replace")
        lines = metrics_file.read(Path(folder) / "run") if code == 0 else []
    went_on = [
        {"dead": dead, "agents": int(left), "step": int(step), "seconds": float(seconds)}
        for dead, left, step, seconds in _WENT_ON.findall(told)
    ]
    last = lines[-1] if lines else None
    survived = last is not None and len(last["test_accuracy"]["agents"]) == n - len(plan)
    if not survived:
        print(told[-3000:], file=sys.stderr)
    return {
        "graph": graph,
        "agents": n,
        "plan": plan,
        "code": code,
        "survived": survived,
        "hung": code is None,
        "went_on": went_on,
        "seconds": time.monotonic() - start,
        "accuracy": last["test_accuracy"]["mean"] if last else None,
        "averaged": last["averaged_model"]["test_accuracy"] if last else None,
    }


def undisturbed(graph: str, n: int, seed: int, epochs: int) -> common.Record:
    """What the same run reaches when nobody dies."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.toml"
        path.write_text(CONFIG.format(epochs=epochs))
        overrides = [f"agents.topology={graph}", f"run.seed={seed}", f"run.dir={folder}/run"]
        overrides += ["agents.on_death=end", "model.loss=cross_entropy"]
        last = Simulation(load_config(path, overrides), n).run()
    return {"graph": graph, "agents": n, "seed": seed, "accuracy": last["test_accuracy"]["mean"]}


def table(page: common.Record) -> str:
    """The page."""
    runs = page["runs"]
    calm: dict[tuple[str, int], list[float]] = {}
    for run in page["undisturbed"]:
        calm.setdefault((run["graph"], run["agents"]), []).append(run["accuracy"])
    noise = [abs(values[1] - values[0]) for values in calm.values() if len(values) > 1]
    seconds = [on["seconds"] for run in runs for on in run["went_on"]]
    differences, rows = [], []
    for run in runs:
        dead = ", ".join(f"{p['rank']} at {p['nth']}" for p in run["plan"])
        how = "yes" if run["survived"] else "HUNG" if run["hung"] else "NO"
        took = ", ".join(f"{on['seconds']:.2f}" for on in run["went_on"])
        without = statistics.mean(calm[run["graph"], run["agents"]])
        reached = "-"
        if run["accuracy"] is not None:
            reached = f"{run['accuracy']:.4f}"
            differences.append(run["accuracy"] - without)
        cells = [run["graph"], run["agents"], dead, how, took, reached, f"{without:.4f}"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    survived, hung = (sum(run[key] for run in runs) for key in ("survived", "hung"))
    lines = [
        "# Deaths survived",
        "",
        f"`python bench/deaths.py`: {page['cores']} cores, Open MPI with ULFM, scikit-learn's",
        f"digits, mlp, {page['epochs']} epochs.",
        "",
        f"- {survived} of {len(runs)} runs came to their end with the agents that were left, "
        f"{hung} hung.",
        "- From the moment that rank 0 or its heir met a death until all went on: median "
        f"{statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s.",
        "- Mean test accuracy of the agents at the end, less that of the undisturbed runs on the",
        f"  same graph: {statistics.mean(differences):+.4f} in the mean,",
        f"  {min(differences):+.4f} at least. Two undisturbed runs differ by",
        f"  {statistics.mean(noise):.4f} in the mean, by {max(noise):.4f} at most.",
        "",
        "| graph | agents | died, at its step | survived | seconds | accuracy | undisturbed |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--undisturbed", type=int, default=2 * len(GRAPHS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=common.HERE / "results" / "deaths.json")
    args = parser.parse_args()
    if openmpi.find() is None:
        sys.exit("this Python's MPI is not Open MPI: MPICDSGD_OPENMPI=FOLDER has one made there")
    chance = random.Random(args.seed)
    page: common.Record = {**common.provenance(), "epochs": args.epochs, "undisturbed": []}
    page["runs"] = []
    for i in range(args.undisturbed):
        graph, n = GRAPHS[i % len(GRAPHS)]
        page["undisturbed"].append(undisturbed(graph, n, i, args.epochs))
        print(json.dumps(page["undisturbed"][-1]), flush=True)
    for i in range(args.runs):
        graph, n = GRAPHS[i % len(GRAPHS)]
        page["runs"].append(train(graph, n, plan_of(n, i, args.epochs, chance), i, args.epochs))
        print(json.dumps(page["runs"][-1]), flush=True)
        common.write(page, args.out)
    common.write(page, args.out)
    args.out.with_suffix(".md").write_text(table(page))
    print(table(page))
    return 0 if all(run["survived"] for run in page["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
