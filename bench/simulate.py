"""What does a simulation cost, and on what? `mpicdsgd simulate` of softmax regression on a ring.

1,024 agents make 1,000 steps of jobs/logistic.toml with an evaluation of every agent after each
hundred; 4,096 agents make 100. Shares are of the time of the steps and evaluations: *gradients*
with the making of minibatches, *updates* (the kernel's pass of each agent) and *evaluation*. With
--quick 64 agents make 40 steps. It takes one process and what cores it may use.

    python bench/simulate.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch

from mpicdsgd.kernels import native
from mpicdsgd.runs import metrics_file
from mpicdsgd.runs.config import load_config
from mpicdsgd.simulation.simulation import Simulation

CONFIG = common.HERE.parent / "jobs" / "logistic.toml"
GOAL_S = 120.0  # of the 1,024 agents' 1,000 steps, on two cores
EVALUATION = 0.25  # of the time, at most


@dataclass(frozen=True)
class Case:
    """So many agents, and epochs of 4 steps."""

    agents: int
    epochs: int
    evaluate_every: str
    goal_s: float | None


CASES = [Case(1024, 250, "100 steps", GOAL_S), Case(4096, 25, "100 steps", None)]
QUICK = [Case(64, 10, "20 steps", None)]


def run(case: Case) -> dict[str, Any]:
    """The figures of one simulation."""
    with tempfile.TemporaryDirectory(prefix="mpicdsgd-simulate-") as folder:
        settings = [
            f"run.dir={folder}",
            f"run.epochs={case.epochs}",
            f"run.evaluate_every={case.evaluate_every}",
        ]
        start = time.perf_counter()
        simulation = Simulation(load_config(CONFIG, settings), case.agents)
        ready = time.perf_counter()
        last = simulation.run()
        end = time.perf_counter()
        lines = len(metrics_file.read(Path(folder)))
    return {
        "agents": case.agents,
        "steps": simulation.total_steps,
        "evaluations": lines,
        "settings": settings[1:],
        "parameters": sum(p.numel() for p in simulation._start.model.parameters()),
        "start_s": ready - start,
        "run_s": end - ready,
        "shares": {name: s / (end - ready) for name, s in simulation.seconds.items()},
        "update_us": 1e6 * simulation.seconds["updates"] / simulation.total_steps / case.agents,
        "test_accuracy": last["test_accuracy"]["mean"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer agents and steps")
    parser.add_argument("--out", type=Path, help="default: bench/results/simulate.json")
    args = parser.parse_args()
    cases, results, checks = (QUICK if args.quick else CASES), {}, []
    for case in cases:
        name = f"{case.agents} agents"
        row = results[name] = run(case)
        shares = ", ".join(f"{what} {100 * part:.0f} %" for what, part in row["shares"].items())
        print(
            f"{name}, {row['steps']} steps of {row['parameters']} parameters: {row['run_s']:.1f} s "
            f"(and {row['start_s']:.1f} s to begin); {shares}; an agent's update "
            f"{row['update_us']:.1f} us; mean test accuracy {row['test_accuracy']:.4f}"
        )
        seconds = f"{name}, seconds for {row['steps']} steps"
        checks.append(common.check(seconds, row["run_s"], case.goal_s, at_most=True))
        checks.append(
            common.check(f"{name}, share of evaluation", row["shares"]["evaluation"],
                         EVALUATION, at_most=True, judged=not args.quick)
        )  # fmt: skip
    common.print_checks(checks)
    made = common.provenance()
    made |= {
        "threads": torch.get_num_threads(),
        "kernel": f"{native.backend}, {native.isa}",
        "config": CONFIG.name,
        "results": results,
        "checks": checks,
    }
    common.write(made, common.place("simulate", args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
