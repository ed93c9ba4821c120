"""What an algorithm may declare, and the order of a step's verbs: the same in jobs and simulations.

Verbs in a wrong order would wait for ever, or mix what is being overwritten. They are refused, on
all agents alike as all run the same text, and with the algorithm's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.algorithms.contract import GRAPH, KINDS, Algorithm
from mpicdsgd.algorithms.received import Received
from mpicdsgd.comm.exchange.header import NUMBERS
from mpicdsgd.common.errors import UserError

if TYPE_CHECKING:
    import torch

# The state has these anyway: in checkpoints, for the kernel, between mixing rounds.
_TAKEN = ("x", "v", "at", "mixed")
_NAME = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")


def check_declared(algorithm: Algorithm) -> None:
    """Raise a UserError for vectors, numbers or publications that cannot be kept or sent. Local."""
    label = algorithm.name or type(algorithm).__name__

    def refuse(what: str) -> NoReturn:
        raise UserError(f"{label}: {what}")

    if algorithm.over not in KINDS:
        refuse(f"over = {algorithm.over!r}, but it is one of {', '.join(KINDS)}")
    names = [*algorithm.vectors, *algorithm.numbers]
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _TAKEN:
            refuse(
                f"{name!r} cannot be a vector's or number's name: it has letters, digits, _, - and "
                f"/ between them, and {', '.join(_TAKEN)} are taken"
            )
        if names.count(name) > 1:
            refuse(f"{name} is declared twice, among vectors = {algorithm.vectors} and the numbers")
        if inside := [other for other in names if other.startswith(f"{name}/")]:
            refuse(f"{inside[0]} cannot lie below {name}, which is a vector or number itself")
    known = ("x", *algorithm.vectors)
    sends = algorithm.sends
    if not sends or len(set(sends)) < len(sends) or not set(sends) <= set(known):
        refuse(f"sends = {sends}, but it has some of {', '.join(known)}, each once")
    if not isinstance(algorithm.posts, int) or algorithm.posts < 1:
        refuse(f"posts = {algorithm.posts}, but a step publishes at least once")


class Walk:
    """Follows the verbs of each step. All methods are local; they raise RuntimeErrors.

    Args:
        agents: n, of this process.
        turns: matrices of the cycle.

    Attributes:
        turn: the matrix of the last publication; round: its number in the step.
        names: of its numbers.
        is_to_post: whether something is to be shown that is not on its way yet.
        is_under_way: whether it is, and was not received yet.
        is_gradient_used: whether this step has used its gradient.
    """

    def __init__(self, algorithm: Algorithm, agents: int, turns: int) -> None:
        self.turn = self.round = 0
        self.names: tuple[str, ...] = ()
        self.is_to_post = self.is_under_way = self.is_gradient_used = False
        self.is_sum_begun = False
        self.slots = {name: slot for slot, name in enumerate(algorithm.sends)}
        if algorithm.posts > 1:
            self.slots["mixed"] = 0
        self._algorithm, self._agents, self._turns = algorithm, agents, turns
        self._made = self._next = self._serial = 0
        self._fresh: dict[int, tuple[torch.Tensor, int]] = {}

    def begin(self) -> None:
        """All is at rest: nothing is under way."""
        self._next = self._made = 0
        self.is_to_post = self.is_under_way = self.is_sum_begun = False
        self.is_gradient_used = True  # there is none yet
        self._fresh.clear()

    def begin_step(self) -> None:
        self._made, self.is_gradient_used = 0, False

    def end_step(self) -> None:
        """The step's verbs are through; the last publication may be still to post."""
        made, posts = self._made + self.is_to_post, self._algorithm.posts
        if self._algorithm.over == GRAPH and made != posts:
            self.refuse(
                f"the step published {made} times, but posts = {posts}: each step publishes as "
                "often as declared, as stops and faults travel with it"
            )
        self._next = 0

    # What is written and shown.

    def wrote(self, slot: int, vector: torch.Tensor | None) -> None:
        """A pass has written this vector for the neighbours; None: it has left them the old one."""
        if vector is None:
            self._fresh.pop(slot, None)
        else:
            self._fresh[slot] = vector, vector._version

    def is_fresh(self, name: str) -> bool:
        """Whether the neighbours are to see what the last pass wrote in this vector's place."""
        found = self._fresh.get(self.slots[name])
        return found is not None and found[0]._version == found[1]

    def publishes(self, numbers: Mapping[str, Any]) -> list[tuple[float, ...]]:
        """The numbers of each agent."""
        self.require(GRAPH, "publish()")
        if self.is_to_post or self.is_under_way:
            self.refuse(
                "publish() again, but what was published before was not received yet (a step that "
                "publishes first needs a begin() that does not)"
            )
        if len(numbers) > NUMBERS:
            self.refuse(f"publish() takes {NUMBERS} numbers, got {', '.join(numbers)}")
        try:
            rows = [
                np.broadcast_to(np.asarray(n, float), (self._agents,)) for n in numbers.values()
            ]
        except (TypeError, ValueError):
            self.refuse(f"publish() takes a number of each agent for {', '.join(numbers)}")
        self.names, self.is_to_post = tuple(numbers), True
        return [tuple(float(row[j]) for row in rows) for j in range(self._agents)]

    def posts(self, step: int) -> None:
        """What was published goes on its way, in a turn and round of its own."""
        self.round = self._next
        self.turn = (step * self._algorithm.posts + self.round) % self._turns
        self._next += 1
        self._made += 1
        self._fresh.clear()
        self.is_to_post, self.is_under_way = False, True

    def receives(self) -> int:
        """The number of what is to be received."""
        self.require(GRAPH, "received()")
        if not self.is_under_way:
            self.refuse("received() needs a publish() before it, each time")
        self.is_under_way = False
        self._serial += 1
        return self._serial

    def source(self, out: str, start: str, of: str, mix: Received) -> int:
        """The slot of the vector that is mixed: ``of``, or else ``out``'s, or else ``start``'s."""
        if mix.serial != self._serial or self.is_under_way:
            self.refuse("update(mix=...) takes what was received last, which is gone now")
        slot = self.slots.get(of, -1) if of else self.slots.get(out, self.slots.get(start, -1))
        if slot < 0:
            self.refuse(
                f'update("{out}", mix=received) needs what is mixed to be sent: {of or out} is not '
                f"in sends = {self._algorithm.sends}"
            )
        return slot

    def uses_gradient(self) -> None:
        if self.is_gradient_used:
            self.refuse(
                "the minibatch's gradient serves one update(gradient=True) or take_gradient() in "
                "each step"
            )
        self.is_gradient_used = True

    def leaves_it_to_torch(self, gradient: bool | str, factor: float) -> None:
        """A torch optimizer makes the local step, with a step size of its own."""
        if isinstance(gradient, str) or (gradient and factor != 1):
            self.refuse(
                'update(gradient="name") and factor do not reach the torch optimizer that makes '
                "the local step: set any_local_step = False"
            )

    def sums(self, *, begins: bool) -> None:
        """A sum begins, or is asked for."""
        if begins == self.is_sum_begun:
            self.refuse("start_sum() and summed() take turns")
        self.is_sum_begun = begins

    # What there is.

    def require(self, kind: str, verb: str) -> None:
        if self._algorithm.over != kind:
            self.refuse(f'{verb} is for over = "{kind}", not "{self._algorithm.over}"')

    def require_no_graph(self, verb: str) -> None:
        if self._algorithm.over == GRAPH:
            self.refuse(f'{verb} is not for over = "{GRAPH}"')

    def unknown(self, name: str) -> NoReturn:
        """There is no such vector or number."""
        has = ", ".join(("x", *self._algorithm.vectors, *self._algorithm.numbers))
        self.refuse(f"there is no {name}: it has {has}")

    def refuse(self, what: str) -> NoReturn:
        raise RuntimeError(f"{self._algorithm.name or type(self._algorithm).__name__}: {what}")


def per_agent(values: NDArray[Any] | float, agents: int) -> NDArray[np.float32]:
    """A number for all agents, or of each, as the kernel takes it. Shape (n,)."""
    return np.broadcast_to(np.asarray(values, np.float32), (agents,))
