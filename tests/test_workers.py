"""Work spread over threads: in order, a few pieces ahead, and with torch on one thread each."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from vila_edge.export.workers import workers


def test_results_come_in_order_whatever_takes_longest() -> None:
    def work(i: int) -> int:
        time.sleep(0.02 if i % 3 == 0 else 0)
        return i * i

    with workers(4) as pool:
        assert list(pool.map(work, range(20))) == [i * i for i in range(20)]


def test_few_pieces_are_taken_ahead() -> None:
    taken: list[int] = []

    def pieces() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    with workers(2) as pool:
        results = pool.map(lambda i: i, pieces())
        assert next(results) == 0
        assert len(taken) <= 5
        results.close()
        assert len(taken) <= 5


def test_an_error_of_one_piece_comes_out() -> None:
    def work(i: int) -> int:
        if i == 3:
            raise ValueError("three")
        return i

    with workers(2) as pool, pytest.raises(ValueError, match="three"):
        list(pool.map(work, range(50)))


def test_each_thread_computes_without_gradients_and_torch_is_left_as_it_was() -> None:
    before, modes = torch.get_num_threads(), list[tuple[bool, int]]()
    with workers(2) as pool:
        pool.each(lambda _: modes.append((torch.is_inference_mode_enabled(), torch.get_num_threads())), range(4))
    assert set(modes) == {(True, 1)}
    assert torch.get_num_threads() == before


# How many pieces are mapped alone, behind one that is large; in a process with a heap of its own.
PROGRAM = """
import ctypes
from vila_edge.export.workers import LARGE_BYTES, workers
class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", *"abcdef")]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Mallinfo, ctypes.c_void_p, [ctypes.c_void_p]
libc.malloc.argtypes = [ctypes.c_size_t]
with workers(1):
    libc.free(libc.malloc(30 << 20))
    before = libc.mallinfo2().hblks
    libc.malloc(LARGE_BYTES + 1)
    print(libc.mallinfo2().hblks - before)
"""


def test_what_is_large_goes_back_to_the_system_whatever_was_freed_before() -> None:
    """glibc alone would keep pieces as large as the largest that was freed, in each thread's part of the heap."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("another C library")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
