"""The one exception for a user's mistake."""

from __future__ import annotations

from typing import Self


class UserError(ValueError):
    """A mistake in what the user gave: arguments, config, files.

    The message is one line: what was given, what is allowed, what to do. The command line prints
    it once, without a traceback, and every rank exits with code 2.

    Attributes:
        raised_on_all_ranks: every rank raises it here, because all have agreed or see the same.
            Then one rank says it and each ends by itself. Otherwise the others may be waiting for
            this rank, which therefore says it with its number and ends them, too.
    """

    raised_on_all_ranks = False

    def everywhere(self) -> Self:
        """This error, as one that every rank raises."""
        self.raised_on_all_ranks = True
        return self
