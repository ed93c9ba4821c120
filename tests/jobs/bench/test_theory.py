"""The bench of the theory, in short: what its page says of the bounds holds in its record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from job import HERE, Ended

BENCH = HERE.parents[1] / "bench"


@pytest.mark.slow
def test_quick(run: Callable[..., Ended], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run(0, str(BENCH / "theory.py"), "--quick", "--out", str(tmp_path), timeout_s=300)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "theory.json").read_text())
    rows = {f"{r['topology']} {r['mixing']}": r for r in record["erratum"]["rows"]}
    assert len(rows) == 8
    for row in rows.values():
        assert row["Theorem 1 corrected"]["text"] == "holds"
        assert row["Theorem 2 corrected"]["text"] == "holds"
        assert row["Proposition 1 corrected"]["text"] == "holds"
    assert "violated" in rows["complete lazy:uniform"]["Theorem 1 as printed"]["text"]
    assert "not applicable" in rows["complete uniform"]["Theorem 1 as printed"]["text"]
    assert "violated" in rows["complete uniform"]["condition (15)"]["text"]
    for row in record["consensus"]["rows"]:
        assert 0 < row["distance"] < row["radius"]
    curves = record["diminishing"]["curves"]
    fixed, falling = curves["fixed 0.1"], curves["0.5/(k+1)^0.75"]
    assert falling["distance"][-1] < fixed["distance"][-1]
    assert all(d <= b for d, b in zip(falling["distance"], falling["bound"], strict=True))
    for name in ("erratum", "consensus", "bias", "diminishing"):
        assert 10_000 < (tmp_path / f"theory_{name}.png").stat().st_size < 300_000
    assert done.out.count("\n| ---") == 4
