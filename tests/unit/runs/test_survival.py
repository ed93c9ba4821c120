"""Where agents can outlive each other, and what a config must be for that."""

from __future__ import annotations

from pathlib import Path

import pytest
from mpi4py import MPI

from mpicdsgd import UserError
from mpicdsgd.runs.config import Config, check, load_config
from mpicdsgd.runs.survival import why_not

OPEN_MPI = "Open MPI v5.0.11, package: Open MPI x@y Distribution, ident: 5.0.11\0"
MPICH = "MPICH Version:      4.3.2\nMPICH Release date: x\0"


def load(tmp_path: Path, *overrides: str) -> Config:
    (tmp_path / "r.toml").write_text('[agents]\non_death = "continue"\n')
    return load_config(tmp_path / "r.toml", overrides)


def test_open_mpi_with_ulfm() -> None:
    environment = {"OMPI_MCA_mpi_ft_enable": "1"}
    assert why_not(OPEN_MPI, environment, MPI.THREAD_MULTIPLE) == ""


@pytest.mark.parametrize(
    ("library", "environment", "level", "told"),
    [
        (MPICH, {"OMPI_MCA_mpi_ft_enable": "1"}, 3, r"\(MPICH\).*use Open MPI 5"),
        (OPEN_MPI, {}, 3, r"without --with-ft ulfm.*mpirun --with-ft ulfm"),
        (OPEN_MPI, {"OMPI_MCA_mpi_ft_enable": "0"}, 3, r"without --with-ft ulfm"),
        (OPEN_MPI, {"OMPI_MCA_mpi_ft_enable": "1"}, 2, r"thread_level"),
    ],
)
def test_where_it_cannot_be(
    library: str, environment: dict[str, str], level: int, told: str
) -> None:
    assert MPI.THREAD_MULTIPLE == 3
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(why_not(library, environment, level).replace("\n", " "))
    assert why_not(library, environment, level).endswith("goes on from its last checkpoint")


def test_the_default_is_to_end(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("")
    config = load_config(tmp_path / "r.toml")
    assert config.agents.on_death == "end"
    assert not config.resume.elastic
    assert config.exchange.transport == "auto"


def test_what_it_brings_with_it(tmp_path: Path) -> None:
    config = load(tmp_path, "exchange.wire=bfloat16")
    assert config.resume.elastic, "the job's checkpoints are of fewer agents then"
    assert (config.exchange.transport, config.exchange.wire) == ("neighbor", "bfloat16")
    check(config)


@pytest.mark.parametrize("name", ["cdsgd", "icdsgd", "torch.optim:AdamW"])
def test_algorithms_that_can(tmp_path: Path, name: str) -> None:
    check(load(tmp_path, f"optim.name={name}"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("agents.on_death=go-on", 'must be "end" or "continue", got "go-on"'),
        ("optim.name=fedavg", 'not optim.name = "fedavg": leave it at "end"'),
        ("optim.name=gosgd", "is for algorithms that mix by a matrix"),
        ("exchange.transport=direct", 'needs exchange.transport = "neighbor", got "direct"'),
        ("run.theory=true", "records a run of one matrix"),
    ],
)
def test_refused(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(UserError) as raised:
        check(load(tmp_path, override))
    assert told in str(raised.value)
