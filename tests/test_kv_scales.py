"""A kv_cache in 8 bits: where its scales come from, and what it costs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.graphs import INT8_CACHE_RUNS, TOO_OLD
from vila_edge import kv_scales, load
from vila_edge.bundle import KV_SCALES_FILE, Bundle, read_manifest, write_manifest
from vila_edge.cli import app
from vila_edge.errors import BundleError, UsageError
from vila_edge.export.built_in_samples import built_in
from vila_edge.export.calibration import embed
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.reference.engine import numpy_engine
from vila_edge.tensorfile import TensorFile


def without_scales(bundle: Path) -> Path:
    """The bundle as an earlier version would have made it."""
    (bundle / KV_SCALES_FILE).unlink()
    (bundle / "graphs/onnxruntime/decoder_int8.onnx").unlink()
    said = read_manifest(bundle)
    write_manifest(
        bundle,
        name=said.name,
        config=said.config,
        quantization=said.quantization,
        provenance=said.provenance,
        license_note=said.license,
        parity=said.parity,
    )
    return bundle


def test_the_largest_key_of_an_export_has_room_to_spare(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint)
    cfg, oracle = checkpoint.config, numpy_engine(checkpoint.config, dict(checkpoint.parameters()))
    seen: dict[int, list[list[np.ndarray]]] = {}
    for sample in built_in().held_out:
        x = embed(sample, cfg, checkpoint.tokenizer(), oracle)
        cache = oracle.new_cache(len(x))
        oracle.forward(x, cache)
        for layer, both in cache.layers.items():
            seen.setdefault(layer, []).append([np.abs(part[0]).max(1) for part in both])
    stored = TensorFile(tiny_bundle / KV_SCALES_FILE)
    assert stored.entries.keys() == kv_scales.specs(cfg.llm).keys()
    for layer, largest in seen.items():
        for part, values in zip(("key", "value"), np.max(largest, 0), strict=True):
            scales = stored.array(kv_scales.name(part, layer))
            np.testing.assert_allclose(scales[0, :, 0] * 127, 1.25 * values, rtol=1e-4)


def test_rounding_is_to_the_nearest_of_256_steps() -> None:
    scales = kv_scales.from_largest(np.asarray([[1.27 / 1.25, 0.0]], np.float32))
    np.testing.assert_allclose(scales[0, 0, 0], [0.01, kv_scales.MIN_SCALE], rtol=1e-6)
    x = np.asarray([[[[0.013, 0.0], [5.0, 0.0], [-5.0, 0.0]]]], np.float32)
    np.testing.assert_allclose(kv_scales.rounded(x, scales)[0, 0, :, 0], [0.01, 1.27, -1.28], rtol=1e-6)


@pytest.mark.skipif(not INT8_CACHE_RUNS, reason=TOO_OLD)
def test_eight_bits_say_what_float32_says_in_a_quarter_of_the_memory(tiny_bundle: Path) -> None:
    wide, narrow = (load(tiny_bundle, threads=1, kv_cache=cache) for cache in ("float32", "int8"))
    sizes = []
    logits = []
    for pipeline in (wide, narrow):
        cache = pipeline.engine.new_cache(100)
        sizes.append(sum(buffer.numpy().nbytes for buffer in cache.buffers.values()))
        logits.append(pipeline.engine.forward(pipeline.engine.embed_tokens(range(20, 60)), cache, range(40)))
    assert sizes[0] == 4 * sizes[1]
    error = np.sqrt(np.square(logits[0] - logits[1]).mean()) / logits[0].std()
    assert 1e-4 < error < 0.05  # half a step of each key and value, and 4-bit products that round activations
    assert "int8 kv_cache" in narrow.engine.backend
    assert "int8" not in wide.engine.backend


@pytest.mark.skipif(not INT8_CACHE_RUNS, reason=TOO_OLD)
def test_a_bundle_without_scales_says_so(bundle_copy: Path) -> None:
    bundle = without_scales(bundle_copy)
    assert Bundle.open(bundle)
    assert load(bundle, threads=1)
    with pytest.raises(BundleError, match="has no graph of a decoder with a kv_cache in int8"):
        load(bundle, threads=1, kv_cache="int8")
    assert CliRunner().invoke(app, ["verify", str(bundle)]).exit_code == 0
    assert "int8" not in CliRunner().invoke(app, ["show", str(bundle), "--json"]).stdout.split('"memory"')[1]


def test_a_missing_graph_for_the_scales_is_found(bundle_copy: Path, tmp_path: Path) -> None:
    kept = shutil.copy(bundle_copy / KV_SCALES_FILE, tmp_path / "kept")
    bundle = without_scales(bundle_copy)
    shutil.copy(kept, bundle / KV_SCALES_FILE)
    said = read_manifest(bundle)
    write_manifest(
        bundle,
        name=said.name,
        config=said.config,
        quantization=said.quantization,
        provenance=said.provenance,
        license_note=said.license,
        parity=said.parity,
    )
    done = CliRunner().invoke(app, ["verify", str(bundle)])
    assert done.exit_code == 3
    assert "decoder_int8.onnx" in done.output


@pytest.mark.parametrize(
    ("backend", "kv_cache", "message"), [("auto", "int4", "unknown type"), ("numpy", "int8", "is not there on numpy")]
)
def test_what_there_is_not_is_refused(tiny_bundle: Path, backend: str, kv_cache: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(tiny_bundle, backend, kv_cache=kv_cache)
