"""The memory plan of our own kernels: what an engine on a fake device really took."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda_engines import MODELS, bundle_of, open_fake
from tests.fake_cuda import FakeDevice
from tests.kernels.host import Compiled
from tests.test_plan import parts_of
from vila_edge.engine.cuda_plan import cuda_plan, runs_on_kernels
from vila_edge.engine.plan import Backend
from vila_edge.kernels.attention import KvCache
from vila_edge.parameters import component


@pytest.mark.parametrize(("backend", "kv_cache"), [("cuda", "float16"), ("cuda, int8", "int8")])
@pytest.mark.parametrize("model", MODELS)
def test_a_plan_is_what_the_device_holds(
    model: str, backend: Backend, kv_cache: KvCache, compiled: Compiled, tmp_path: Path
) -> None:
    bundle, device = bundle_of(model, tmp_path, [1, 2, 3]), FakeDevice()
    parts, cfg = parts_of(bundle.path), bundle.config
    assert runs_on_kernels(cfg, parts)
    planned = cuda_plan(cfg, parts, backend, cfg.llm.context_length, 1)
    with open_fake(bundle, compiled, tmp_path, kv_cache, device) as engine:
        before = device.used
        kept = engine.new_cache(engine.max_context)
        assert device.used - before == planned.kv_cache
        assert kept.length == 0
    tower = sum(2 * part.numbers for part in parts.values() if component(part.name) == "vision_tower")
    # Beside it are the host's tables, alignment of some hundred small arrays, and the projector's own batches.
    assert planned.weights - tower + planned.prefill == pytest.approx(before, rel=0.25)
