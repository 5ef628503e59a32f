"""`vila-edge build`: what it builds for, what it takes from the cache, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.test_cli import Done, in_process
from tests.tiny import TINY
from vila_edge.bundle import Bundle
from vila_edge.engine.engine_cache import EngineCache
from vila_edge.engine.tensorrt_options import COMPONENTS, BuildOptions
from vila_edge.errors import BackendError, UsageError
from vila_edge.export.build_job import Built, Target, build_engines, choose_options, find_target

__all__ = ["in_process"]

OPTIONS = BuildOptions(context=64, chunk=32)


def tensorrt(name: str = "tensorrt", version: str = "10.3.0", *offered: str) -> ModuleType:
    module = ModuleType(name)
    module.__dict__["__version__"] = version
    if offered:
        module.__dict__["ComputeCapability"] = SimpleNamespace(__members__=dict.fromkeys(("NONE", "CURRENT", *offered)))
    return module


RTX = tensorrt("tensorrt_rtx", "1.7.1.116", "SM86", "SM120")
ORIN = Target(tensorrt(), 87, ahead_of_time=False)


class Builder:
    """Stands for `vila_edge.export.engines`: engines are texts, and every call is written down."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails: BaseException | None = None

    def build_engine(
        self, trt: ModuleType, bundle: Bundle, component: str, options: BuildOptions, **said: Any
    ) -> memoryview:
        (said["folder"] / "weights").write_bytes(b"large")
        self.calls.append((component, {"options": options, **said}))
        said["progress"]("Building", 0, 2)
        if self.fails and component == "decoder":
            raise self.fails
        said["progress"]("Building", 2, 2)
        return memoryview(f"{component} of {trt.__name__} for {options.context}".encode())

    @property
    def built(self) -> list[str]:
        return [component for component, _ in self.calls]


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    made = Builder()
    monkeypatch.setitem(sys.modules, "vila_edge.export.engines", made)
    return made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    """The cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return EngineCache()


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int] | None], None]:
    """Put a GPU of a compute capability in, or take it out."""

    def put(compute_capability: tuple[int, int] | None) -> None:
        def open_device() -> contextlib.nullcontext[SimpleNamespace]:
            if compute_capability is None:
                raise BackendError("libcuda.so.1 is not here", "install the driver")
            return contextlib.nullcontext(SimpleNamespace(compute_capability=compute_capability))

        monkeypatch.setitem(sys.modules, "vila_edge.engine.cuda", SimpleNamespace(open_device=open_device))

    return put


@pytest.fixture
def orin(builder: Builder, cache: EngineCache, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """A machine with TensorRT 10.3 and a GPU of 8.7."""
    gpu((8, 7))
    monkeypatch.setitem(sys.modules, "tensorrt", ORIN.trt)
    return builder


# The walk


def test_what_was_built_is_not_built_again(builder: Builder, bundle: Bundle, cache: EngineCache) -> None:
    told: list[Built] = []
    first = build_engines(bundle, ORIN, OPTIONS, COMPONENTS, cache, done=told.append)
    assert builder.built == [built.component for built in first] == list(COMPONENTS)
    assert told == first
    assert [built.path.stat().st_size > built.size > 0 for built in first] == [True] * 3
    again = build_engines(bundle, ORIN, OPTIONS, COMPONENTS, cache)
    assert len(builder.calls) == 3
    assert [(built.path, built.size, built.cached) for built in again] == [(one.path, one.size, True) for one in first]
    build_engines(bundle, ORIN, BuildOptions(context=128, chunk=32), COMPONENTS, cache)
    assert builder.built[3:] == ["decoder"]  # the others do not depend on the context
    build_engines(bundle, ORIN, OPTIONS, ["mm_projector"], cache, force=True)
    assert builder.built[4:] == ["mm_projector"]


def test_the_builder_gets_what_it_needs(builder: Builder, bundle: Bundle, cache: EngineCache) -> None:
    build_engines(bundle, ORIN, OPTIONS, ["decoder"], cache)
    build_engines(bundle, Target(RTX, 120, ahead_of_time=True), OPTIONS, ["decoder"], cache)
    here, ahead = (said for _, said in builder.calls)
    assert (here["compute_capability"], ahead["compute_capability"]) == (None, (12, 0))
    assert here["timing_cache"] == cache.root / "timing-tensorrt-10.3.0-sm87.cache"
    assert ahead["timing_cache"] == cache.root / "timing-tensorrt_rtx-1.7.1.116-sm120.cache"
    assert here["options"] == OPTIONS
    assert here["folder"].parent == cache.root  # one disk has to have room, and /tmp may be memory
    assert [cache.read(key) for key in cache.known() if key.sm == 87] == [b"decoder of tensorrt for 64"]


def test_a_damaged_engine_is_built_again(builder: Builder, bundle: Bundle, cache: EngineCache) -> None:
    [made] = build_engines(bundle, ORIN, OPTIONS, ["decoder"], cache)
    made.path.write_bytes(made.path.read_bytes()[:-1])
    said: list[str] = []
    [again] = build_engines(bundle, ORIN, OPTIONS, ["decoder"], cache, say=said.append)
    assert not again.cached
    assert cache.verify(cache.known()[0]) == again.size
    assert len(said) == 1
    assert said[0].startswith(f"decoder is built again: {made.path}: ")
    assert "truncated" in said[0]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), BackendError("decoder: no tactic")])
def test_a_build_that_stops_leaves_what_is_finished(
    failure: BaseException, builder: Builder, bundle: Bundle, cache: EngineCache
) -> None:
    builder.fails = failure
    with pytest.raises(type(failure)):
        build_engines(bundle, ORIN, OPTIONS, COMPONENTS, cache)
    assert sorted(key.component for key in cache.known()) == ["mm_projector", "vision_tower"]
    assert all(name == "secret" or name.endswith(".engine") for name in os.listdir(cache.root))
    builder.fails = None
    build_engines(bundle, ORIN, OPTIONS, COMPONENTS, cache)
    assert builder.built == [*COMPONENTS, "decoder"]


def test_ctrl_c_inside_of_tensorrt_is_not_lost(
    builder: Builder, bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT calls back from C++, where a KeyboardInterrupt may be swallowed; the next call has to stop it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    told: list[str] = []

    def swallow(trt: ModuleType, bundle: Bundle, component: str, options: BuildOptions, **said: Any) -> bytes:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # interrupted
        if component == "decoder":
            said["progress"]("Building", 1, 2)
        if component == "vision_tower":
            raise BackendError("vision_tower: TensorRT failed, because it was interrupted")
        told.append(component)
        return b"plan"

    monkeypatch.setattr(builder, "build_engine", swallow)
    try:
        for component in COMPONENTS:
            with pytest.raises(KeyboardInterrupt):
                build_engines(bundle, ORIN, OPTIONS, [component], cache)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert told == ["mm_projector"]  # the decoder's was stopped on its way
    assert cache.known() == []


def test_what_a_killed_build_left_is_removed(builder: Builder, bundle: Bundle, cache: EngineCache) -> None:
    cache.prepare()
    (cache.root / ".build.x.partial").mkdir()
    (cache.root / ".build.x.partial" / "weights").write_bytes(b"large")
    (cache.root / ".0.engine.12.partial").write_bytes(b"half")
    build_engines(bundle, ORIN, OPTIONS, ["decoder"], cache)
    assert not [name for name in os.listdir(cache.root) if name.startswith(".")]


def test_one_build_at_a_time(builder: Builder, bundle: Bundle, cache: EngineCache) -> None:
    cache.prepare()
    descriptor = os.open(cache.root, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(UsageError, match=f"another process builds engines in {cache.root}"):
            build_engines(bundle, ORIN, OPTIONS, COMPONENTS, cache)
    finally:
        os.close(descriptor)
    assert builder.calls == []


# What it builds for


def test_the_gpu_at_hand_is_built_for(gpu: Any) -> None:
    gpu((8, 7))
    assert find_target(ORIN.trt) == ORIN
    assert find_target(ORIN.trt, 87) == ORIN  # said, and true
    gpu((12, 1))
    assert find_target(RTX).sm == 121


def test_another_gpu_is_built_for_where_that_can_be_done(gpu: Any) -> None:
    gpu((8, 9))
    target = find_target(RTX, 120)
    assert (target.sm, target.ahead_of_time, target.compute_capability) == (120, True, (12, 0))
    with pytest.raises(UsageError, match="--sm 87: tensorrt_rtx 1.7.1.116 builds ahead of time for 86, 120"):
        find_target(RTX, 87)
    with pytest.raises(UsageError, match="--sm 86: tensorrt 10.3.0 builds for the GPU that it runs on alone"):
        find_target(ORIN.trt, 86)


def test_without_a_gpu_the_way_out_is_said(gpu: Any) -> None:
    gpu(None)
    with pytest.raises(BackendError, match="no GPU to build for: libcuda.so.1 is not here") as error:
        find_target(RTX)
    assert error.value.hint == "install the driver; or build ahead of time, with --sm: tensorrt_rtx has 86, 120"
    with pytest.raises(BackendError) as error:
        find_target(ORIN.trt)
    assert error.value.hint == "install the driver"
    assert find_target(RTX, 86).ahead_of_time


def test_defaults_come_from_the_model() -> None:
    assert choose_options(TINY, ORIN.trt) == BuildOptions(context=128, chunk=128, images=1, form="append")
    assert choose_options(TINY, RTX).form == "scatter"
    said = choose_options(TINY, RTX, context=64, chunk=16, images=3, form="append", workspace=1 << 20)
    assert said == BuildOptions(64, 16, 3, "append", 1 << 20)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"context": 129}, "--context 129: this model has 1 to 128"),
        ({"context": 64, "chunk": 65}, "--chunk 65: expected 1 to 64"),
        ({"images": 5000}, "--images 5,000: expected 1 to 16"),
        ({"form": "scatter"}, "--kv-form scatter: tensorrt 10.3.0, it needs 10.15"),
    ],
)
def test_what_does_not_fit_is_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_options(TINY, ORIN.trt, **said)


# The command


def test_the_command_tells_what_it_did(
    orin: Builder, tiny_bundle: Path, cache: EngineCache, in_process: Callable[..., Done]
) -> None:
    done = in_process("build", tiny_bundle)
    assert (done.returncode, done.stdout) == (0, "")
    for text in (
        "tensorrt 10.3.0, for compute capability 8.7 (SM 87): the GPU of this machine",
        "up to 1 images at a time; a context of 128, 128 of a prompt at a time, kv_cache append",
        "the 4-bit weights are asymmetric",
        "export --symmetric",
    ):
        assert text in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(COMPONENTS)]
    assert [line.split()[0] for line in lines] == list(COMPONENTS)
    assert all("built in" in line and str(cache.root) in line for line in lines)
    done = in_process("build", tiny_bundle, "--component", "decoder", "--json")
    assert done.stderr.count("was there") == 1
    found = json.loads(done.stdout)
    assert (found["runtime"], found["version"], found["sm"], found["ahead_of_time"]) == (
        "tensorrt",
        "10.3.0",
        87,
        False,
    )
    assert found["options"] == {
        "context": 128,
        "chunk": 128,
        "images": 1,
        "form": "append",
        "workspace": None,
        "projector": "graph",
    }
    [engine] = found["engines"]
    assert (engine["component"], engine["built"], engine["seconds"]) == ("decoder", False, 0)
    assert Path(engine["path"]).stat().st_size > engine["bytes"] > 0


def test_options_reach_the_builder(orin: Builder, tiny_bundle: Path, in_process: Callable[..., Done]) -> None:
    options = ["--context", "100", "--chunk", "50", "--images", "2", "--kv-form", "append", "--workspace-mib", "3"]
    options += ["--projector", "plugin"]
    assert in_process("build", tiny_bundle, "--component", "decoder", *options).returncode == 0
    assert orin.calls[0][1]["options"] == BuildOptions(100, 50, 2, "append", 3 << 20, "plugin")
    assert in_process("build", tiny_bundle, "--component", "decoder", *options, "--force").returncode == 0
    assert orin.built == ["decoder", "decoder"]


def test_ctrl_c_ends_it_and_leaves_nothing_half(
    orin: Builder, tiny_bundle: Path, cache: EngineCache, in_process: Callable[..., Done]
) -> None:
    orin.fails = KeyboardInterrupt()
    assert in_process("build", tiny_bundle).returncode == 130
    assert len([name for name in os.listdir(cache.root) if name.endswith(".engine")]) == 2
    assert not [name for name in os.listdir(cache.root) if name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--runtime", "cuda"], 2, "--runtime cuda: expected one of auto, tensorrt, tensorrt_rtx"),
        (["--component", "llm"], 2, "--component llm: expected one of vision_tower, mm_projector, decoder"),
        (["--kv-form", "paged"], 2, "--kv-form paged: expected one of auto, scatter, append"),
        (["--context", "0"], 2, "--context"),
        (["--context", "1000"], 2, "--context 1000: this model has 1 to 128"),
        (["--sm", "86"], 2, "--sm 86: tensorrt 10.3.0 builds for the GPU that it runs on alone"),
    ],
)
def test_a_wrong_call_is_an_error_with_a_remedy(
    arguments: list[str], code: int, says: str, orin: Builder, tiny_bundle: Path, in_process: Callable[..., Done]
) -> None:
    done = in_process("build", tiny_bundle, *arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert orin.calls == []


def test_no_tensorrt_is_an_error_with_a_remedy(
    cache: EngineCache, tiny_bundle: Path, in_process: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    done = in_process("build", tiny_bundle)
    assert done.returncode == 5
    for text in ("TensorRT does not load", "JetPack", "--system-site-packages", "pip install tensorrt-rtx"):
        assert text in done.stderr


def test_no_onnx_is_an_error_with_a_remedy(
    orin: Builder, tiny_bundle: Path, in_process: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "vila_edge.export.engines")
    for name in [name for name in sys.modules if name.startswith("vila_edge.export.") and "build_job" not in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    done = in_process("build", tiny_bundle)
    assert done.returncode == 2
    assert "build needs the package 'onnx', which is not installed" in done.stderr
    assert "pip install 'vila-edge[build]'" in done.stderr


def test_a_bundle_that_is_none_is_an_error(orin: Builder, tmp_path: Path, in_process: Callable[..., Done]) -> None:
    assert in_process("build", tmp_path / "none").returncode == 3


# With a TensorRT


def test_a_real_engine_is_built_and_kept(tiny_bundle: Path, tmp_path: Path) -> None:
    """Ahead of time, so without a GPU, and without torch, as on a device; it is not run."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    program = """
import sys
for name in ("torch", "transformers", "onnxruntime"):
    sys.modules[name] = None
from vila_edge.cli import main
main()
"""
    arguments = ["build", tiny_bundle, "--runtime", "tensorrt_rtx", "--sm", "86", "--json", "--component"]
    for component in ("mm_projector", "decoder"):
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments), component],
            capture_output=True,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["ahead_of_time"]
        assert [engine["built"] for engine in found["engines"]] == [True]
    cache = EngineCache(tmp_path / "vila-edge" / "engines")
    keys = cache.known()
    assert [(key.component, key.sm) for key in keys] == [("decoder", 86), ("mm_projector", 86)]
    assert all(len(cache.read(key)) > 10_000 for key in keys)
