"""Work spread over threads: in order, a few pieces ahead, and with torch on one thread each."""

from __future__ import annotations

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
