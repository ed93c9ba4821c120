"""Algorithms of one's own in a job: what they get wrong is refused on all agents, without a hang.

And what looks odd is what the formula says, to the bits of the simulation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from oracle import Net, Problem, flatten, gather, make_agents, relative, train
from wrong_steps import RIGHT, WRONG, WRONG_DECLARATIONS, SmallRows, made, own, usual

from mpicdsgd import AgentLeft, Mixed, UserError, optimizer
from mpicdsgd.algorithms.contract import Algorithm
from mpicdsgd.algorithms.local_steps import Momentum


def small(comm: MPI.Intracomm, kind: Any, **settings: Any) -> tuple[torch.nn.Parameter, Any]:
    """Three parameters, pulled to 0: the gradient is x."""
    start = np.random.default_rng(0).standard_normal((comm.size, 3)).astype(np.float32)
    x = torch.nn.Parameter(torch.from_numpy(start[comm.rank].copy()))
    return x, optimizer(kind, [x], agents=make_agents(comm), lr=0.1, **settings)


def go(x: torch.nn.Parameter, opt: Any, steps: int) -> None:
    for _ in range(steps):
        x.grad = x.detach().clone()
        opt.step()


def test_a_factor_does_not_reach_torchs_step(comm: MPI.Intracomm) -> None:
    x = torch.nn.Parameter(torch.ones(3))

    def step(self: Algorithm, ctx: Any) -> None:
        ctx.update(mix=ctx.received(), gradient=True, factor=0.5)
        ctx.publish()

    algorithm = made(own(step=step), comm.size)
    opt = Mixed(torch.optim.SGD([x], lr=1.0), make_agents(comm), algorithm=algorithm)
    with pytest.raises(RuntimeError, match="factor do not reach the torch optimizer"):
        go(x, opt, 1)


@pytest.mark.parametrize("name", WRONG)
def test_verbs_in_a_wrong_order(comm: MPI.Intracomm, name: str) -> None:
    body, text = WRONG[name]
    x, opt = small(comm, own(**body))
    with pytest.raises(RuntimeError, match=text):
        go(x, opt, 3)
    with pytest.raises(RuntimeError, match="interrupted by an exception"):
        go(x, opt, 1)
    opt.close()


@pytest.mark.parametrize("name", WRONG_DECLARATIONS)
def test_what_cannot_be_declared(comm: MPI.Intracomm, name: str) -> None:
    body, text = WRONG_DECLARATIONS[name]
    with pytest.raises(UserError, match=text):
        small(comm, own(**body))


@pytest.mark.parametrize("name", RIGHT)
def test_what_looks_odd_and_is_right(comm: MPI.Intracomm, name: str) -> None:
    body, formula = RIGHT[name]
    x, opt = small(comm, own(**body))
    start = gather(comm, x.detach().numpy().copy()).astype(np.float32)
    go(x, opt, 5)
    found = gather(comm, x.detach().numpy())
    mixing = opt.agents.mixing
    expected = formula(mixing.Pi, start.astype(float), 0.1, 5, lambda k, X: X)
    assert relative(found, expected) <= 1e-6
    rows = SmallRows(start, mixing, made(own(**body), comm.size, lr=0.1), lambda k, X: X)
    np.testing.assert_array_equal(rows.run(5), found.astype(np.float32))
    opt.close()


@pytest.mark.parametrize("sends", [("x",), ("x", "s")])
def test_who_fails_alone_lets_the_others_end(comm: MPI.Intracomm, sends: tuple[str, ...]) -> None:
    """The others hear of it when it closes, as of anybody who leaves."""

    def step(self: Any, ctx: Any) -> None:
        if ctx.step == 2 and 0 in ctx.ranks:
            raise ZeroDivisionError("one's own mistake")
        usual(self, ctx)

    x, opt = small(comm, own(step=step, vectors=("s",), sends=sends))
    if comm.rank == 0:
        with pytest.raises(ZeroDivisionError):
            go(x, opt, 9)
        with pytest.raises(RuntimeError, match="interrupted by an exception"):
            opt.mix()
    else:
        with pytest.raises(AgentLeft, match="agent 0 left after step 2"):
            go(x, opt, 9)
    opt.close()


# Momentum that is not what the kernel alone does


class Late(Algorithm):
    """Adapt, then combine, with momentum; half of the agents rest in every third step."""

    Settings = Momentum

    def begin(self, ctx: Any, is_new: bool) -> None:
        pass

    def step(self, ctx: Any) -> None:
        ctx.update(gradient=True)
        ctx.publish()
        ctx.update(mix=ctx.received(), publish=False)

    def takes_part(self, step: int, rank: int) -> bool:
        return step % 3 != 1 or rank % 2 == 1


def take(x: torch.nn.Parameter, opt: Any, steps: int) -> None:
    for _ in range(steps):
        if opt.takes_part:
            go(x, opt, 1)
        else:
            opt.mix()


@pytest.mark.parametrize("nesterov", [False, True, "look-ahead"])
def test_look_ahead_follows_x(comm: MPI.Intracomm, nesterov: Any) -> None:
    """Also where x is mixed after the local step, and right after a restart."""
    settings: dict[str, Any] = {"momentum": 0.9, "nesterov": nesterov}
    x, opt = small(comm, Late, **settings)
    start = gather(comm, x.detach().numpy().copy())
    take(x, opt, 4)
    kept = {name: np.array(values) for name, values in opt.arrays().items()}
    take(x, opt, 5)
    mixing = opt.agents.mixing
    X, V = start, np.zeros_like(start)
    for k in range(9):
        at = X + 0.9 * V if nesterov == "look-ahead" else X
        here = np.array([opt.algorithm.takes_part(k, j) for j in range(comm.size)])[:, None]
        V = np.where(here, 0.9 * V - 0.1 * at, V)
        push = 0.9 * V - 0.1 * at if nesterov is True else V
        X = mixing.Pi @ (X + np.where(here, push, 0))
    assert relative(gather(comm, opt.x[:3]), X) <= 2e-6
    if nesterov == "look-ahead":
        assert relative(gather(comm, x.detach().numpy()), X + 0.9 * V) <= 2e-6
    rows = SmallRows(
        start.astype(np.float32), mixing, made(Late, comm.size, lr=0.1, **settings), lambda k, Y: Y
    )
    np.testing.assert_array_equal(rows.run(9), gather(comm, opt.x[:3]).astype(np.float32))

    y, again = small(comm, Late, **settings)
    again.load_arrays(4, kept)
    take(y, again, 5)
    for name, values in opt.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], values, err_msg=name)
    opt.close()
    again.close()


@pytest.mark.parametrize("name", ["cdmsgd", "gradient-tracking"])
def test_mix_comes_first_after_a_restart(comm: MPI.Intracomm, name: str) -> None:
    """It has the step sizes and the momentum that a step would have."""
    more: dict[str, Any] = {"nesterov": "look-ahead"} if name == "cdmsgd" else {}

    def fresh() -> tuple[Net, Any]:
        net = Net(Problem(comm.size), comm.rank)
        return net, optimizer(name, net.parameters(), agents=make_agents(comm), lr=0.05, **more)

    net, opt = fresh()
    train(opt, net, 3)
    again, other = fresh()
    other.load_arrays(3, {key: np.array(values) for key, values in opt.arrays().items()})
    for one in (opt, other):
        one.mix()
    train(opt, net, 1)
    train(other, again, 1)
    np.testing.assert_array_equal(
        flatten([p.detach() for p in net.parameters()]),
        flatten([p.detach() for p in again.parameters()]),
    )
    opt.close()
    other.close()
