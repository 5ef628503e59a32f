"""Ctrl-C during a reply stops the reply, not the program; a second one is a KeyboardInterrupt."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vila_edge.pipeline import Reply

INTERRUPTED = 130  # exit code of a program that Ctrl-C ended


@contextmanager
def stops_reply(reply: Reply) -> Iterator[None]:
    """While the block runs, the first Ctrl-C cancels `reply`."""

    def handle(number: int, frame: FrameType | None) -> None:
        if reply.cancelled:
            raise KeyboardInterrupt
        reply.cancel()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
