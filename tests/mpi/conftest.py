"""MPI tests: ``mpiexec -n N python -m pytest tests/mpi`` for any N; tests/run.sh takes 1, 2, 4, 5.

Those marked ``ranks(1, 4)`` are taken only there, if --full is not given: more would show no more.

A test that fails on one rank alone would leave the others in a collective call, so the first
failure prints its report and ends all ranks.
"""

import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import costs
import pytest
from mpi4py import MPI

from mpicdsgd.checkpoints import background_writer, writer_process
from mpicdsgd.comm import shutdown
from mpicdsgd.comm.exchange import exchange
from mpicdsgd.comm.links import assembly
from mpicdsgd.common import signals
from mpicdsgd.kernels import gpu
from mpicdsgd.runs import owner

_abort = shutdown.abort  # tests that replace it may fail, too


def pytest_report_header() -> str:
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}, {MPI.COMM_WORLD.size} ranks"


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if MPI.COMM_WORLD.rank != 0:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            config.pluginmanager.unregister(reporter)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and MPI.COMM_WORLD.size > 1:
        text = f"\n[rank {MPI.COMM_WORLD.rank}] {report.nodeid} ({report.when}):\n"
        sys.__stderr__.write(f"{text}{report.longreprtext}\n{report.capstderr}\n")
        _abort(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None:
            # A rank that hangs within MPI handles no signal.
            item.add_marker(pytest.mark.timeout(method="thread"))
    if config.getoption("--full"):
        return
    markers = {item: item.get_closest_marker("ranks") for item in items}
    left_out = [i for i, m in markers.items() if m and MPI.COMM_WORLD.size not in m.args]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """A test's CPU seconds are those of all ranks."""
    for others in (MPI.COMM_WORLD.gather(costs.of) or [])[1:]:
        for name, (_, cpu) in others.items():
            costs.of[name][1] += cpu


@pytest.fixture(autouse=True)
def host_tests_use_no_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not marked `gpu` is about the host, also where there is one."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(gpu, "why_not", lambda: "this test is about the host")
        monkeypatch.setattr(gpu, "count", lambda: 0)


@pytest.fixture(autouse=True)
def signals_are_the_tests_own() -> Iterator[None]:
    """``mpicdsgd train`` within a test leaves handlers, with which TERM would end no test run."""
    before = [signal.getsignal(number) for number in signals.STOP]
    yield
    for number, handler in zip(signals.STOP, before, strict=True):
        signal.signal(number, handler)
    signals.forget()


@pytest.fixture(autouse=True)
def nobody_owns_a_folder_that_is_gone() -> Iterator[None]:
    """A run that a test leaves would go on touching its claim, and say that it cannot."""
    yield
    owner.release_all()


@pytest.fixture(autouse=True)
def who_leaves_says_so_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is for jobs; in a hundred tests it is two minutes."""
    monkeypatch.setattr(exchange, "_GRACE_S", 0.1)
    monkeypatch.setattr(assembly, "_GRACE_S", 0.1)


class Lasting(writer_process.WriterProcess):
    """A writer of checkpoints that goes from one run of the tests to the next, if it is idle."""

    jobs = 0

    def _send(self, job: writer_process.Job) -> None:
        self.jobs += 1
        super()._send(job)

    def answer(self, timeout_s: float | None = 0.0) -> writer_process.Job | None:
        found = super().answer(timeout_s)
        self.jobs -= found is not None
        return found

    def close(self) -> None:
        """Kept, unless it has died."""
        if not self.alive:
            super().close()


_writers: list[Lasting] = []


@pytest.fixture(autouse=True)
def writers_last(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a short run's time is its writer's start, on every rank: one for all tests."""
    if request.node.get_closest_marker("own_writer") is not None:
        return

    def writer(on_node: int = 1) -> Lasting:
        if not (_writers and _writers[0].alive and _writers[0].jobs == 0):
            _writers[:] = [Lasting(on_node)]
        _writers[0]._on_node = on_node
        return _writers[0]

    monkeypatch.setattr(background_writer, "WriterProcess", writer)


@pytest.fixture
def comm() -> Iterator[MPI.Intracomm]:
    """A communicator of the test's own; all ranks meet before the test and after it."""
    own = MPI.COMM_WORLD.Dup()
    own.Barrier()
    yield own
    own.Barrier()
    own.Free()


@pytest.fixture
def shared_folder(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that all ranks see, and in which they are."""
    path = Path(comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None))
    monkeypatch.chdir(path)
    yield path
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(path)
