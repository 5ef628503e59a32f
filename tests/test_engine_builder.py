"""What TensorRT's builder is told, seen by one that writes it down; and what is made of its answer."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vila_edge.errors import BackendError
from vila_edge.export.engines import build_graph


class Flag(Enum):
    STRONGLY_TYPED, EXPLICIT_BATCH, REQUIRE_USER_ALLOCATION, WORKSPACE, DETAILED = range(3, 8)


class TimingCache:
    """It grows with every build."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"measured "


class Recorder:
    """A module `tensorrt`: `told` has what the builder was asked for."""

    def __init__(self, name: str = "tensorrt", *builder_flags: str, fails: str = "") -> None:
        self.told: dict[str, Any] = {"flags": [], "limits": {}, "profiles": [], "network": None, "timing": None}
        self.fails = fails
        self.module = ModuleType(name)
        self.module.__dict__.update(
            __version__="10.3.0",
            ILogger=type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1}),
            IProgressMonitor=type("IProgressMonitor", (), {}),
            NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=Flag.STRONGLY_TYPED.value),
            ProfilingVerbosity=Flag,
            MemoryPoolType=Flag,
            BuilderFlag=SimpleNamespace(**{flag: Flag[flag] for flag in builder_flags}),
            Builder=self.builder,
            OnnxParser=lambda network, logger: SimpleNamespace(parse_from_file=lambda path: True),
        )

    def builder(self, logger: Any) -> SimpleNamespace:
        self.logger = logger
        return SimpleNamespace(
            create_network=lambda flags: self.told.update(network=flags),
            create_builder_config=self.config,
            create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda *shapes: None),
            build_serialized_network=self.build,
        )

    def config(self) -> SimpleNamespace:
        return SimpleNamespace(
            set_flag=self.told["flags"].append,
            set_memory_pool_limit=self.told["limits"].__setitem__,
            add_optimization_profile=self.told["profiles"].append,
            create_timing_cache=TimingCache,
            set_timing_cache=self.take_timing_cache,
        )

    def take_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self.told["timing"] = cache.content
        return True

    def build(self, network: Any, config: Any) -> bytes | None:
        if self.fails:
            self.logger.log(1, self.fails)
        return None if self.fails else b"plan"


def build(recorder: Recorder, **said: Any) -> memoryview:
    return build_graph(recorder.module, Path("decoder.onnx"), "decoder", [{"x": ((1,), (2,), (3,))}] * 2, **said)


def test_networks_are_strongly_typed_and_have_all_profiles() -> None:
    recorder = Recorder()
    assert bytes(build(recorder)) == b"plan"
    assert recorder.told["network"] == 1 << Flag.STRONGLY_TYPED.value
    assert len(recorder.told["profiles"]) == 2


def test_the_scratch_memory_is_limited_where_that_is_asked_for() -> None:
    recorder, free = Recorder(), Recorder()
    build(recorder, workspace=3 << 20)
    build(free)
    assert (recorder.told["limits"], free.told["limits"]) == ({Flag.WORKSPACE: 3 << 20}, {})


def test_a_tensorrt_that_allocates_by_itself_is_told_not_to() -> None:
    """A CUDA graph cannot be made of a run that allocates."""
    rtx, plain = Recorder("tensorrt_rtx", "REQUIRE_USER_ALLOCATION"), Recorder()
    build(rtx)
    build(plain)
    assert (rtx.told["flags"], plain.told["flags"]) == ([Flag.REQUIRE_USER_ALLOCATION], [])


def test_what_a_build_measures_is_there_for_the_next(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "timing"
    for known in (b"", b"measured ", b"measured measured "):
        recorder = Recorder()
        build(recorder, timing_cache=path)
        assert recorder.told["timing"] == known
    assert path.read_bytes() == b"measured " * 3


@pytest.mark.parametrize(
    ("reason", "workspace", "hint"),
    [
        ("no tactics to implement the operation within workspace limit", 1 << 20, "take a larger --workspace-mib"),
        ("no tactics to implement the operation within workspace limit", None, "--backend onnxruntime"),
        ("an operator is not known", 1 << 20, "--backend onnxruntime"),
    ],
)
def test_too_little_scratch_memory_has_a_remedy_of_its_own(reason: str, workspace: int | None, hint: str) -> None:
    with pytest.raises(BackendError, match=f"decoder: tensorrt 10.3.0 cannot build its engine: {reason}") as error:
        build(Recorder(fails=reason), workspace=workspace)
    assert hint in error.value.hint
