"""A plugin that says at the end of the tests where their time went: wall and CPU seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator

import pytest

elsewhere: list[Callable[[], float]] = []  # CPU seconds of processes that others wait for
of: dict[str, list[float]] = {}  # of each test, with its fixtures: wall and CPU seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slowest", type=int, default=15, metavar="N",
        help="print the N slowest tests and files, with their wall and CPU seconds (default: 15)",
    )  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """CPU seconds are also those of processes that the test started and waited for."""
    wall, cpu = time.perf_counter(), _cpu_s()
    result = yield
    of[item.nodeid] = [time.perf_counter() - wall, _cpu_s() - cpu]
    return result


def _cpu_s() -> float:
    return sum(os.times()[:4]) + sum(more() for more in elsewhere)


def busy() -> float:
    """How many times as long things may take, as others want this machine's cores, too."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    count = config.getoption("--slowest")
    if count <= 0 or not of:
        return
    files: dict[str, list[float]] = {}
    for name, cost in of.items():
        sums = files.setdefault(name.partition("::")[0], [0.0, 0.0])
        sums[:] = [sums[0] + cost[0], sums[1] + cost[1]]
    load = os.getloadavg()[0]
    terminalreporter.section(f"slowest {count}: seconds, CPU seconds (load {load:.1f})")
    for what in (of, files):
        for name, (wall, cpu) in sorted(what.items(), key=lambda x: -x[1][0])[:count]:
            terminalreporter.line(f"{wall:8.2f} {cpu:8.2f}  {name}")
    wall, cpu = (sum(cost[k] for cost in of.values()) for k in (0, 1))
    terminalreporter.line(f"{wall:8.2f} {cpu:8.2f}  all {len(of)}")
