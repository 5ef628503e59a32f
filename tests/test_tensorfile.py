"""safetensors files on the disk, seen without reading them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from vila_edge.errors import InputError
from vila_edge.tensorfile import TensorFile, write_tensors


def test_what_is_written_is_mapped_back(tmp_path: Path) -> None:
    tensors: dict[str, NDArray[Any]] = {
        "b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a": np.arange(5, dtype=np.uint8),
    }
    write_tensors(tmp_path / "x", tensors)
    file = TensorFile(tmp_path / "x")
    assert set(file.entries) == {"a", "b"}
    for name, want in tensors.items():
        assert isinstance(file.array(name), np.memmap)
        np.testing.assert_array_equal(file.array(name), want)
        entry = file.entries[name]
        raw = (tmp_path / "x").read_bytes()[entry.offset : entry.offset + entry.length]
        assert raw == want.tobytes()


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = np.ones((2, 2), np.float32), np.zeros(7, np.float16)
    write_tensors(tmp_path / "x", {"one": one, "two": two})
    write_tensors(tmp_path / "y", {"two": two, "one": np.asfortranarray(one)})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_bfloat16_and_float16_widen_exactly(tmp_path: Path) -> None:
    values = torch.randn(40, 3)
    save_file({"b": values.bfloat16(), "h": values.half()}, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    np.testing.assert_array_equal(file.float32("b"), values.bfloat16().float().numpy())
    np.testing.assert_array_equal(file.float32("h"), values.half().float().numpy())


def test_damaged_files_are_refused_with_their_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": np.arange(10, dtype=np.float32), "b": np.ones((3, 3), np.float16)})
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(500):
        data = bytearray(whole[: rng.randint(0, len(whole))])
        for _ in range(rng.randint(0, 3)):
            if data:
                data[rng.randrange(min(len(data), 120))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            TensorFile(path)
        except InputError as error:
            refused += 1
            assert "model.safetensors" in error.message
    assert refused > 400


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        TensorFile(tmp_path / "x")


def test_a_tensor_that_is_read_often_stays_mapped(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": np.arange(6, dtype=np.float32).reshape(3, 2)})
    once, kept = TensorFile(tmp_path / "x"), TensorFile(tmp_path / "x", keep_mapped=True)
    assert once.array("a") is not once.array("a")
    assert kept.array("a") is kept.array("a")
    np.testing.assert_array_equal(kept.float32("a", np.array([2, 0])), [[4, 5], [0, 1]])
