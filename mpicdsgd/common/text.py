"""Words for messages: agents in words, long lists cut short, what a file held made printable."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    """``text`` with what would break a one-line message (line breaks, escapes) escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


_SHOWN = 8  # agents, edges or parts that a message lists before it says how many more there are


def agents_in_words(n: int) -> str:
    """``1 agent``, ``5 agents``."""
    return "1 agent" if n == 1 else f"{n} agents"


def shorten(items: Sequence[object]) -> str:
    """The items in a line, the first few only where there are many."""
    rest = len(items) - _SHOWN
    listed = ", ".join(str(item) for item in items[:_SHOWN])
    return f"{listed}, and {rest} more" if rest > 0 else listed
