"""Ctrl-C while a C++ library works and calls back.

An exception that the signal raises in a callback can get lost on its way through C++, and has been seen to. So the
signal is remembered, and raised where an exception is safe.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType


class CtrlC:
    """While the block runs, Ctrl-C raises KeyboardInterrupt at once or, `inside` of the library, by `check`."""

    def __init__(self) -> None:
        self.inside = False  # set by the first call back
        self._pressed = False
        self._previous = signal.getsignal(signal.SIGINT)
        # Elsewhere signals cannot be handled; a program in the background may ignore them.
        self._ours = threading.current_thread() is threading.main_thread() and callable(self._previous)

    def __enter__(self) -> CtrlC:
        if self._ours:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._previous)
        self.check()  # it may have been lost, or have become another error

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was pressed."""
        if self._pressed:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._pressed = True
        if not self.inside:
            raise KeyboardInterrupt
