"""Torch on all cores with the same result on any number of them.

One product spread over threads may be summed in another order for each number of threads. So every piece of work
here runs on one thread, pieces are cut without regard to the number of cores, and results come in their order.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from itertools import islice
from typing import TypeVar

import torch

LARGE_BYTES = 4 << 20  # more than a chunk of a weight that is rounded: there the system would be asked too often
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h

A = TypeVar("A")
B = TypeVar("B")


class Workers:
    """Runs pieces of work on a number of threads."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads)

    def map(self, work: Callable[[A], B], pieces: Iterable[A]) -> Generator[B, None, None]:
        """`work` of each piece, in order. Few pieces are taken ahead; closing it drops those that nobody began."""
        left = iter(pieces)
        futures = deque(self._submit(work, islice(left, 2 * self.threads)))
        try:
            while futures:
                result = futures.popleft().result()
                futures.extend(self._submit(work, islice(left, 1)))
                yield result
        finally:
            for future in futures:
                future.cancel()
            wait(futures)  # what was begun still uses its inputs

    def _submit(self, work: Callable[[A], B], pieces: Iterable[A]) -> list[Future[B]]:
        return [self._pool.submit(_run, work, piece) for piece in pieces]

    def each(self, work: Callable[[A], None], pieces: Iterable[A]) -> None:
        """Run all pieces to their end."""
        for _ in self.map(work, pieces):
            pass

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def workers(threads: int) -> Iterator[Workers]:
    """Workers for a block of code, in which torch itself uses one thread."""
    return_large_pieces()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = Workers(threads)
    try:
        yield pool
    finally:
        pool.close()
        torch.set_num_threads(before)


def _run(work: Callable[[A], B], piece: A) -> B:
    with torch.inference_mode():  # each thread has its own mode
        return work(piece)


def return_large_pieces() -> None:
    """From now on, what is large goes back to the system when it is freed.

    glibc raises its own limit for that to the largest piece it saw, up to 32 MiB, and then each thread's part of the
    heap grows from layer to layer, though nothing is left in it.
    """
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE_BYTES)


def release_memory() -> None:
    """Give freed memory back to the system. The C library keeps what threads freed, for a next time."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
