"""Waiting by looking now and then, within a limit."""

from __future__ import annotations

import time

TIMEOUT_S = 300.0


class Patience:
    """Time waited so far, and the pauses between two looks; a suspended job does not age."""

    def __init__(self, timeout_s: float) -> None:
        self.waited_s = 0.0
        self._timeout_s = timeout_s
        self._last = time.perf_counter()

    def pause(self) -> bool:
        """Give the core away for a moment; False once the timeout has passed."""
        # Spinning would take the core from the very neighbours waited for, where ranks share it. A
        # pause in proportion to what was waited makes no wait much longer.
        time.sleep(0.0 if self.waited_s < 1e-3 else min(1e-3, 0.05 * self.waited_s))
        now = time.perf_counter()
        self.waited_s += min(now - self._last, 1.0)
        self._last = now
        return self.waited_s < self._timeout_s
