"""Agents: the same for all, or an error for all; broadcast, average, agreement."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from oracle import make_agents, matrix

from mpicdsgd import Agents, UserError, complete, metropolis, ring
from mpicdsgd.comm.agreement import Disagreement, agreement, collect, require_same
from mpicdsgd.graphs.mixing_cycle import Mixing, MixingCycle
from mpicdsgd.graphs.mixing_matrix import MixingMatrix


class Model(torch.nn.Module):
    """Parameters and buffers of many kinds, different on every rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.conv = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.norm = torch.nn.BatchNorm2d(3)
        self.scale = torch.nn.Parameter(torch.tensor(float(rank)))
        self.wide = torch.nn.Parameter(torch.full((2,), rank / 3, dtype=torch.float64))
        self.narrow = torch.nn.Parameter(torch.full((3,), rank / 4, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.tensor([rank % 2 == 0, True]))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("turned", torch.randn(3, 4).t())
        for _ in range(rank + 1):
            self.norm(torch.randn(4, 3, 2, 2) + rank)


def test_attributes(comm: MPI.Intracomm) -> None:
    agents = Agents(comm, matrix(comm.size, "star"))
    assert (agents.rank, agents.size) == (comm.rank, comm.size)
    assert agents.sources == agents.destinations == agents.graph.sources[comm.rank]
    (turn,) = agents.turns
    assert turn.sources == agents.sources
    assert turn.destinations == agents.destinations
    Pi = agents.mixing.Pi
    assert [Pi[comm.rank, source] for source in agents.sources] == list(turn.weights)
    result = MPI.Comm.Compare(agents.comm, comm)
    assert result == MPI.CONGRUENT  # a duplicate: its messages never meet the caller's


def test_directed_sources_and_destinations(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm, "expo", "uniform")
    n = comm.size
    hops = sorted({1 << i for i in range(max(0, (n - 1).bit_length()))})
    assert list(agents.sources) == sorted({(comm.rank - h) % n for h in hops})
    assert list(agents.destinations) == sorted({(comm.rank + h) % n for h in hops})


def test_broadcast(comm: MPI.Intracomm) -> None:
    """Everybody gets rank 0's values, bit by bit and in place, buffers and all."""
    agents = make_agents(comm)
    model, first = Model(comm.rank), Model(0)
    tensors = dict(model.state_dict(keep_vars=True))
    agents.broadcast(model)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    for name, expected in first.state_dict().items():
        assert torch.equal(tensors[name], expected), name
    one = [torch.full((2,), float(comm.rank))]
    agents.broadcast(t for t in one)
    assert one[0].tolist() == [0.0, 0.0]


def test_average(comm: MPI.Intracomm) -> None:
    """Means in float64, rounded once; what is no float is rank 0's; the model is unchanged."""
    agents = make_agents(comm)
    model = Model(comm.rank)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    means = agents.average(model)
    models = [Model(rank).state_dict() for rank in range(comm.size)]
    for name, mean in means.items():
        values = [other[name] for other in models]
        assert (mean.dtype, mean.shape) == (before[name].dtype, before[name].shape)
        if mean.is_floating_point():
            expected = torch.stack([v.double() for v in values]).mean(0)
            atol = 2**-7 if mean.dtype == torch.bfloat16 else 1e-7
            assert torch.allclose(mean.double(), expected, rtol=0, atol=atol), name
        else:
            assert torch.equal(mean, values[0]), name
        assert torch.equal(model.state_dict()[name], before[name])
    model.load_state_dict(means)
    assert int(model.norm.num_batches_tracked) == 1


def test_mean_of_more_than_a_chunk(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    x = np.arange((1 << 20) + 5, dtype=np.float32) % 1000 + comm.rank
    expected = np.arange((1 << 20) + 5) % 1000 + (comm.size - 1) / 2
    assert np.array_equal(agents.mean(x), expected.astype(np.float32))


def test_averages_differ_in_nothing_between_ranks(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    torch.manual_seed(comm.rank)
    mean = agents.average([torch.randn(1000)])["0"]
    assert len(set(comm.allgather(mean.numpy().tobytes()))) == 1


def test_another_matrix_on_one_rank(comm: MPI.Intracomm) -> None:
    """An error on every rank that says which one differs."""
    if comm.size < 3:
        pytest.skip("two ranks with different matrices: neither is the odd one")
    odd = comm.size - 2
    Pi = matrix(comm.size, "complete" if comm.rank == odd else "chain")
    with pytest.raises(UserError, match=rf"mixing matrix Pi.*differs on rank {odd}:") as raised:
        Agents(comm, Pi)
    assert raised.value.raised_on_all_ranks
    two = matrix(comm.size, "complete" if comm.rank in (0, odd) else "chain")
    if comm.size == 5:
        with pytest.raises(UserError, match=rf"differs on ranks 0, {odd}:"):
            Agents(comm, two)


def test_matrix_for_another_number_of_agents(comm: MPI.Intracomm) -> None:
    n = comm.size + 1
    with pytest.raises(UserError, match=rf"is for {n} agents, the job has {comm.size} ranks"):
        Agents(comm, metropolis(ring(n)))
    last = comm.rank == comm.size - 1
    with pytest.raises(UserError, match=rf"is for {n} agents"):
        Agents(comm, metropolis(complete(n if last else comm.size)))


def test_unknown_device_on_one_rank(comm: MPI.Intracomm) -> None:
    device = "tpu" if comm.rank == comm.size - 1 else "auto"
    with pytest.raises(UserError, match=r'device must be "auto", "cpu", .* got "tpu"'):
        make_agents(comm, device=device)


@pytest.mark.parametrize("what", ["shape", "dtype", "name", "one more"])
def test_another_model_on_one_rank(comm: MPI.Intracomm, what: str) -> None:
    if comm.size == 1:
        pytest.skip("one rank has one model")
    agents = make_agents(comm)
    model: Any = torch.nn.Sequential(torch.nn.Linear(3, 2))
    if comm.rank == comm.size - 1:
        if what == "shape":
            model[0] = torch.nn.Linear(2, 3)
        elif what == "dtype":
            model.double()
        elif what == "name":
            model = torch.nn.ModuleDict({"linear": torch.nn.Linear(3, 2)})
        else:
            model.append(torch.nn.Linear(1, 1))
    for collective in (agents.broadcast, agents.average):
        with pytest.raises(
            UserError, match=r"the model \(names, shapes, dtypes\) must be the same"
        ):
            collective(model)


def test_one_failing_rank_raises_everywhere(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    culprit = comm.size // 2

    def enter() -> None:
        with agents.agreement("a test"):
            if comm.rank == culprit:
                raise UserError(f"rank {comm.rank} says Müll")

    with pytest.raises(UserError, match=f"^rank {culprit} says Müll$") as raised:
        enter()
    assert raised.value.raised_on_all_ranks
    with agents.agreement("nothing wrong"):
        pass


def test_the_lowest_failing_rank_is_heard(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)

    def enter() -> None:
        with agents.agreement("a test"):
            raise UserError(f"rank {comm.rank}")

    with pytest.raises(UserError, match=r"^rank 0$"):
        enter()


def test_long_messages_are_cut(comm: MPI.Intracomm) -> None:
    text = "x" * 5000
    with pytest.raises(UserError, match=r"^x{900,}$"), agreement(comm, "a test"):
        raise UserError(text)


def test_what_no_user_did_passes_through(comm: MPI.Intracomm) -> None:
    """Another exception is not agreed on: it ends the job. Here every rank has it."""
    agents = make_agents(comm)
    with pytest.raises(ZeroDivisionError), agents.agreement("a test"):
        _ = 1 / 0


def test_collect_is_by_rank(comm: MPI.Intracomm) -> None:
    assert collect(comm, "words", f"w{comm.rank}") == [f"w{j}" for j in range(comm.size)]
    require_same(comm, "what", "x" * 5000)


@pytest.mark.parametrize("mixing", ["metropolis", "matchings"])
def test_matrices_that_differ_by_rounding(comm: MPI.Intracomm, mixing: str) -> None:
    """Rank 0's bits are used everywhere: what is computed depends on BLAS and CPU."""
    if comm.size == 1:
        pytest.skip("one rank has one matrix")
    given = matrix(comm.size, "ring", mixing)

    def moved(by: float) -> Mixing:
        turns = []
        for turn in given.turns:
            Pi = turn.Pi.copy()
            j, i = next(iter(np.argwhere(turn.Pi - np.diag(np.diag(turn.Pi)))))
            Pi[j, i] += comm.rank * by
            turns.append(MixingMatrix(Pi, turn.graph, turn.name))
        if isinstance(given, MixingMatrix):
            return turns[0]
        return MixingCycle(tuple(turns), given.graph, given.name)

    agents = Agents(comm, moved(1e-12))
    assert len(set(comm.allgather(agents.mixing.digest))) == 1
    np.testing.assert_array_equal(agents.mixing.turns[-1].Pi, given.turns[-1].Pi)
    assert agents.turns[0].weights == given.turns[0].row(comm.rank)[2]
    with pytest.raises(UserError, match="mixing matrix Pi must be the same"):
        Agents(comm, moved(1e-4))


def test_ranks_at_different_agreements(comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("one rank is always with itself")
    name = "the first" if comm.rank == 0 else "the second"
    with pytest.raises(Disagreement, match="all ranks must call the same collective functions"):
        collect(comm, name, "")
    assert collect(comm, "together", "") == [""] * comm.size


def test_a_rank_that_does_not_come(comm: MPI.Intracomm) -> None:
    """The others wait for the timeout, and say at what."""
    if comm.size == 1:
        pytest.skip("one rank waits for nobody")
    agents = make_agents(comm, timeout_s=0.5)
    if comm.rank != 0:
        with pytest.raises(Disagreement, match=rf"rank {comm.rank} at lunch: waited 0\.5 s"):
            collect(agents.comm, "lunch", "", agents.timeout_s)
    comm.Barrier()
    if comm.rank == 0:  # so that nothing is left under way
        assert collect(agents.comm, "lunch", "") == [""] * comm.size


def test_cores_and_threads(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    """This node's cores are shared out; a number given holds, and OMP_NUM_THREADS before ours."""
    agents = make_agents(comm)
    mine = len(os.sched_getaffinity(0))
    assert agents.cores == max(1, mine // agents.local_size)
    assert 0 <= agents.local_rank < agents.local_size <= comm.size
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        assert agents.share_cores() == 1
        assert agents.share_cores(threads=2) == 2
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert agents.share_cores() == agents.cores == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
