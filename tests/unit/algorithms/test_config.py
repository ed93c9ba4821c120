"""Which algorithm has which setting: own defaults, what is refused, and where it was given."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from mpicdsgd.algorithms import config as settings
from mpicdsgd.algorithms import named, registry
from mpicdsgd.algorithms.config import OptimConfig
from mpicdsgd.common.errors import UserError
from mpicdsgd.runs.config import Config, check, load_config
from mpicdsgd.runs.toml_config import write_toml

CLASSES = {
    "cdsgd": named.CDSGD,
    "cdmsgd": named.CDMSGD,
    "sgd": named.SGD,
    "msgd": named.MSGD,
    "fedavg": named.FedAvg,
    "easgd": named.EASGD,
    "eamsgd": named.EAMSGD,
    "downpour": named.Downpour,
    "gossip": named.GossipSGD,
    "gosgd": named.GoSGD,
}
ONLY = {
    "optim.rounds=1": "optim.rounds = 1 is for cdsgd, icdsgd and cdmsgd only, not {}: leave it out",
    "optim.local_epochs=1": "is for fedavg only, not {}",
    "optim.fraction=1.0": "is for fedavg only, not {}",
    "optim.server_momentum=0": "is for fedavg only, not {}",
    "optim.period=4": "optim.period = 4 is for easgd and eamsgd only, not {}",
    "optim.elasticity=0": "is for easgd and eamsgd only, not {}",
    "optim.asynchronous=false": "optim.asynchronous = false is for easgd and eamsgd only, not {}",
    "optim.n_push=1": "is for downpour only, not {}",
    "optim.n_fetch=1": "is for downpour only, not {}",
    "optim.adagrad=false": "is for downpour only, not {}",
    "optim.probability=0.5": "is for gossip and gosgd only, not {}",
    "optim.momentum=0.95": "is for cdmsgd, msgd and eamsgd only, not {}",
    "optim.nesterov=true": "is for cdmsgd and msgd only, not {}",
}


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("text", "overrides", "rounds"),
    [
        ("[optim]\nname = 'icdsgd'", [], 2),
        ("[optim]\nname = 'icdsgd'\nrounds = 1", [], 1),
        ("[optim]\nname = 'icdsgd'", ["optim.rounds=1"], 1),
        ("[optim]\nname = 'icdsgd'\nrounds = 1", ["optim.rounds=3"], 3),
        ("", ["optim.name=icdsgd"], 2),
        ("", ["optim.name=icdsgd", "optim.rounds=0"], 0),  # which the optimizer refuses
        ("[optim]\nname = 'icdsgd'", ["optim.name=cdsgd"], 1),
        ("", [], 1),
    ],
)
def test_rounds_as_given_or_the_algorithms_own(
    tmp_path: Path, text: str, overrides: list[str], rounds: int
) -> None:
    config = load(tmp_path, text, *overrides)
    assert config.optim.rounds == rounds
    write_toml(config, tmp_path / "resolved.toml", {})
    assert f"rounds = {rounds}\n" in (tmp_path / "resolved.toml").read_text()
    assert load_config(tmp_path / "resolved.toml").optim == config.optim


@pytest.mark.parametrize("name", [*settings.NAMES, "torch.optim:AdamW"])
@pytest.mark.parametrize("given", ONLY)
def test_on_the_command_line_a_setting_of_another_is_refused_at_its_default(
    tmp_path: Path, name: str, given: str
) -> None:
    key = given.partition("=")[0].removeprefix("optim.")
    kind = registry.find(name)
    if kind is not None and key in registry.setting_names(kind) and key not in kind.fixed:
        assert load(tmp_path, "", f"optim.name={name}", given).optim.name == name
        return
    with pytest.raises(UserError) as error:
        load(tmp_path, "", f"optim.name={name}", given)
    assert ONLY[given].format(name) in str(error.value)


@pytest.mark.parametrize("name", [*settings.NAMES, "torch.optim:AdamW"])
def test_a_resolved_config_is_one_for_every_algorithm(tmp_path: Path, name: str) -> None:
    config = load(tmp_path, "", f"optim.name={name}")
    check(config)
    write_toml(config, tmp_path / "resolved.toml", {})
    again = load_config(tmp_path / "resolved.toml")
    check(again)
    assert again.optim == config.optim


def test_a_files_momentum_stays_for_whom_the_command_line_names(tmp_path: Path) -> None:
    jobs = Path(__file__).parents[3] / "jobs"
    for file in jobs.glob("*.toml"):
        for name in settings.NAMES:
            check(load_config(file, [f"optim.name={name}", "run.theory=false"]))
    # But a value that changes another algorithm's setting is a mistake there, too.
    with pytest.raises(UserError, match=r"optim\.period = 3 is for easgd and eamsgd only"):
        check(load(tmp_path, "[optim]\nname = 'sgd'\nperiod = 3"))


def test_classes_have_the_configs_defaults() -> None:
    """But where the class must be told (None, or no default): what only a run knows."""
    config = OptimConfig()
    seen = set()
    for kind in CLASSES.values():
        for key, parameter in inspect.signature(kind).parameters.items():
            if key not in {f.name for f in dataclasses.fields(OptimConfig)}:
                continue
            if parameter.default in (inspect.Parameter.empty, None):
                assert (kind.__name__, key) in {
                    ("FedAvg", "period"),
                    ("EASGD", "elasticity"),
                    ("EAMSGD", "elasticity"),
                }
                continue
            assert parameter.default == getattr(config, key), f"{kind.__name__}, {key}"
            seen.add(key)
    assert seen >= {"lr", "momentum", "nesterov", "weight_decay", "rounds", "fraction", "period",
                    "server_momentum", "n_push", "n_fetch", "adagrad", "probability"}  # fmt: skip


def test_who_uses_what() -> None:
    def those(what: object) -> set[str]:
        assert callable(what)
        return {name for name in [*settings.NAMES, "torch.optim:AdamW"]
                if what(OptimConfig(name=name))}  # fmt: skip

    by_matrix = {"cdsgd", "cdmsgd", "icdsgd", "gradient-tracking", "push-sum"}
    by_matrix |= {"torch.optim:AdamW"}
    assert those(settings.mixes_by_matrix) == by_matrix
    assert those(settings.uses_graph) == by_matrix | {"gossip", "gosgd"}
    assert those(settings.needs_server) == {"downpour"}
