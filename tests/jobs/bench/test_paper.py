"""The paper's experiments run to a page on few real samples, once; its claims are decided right."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job import HERE, Ended

BENCH = HERE.parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from paper import claims, rules  # noqa: E402
from paper import consensus as paper_consensus  # noqa: E402
from paper import curves as paper_curves  # noqa: E402
from paper import figures as paper_figures  # noqa: E402
from paper import page as paper_page  # noqa: E402
from paper import part as paper_part  # noqa: E402
from paper import run as paper_run  # noqa: E402
from paper import runs as paper_runs  # noqa: E402
from paper import start as paper_start  # noqa: E402

DIGITS = paper_start.Source("digits", "digits", "")
EPOCHS = 30
NOTE = {"code": 0, "said": "", "seconds": 1.0}


@pytest.mark.slow
def test_quick(run: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    out, runs = tmp_path / "out", tmp_path / "runs"
    words = (str(BENCH / "paper" / "run.py"), "--quick", "--runs", str(runs), "--out", str(out))
    first = run(0, *words, timeout_s=200)
    assert first.code == 0, first.err + first.out
    assert first.out.startswith("2 runs, 0 done, 2 left")
    assert "[2 done, 0 left]" in first.out

    record = json.loads((out / "paper.json").read_text())
    assert {"commit", "dirty", "host", "cpu", "cores", "versions"} <= record.keys()
    assert (record["scale"], record["failed"], record["unfinished"]) == ("quick", [], 0)
    results = record["results"]
    assert results.keys() == {
        "digits/1a/SGD, one machine", "digits/1a/CDSGD", "digits/algorithms/CDSGD",
        "digits/algorithms/SGD, one machine",
    }  # fmt: skip
    # A configuration of two figures is one run.
    assert results["digits/1a/CDSGD"] == results["digits/algorithms/CDSGD"]
    assert len(list(runs.iterdir())) == 2
    for row in results.values():
        assert row["settings"]["run"]["evaluate_train"] is True
        assert len(row["epoch"]) == len(row["curves"]["test"]["mean"]) == 2
        assert row["late"]["test"][0] > 5  # percent: it was trained at all
    assert results["digits/1a/CDSGD"]["late"]["bytes"][0] > 0
    assert {c["seen"] for c in record["claims"]["digits"]} == {None}  # one seed decides nothing

    page = (out / "paper.md").read_text()
    judged = [c for c in claims.CLAIMS if {e for e, _ in c.setups} <= {"1a", "algorithms"}]
    assert page.count("not testable here") == len(judged) > 3
    for name in ("paper_digits_1a.png", "paper_digits_algorithms.png"):
        assert f"({name})" in page
        assert 5_000 < (out / name).stat().st_size < 100_000

    _beside_proposition_1(runs / results["digits/1a/CDSGD"]["runs"]["0"], results, page)

    # In this process, which saves the imports; what would be started is counted.
    started: list[paper_start.Run] = []
    monkeypatch.setattr(paper_start, "execute", lambda made, commit: started.append(made) or NOTE)
    monkeypatch.setattr(paper_run, "write_all", lambda *arguments: 0)
    monkeypatch.setattr(sys, "argv", list(words))
    assert paper_run.main() == 0
    assert started == []
    monkeypatch.setattr(sys, "argv", [*words, "run.epochs=3"])
    assert paper_run.main() == 0
    assert len(started) == 2
    assert not any(made.folder.exists() for made in started)


def _beside_proposition_1(folder: Path, results: dict[str, Any], page: str) -> None:
    """Against the recursion, written out; and a distance beyond it is a violation."""
    (found,) = results["digits/1a/CDSGD"]["proposition_1"]
    assert "proposition_1" not in results["digits/1a/SGD, one machine"], "one agent"
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    L = max(g for line in lines for g in line["gradient"]) ** 0.5
    bound = [0.0]
    for line in lines:
        for lr in line["lr"]:
            bound.append(0.0 * bound[-1] + lr * L)  # the complete graph's gap is 1
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line["consensus"]["rms"] * 2**0.5 for line in metrics]
    factors = [bound[line["step"]] / d for line, d in zip(metrics, measured, strict=True)]
    assert found["L"] == pytest.approx(L, rel=1e-12)
    assert found["factor"] == pytest.approx([min(factors), max(factors)], rel=1e-9)
    assert (found["violations"], found["evaluations"]) == (0, 2)
    assert page.count("holds at all") == 2
    settings = results["digits/1a/CDSGD"]["settings"]
    text = (folder / "metrics.jsonl").read_text()
    metrics[1]["consensus"]["rms"] *= 1.01 * factors[1]
    target = (folder / "metrics.jsonl").resolve()
    target.write_text("".join(json.dumps(line) + "\n" for line in metrics))
    assert paper_consensus.beside(folder, settings, 2).violations == 1
    target.write_text(text)


def one_run(runs: Path, *more: str) -> paper_start.Run:
    setup = paper_runs.setups("1a", "quick")[1]
    return paper_start.make(setup, 0, "quick", DIGITS, "cpu", more, runs)


def test_what_a_run_is(tmp_path: Path) -> None:
    here = one_run(tmp_path)
    assert one_run(tmp_path, "run.keep=7").folder == here.folder
    assert one_run(tmp_path, "optim.lr=0.3").folder != here.folder
    assert one_run(tmp_path, "run.epochs=3").folder != here.folder
    assert here.ranks == 2
    assert one_run(tmp_path, "optim.name=downpour").ranks == 3  # and a server


def test_a_failing_run_is_noted_and_begun_anew(tmp_path: Path) -> None:
    made = one_run(tmp_path)
    fails = [sys.executable, "-c", "print('mpicdsgd: no such thing'); exit(2)"]
    note = paper_start.execute(made, "c0ffee", fails)
    assert (note["code"], note["said"]) == (2, "mpicdsgd: no such thing")
    assert paper_start.noted(made) == note
    assert paper_start.metrics(made) == []

    # Half a run is no run, and one that ends well without its last line has failed.
    lines = made.folder / "metrics.jsonl"
    lines.write_text('{"step": 11, "epoch": 1.0}\n')
    assert paper_start.execute(made, "c0ffee", [sys.executable, "-c", ""])["code"] == 1
    lines.write_text('{"step": 11, "epoch": 1.0}\n{"step": 22, "epoch": 2.0}\n')
    assert [line["step"] for line in paper_start.metrics(made)] == [11, 22]


def test_every_setup_is_a_config(tmp_path: Path) -> None:
    for scale, setting in paper_runs.SCALES.items():
        for data, (_, experiments) in setting.data.items():
            source = paper_start.Source(data, data, "")
            for experiment in experiments:
                found = paper_runs.setups(experiment, scale)
                assert len({s.label for s in found}) == len(found)
                for setup in found:
                    made = paper_start.make(setup, 0, scale, source, "cpu", (), tmp_path)
                    assert made.estimate_s > 0
    labels = {(e, s.label) for e in paper_runs.TITLES for s in paper_runs.setups(e, "cpu")}
    assert {place for claim in claims.CLAIMS for place in claim.setups} <= labels


def test_cifar_of_jpegs_is_called_so(tmp_path: Path) -> None:
    below = tmp_path / "cifar-10-jpeg" / "cifar-10-batches-bin"
    below.mkdir(parents=True)
    assert paper_start.find("cifar10", [tmp_path]) is None
    (below / "data_batch_1.bin").touch()
    source = paper_start.find("cifar10", [tmp_path / "nowhere", tmp_path])
    assert source is not None
    assert (source.title, source.path) == ("CIFAR-10 (JPEG)", str(below.resolve()))


# Claims, on made-up curves: accuracy rises to ``end`` with the time constant ``tau``, in epochs


def made_up(
    end: float, tau: float, *, gap: float = 0.0, std: float = 0.0, swing: float = 0.0,
    loss: float = 1.0, seeds: int = 3,
) -> paper_curves.Curves:  # fmt: skip
    """The gap grows in proportion to the training accuracy; seeds differ by 0.05 points.

    The deviation over agents goes up and down by ``swing`` from one epoch to the next.
    """
    lines = {}
    for seed in range(seeds):
        lines[seed] = []
        for epoch in range(1, EPOCHS + 1):
            share = 1 - np.exp(-epoch / tau)
            train = (end + gap) * share / 100
            test = end * share / 100 + 0.0005 * seed
            deviation = (std + swing * (-1) ** epoch / 2) / 100 + 0.0001 * seed
            lines[seed].append({
                "epoch": float(epoch), "step": epoch, "time_s": 1.0, "bytes_sent": 1,
                "wait_s": 0.0, "train_loss": {"mean": loss}, "test_loss": {"mean": 1.0},
                "train_accuracy": {"mean": train},
                "test_accuracy": {"mean": test, "std": deviation},
                "averaged_model": {"test_accuracy": test}, "consensus": {"rms": std},
            })  # fmt: skip
    found = paper_curves.curves(lines)
    assert found is not None
    return found


FAST, SLOW = made_up(95, 2), made_up(95, 5)
GAPING = [made_up(95, 5), made_up(94, 5, gap=4), made_up(93, 5, gap=8)]
SPREAD = [made_up(95, 2, std=s) for s in (0.1, 0.2, 0.9)]


def slows_on(on: str) -> rules.Decision:
    return partial(rules.slows, on=on)


def faster_on(on: str) -> rules.Decision:
    return partial(rules.last_is_faster, on=on)


@pytest.mark.parametrize(
    ("decision", "seen", "not_seen"),
    [
        (rules.ahead_early, [FAST, SLOW], [SLOW, FAST]),
        (rules.ahead_early, [FAST, SLOW], [FAST, FAST]),
        (rules.equal_late, [FAST, made_up(94.5, 5)], [FAST, made_up(93, 5)]),
        (rules.equal_late, [made_up(94.5, 5), FAST], [made_up(93, 5), FAST]),
        (rules.smaller_gap, [made_up(95, 2, gap=4), made_up(95, 2, gap=2)],
         [made_up(95, 2, gap=2), made_up(95, 2, gap=4)]),
        (rules.smaller_gap_at_equal_training, [made_up(95, 2, gap=4), made_up(95, 9, gap=1)],
         [made_up(95, 2, gap=4), made_up(95, 9, gap=4)]),
        (rules.not_below_late, [made_up(95.1, 5), FAST], [made_up(94, 2), FAST]),
        (slows_on("train"), [made_up(95, t) for t in (2, 3, 5)],
         [made_up(95, t) for t in (2, 5, 3)]),
        (slows_on("test"), [made_up(95, t) for t in (2, 3, 5)], [FAST, FAST, FAST]),
        # Agents with smaller shares may learn these sooner, and yet know less.
        (slows_on("test"), GAPING, [made_up(95, 2)] * 3),
        (faster_on("test"), [SLOW, SLOW, FAST], [FAST, SLOW, SLOW]),
        (faster_on("train"), GAPING, [SLOW, SLOW, made_up(94, 5)]),
        (rules.wider_spread, SPREAD, SPREAD[::-1]),
        (rules.farther_apart, SPREAD, SPREAD[::-1]),
        (rules.less_stable, [made_up(95, 2, std=0.5, swing=s) for s in (0.0, 0.1, 0.3)],
         [made_up(95, 2, std=s, swing=0.2) for s in (0.5, 0.6, 0.9)]),
    ],
)  # fmt: skip
def test_decisions(
    decision: rules.Decision,
    seen: list[paper_curves.Curves],
    not_seen: list[paper_curves.Curves],
) -> None:
    assert decision(seen).seen is True
    verdict = decision(not_seen)
    assert verdict.seen is False
    assert any(c.isdigit() for c in verdict.numbers)


def test_a_difference_within_the_seeds_is_none() -> None:
    noise = np.array([3.0, -3.0, 1.0])
    base = np.array([90.0, 90.0, 90.0])
    assert not paper_curves.difference(base + 1 + noise, base).above(rules.POINTS)
    assert paper_curves.difference(base + 1 + noise / 100, base).above(rules.POINTS)
    assert not paper_curves.difference(base + 0.1, base).above(rules.POINTS)


GUESS = math.log(10)


def test_what_cannot_be_tested_is_said() -> None:
    claim = claims.CLAIMS[0]
    one, two = claim.setups
    assert claims.decide(claim, {one: FAST, two: SLOW}, GUESS).seen is True
    verdict = claims.decide(claim, {one: FAST, two: None}, GUESS)
    assert verdict.seen is None
    assert two[1] in verdict.numbers
    assert claims.decide(claim, {one: FAST, two: made_up(95, 5, seeds=1)}, GUESS).seen is None
    assert claims.decide(claim, {one: FAST, two: made_up(95, 5, seeds=2)}, GUESS).seen is True
    for loss in (2.31, math.inf, math.nan):
        verdict = claims.decide(claim, {one: made_up(95, 2, loss=loss), two: SLOW}, GUESS)
        assert verdict.seen is None
        assert verdict.numbers.startswith(f"{one[1]} diverged")
    assert claims.decide(claim, {one: made_up(95, 2, loss=2.30), two: SLOW}, GUESS).seen is True


def test_what_the_spread_over_agents_is_worth_is_said() -> None:
    # At the end of seeds 0, 1, 2: 0.1, 0.11, 0.12 and 0.9, 0.91, 0.92 points.
    numbers = rules.wider_spread(SPREAD).numbers
    assert "late 0.11 ± 0.01, 0.21 ± 0.01, 0.91 ± 0.01 over seeds" in numbers
    assert "up to 9% of its size" in numbers


def page_of(found: dict[tuple[str, str], paper_curves.Curves | None], title: str) -> str:
    setups = {"1b": paper_runs.setups("1b", "cpu")}
    places = [("1b", setup.label) for setup in setups["1b"]]
    part = paper_part.Part(
        "cifar10", title, {p: found.get(p, FAST) for p in places}, setups, {},
        dict.fromkeys(places, 0.0),
    )  # fmt: skip
    begin = paper_run.common.provenance() | {
        "scale": "cpu", "device": "cpu", "seeds": 3, "overrides": [],
    }  # fmt: skip
    return paper_page.page(begin, [part], [], [], 0)


def test_the_page_says_in_words_what_is_missing_and_what_diverged() -> None:
    whole = page_of({}, "CIFAR-10")
    for word in ("diverged", "is missing", "is not complete", "JPEG"):
        assert word not in whole
    # Claims that compare what is not run there are no rows, but named by their experiment.
    assert "not testable here" not in whole
    assert "experiments that were not run on CIFAR-10: " in whole
    assert paper_runs.TITLES["algorithms"] in whole
    text = page_of(
        {
            ("1b", "CDMSGD"): None,
            ("1b", "FedAvg"): made_up(95, 2, seeds=2),
            ("1b", "MSGD, one machine"): made_up(24, 2, loss=6.3),
        },
        "CIFAR-10 (JPEG)",
    )
    assert "- **CDMSGD is missing**: no run of it is finished." in text
    assert "- **FedAvg is not complete**: finished are seeds 0, 1 of 3." in text
    assert (
        "- **MSGD, one machine diverged**: its training loss ends at 6.30, and guessing has 2.30"
        in text
    )
    assert "*(JPEG)*: each image of this copy went through JPEG once" in text


def test_many_lines_are_told_apart_and_in_the_order_of_their_ends(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    ends = [90, 95, 80, 93, 91, 92, 94, 85, 86, 87, 88, 89, 84, 83, 82, 81]
    found = {f"s{end}": made_up(end, 2) for end in ends}
    axes = figure.subplots()
    paper_figures._PANELS["algorithms"][0](axes, found)
    looks = {(x.get_color(), x.get_linestyle(), x.get_marker()) for x in axes.lines}
    assert len(looks) == len(ends)
    handles, labels = paper_figures.legend(axes, found, True)
    # Seeds differ by 0.05 points: the mean of three is 0.05 above the first.
    assert labels == [f"s{end}: {end + 0.05:.1f}" for end in sorted(ends, reverse=True)]
    by_label = dict(zip(labels, handles, strict=True))
    assert by_label["s95: 95.0"] is axes.lines[1]
    assert paper_figures.legend(axes, found, False)[1] == list(found)


# The command line


def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `paper_run.main` in this process."""
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    capsys.readouterr()
    try:
        code = paper_run.main()
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--seeds", "0"], "a whole number >= 1"),
        (["--seeds", "-1"], "a whole number >= 1"),
        (["--only", "1c"], "--only 1c: known with --scale quick are digits/1a, digits/algorithms"),
        (["--only", "1a,"], "--only : known"),
        (["--only", "cnn"], "--only cnn: known with --scale quick are"),
        (["optim.foo=1"], "unknown config key optim.foo"),
        (["optim.momentum=0.9"], "optim.momentum = 0.9 is for cdmsgd, msgd and eamsgd only"),
        (["run.epochs=0"], "run.epochs must be at least 1"),
        (["agents.topology=hypercubic"], "unknown topology"),
        (["--scale", "cpu"], "MNIST and CIFAR-10 and CIFAR-100: not in EMPTY. Name folders that"),
        (["--scale", "cpu", "optim.foo=1"], "by --data or MPICDSGD_DATA"),
    ],
)
def test_mistakes_are_found_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], text: str,
) -> None:  # fmt: skip
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    more = ("--dry-run", "--runs", str(tmp_path), "--out", str(out), "--data", str(empty))
    code, _, err = said(monkeypatch, capsys, "--quick", *words, *more)
    assert (code, out.exists()) == (2, False)
    assert text.replace("EMPTY", str(empty)) in err


