"""Do the paper's experiments come out as it says? Its figures, a page of its claims, all numbers.

    python bench/paper/run.py [--scale full|cpu|quick] [--device cuda] [--only 1a,mnist/2b]
                              [--seeds N] [--data DIR ...] [--runs DIR] [--out DIR]
                              [--dry-run | --page-only] [SECTION.KEY=VALUE ...]

Each run is `mpiexec -n N mpicdsgd train jobs/mnist.toml ...`, one after another. A run that is
finished is not made again, and one that was interrupted goes on; settings given at the end change
all runs, which then are other runs. OUT gets `paper.md`, `paper.json` and `paper_*.png`, of what
--only names and of all other experiments that are finished. A data set that is not there is left
out, and the page says so. Exit codes: 0 done, 1 a run failed, 2 a mistake in the arguments.

    full   the authors' CNN on whole data sets, for a GPU (--device cuda: all agents on cuda:0)
    cpu    an MLP on 10,000 images (--dry-run: how long on 2 cores); --only cnn: the authors' CNN
    quick  two tiny runs

In each --data DIR: mnist/, cifar-10-batches-bin/, cifar-100-binary/, in their original formats.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, whose modules all of it shares

import common

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
from paper import consensus, figures, page, start
from paper.curves import curves, summary
from paper.part import Part
from paper.runs import DATA_TITLES, SCALES, TITLES, Setup, setups

Place = tuple[str, str, str]  # data set, experiment, label
_WHERE = "Name folders that have mnist/, cifar-10-batches-bin/, ... by --data or MPICDSGD_DATA"


def planned(
    args: argparse.Namespace,
) -> tuple[list[start.Source], list[str], list[Place], list[Place]]:
    """The data sets that are there, those wanted that are not, and setups: wanted and all others.

    Raises:
        UserError: `--only` names what there is not, or nothing that is wanted is there.
    """
    scale = SCALES[args.scale]
    usual = {data: experiments for data, (_, experiments) in scale.data.items()}
    known = {data: (*usual[data], *scale.asked.get(data, ())) for data in usual}
    names = {f"{data}/{e}" for data in known for e in known[data]}
    wanted = set(args.only.split(",")) if args.only else set()
    if strange := wanted - names - {name.partition("/")[2] for name in names}:
        raise UserError(f"--only {','.join(sorted(strange))}: known with --scale {args.scale} are "
                        f"{', '.join(sorted(names))}, or without the data set")  # fmt: skip
    there, missing, chosen, others = [], [], [], []
    for data, experiments in known.items():
        mine = [e for e in experiments if {e, f"{data}/{e}"} & wanted or
                (not args.only and e in usual[data])]  # fmt: skip
        source = start.find(data, args.data)
        if source is None:
            missing += [data] if mine else []
            continue
        there.append(source)
        for e in experiments:
            (chosen if e in mine else others).extend(
                (data, e, s.label) for s in setups(e, args.scale)
            )
    if not chosen:
        raise UserError(
            f"{' and '.join(DATA_TITLES[name] for name in missing)}: not in "
            f"{' or '.join(map(str, args.data))}. {_WHERE}"
        )
    return there, missing, chosen, others


def runs_of(
    args: argparse.Namespace, sources: Sequence[start.Source], places: Sequence[Place]
) -> dict[Place, dict[int, start.Run]]:
    """By setup and seed. Equal settings give equal runs."""
    by_name = {source.name: source for source in sources}
    return {
        (data, e, label): {
            seed: start.make(
                _setup(args, e, label), seed, args.scale, by_name[data], args.device,
                args.overrides, args.runs,
            )
            for seed in range(args.seeds)
        }
        for data, e, label in places
    }  # fmt: skip


def finished_ones(
    runs: dict[Place, dict[int, start.Run]],
) -> dict[Place, dict[int, start.Run]]:
    """Those of experiments of which every setup has a finished seed."""
    begun = {(data, e): True for data, e, _ in runs}
    for (data, e, _), by_seed in runs.items():
        begun[data, e] &= any(start.metrics(run) for run in by_seed.values())
    return {place: by_seed for place, by_seed in runs.items() if begun[place[:2]]}


def _setup(args: argparse.Namespace, experiment: str, label: str) -> Setup:
    return next(s for s in setups(experiment, args.scale) if s.label == label)


def work(args: argparse.Namespace, runs: dict[Place, dict[int, start.Run]]) -> list[common.Record]:
    """Start what is not finished. Returns the failures."""
    unique: dict[Path, tuple[start.Run, str]] = {}
    for seed in range(args.seeds):  # all figures have a first seed before any has a second
        for (data, experiment, label), by_seed in runs.items():
            name = f"{data} {experiment}: {label}, seed {seed}"
            unique.setdefault(by_seed[seed].folder, (by_seed[seed], name))
    todo = [(run, name) for run, name in unique.values() if not start.metrics(run)]
    left_s = sum(run.estimate_s for run, _ in todo)
    print(f"{len(unique)} runs, {len(unique) - len(todo)} done, {len(todo)} left: about "
          f"{left_s / 60:.0f} min{_rough(args)}", flush=True)  # fmt: skip
    if args.dry_run:
        for run, name in todo:
            print(f"  {run.estimate_s:5.0f} s  {run.ranks:2} ranks  {name}  ({run.folder.name})")
        return []
    failed = []
    commit = common.provenance()["commit"]
    for k, (run, name) in enumerate(todo, 1):
        note = start.execute(run, commit)
        became = "done" if not note["code"] else f"FAILED ({note['code']}): {note['said']}"
        print(f"[{k} done, {len(todo) - k} left] {name}: {became}, {note['seconds']:.0f} s",
              flush=True)  # fmt: skip
        if note["code"]:
            failed.append({"name": name, "folder": str(run.folder), **_brief(note)})
    return failed


def _rough(args: argparse.Namespace) -> str:
    on = "a GPU, guessed" if args.scale == "full" else "2 cores that are free"
    return f" on {on}" if args.scale != "quick" else ""


def _brief(note: common.Record) -> common.Record:
    return {key: note[key] for key in ("code", "said", "seconds", "ranks", "overrides")}


def write_all(
    args: argparse.Namespace,
    sources: Sequence[start.Source],
    missing: Sequence[str],
    runs: dict[Place, dict[int, start.Run]],
) -> int:
    """Page, record and figures from what is there. Returns the number of failed runs."""
    record = common.provenance() | {
        "scale": args.scale, "device": args.device, "seeds": args.seeds,
        "overrides": args.overrides, "data": {s.name: s.title for s in sources},
        "missing": list(missing), "results": {}, "claims": {},
    }  # fmt: skip
    parts, failed, unfinished = [], {}, set()
    for source in sources:
        part = Part(source.name, source.title, {}, {}, {})
        for place in [p for p in runs if p[0] == source.name]:
            _, experiment, label = place
            setup = _setup(args, experiment, label)
            settings = runs[place][0].settings
            lines = {seed: found for seed, run in runs[place].items()
                     if (found := start.metrics(run))}  # fmt: skip
            notes = {seed: start.noted(run) for seed, run in runs[place].items()}
            for seed in runs[place].keys() - lines.keys():
                folder = runs[place][seed].folder
                unfinished.add(folder)
                if (note := notes[seed]) and note["code"]:
                    name = f"{source.title}, {experiment}: {label}, seed {seed}"
                    failed[folder] = {"name": name, **_brief(note)}
            part.setups.setdefault(experiment, []).append(setup)
            part.settings[experiment, label] = settings
            part.found[experiment, label] = one = curves(lines)
            part.lambda_2[experiment, label] = _lambda_2(settings, setup.agents)
            radii = _radii(lines, runs[place], setup, settings)
            if radii:
                part.radii[experiment, label] = radii
            record["results"]["/".join(place)] = {
                "agents": setup.agents,
                "settings": settings,
                "lambda_2": part.lambda_2[experiment, label],
                "runs": {seed: run.folder.name for seed, run in runs[place].items()},
                "commits": sorted({note["commit"] for note in notes.values() if note}),
                **(summary(one) if one is not None else {}),
                **({"proposition_1": [asdict(r) for r in radii]} if radii else {}),
            }
        parts.append(part)
        _figures(args.out, part)
        record["claims"][source.name] = [
            {"claim": c.text, "step sizes": c.where, "rule": c.rule, "seen": v.seen,
             "numbers": v.numbers, "setups": ["/".join(s) for s in c.setups]}
            for c, v in page.verdicts(part)
        ]  # fmt: skip
    record |= {"failed": list(failed.values()), "unfinished": len(unfinished)}
    common.write(record, args.out / "paper.json")
    text = page.page(record, parts, record["failed"], missing, len(unfinished))
    (args.out / "paper.md").write_text(text)
    print(f"{args.out / 'paper.md'} and paper.json are written")
    return len(failed)


def _radii(
    lines: dict[int, list[common.Record]], runs: dict[int, start.Run], setup: Setup,
    settings: common.Record,
) -> list[consensus.Radius]:  # fmt: skip
    """Proposition 1 beside the finished runs, where it speaks of them."""
    if not consensus.covered(settings, setup.agents):
        return []
    return [consensus.beside(runs[seed].folder, settings, setup.agents) for seed in lines]


def _figures(out: Path, part: Part) -> None:
    for experiment, found in part.setups.items():
        ready = {}
        for setup in found:
            if (one := part.found[experiment, setup.label]) is not None:
                lambda_2 = part.lambda_2[experiment, setup.label]
                label = f"{setup.label}, lambda_2 = {abs(lambda_2):.2f}"
                ready[label if experiment == "2b" else setup.label] = one
        name = f"paper_{part.name}_{experiment}.png"
        if ready:
            figures.draw(experiment, part.title, ready, out / name)
            part.figures[experiment] = name


def _lambda_2(settings: common.Record, agents: int) -> float:
    graph = graph_from_spec(settings["agents"]["topology"], agents)
    found = mixing_from_spec(settings["agents"]["mixing"], graph)
    return round(float(found.spectrum.lambda_2), 6) if agents > 1 else 0.0


def everything(args: argparse.Namespace) -> int:
    """All that is asked for. Returns the exit code."""
    sources, missing, chosen, others = planned(args)
    for name in missing:
        print(f"{DATA_TITLES[name]} is not there and left out. {_WHERE}")
    runs = runs_of(args, sources, chosen)
    failed = [] if args.page_only else work(args, runs)
    if args.dry_run:
        return 0
    if not args.overrides:
        runs |= finished_ones(runs_of(args, sources, others))
    used = [source for source in sources if any(data == source.name for data, _, _ in runs)]
    order = {e: k for k, e in enumerate(TITLES)}
    runs = dict(sorted(runs.items(), key=lambda item: order[item[0][1]]))
    return int(write_all(args, used, missing, runs) > 0 or bool(failed))


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number >= 1")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    given = Path(os.environ.get("MPICDSGD_DATA") or "data")
    results = common.HERE / "results"
    parser.add_argument("--scale", choices=list(SCALES), default="cpu")
    parser.add_argument("--quick", dest="scale", action="store_const", const="quick")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help=f"of {', '.join(TITLES)}, or DATA/NAME")
    parser.add_argument("--seeds", type=_at_least_one, default=None, help="default: the scale's")
    parser.add_argument("--data", type=Path, nargs="+", default=[given],
                        help="default: MPICDSGD_DATA, or data/")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"), help="default: runs/paper")
    parser.add_argument("--out", type=Path, default=results, help="default: bench/results")
    parser.add_argument("--dry-run", action="store_true", help="list the runs that are left")
    parser.add_argument("--page-only", action="store_true", help="of the runs that are there")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", default=[])
    args = parser.parse_intermixed_args()
    args.seeds = args.seeds or SCALES[args.scale].seeds
    try:
        code = everything(args)
        sys.stdout.flush()  # a reader that has gone away is found here, and not at the exit
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
