"""Fixtures that run whole jobs, in a folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from job import Ended, Job


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """``start(ranks, *arguments, **environment)``: a `Job` of this Python in ``tmp_path``."""
    jobs: list[Job] = []

    def start(ranks: int, *arguments: str, **environment: str) -> Job:
        jobs.append(Job(tmp_path, ranks, list(arguments), environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.close()


@pytest.fixture
def run(start: Callable[..., Job]) -> Callable[..., Ended]:
    """The same, waiting for its end."""

    def run(ranks: int, *arguments: str, timeout_s: float = 120.0, **environment: str) -> Ended:
        return start(ranks, *arguments, **environment).wait(timeout_s)

    return run
