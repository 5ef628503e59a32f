"""The plugin in engines that TensorRT for RTX builds for SM 86, where there is no GPU: its code is in there bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.families import FAMILIES, config_of, shrink
from tests.kernels.projections import config, projector_parameters
from tests.kernels.test_kernel_projector import bundle_of
from tests.test_engines import OPTIONS, SM86, check_plan, trt
from vila_edge.bundle import Bundle
from vila_edge.engine.cuda.projector import bundle_projector
from vila_edge.engine.tensorrt_options import BuildOptions
from vila_edge.engine.tensorrt_plugin import ABOUT, CODE
from vila_edge.errors import BackendError
from vila_edge.export.engines import build_engine
from vila_edge.export.plan_inspection import describe_plan
from vila_edge.export.tensorrt_alias import load_alias
from vila_edge.export.tensorrt_projector import kernels_code
from vila_edge.kernels.projector import ProjectorShape

PLUGIN = BuildOptions(OPTIONS.context, OPTIONS.chunk, OPTIONS.images, projector="plugin")

Build = Callable[[Bundle], memoryview]


@pytest.fixture(scope="module")
def code() -> bytes:
    return kernels_code(SM86)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Build the projector's engine with the plugin."""

    def build(bundle: Bundle) -> memoryview:
        folder = tmp_path / "build"
        folder.mkdir()
        return build_engine(
            trt,
            bundle,
            "mm_projector",
            PLUGIN,
            compute_capability=SM86,
            timing_cache=None,
            progress=None,
            folder=folder,
        )

    return build


@pytest.mark.parametrize("family", ["VILA-7b", "VILA1.5-3b-s2", "NVILA-8B", "NVILA-Lite-2B"])
def test_an_engine_carries_the_code_of_its_gpu(family: str, code: bytes, build: Build, tmp_path: Path) -> None:
    cfg = config_of(shrink(FAMILIES[family]), tmp_path)
    bundle = bundle_of(cfg, projector_parameters(cfg), tmp_path)
    plan = build(bundle)
    assert code.startswith(b"\x7fELF") and code in bytes(plan)
    for name, array in bundle_projector(bundle).arrays.items():
        assert name.endswith("weight_sum") or array.tobytes() in bytes(plan), name
    assert {"image_features", "image_embeds"} <= describe_plan(plan).tensors.keys()
    check_plan(plan, cfg, "mm_projector", PLUGIN)


def test_a_plugin_that_cannot_be_made_is_told(
    code: bytes, build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cfg = config("linear")

    def broken(shape: ProjectorShape, code: bytes) -> SimpleNamespace:
        return SimpleNamespace(about=SimpleNamespace(projector=shape), fields={ABOUT: b"{}", CODE: code})

    monkeypatch.setattr("vila_edge.export.tensorrt_projector.carried", broken)
    with pytest.raises(BackendError, match="mm_projector: tensorrt_rtx .* cannot read its graph: .*of another version"):
        build(bundle_of(cfg, projector_parameters(cfg), tmp_path))


def test_a_library_that_is_another_under_a_second_name() -> None:
    name = "libve_second_name.so"
    with pytest.raises(OSError, match="cannot open shared object file"):
        ctypes.CDLL(name)
    load_alias(name, "libm.so.6")
    cosine = ctypes.CDLL(name).cos
    cosine.restype, cosine.argtypes = ctypes.c_double, [ctypes.c_double]
    assert cosine(0.0) == 1.0
