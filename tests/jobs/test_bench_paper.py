"""The paper's experiments run to a page on few real samples, once; its claims are decided right."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from job import HERE, Ended

BENCH = HERE.parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import paper  # noqa: E402
import paper_claims as claims  # noqa: E402
import paper_curves  # noqa: E402
import paper_runs  # noqa: E402
import paper_start  # noqa: E402

DIGITS = paper_start.Source("digits", "digits", "")
EPOCHS = 30
NOTE = {"code": 0, "said": "", "seconds": 1.0}


@pytest.mark.slow
def test_quick(run: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    out, runs = tmp_path / "out", tmp_path / "runs"
    words = (str(BENCH / "paper.py"), "--quick", "--runs", str(runs), "--out", str(out))
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
    assert page.count("not testable here") == len(claims.CLAIMS)
    for name in ("paper_digits_1a.png", "paper_digits_algorithms.png"):
        assert f"({name})" in page
        assert 5_000 < (out / name).stat().st_size < 100_000

    # In this process, which saves the imports; what would be started is counted.
    started: list[paper_start.Run] = []
    monkeypatch.setattr(paper_start, "execute", lambda made, commit: started.append(made) or NOTE)
    monkeypatch.setattr(paper, "write_all", lambda *arguments: 0)
    monkeypatch.setattr(sys, "argv", list(words))
    assert paper.main() == 0
    assert started == []
    monkeypatch.setattr(sys, "argv", [*words, "run.epochs=3"])
    assert paper.main() == 0
    assert len(started) == 2
    assert not any(made.folder.exists() for made in started)


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
    end: float, tau: float, *, gap: float = 0.0, std: float = 0.0, seeds: int = 3
) -> paper_curves.Curves:
    """The gap grows in proportion to the training accuracy; seeds differ by 0.05 points."""
    lines = {}
    for seed in range(seeds):
        lines[seed] = []
        for epoch in range(1, EPOCHS + 1):
            share = 1 - np.exp(-epoch / tau)
            train = (end + gap) * share / 100
            test = end * share / 100 + 0.0005 * seed
            lines[seed].append({
                "epoch": float(epoch), "step": epoch, "time_s": 1.0, "bytes_sent": 1,
                "wait_s": 0.0, "train_loss": {"mean": 1.0}, "test_loss": {"mean": 1.0},
                "train_accuracy": {"mean": train},
                "test_accuracy": {"mean": test, "std": std / 100 + 0.0001 * seed},
                "averaged_model": {"test_accuracy": test}, "consensus": {"rms": std},
            })  # fmt: skip
    found = paper_curves.curves(lines)
    assert found is not None
    return found


FAST, SLOW = made_up(95, 2), made_up(95, 5)


@pytest.mark.parametrize(
    ("decision", "seen", "not_seen"),
    [
        (claims.ahead_early, [FAST, SLOW], [SLOW, FAST]),
        (claims.ahead_early, [FAST, SLOW], [FAST, FAST]),
        (claims.equal_late, [FAST, made_up(94.5, 5)], [FAST, made_up(93, 5)]),
        (claims.equal_late, [made_up(94.5, 5), FAST], [made_up(93, 5), FAST]),
        (claims.smaller_gap, [made_up(95, 2, gap=4), made_up(95, 2, gap=2)],
         [made_up(95, 2, gap=2), made_up(95, 2, gap=4)]),
        (claims.smaller_gap_at_equal_training, [made_up(95, 2, gap=4), made_up(95, 9, gap=1)],
         [made_up(95, 2, gap=4), made_up(95, 9, gap=4)]),
        (claims.not_below_late, [made_up(95.1, 5), FAST], [made_up(94, 2), FAST]),
        (claims.slows, [made_up(95, t) for t in (2, 3, 5)], [made_up(95, t) for t in (2, 5, 3)]),
        (claims.slows, [made_up(95, t) for t in (2, 3, 5)], [FAST, FAST, FAST]),
        (claims.faster_when_sparse, [SLOW, SLOW, FAST], [FAST, SLOW, SLOW]),
        (claims.less_consensus, [made_up(95, 2, std=s) for s in (0.1, 0.2, 0.9)],
         [made_up(95, 2, std=s) for s in (0.9, 0.2, 0.1)]),
    ],
)  # fmt: skip
def test_decisions(
    decision: claims.Decision,
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
    assert not paper_curves.difference(base + 1 + noise, base).above(claims.POINTS)
    assert paper_curves.difference(base + 1 + noise / 100, base).above(claims.POINTS)
    assert not paper_curves.difference(base + 0.1, base).above(claims.POINTS)


def test_what_cannot_be_tested_is_said() -> None:
    claim = claims.CLAIMS[0]
    one, two = claim.setups
    assert claims.decide(claim, {one: FAST, two: SLOW}).seen is True
    verdict = claims.decide(claim, {one: FAST, two: None})
    assert verdict.seen is None
    assert two[1] in verdict.numbers
    assert claims.decide(claim, {one: FAST, two: made_up(95, 5, seeds=1)}).seen is None
    assert claims.decide(claim, {one: FAST, two: made_up(95, 5, seeds=2)}).seen is True