def test_some_data_sets_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte").touch()
    words = ("--scale", "cpu", "--dry-run", "--runs", str(tmp_path), "--data", str(tmp_path))
    code, out, _ = said(monkeypatch, capsys, *words)
    assert code == 0
    assert "CIFAR-10 is not there and left out. Name folders that have mnist/" in out
    assert "mnist algorithms: i-CDSGD, ring, seed 2" in out
    assert "mnist cnn" not in out, "only where it is asked for"
    code, out, _ = said(monkeypatch, capsys, *words, "--only", "cnn")
    assert (code, out.count("mnist cnn: CD"), out.count(" ranks ")) == (0, 6, 6)


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte").touch()
    words = [sys.executable, str(BENCH / "paper" / "run.py"), "--dry-run", "--runs", str(tmp_path),
             "--data", str(tmp_path)]  # fmt: skip
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stderr is not None
        job.stdout.close()
        assert job.stderr.read() == ""
        assert job.wait(100) == 1


def test_the_page_has_other_experiments_only_when_they_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: set[str] = set()
    monkeypatch.setattr(
        paper_start, "metrics", lambda made: [made] if made.folder.name in done else []
    )
    runs: dict[paper_run.Place, dict[int, paper_start.Run]] = {}
    for experiment, label, seed in [("a", "x", 0), ("a", "x", 1), ("a", "y", 0), ("b", "x", 0)]:
        made = paper_start.Run((), 1, Path(f"{experiment}{label}{seed}"), {}, 0.0)
        runs.setdefault(("digits", experiment, label), {})[seed] = made
    assert paper_run.finished_ones(runs) == {}
    done |= {"ax1"}
    assert paper_run.finished_ones(runs) == {}
    done |= {"ay0"}
    assert [place[1:] for place in paper_run.finished_ones(runs)] == [("a", "x"), ("a", "y")]
    done |= {"bx0"}
    assert paper_run.finished_ones(runs) == runs
