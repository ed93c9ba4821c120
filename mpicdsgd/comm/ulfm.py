"""Communicators that can be left together when a rank dies (Open MPI with ULFM).

A rank that learns of a death revokes every communicator of its family, so that nobody waits on one
of them for ever, and then all ranks that live agree. Three things that MPI asks for make this work:

    create   a communicator may be revoked by one rank only when it is there on all, or those that
             still make it crash: after it is made all agree on that, and only then is it known
    agree    `MPI_Comm_agree` on the family's base is all that works among the dead. Every agreement
             is on the base, and says what its rank has come to: it has made a communicator, it has
             finished, it has met an error. Ranks that have come to different things thereby know
             it, all alike, and go on to `shrink`.
    free     not at all: a peer may be about to revoke it. There are few, and they are small.
"""

from __future__ import annotations

import contextlib
import enum
import time

from mpi4py import MPI

_LOOKS = 20  # at who is dead, where an error says that somebody is ...
_BETWEEN_S = 0.25  # ... and MPI's failure detector does not know it yet


class At(enum.IntFlag):
    """What a rank has come to at an agreement. Bits, as MPI agrees on their AND."""

    ERROR = 0
    CREATED = 1
    FINISHED = 2
    MISTAKE = 4


class Broken(Exception):
    """The ranks have agreed that this family is to be left: `Family.shrink` is next."""


class Family:
    """A base and all communicators made from it. Making one is collective over ``comm``.

    Args:
        comm: duplicated. A death in here ends the job.

    Attributes:
        base: to be given to whoever makes communicators; its duplicates belong to the family.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._adopt(Member(comm.Dup()))

    def _adopt(self, base: Member) -> None:
        self.base = base
        base.family = self
        self.members = [base]

    def revoke(self) -> None:
        """Have every call on every communicator of the family fail, on all ranks. Local."""
        for member in self.members:
            with contextlib.suppress(MPI.Exception):
                if not member.Is_revoked():
                    member.Revoke()

    def agree(self, at: At) -> At:
        """What all ranks that live have come to: ``at`` on all, or ERROR. Collective over them.

        The same on all of them. A death that some do not know of is an ERROR, too.
        """
        try:
            self.base.Ack_failed()
            return At(self.base.Agree(int(at)))
        except MPI.Exception:
            return At.ERROR

    def shrink(self) -> tuple[Family, list[int]]:
        """The family of the ranks that live, and who of this one's is dead. Collective over them.

        The family must be revoked, and all have agreed on an ERROR.
        """
        for look in range(_LOOKS):
            base = Member(self.base.Shrink())
            # Nobody may revoke it before it is there on all; what is agreed on is of no account.
            self.agree(At.CREATED)
            if base.size < self.base.size or look == _LOOKS - 1:
                break
            time.sleep(_BETWEEN_S)
        before, now = self.base.Get_group(), base.Get_group()
        places = MPI.Group.Translate_ranks(before, list(range(before.size)), now)
        made = Family.__new__(Family)
        made._adopt(base)
        return made, [rank for rank, place in enumerate(places) if place == MPI.UNDEFINED]


class Member(MPI.Intracomm):
    """A communicator of a family; what is made from it is one, too."""

    family: Family

    def Dup(self, info: MPI.Info | None = None) -> Member:  # noqa: N802, MPI's own name
        return self._created(super().Dup(info))

    def Split(self, color: int = 0, key: int = 0) -> Member:  # noqa: N802
        return self._created(super().Split(color, key))

    def Split_type(  # noqa: N802
        self, split_type: int, key: int = 0, info: MPI.Info = MPI.INFO_NULL
    ) -> Member:
        return self._created(super().Split_type(split_type, key, info))

    def Free(self) -> None:  # noqa: N802
        """See the module."""

    def _created(self, comm: MPI.Comm) -> Member:
        if self.family.agree(At.CREATED) != At.CREATED:
            raise Broken
        made = Member(comm)
        made.family = self.family
        self.family.members.append(made)
        return made
