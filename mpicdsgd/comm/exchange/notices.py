"""What an agent's headers tell of a stop and of a fault: see `header` for how they spread."""

from __future__ import annotations

from mpicdsgd.comm.exchange.header import NEVER, Fault, Reason


class Notices:
    """An agent's own wishes and findings, and the least that it knows of all agents'. Local.

    Args:
        rank: this agent.
        diameter: of the graph.

    Attributes:
        stop_step, stops_within, fault, fault_raised: see `communication.Communication`.
    """

    def __init__(self, rank: int, diameter: int) -> None:
        self._rank, self._diameter = rank, diameter
        self._step = 0  # of the last post
        self.stop_step = NEVER
        self.stops_within = diameter + 1
        self.fault = Fault()
        self.fault_raised = False
        self._stop_wanted = False
        self._found: tuple[Reason, int | None] | None = None

    def request_stop(self) -> None:
        """Have all agents stop after the same step. Local, also in a signal handler."""
        self._stop_wanted = True  # the tuple is made in `tell`, where the step is certain

    @property
    def stop_wanted(self) -> bool:
        """Whether a stop was asked for here, or is known to have been elsewhere."""
        return self._stop_wanted or self.stop_step < NEVER

    @property
    def fault_known(self) -> Fault:
        """`fault`, or one found here that the next post will tell, if that is less."""
        return self.fault if self._found is None else min(self.fault, self._own_fault(self._step))

    def report(self, reason: Reason, at: int | None = None) -> None:
        """Have all agents raise the fault after the same step. Local.

        Args:
            at: completed steps when it happened; None: those of the next post.
        """
        self._found = self._found or (reason, at)

    def tell(self, step: int) -> None:
        """Have what is wished and found here stand in the header that announces ``step``."""
        if self._stop_wanted:
            self.stop_step = min(self.stop_step, step + self._diameter)
            self._stop_wanted = False
        if self._found:
            self.fault = min(self.fault, self._own_fault(step))
            self._found = None

    def tell_alone(self) -> None:
        """An agent alone need not wait for a header."""
        if self._found and self._diameter == 0:
            self.fault, self._found = min(self.fault, self._own_fault(self._step)), None

    def tell_at_last(self) -> None:
        """What was found after the last post counts, too."""
        if self._found:
            self.fault = min(self.fault, self._own_fault(self._step))

    def _own_fault(self, step: int) -> Fault:
        assert self._found is not None
        reason, at = self._found
        return Fault(step + self._diameter, step if at is None else at, reason, self._rank)
