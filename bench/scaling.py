"""How do step time, traffic and memory of an agent grow with the number of agents?

For each N a job of N ranks is started, as a batch script would do it. On each graph and by each
transport every agent trains the same model with CDMSGD: with the same batch for every agent (weak
scaling), and with one batch split over all (strong). *local* is torch.optim.SGD without exchange.
Times are the slowest rank's; all cases of a job take turns in every round. What each step sends is
counted where it is given to MPI, memory is this rank's share of /proc, and both are held against
`scaling_model`. An exchange alone, for vectors of several sizes on the ring, fits Hockney's model,
which predicts steps on more nodes.

    python bench/scaling.py [--agents 1 2 4 8 16] [--model cnn] [--quick] [--network hdr100]
    python bench/scaling.py --launcher "srun -n {n}" --agents 8 64 512 --transports auto neighbor

Ranks that share cores show how much work there is, not how it scales.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np
import scaling_job
import scaling_model as theory

import mpicdsgd
from mpicdsgd.common import figures
from mpicdsgd.models import build

GRAPHS = ("ring", "torus", "one-peer exponential", "exponential", "complete")
TRANSPORTS = ("direct", "neighbor")
NODES = (64, 256, 1024, 4096)
MEMORY_GOAL = 5.0  # percent of the formula
JUDGED_SIZE = 1_000_000  # below, what every process has anyway is no longer small beside it


# All jobs: start, gather


def start(args: argparse.Namespace, n: int) -> list[common.Record]:
    """The lines of this very command as a job of ``n`` ranks; ends with it where it fails."""
    launcher = shlex.split(args.launcher.format(n=n)) if args.launcher else common.mpiexec(n)
    command = [*launcher, sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--job"]
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | os.environ
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
    except OSError as error:
        sys.exit(f"{launcher[0]}: {error.strerror}")
    if done.returncode:
        sys.exit(done.returncode)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def gather(args: argparse.Namespace) -> common.Record:
    """The record of all jobs."""
    whole: common.Record = {}
    results: common.Record = {}
    record: common.Record = {"memory": {}, "exchange": [], "skipped": {}}
    for n in args.agents:
        for line in start(args, n):
            whole = whole or line.get("provenance", {})
            record["skipped"] |= line.pop("skipped", {})
            if "step" in line:
                results[f"{line.pop('step')}, {line['mode']}"] = line | line.pop("row")
            elif "memory" in line:
                record["memory"][line["memory"]] = line["row"] | {"agents": n}
            elif "exchange" in line:
                record["exchange"].append(line | line.pop("row"))
            else:
                record |= {k: v for k, v in line.items() if k in ("parameters", "elements")}
        print(f"N={n} measured", flush=True)
    asked = ("launcher", "model", "batch", "total", "wire", "memory_size", "rounds", "steps")
    settings = {name: getattr(args, name) for name in asked}
    return whole | {"ranks": args.agents} | settings | record | {"results": results}


# All jobs: what it says


def fits_of(exchange: Sequence[common.Record]) -> common.Record:
    """Hockney's model by transport: of each N, and of all whose ranks have cores of their own.

    Of the fastest rounds: what else a machine does only adds to an exchange.
    """
    fits = {}
    for transport in dict.fromkeys(point["exchange"] for point in exchange):
        points = [point for point in exchange if point["exchange"] == transport]
        sizes = sorted({point["agents"] for point in points})
        alone = [p for p in points if p["alone"]] or [p for p in points if p["agents"] == sizes[0]]
        groups = {f"N={n}": [p for p in points if p["agents"] == n] for n in sizes}
        for name, group in ({"used": alone} | groups).items():
            if len({p["size"] for p in group}) < 2:
                continue
            found = theory.fit([theory.Point(p["messages"], p["bytes"], p["min_s"])
                                for p in group])  # fmt: skip
            fits[f"{transport}, {name}"] = {
                "alpha_s": found.link.alpha_s, "bandwidth": found.link.bandwidth, "rms": found.rms,
                "worst": found.worst, "agents": sorted({p["agents"] for p in group}),
                "alone": all(p["alone"] for p in group),
            }  # fmt: skip
    return fits


def link_of(args: argparse.Namespace, fits: common.Record) -> tuple[theory.Link | None, str]:
    """What predicts, and where it is from."""
    link, source = None, ""
    if used := fits.get("neighbor, used") or fits.get("direct, used"):
        link = theory.Link(used["alpha_s"], used["bandwidth"])
        shared = "" if used["alone"] else ", ranks that share cores"
        source = f"fitted to N={used['agents']}{shared}: no network, unless each rank has a node"
    if args.network:
        link = theory.NETWORKS[args.network]
        source = f"{args.network}: example figures, not measured"
    given = [args.alpha and args.alpha * 1e-6, args.bandwidth and args.bandwidth * 1e9 / 8]
    if any(given):
        alpha_s, bandwidth = (
            g or getattr(link, name, None)
            for g, name in zip(given, ("alpha_s", "bandwidth"), strict=True)
        )
        link = theory.Link(alpha_s, bandwidth) if alpha_s and bandwidth else None
        source = "as given"
    return link, source


def predictions_of(link: theory.Link, record: common.Record) -> common.Record:
    """Seconds of an exchange and of a step, where it is all hidden or nothing, by nodes."""
    fewest = min(record["ranks"])
    compute_s = record["results"][f"local, N={fewest}, weak"]["median_s"]
    values = theory.WIRE_BYTES[record["wire"]] * record["elements"]
    return {
        str(n): {
            name: {"exchange_s": s, "hidden_s": max(compute_s, s), "step_s": compute_s + s}
            for name, s in theory.predict(link, n, values).items()
        }
        for n in NODES
    }


def checks_of(record: common.Record) -> list[common.Record]:
    results, memory, checks = record["results"], record["memory"], []
    for n in record["ranks"]:
        rows = [row for row in results.values() if row["agents"] == n]
        off = max(row["off"] for row in rows)
        name = f"N={n}: bytes and messages of a step, furthest from the formula"
        checks.append(common.check(name, off, 0.0, at_most=True))
        if found := [m for m in memory.values() if m["agents"] == n]:
            worst = max(100 * abs(m["measured"] / m["formula"] - 1) for m in found)
            name = f"N={n}: memory of a rank, furthest from the formula, %"
            judged = record["memory_size"] >= JUDGED_SIZE
            checks.append(common.check(name, worst, MEMORY_GOAL, at_most=True, judged=judged))
    degree_2 = [n for n in record["ranks"] if n >= 3]
    for transport in ("auto", *TRANSPORTS):
        names = [f"ring, N={n}: {transport}, weak" for n in degree_2]
        sizes = [results[name]["bytes"] for name in names if name in results]
        if len(sizes) > 1:
            name = f"ring, {transport}: most bytes of an agent over least, N={degree_2}"
            checks.append(common.check(name, max(sizes) / min(sizes), 1.0, at_most=True))
    for name, one in record["fits"].items():
        if name.endswith("used"):
            checks.append(common.check(f"fit, {name}: residual (rms), %", 100 * one["rms"], None))
    return checks


def print_results(record: common.Record) -> None:
    print(f"{record['cpu']}, {record['cores']} cores, {record['threads']} threads a rank; "
          f"{record['model']} of {record['parameters']:,} parameters; batch {record['batch']} an "
          f"agent (weak), {record['total']} in all (strong)")  # fmt: skip
    width = max(len(name) for name in record["results"])
    print(f"{'':{width}} {'ms':>8} {'quartiles':>17} {'waited':>7} {'/local':>6} "
          f"{'bytes':>11} {'messages':>8}")  # fmt: skip
    for name, row in record["results"].items():
        print(f"{name:{width}} {row['median_s'] * 1e3:8.2f} {row['q1_s'] * 1e3:8.2f} "
              f"{row['q3_s'] * 1e3:8.2f} {row['wait_s'] * 1e3:7.2f} {row['over_local']:6.2f} "
              f"{row['bytes']:11.0f} {row['messages']:8.0f}")  # fmt: skip
    if record["memory"]:
        print(f"memory of a rank, {record['memory_size']:,} parameters, MB: measured, formula")
    for name, row in record["memory"].items():
        over = 100 * (row["measured"] / row["formula"] - 1)
        print(f"  {name:{width}} {row['measured'] / 1e6:8.2f} {row['formula'] / 1e6:8.2f} "
              f"{over:+6.2f} %")  # fmt: skip
    for name, why in record["skipped"].items():
        print(f"left out: {name}: {why}")
    for name, one in record["fits"].items():
        rms, worst = (f"{100 * one[k]:.0f} %" for k in ("rms", "worst"))
        print(f"fit, {name}: {link_text(one)}, residual {rms} (largest {worst})")


def link_text(link: common.Record) -> str:
    return f"alpha {link['alpha_s'] * 1e6:.1f} us, {link['bandwidth'] / 1e9:.2f} GB/s"


def print_predictions(record: common.Record) -> None:
    link = record["link"]
    print(f"predicted step, ms: exchange hidden behind the gradient .. not hidden\n"
          f"{link_text(link)}: {link['source']}\n"
          "no congestion, one rank a node, an agent's messages one after another")  # fmt: skip
    names = list(record["predictions"][str(NODES[0])])
    print(f"{'nodes':>6} " + " ".join(f"{name:>20}" for name in names))
    for n, row in record["predictions"].items():
        cells = (f"{row[k]['hidden_s'] * 1e3:.1f} .. {row[k]['step_s'] * 1e3:.1f}" for k in names)
        print(f"{n:>6} " + " ".join(f"{cell:>20}" for cell in cells))


def write_csv(record: common.Record, path: Path) -> None:
    rows = [{"name": name} | row for name, row in record["results"].items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot(record: common.Record, out: Path) -> None:
    """Step times, weak and strong, and bytes, against the number of agents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    series: dict[tuple[str, str, str], list[common.Record]] = {}
    for name, row in record["results"].items():
        graph, rest = name.split(", ", 1)
        transport = rest.split(": ")[1].split(",")[0] if ": " in rest else ""
        series.setdefault((graph, transport, row["mode"]), []).append(row)
    colours = dict(zip(("local", *GRAPHS), figures.COLOURS[::-1], strict=False))
    for (graph, transport, mode), rows in series.items():
        x = [row["agents"] for row in rows]
        y, low, high = (np.array([row[k] for row in rows]) * 1e3
                        for k in ("median_s", "q1_s", "q3_s"))  # fmt: skip
        style = {"color": colours[graph], "ls": "--" if transport == "neighbor" else "-", "ms": 3.5,
                 "marker": "o", "label": f"{graph}{transport and f', {transport}'}"}  # fmt: skip
        panels[scaling_job.MODES.index(mode)].errorbar(
            x, y, yerr=[y - low, high - y], lw=1.4, **style
        )
        if graph != "local" and mode == "weak":
            panels[2].plot(x, [row["bytes"] / 1e6 for row in rows], lw=1.4, **style)
    titles = (
        "Weak scaling: step, ms",
        "Strong scaling: step, ms",
        "Sent by an agent in a step, MB",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left", color=figures.INK, fontsize=12, fontweight="bold")
        axes.set_xlabel("agents", color=figures.INK)
        axes.set_xscale("log", base=2)
        axes.set_xticks(record["ranks"], [str(n) for n in record["ranks"]])
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#dddddd", lw=0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figures.save(figure, out)


# The command


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--agents", type=int, nargs="+", help="default: 1 2 4 8 16; quick: 1 3 4")
    add("--model", default="mlp", help=f"{', '.join(build.MODELS)} or package.module:factory")
    add("--input", type=int, nargs="+", default=[1, 28, 28], help="a sample's shape: 1 28 28")
    add("--batch", type=int, default=32, help="weak scaling: samples of an agent; 32")
    add("--total", type=int, help="strong scaling: samples of all; 256, of many agents 8 for each")
    add("--graphs", nargs="+", choices=GRAPHS, default=list(GRAPHS), metavar="GRAPH")
    add("--transports", nargs="+", default=list(TRANSPORTS), choices=("auto", *TRANSPORTS))
    add("--wire", choices=theory.WIRE_BYTES, default="float32")
    add("--memory-size", type=int, help="parameters where memory is measured; 2e6")
    add("--launcher", help='how to start n ranks: "srun -n {n}"; default: this MPI\'s mpiexec')
    add("--network", choices=theory.NETWORKS, help="predict for such a network; example figures")
    add("--alpha", type=float, help="predict for a latency, microseconds")
    add("--bandwidth", type=float, help="and a bandwidth, Gbit/s")
    add("--quick", action="store_true", help="smaller sizes, fewer rounds")
    add("--out", type=Path)
    add("--csv", type=Path, help="default: beside the JSON")
    add("--plot", type=Path, help=".png, .pdf or .svg; default: a .png beside the JSON")
    add("--job", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.agents = sorted(set(args.agents or ([1, 3, 4] if args.quick else [1, 2, 4, 8, 16])))
    args.total = args.total or max(256, 8 * args.agents[-1])
    args.memory_size = args.memory_size or (JUDGED_SIZE if args.quick else 2 * JUDGED_SIZE)
    args.rounds, args.steps = (3, 2) if args.quick else (11, 4)
    args.sizes = [4**k for k in ((5, 7, 9) if args.quick else range(5, 12))]
    if args.agents[0] < 1 or args.batch < 1 or args.total < args.agents[-1]:
        parser.error("at least one agent, and one sample for each, are needed")
    try:  # before all the jobs
        build.build(build.ModelConfig(args.model), tuple(args.input), scaling_job.CLASSES)
        if args.plot:
            figures.check_suffix(args.plot)
    except mpicdsgd.UserError as error:
        parser.error(str(error))
    return args


def main() -> int:
    args = arguments()
    if args.job:
        return scaling_job.job(args)
    if common.in_job():
        sys.exit("start it without mpiexec: it starts a job for each number of agents itself")
    record = gather(args)
    record["fits"] = fits_of(record["exchange"])
    print_results(record)
    link, source = link_of(args, record["fits"])
    if link is not None:
        record["link"] = {"alpha_s": link.alpha_s, "bandwidth": link.bandwidth, "source": source}
        record["predictions"] = predictions_of(link, record)
        print_predictions(record)
    record["checks"] = checks_of(record)
    out = common.place("scaling", args)
    common.print_checks(record["checks"])
    common.write(record, out)
    write_csv(record, args.csv or out.with_suffix(".csv"))
    plot(record, args.plot or out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
