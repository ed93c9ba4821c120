"""Settings of an algorithm of one's own, and its declarations: refused by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpicdsgd.algorithms.config import settings_of
from mpicdsgd.cli import parser
from mpicdsgd.runs.config import load_config

CONFIG = """
run = { epochs = 1, evaluate_every = "never", checkpoint_every = "never" }
agents = { topology = "ring" }
model = { name = "quadratic", loss = "least_squares" }
data = { name = "points", partition = "contiguous", batch_size = 1, args = { features = 3 } }
optim = { name = "ownalg:Extra", lr = 0.02, args = { strength = 0.75 } }
"""


def test_what_is_given(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(CONFIG)
    found = settings_of(load_config(tmp_path / "r.toml", ["optim.weight_decay=0.5"]).optim)
    assert (found.lr, found.weight_decay, found.strength, found.warm) == (0.02, 0.5, 0.75, 3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["optim.args={strength=2.0}"], "optim.strength (k) must be in [0, 1], got 2.0"),
        (["optim.args={warmth=1}"], "optim.args.warmth: ownalg:Extra has the settings lr, weight"),
        (["optim.args={warm=0.5}"], "optim.args.warm: ownalg:Extra takes one like 3, got 0.5"),
        (["optim.args={lr=0.5}"], "optim.lr and optim.weight_decay are set outside optim.args"),
        (["optim.momentum=0.5"], "optim.momentum = 0.5 is for "),
        (["optim.name=ownalg:Extro"], "ownalg has no Extro: did you mean Extra?"),
        (["optim.name=ownalg:Bare"], 'optim.name = "ownalg:Bare" has no dataclass Settings'),
        (["optim.name=ownalg:Taken", "optim.args={}"], "its setting schedule has the name of"),
        (["optim.name=ownalg:Wrong"], "'x' cannot be a vector's or number's name"),
        (["agents.mixing=matchings"], "changes by step, but ownalg:Extra needs one that stays"),
        (["exchange.wire=int8"], "exchange.wire must be one of"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    (tmp_path / "r.toml").write_text(CONFIG)
    command = ["simulate", f"{tmp_path}/r.toml", "--agents", "4", f"run.dir={tmp_path}/run"]
    assert parser.main([*command, *arguments]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert "optim.optim" not in said
