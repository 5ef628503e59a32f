"""Engines whose projector is our kernels, by themselves and as a plugin: on a fake TensorRT, against the numpy oracle."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.fake_cuda import FakeDevice
from tests.fake_plugins import add_plugins, plugin_plan
from tests.fake_tensorrt import make_module
from tests.kernels.host import Compiled
from tests.kernels.projections import ROUNDING, error
from tests.tensorrt_engines import Built, build_fakes
from vila_edge.backends import open_engine
from vila_edge.engine.cuda.projector import bundle_projector
from vila_edge.engine.engine_cache import EngineCache, build_flags, engine_key
from vila_edge.engine.tensorrt import Component, TensorrtEngine
from vila_edge.engine.tensorrt_plugin import ABOUT, Carried, PluginHome, carried, read_fields
from vila_edge.errors import BackendError, UsageError
from vila_edge.export.tensorrt_projector import kernels_code, write_plugin
from vila_edge.kernels import store
from vila_edge.kernels.manifest import Manifest
from vila_edge.kernels.store import Image, Version

Open = Callable[..., TensorrtEngine]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_fakes("scatter", tmp_path_factory.mktemp("engines"))


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def trt(device: FakeDevice) -> ModuleType:
    return add_plugins(make_module(device), device)


@pytest.fixture
def without(built: Built, trt: ModuleType, tmp_path: Path) -> Built:
    """Engines of all but the projector."""
    found = dataclasses.replace(built, cache=EngineCache(tmp_path / "cache"))
    for component in ("vision_tower", "decoder"):
        found.cache.store(key_of(found, component, trt), built.plans[component])
    return found


@pytest.fixture
def with_plugin(without: Built, trt: ModuleType, compiled: Compiled, tmp_path: Path) -> Built:
    """An engine of the projector that carries kernels for the CPU."""
    found = dataclasses.replace(without, options=dataclasses.replace(without.options, projector="plugin"))
    home = PluginHome(trt, None, [])
    with home.serving():
        graph = write_plugin(found.bundle, found.options, compiled.image("projector.cu"), tmp_path)
        found.cache.store(key_of(found, "mm_projector", trt), plugin_plan(trt, graph, found.options.images))
    return found


def key_of(built: Built, component: str, trt: ModuleType) -> Any:
    return engine_key(built.bundle.manifest.digest, component, trt, 87, build_flags(component, built.options))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, trt: ModuleType, device: FakeDevice, compiled: Compiled) -> Iterator[Open]:
    """Opens engines on the fake device; closes them after the test, and everything has to be there then."""
    opened = list[TensorrtEngine]()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)

    def find(manifest: Manifest, file: str, compute_capability: Version, driver: Version) -> Image:
        return Image(compiled.image(file), "shipped", "built for the CPU")

    def open_engine(built: Built, **arguments: Any) -> TensorrtEngine:
        opened.append(TensorrtEngine(built.bundle, "tensorrt", device, built.cache, find_kernels=find, **arguments))
        return opened[-1]

    yield open_engine
    for engine in opened:
        engine.close()
    gc.collect()
    assert (device.used, device.pins, device.modules, device.streams) == (0, {}, [], {})


def check(engine: TensorrtEngine, built: Built) -> None:
    """More images than fit at once, against the oracle."""
    cfg = built.bundle.config
    shape = (3, cfg.vision_tower.num_features, cfg.mm_hidden_size)
    features = np.random.default_rng(0).standard_normal(shape).astype(np.float16).astype(np.float32)
    assert error(engine.project(features), built.oracle.project(features)) < 3 * ROUNDING


def test_kernels_need_no_engine_of_the_projector(use: Open, without: Built, device: FakeDevice) -> None:
    engine = use(without, projector="kernel")
    assert engine.backend.endswith("decode in a CUDA graph, projector in our kernels (shipped)")
    check(engine, without)
    with pytest.raises(BackendError, match="no engine of mm_projector to use"):
        use(without)


def test_an_engine_with_the_plugin_runs_the_kernels_that_it_carries(
    use: Open, with_plugin: Built, device: FakeDevice
) -> None:
    engine = use(with_plugin)
    assert engine.options == with_plugin.options
    assert engine.backend.endswith("decode in a CUDA graph, projector in our kernels (a plugin)")
    check(engine, with_plugin)
    check(engine, with_plugin)
    assert device.calls["load_module"] == 1
    shape = bundle_projector(with_plugin.bundle).shape
    assert isinstance(engine._mm_projector, Component)
    assert engine._mm_projector._session._engine.scratch_bytes == shape.scratch_bytes(2) > shape.scratch_bytes(1)
    assert device.calls["kernel"] == 2 * 2 * len(shape.products)


def test_two_engines_with_the_plugin_have_a_home_each(use: Open, with_plugin: Built) -> None:
    first, second = use(with_plugin), use(with_plugin)
    first.close()
    check(second, with_plugin)


def test_what_fails_in_the_plugin_is_told(use: Open, with_plugin: Built, device: FakeDevice) -> None:
    engine = use(with_plugin)
    assert engine._plugins is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "load_module", lambda code: (_ for _ in ()).throw(BackendError("out of memory")))
        with pytest.raises(BackendError, match="mm_projector does not run: MmProjector: out of memory; Error Code 2"):
            check(engine, with_plugin)
    check(engine, with_plugin)


def test_an_engine_of_other_kernels_is_refused(use: Open, with_plugin: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vila_edge.engine.tensorrt_plugin.source_digest", lambda manifest, file: "others")
    with pytest.raises(BackendError, match="cannot load the engine of mm_projector .*kernels of other sources"):
        use(with_plugin)


# what is carried


@pytest.fixture
def plugin(built: Built) -> Carried:
    return carried(bundle_projector(built.bundle).shape, b"\x7fELF\0\0\0")


@pytest.mark.parametrize("end", [b"", b"\0"])
def test_fields_come_back_as_they_were(plugin: Carried, end: bytes) -> None:
    assert read_fields({name: value + end for name, value in plugin.fields.items()}) == plugin


def test_fields_of_another_version_are_refused(plugin: Carried) -> None:
    about = json.loads(plugin.fields[ABOUT])
    about["projector"]["products"][0].pop("gelu")
    for wrong in ({}, plugin.fields | {ABOUT: b"{"}, plugin.fields | {ABOUT: json.dumps(about).encode()}):
        with pytest.raises(BackendError, match="MmProjector of another version of vila-edge") as caught:
            read_fields(wrong)
        assert "vila-edge build BUNDLE --projector plugin" in caught.value.hint


def test_a_tensorrt_without_plugins_in_python_is_told(device: FakeDevice) -> None:
    with pytest.raises(BackendError, match="tensorrt 10.16.0 has no plugins in Python") as caught:
        PluginHome(make_module(device), device, [])
    assert "--projector graph" in caught.value.hint


def test_another_plugin_of_that_name_is_told(trt: ModuleType, device: FakeDevice) -> None:
    trt.get_plugin_registry().creators["MmProjector", "1", "vila_edge"] = object()
    with pytest.raises(BackendError, match="has another plugin vila_edge::MmProjector already"):
        PluginHome(trt, device, [])


# choices


def test_a_build_without_code_for_its_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[Version, Version]]()

    def find(manifest: Manifest, file: str, compute_capability: Version, driver: Version) -> Image:
        asked.append((compute_capability, driver))
        raise BackendError(f"no code of {file}", "pip install 'vila-edge[kernels]'")

    monkeypatch.setattr(store, "find", find)
    with pytest.raises(BackendError, match="no code of projector.cu") as caught:
        kernels_code((8, 6))
    assert (
        caught.value.hint == "pip install 'vila-edge[kernels]'; or build the projector without them: --projector graph"
    )
    assert asked == [((8, 6), (12, 6))], "of a GPU elsewhere, whose driver takes what ships"


def test_only_tensorrt_has_a_choice(built: Built) -> None:
    with pytest.raises(UsageError, match="--projector kernel is not there on --backend onnxruntime"):
        open_engine(built.bundle, "onnxruntime", projector="kernel")
    with pytest.raises(UsageError, match="unknown projector 'plugin'"):
        open_engine(built.bundle, "tensorrt", projector="plugin")


def test_the_kind_of_projector_is_in_the_key_of_its_engine_alone(built: Built, trt: ModuleType) -> None:
    other = dataclasses.replace(built, options=dataclasses.replace(built.options, projector="plugin"))
    differ = [c for c in built.plans if key_of(built, c, trt) != key_of(other, c, trt)]
    assert differ == ["mm_projector"]
