"""`vila-edge build` looks for room before it spends minutes: on the disk, and in memory."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.test_cli import Done, in_process
from tests.test_cli_build import OPTIONS, ORIN, RTX, Builder, builder, bundle, cache, gpu, orin
from vila_edge.bundle import Bundle
from vila_edge.engine.engine_cache import EngineCache
from vila_edge.engine.tensorrt_options import COMPONENTS
from vila_edge.errors import BackendError
from vila_edge.export.build_job import build_engines
from vila_edge.export.build_room import build_memory, check_disk

__all__ = ["builder", "bundle", "cache", "gpu", "in_process", "orin"]


def test_the_disk_is_looked_at_before_minutes_are_spent(
    builder: Builder, bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_engines(bundle, ORIN, OPTIONS, ["vision_tower"], cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(BackendError, match="mm_projector, decoder .* take about 1 MiB, 1 are free") as error:
        build_engines(bundle, ORIN, OPTIONS, COMPONENTS, cache)
    assert "XDG_CACHE_HOME" in error.value.hint
    assert builder.built == ["vision_tower"]
    build_engines(bundle, ORIN, OPTIONS, ["vision_tower"], cache)  # what is there needs no room


def test_room_is_planned_for_engines_and_the_weights_of_one(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = bundle.manifest.files
    tower = files["weights/vision_tower.safetensors"].size
    llm = sum(entry.size for name, entry in files.items() if name.startswith("weights/llm."))
    for missing, fails in ((0, False), (1, True)):
        free = SimpleNamespace(free=tower + 2 * llm - missing)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: free)
        if fails:
            with pytest.raises(BackendError):
                check_disk(tmp_path, bundle, ["vision_tower", "decoder"])
        else:
            check_disk(tmp_path, bundle, ["vision_tower", "decoder"])


def test_a_build_that_memory_is_too_small_for_is_not_begun(
    orin: Builder, tiny_bundle: Path, in_process: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system would kill it, or something else, after minutes."""
    bundle = Bundle.open(tiny_bundle)
    need = {component: build_memory(bundle, component) for component in COMPONENTS}
    monkeypatch.setattr("vila_edge.export.build_room.available_memory", lambda: need["decoder"] - 1)
    done = in_process("build", tiny_bundle, "--component", "decoder")
    assert (done.returncode, orin.built) == (5, [])
    for text in ("decoder: its build takes about 1 MiB of memory, 1 are available", "--no-memory-check"):
        assert text in done.stderr
    assert in_process("build", tiny_bundle, "--component", "decoder", "--no-memory-check").returncode == 0
    assert in_process("build", tiny_bundle, "--component", "decoder").returncode == 0, "it is there"
    assert orin.built == ["decoder"]


@pytest.mark.parametrize("available", [None, 1 << 40])
def test_memory_that_is_enough_or_unknown_is_no_reason_to_stop(
    available: int | None, builder: Builder, bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vila_edge.export.build_room.available_memory", lambda: available)
    build_engines(bundle, ORIN, OPTIONS, COMPONENTS, cache)
    assert builder.built == list(COMPONENTS)


def test_memory_is_planned_for_the_weights_as_an_engine_holds_them(make_bundle: Callable[[str], Path]) -> None:
    """Of the decoder 4 bits and 16 as they are stored and 32 as 16, of the others always 16."""
    need = {
        quantization: [build_memory(Bundle.open(make_bundle(quantization)), component) for component in COMPONENTS]
        for quantization in ("int4", "fp16", "fp32")
    }
    assert need["int4"][:2] == need["fp16"][:2] == need["fp32"][:2]
    assert need["fp16"][2] == need["fp32"][2] > 1.5 * need["int4"][2]


def test_an_engine_for_another_gpu_is_said_to_stay_here(
    builder: Builder,
    cache: EngineCache,
    tiny_bundle: Path,
    in_process: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", RTX)
    done = in_process("build", tiny_bundle, "--runtime", "tensorrt_rtx", "--sm", "86")
    assert done.returncode == 0
    assert "these engines load on this machine alone" in done.stderr
