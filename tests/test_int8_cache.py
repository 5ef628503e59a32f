"""A kv_cache in 8 bits on an onnxruntime that is too old for it."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

from vila_edge.backends import open_engine
from vila_edge.bundle import Bundle
from vila_edge.errors import BackendError


@pytest.mark.parametrize("old", ["1.23.2", "1.26.0"])
def test_an_old_onnxruntime_is_named_before_anything_is_loaded(
    old: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", old)
    with pytest.raises(BackendError, match=f"needs onnxruntime 1.27 or newer, this is {old}") as caught:
        open_engine(Bundle.open(tiny_bundle), "onnxruntime", 1, "int8")
    assert "--kv-cache float32" in caught.value.hint
