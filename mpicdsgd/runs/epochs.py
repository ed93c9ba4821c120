"""Where in its epochs a run is at a step.

Steps are counted from the run's start and never again. How many make an epoch depends on the number
of agents, so after a restart on another one (`checkpoints.elastic`) the same step is at another
place of the epochs: ``shift`` is added to the step before it is divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Course:
    """See the module.

    Attributes:
        epochs: of the whole run.
        per_epoch: steps of an epoch, >= 1.
        shift: 0 in a run that has had one number of agents only; may be negative.
    """

    epochs: int
    per_epoch: int
    shift: int = 0

    @property
    def total_steps(self) -> int:
        """After so many steps all epochs are done."""
        return self.epochs * self.per_epoch - self.shift

    def place(self, step: int) -> tuple[int, int]:
        """The epoch in which ``step`` steps end, and how many of its steps are done."""
        return divmod(step + self.shift, self.per_epoch)

    def epoch(self, step: int) -> float:
        """Epochs done."""
        return (step + self.shift) / self.per_epoch

    def is_due(self, step: int, every: int) -> bool:
        """Whether ``step`` is one of every ``every`` steps, as epochs count them; 0: none is."""
        return every > 0 and (step + self.shift) % every == 0

    def was_due(self, step: int, every: int, since: float) -> bool:
        """Whether one of every ``every`` steps is after epoch ``since``, up to ``step``."""
        passed = int(since * self.per_epoch + 1e-6)
        return every > 0 and (step + self.shift) // every > passed // every

    def going_on(self, other: Course, step: int) -> Self:
        """This course from the place in the epochs that ``other`` has at ``step``.

        A begun step's part of an epoch is rounded to whole steps of this one, but never up to the
        epoch's end: what is left of an epoch is not skipped.
        """
        epoch, done = other.place(step)
        here = min(round(done * self.per_epoch / other.per_epoch), self.per_epoch - 1)
        return type(self)(self.epochs, self.per_epoch, epoch * self.per_epoch + here - step)
