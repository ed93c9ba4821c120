"""Fixtures that run whole jobs, in a folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import job
import pytest
from job import Ended, Job, forking


@pytest.fixture(scope="session", autouse=True)
def forks(full: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """With --full all ranks are started as a user's are."""
    if full:
        yield
    else:
        with forking(tmp_path_factory.mktemp("forks")):
            yield


@pytest.fixture
def real_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which a launcher is to kill what a dead rank has left."""
    monkeypatch.setattr(job, "server", None)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """``start(ranks, *arguments, **environment)``: a `Job` of this Python in ``tmp_path``."""
    jobs: list[Job] = []

    def start(ranks: int, *arguments: str, **environment: str) -> Job:
        jobs.append(Job(tmp_path, ranks, list(arguments), environment))
        return jobs[-1]

    yield start
    for one in jobs:
        one.close()


@pytest.fixture
def run(start: Callable[..., Job]) -> Callable[..., Ended]:
    """The same, waiting for its end."""

    def run(ranks: int, *arguments: str, timeout_s: float = 120.0, **environment: str) -> Ended:
        return start(ranks, *arguments, **environment).wait(timeout_s)

    return run
