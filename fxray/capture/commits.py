"""Commits in the background, so that a crash loses seconds and training waits for none."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CommitThread"]


class CommitThread(threading.Thread):
    """Calls `commit` every `seconds` until stopped.

    A commit waits for the disk; TensorStore does that without the GIL.
    """

    def __init__(self, commit: Callable[[], bool], seconds: float) -> None:
        super().__init__(name="fxray-commit", daemon=True)
        self._commit, self._seconds = commit, seconds
        self._stopped = threading.Event()

    def run(self) -> None:
        """Commit until stopped, or until `commit` says there is nothing left to do."""
        while not self._stopped.wait(self._seconds) and self._commit():
            pass

    def stop(self) -> None:
        """End, after the commit that is under way."""
        self._stopped.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join()
