"""What can go wrong between neighbours. None of these is a user's mistake in a file."""

from __future__ import annotations

from mpicdsgd.comm.exchange.header import Fault, Reason


class ExchangeError(RuntimeError):
    """Neighbours could not exchange; the job cannot go on."""

    of_another = True  # the cause lies with another rank, whose own message is worth waiting for


class AgentMissing(ExchangeError):
    """A neighbour did not answer within the timeout."""


class AgentLeft(ExchangeError):
    """An agent closed its exchange while this one goes on."""


class OutOfStep(ExchangeError):
    """A neighbour is at another step."""


_WHY = {
    Reason.CHANGED_BY_HAND: (
        "parameters were changed outside step(): call opt.publish() on all agents after changing "
        "them"
    ),
    Reason.NON_FINITE: "parameters became NaN or infinite: try a smaller lr or gradient clipping",
    Reason.NON_FINITE_LOSS: "the loss is NaN or infinite: try a smaller lr, or check the data",
}


class AgentFault(RuntimeError):
    """One agent found a fault; raised on all agents after the same step.

    Attributes:
        fault: which agent, after how many of its steps, and why.
    """

    raised_on_all_ranks = True  # as in `common.errors.UserError`

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"agent {fault.agent}, step {fault.at}: {_WHY[fault.reason]}")
        self.fault = fault
