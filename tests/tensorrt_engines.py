"""Tiny bundles with TensorRT engines for a fake TensorRT, which runs the real graphs on the CPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from tests.fake_cuda import FakeDevice
from tests.fake_tensorrt import make_module, plan
from tests.graphs import handmade_bundle, int4_tensors
from tests.tensorrt_graphs import GraphRunner, has_tensor_scatter
from tests.tiny import TINY, random_parameters
from vila_edge.bundle import Bundle
from vila_edge.config import VilaConfig
from vila_edge.engine.engine_cache import EngineCache, build_flags, engine_key
from vila_edge.engine.tensorrt_options import COMPONENTS, BuildOptions
from vila_edge.export.engines import profiles
from vila_edge.reference.engine import ReferenceEngine, numpy_engine

CONTEXT, CHUNK = 96, 8

# A position of its keys takes 256 bytes, as much as TensorRT's alignment; of TINY's only 64.
WIDE = dataclasses.replace(TINY, llm=dataclasses.replace(TINY.llm, head_dim=64))
KINDS: dict[str, tuple[VilaConfig, BuildOptions]] = {
    "scatter": (TINY, BuildOptions(CONTEXT, CHUNK, 2, "scatter")),
    "append beside": (TINY, BuildOptions(CONTEXT, CHUNK, 2, "append")),
    "append behind": (WIDE, BuildOptions(CONTEXT, CHUNK, 2, "append")),
}


@dataclass(frozen=True)
class Built:
    """A bundle with its engines in a cache, and the oracle of its weights."""

    bundle: Bundle
    options: BuildOptions
    cache: EngineCache
    plans: dict[str, bytes]
    oracle: ReferenceEngine

    def store(self, trt: ModuleType, **plans: bytes) -> None:
        for component, serialized in (self.plans | plans).items():
            flags = build_flags(component, self.options)
            self.cache.store(engine_key(self.bundle.manifest.digest, component, trt, 87, flags), serialized)


def build_fakes(kind: str, folder: Path) -> Built:
    """A bundle in `folder` with its engines. `kind`: one of `KINDS`; skips where onnxruntime cannot run it."""
    cfg, options = KINDS[kind]
    if options.form == "scatter" and not has_tensor_scatter():
        pytest.skip("needs an onnxruntime with TensorScatter")
    tensors, meant = int4_tensors(random_parameters(cfg), 32)
    (folder / "bundle").mkdir()
    bundle = handmade_bundle(cfg, tensors, folder / "bundle")
    graphs = GraphRunner(bundle, options, folder / "graphs").graphs
    plans = {
        component: plan(graphs[component], profiles(cfg, component, options), scratch)
        for component, scratch in zip(COMPONENTS, (4096, 0, 5000), strict=True)
    }
    built = Built(bundle, options, EngineCache(folder / "cache"), plans, numpy_engine(cfg, meant))
    built.store(make_module(FakeDevice()))
    return built
