"""The page `checkpoints.md` and its checks, from what `run.py` has measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import common

SLOWER = 1.05  # a step with a checkpoint every 50, over one without, at most
THROUGHPUT = 0.7  # of tofile and fsync, at least
MB = 1e6


def rates(row: common.Record) -> tuple[list[float], list[float]]:
    """Bytes per second of checkpoints and of tofile."""
    seconds = row["seconds"]
    return ([row["size_bytes"] / s for s in seconds["checkpoint"]],
            [row["plain_bytes"] / s for s in seconds["tofile"]])  # fmt: skip


def checks(sections: common.Record) -> list[common.Record]:
    found = []
    for model, row in _results(sections, "steps").items():
        seconds, judged = row["seconds"], not sections["steps"]["quick"]
        value = _of_medians(seconds["with"], seconds["without"])
        found.append(common.check(f"{model}: step with checkpoints over without", value, SLOWER,
                                  at_most=True, judged=judged))  # fmt: skip
    for model, row in _results(sections, "write").items():
        value, judged = _of_medians(*rates(row)), not sections["write"]["quick"]
        found.append(
            common.check(f"{model}: throughput over tofile's", value, THROUGHPUT, judged=judged)
        )
    return found


def page(record: common.Record) -> str:
    """The whole page."""
    sections = record["sections"]
    out = ["# What checkpoints cost", "",
           "Made by `python bench/checkpoints/run.py`: medians (smallest to largest); every time "
           "is the slowest rank's."]  # fmt: skip
    parts: dict[str, Callable[[common.Record], list[str]]] = {
        "steps": _steps, "write": _write, "restart": _restart, "startup": _startup,
    }  # fmt: skip
    for name, part in parts.items():
        if name in sections:
            out += ["", *part(sections[name]), "", _made(sections[name])]
    return "\n".join(out) + "\n"


def _steps(section: common.Record) -> list[str]:
    rows = []
    for model, row in section["results"].items():
        seconds = row["seconds"]
        in_round = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
        rows.append([
            model, f"{row['parameters']:,}", _size(row["size_bytes"]),
            _spread(seconds["without"], 1e3), _spread(seconds["with"], 1e3),
            f"**{_of_medians(seconds['with'], seconds['without']):.3f}**", _spread(in_round, 1, 3),
            _spread(seconds["save"], 1e3),
        ])  # fmt: skip
    head = ["model", "parameters", "checkpoint", "step without, ms", "step with, ms",
            "ratio of medians", "ratio in a round", "training waits for the copy, ms"]  # fmt: skip
    return [
        f"## A training step with a checkpoint every {section['every']} steps", "",
        f"{section['ranks']} ranks, batch 32; goal: at most {SLOWER}. A block of "
        f"{section['every']} steps with a checkpoint lasts until its manifest is there and the "
        "checkpoint before it is removed.", "",
        *common.table(head, rows),
    ]  # fmt: skip


def _write(section: common.Record) -> list[str]:
    rows = []
    for model, row in section["results"].items():
        ours, plain = rates(row)
        in_round = [a / b for a, b in zip(ours, plain, strict=True)]
        rows.append([
            model, _size(row["size_bytes"]), _spread(row["seconds"]["checkpoint"], 1, 2),
            _spread(ours, 1 / MB), _spread(plain, 1 / MB),
            f"**{_of_medians(ours, plain):.2f}**", _spread(in_round, 1, 2),
        ])  # fmt: skip
    head = ["model", "all ranks' bytes", "seconds to the manifest", "checkpoint, MB/s",
            "tofile and fsync, MB/s", "ratio of medians", "ratio in a round"]  # fmt: skip
    return [
        "## Throughput of a write", "",
        f"{section['ranks']} ranks at the same time, on {section['file system']}; goal: at least "
        f"{THROUGHPUT} of `numpy.tofile` and `fsync` of the same arrays. A checkpoint is copied, "
        "checksummed, written, synced, and listed in a manifest.", "", *common.table(head, rows),
    ]  # fmt: skip


def _restart(section: common.Record) -> list[str]:
    rows = []
    ways = {"without": "none", "cached": "in the page cache", "disk": "on the disk"}
    for model, row in section["results"].items():
        for way, title in ways.items():
            starts = row["starts"][way]
            size = "" if way == "without" else _size(row["size_bytes"])
            rows.append([model, title, size, *(_spread([max(s[mark]) for s in starts], 1, 2)
                         for mark in ("imported", "ready", "first step", "reading"))])  # fmt: skip
    head = ["model", "checkpoint", "bytes", "imported, s", "run made, s", "first step done, s",
            "of it: finding, checking, reading the checkpoint, s"]  # fmt: skip
    return [
        "## From the launcher's start to the first step", "",
        f"{section['ranks']} ranks.", "", *common.table(head, rows),
    ]  # fmt: skip


def _startup(section: common.Record) -> list[str]:
    results = section["results"]
    rows = []
    for which, title in {"new": "new", "again": "restart"}.items():
        by_mark = {
            mark: [t for start in results["starts"] for t in start[which][mark]]
            for mark in ("entered", "imported", "ready", "first step", "reading")
        }
        rows.append([title, *(_spread(times, 1, 1) for times in by_mark.values())])
    head = ["start", "Python runs, s", "imported, s", "run made, s", "first step done, s",
            "of it: the checkpoint, s"]  # fmt: skip
    made = [start["new"]["checkpoint"] for start in results["starts"]]
    return [
        f"## {results['ranks']} ranks on {section['cores']} cores", "",
        "Medians over ranks, and the first and last of them; an MLP of 17,000 parameters on the "
        "digits.", "", *common.table(head, rows), "",
        f"One checkpoint: {made[0]['files']} files, {_size(made[0]['size_bytes'])}, "
        f"{_spread([m['seconds'] for m in made], 1, 1)} s from the call to the manifest, with the "
        f"start of {results['ranks']} writers; training waits "
        f"{_spread([m['save_s'] for m in made], 1, 1)} s of it.", "", *_files(results["files"]),
    ]  # fmt: skip


def _files(files: common.Record) -> list[str]:
    if "skipped" in files:
        return [f"Files were not counted: {files['skipped']}."]
    rows = []
    for name, row in files.items():
        if name == "seconds":
            continue
        rows.append([
            name, str(sum(row["count"].values())),
            *(f"{row['count'][kind]} ({_size(row['size_bytes'][kind])})" for kind in ("py", "so")),
            str(row["opens"]), str(row["failed_opens"]), str(row["looks"]),
        ])  # fmt: skip
    head = ["what starts", "files", "Python's", "shared libraries", "opens", "opens that fail",
            "stat, access, readlink"]  # fmt: skip
    seconds = files["seconds"]
    return [
        *common.table(head, rows), "",
        f"`import torch` in a new Python: {_spread(seconds['warm'], 1, 2)} s, and "
        f"{_spread(seconds['cold'], 1, 2)} s once its files are out of the page cache.",
    ]  # fmt: skip


def _made(section: common.Record) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in section["versions"].items())
    changed = " with changes" if section["dirty"] else ""
    quick = "; **a quick round, to try the bench**" if section["quick"] else ""
    return (
        f"*{section['cpu']}, {section['cores']} cores, {section['file system']}; {versions}; "
        f"kernel {section['kernel']['isa']}; commit {section['commit'][:10]}{changed}; load before "
        f"{section['load before']:.1f}{quick}.*"
    )


def _results(sections: common.Record, name: str) -> common.Record:
    found: common.Record = sections.get(name, {}).get("results", {})
    return found


def _of_medians(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(over) / statistics.median(under)


def _spread(values: Sequence[float], factor: float, digits: int = 0) -> str:
    scaled = [factor * v for v in values]
    return (f"{statistics.median(scaled):,.{digits}f} "
            f"({min(scaled):,.{digits}f} to {max(scaled):,.{digits}f})")  # fmt: skip


def _size(count: float) -> str:
    return f"{count / 1e3:,.0f} kB" if count < MB else f"{count / MB:,.0f} MB"
