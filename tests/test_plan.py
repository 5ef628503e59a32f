"""The memory plan: exact where it can be, and near what a process really takes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.tiny import TINY
from vila_edge.bundle import TOKENIZER, WEIGHTS, Bundle, read_manifest, write_manifest
from vila_edge.caches import PREFILL_CHUNK
from vila_edge.config import ScalesConfig, VilaConfig
from vila_edge.engine.onnxruntime import OnnxruntimeEngine
from vila_edge.engine.plan import PROGRAM, Backend, Memory, kv_cache_bytes, largest_context, plan, tiles_at_once
from vila_edge.export.storage import Storage, StoragePlan
from vila_edge.export.weights import rope_tables, write_graph_files
from vila_edge.inventory import Part, take_inventory
from vila_edge.reference.engine import bundle_parameters
from vila_edge.tensorfile import TensorFile, write_stream

DEVIATION = 0.15  # of the peak above a model of next to no size

MEDIUM = dataclasses.replace(
    TINY,
    vision_tower=dataclasses.replace(
        TINY.vision_tower,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=384,
        patch_size=14,
    ),
    llm=dataclasses.replace(
        TINY.llm,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        vocab_size=32000,
        context_length=2048,
    ),
    preprocess=dataclasses.replace(TINY.preprocess, image_size=384),
)
WIDE = dataclasses.replace(
    MEDIUM,
    llm=dataclasses.replace(
        MEDIUM.llm,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=4,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=True,
    ),
)
LARGE_TOWER = dataclasses.replace(
    MEDIUM,
    vision_tower=dataclasses.replace(
        MEDIUM.vision_tower, hidden_size=1152, intermediate_size=4304, num_hidden_layers=8, num_attention_heads=16
    ),
)

# What a process does that loads a bundle, looks at images, fills its context and looks at more; and the memory it held.
PROGRAM_TEXT = """
import sys
import numpy as np
from vila_edge.backends import open_engine
from vila_edge.bundle import Bundle

bundle, backend, context, tiles = Bundle.open(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
kv_cache = "int8" if backend.endswith("int8") else "float32"
engine, cfg, rng = open_engine(bundle, backend.split(",")[0], 2, kv_cache), bundle.config, np.random.default_rng(0)


def look():
    side = cfg.vision_tower.image_size
    if tiles:
        engine.project(engine.encode_images(rng.standard_normal((tiles, 3, side, side), np.float32)))


look()
look()
cache = engine.new_cache(context)
x = rng.standard_normal((context - 1, cfg.llm.hidden_size), np.float32)
for start in range(0, len(x), engine.prefill_chunk):
    engine.forward(x[start : start + engine.prefill_chunk], cache)
engine.forward(engine.embed_tokens([1]), cache)
look()
with open("/proc/self/status") as file:  # ru_maxrss would begin with what the parent held
    print(next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")))
"""


def random_bundle(cfg: VilaConfig, storage: Storage, folder: Path) -> Path:
    """A bundle of noise, as an export would lay it out."""
    places, rng, tables = StoragePlan(cfg, storage), np.random.default_rng(0), rope_tables(cfg.llm)

    def noise(dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        if dtype == "U8":
            return rng.integers(0, 256, shape, np.uint8)
        values = 1e-3 * rng.standard_normal(shape, np.float32)
        return values.astype(np.float16) if dtype == "F16" else values

    (folder / WEIGHTS).mkdir(parents=True)
    specs = {name: spec for of_file in places.files.values() for name, spec in of_file.items()}
    for file, of_file in places.files.items():
        write_stream(folder / file, of_file, lambda name: [tables[name] if name in tables else noise(*specs[name])])
    write_graph_files(folder, cfg, places.places())
    (folder / TOKENIZER).write_text("{}")
    said = {"parameter_bytes": places.parameter_bytes()}
    write_manifest(folder, name="noise", config=cfg, quantization=said, provenance={}, license_note="", parity={})
    return folder


def parts_of(bundle: Path) -> dict[str, Part]:
    manifest = read_manifest(bundle)
    weights = {name: TensorFile(bundle / name) for name in manifest.files if name.startswith(WEIGHTS)}
    return take_inventory(manifest.config, weights).parts


def planned(bundle: Path, backend: Backend, context: int, tiles: int = 1) -> Memory:
    return plan(read_manifest(bundle).config, parts_of(bundle), backend, context, PREFILL_CHUNK, tiles)


def measured(bundle: Path, backend: Backend, context: int, tiles: int = 1) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM_TEXT, str(bundle), backend, str(context), str(tiles)],
        capture_output=True,
        text=True,
        check=True,
        env={"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
        cwd=Path(__file__).parents[1],
    )
    return int(done.stdout)


def check_against_a_process(
    folder: Path, cfg: VilaConfig, storage: Storage, backend: Backend, context: int, tiles: int = 1
) -> None:
    bundle = random_bundle(cfg, storage, folder / "bundle")
    least = measured(random_bundle(TINY, Storage(group_size=32), folder / "least"), backend, 2)
    want = measured(bundle, backend, context, tiles) - least
    got = planned(bundle, backend, context, tiles).total - PROGRAM
    assert abs(got / want - 1) < DEVIATION, f"planned {got / 1e6:.0f} MB, measured {want / 1e6:.0f} MB"


def test_what_is_planned_is_near_what_a_process_takes(tmp_path: Path) -> None:
    check_against_a_process(tmp_path, MEDIUM, Storage(lm_head="int8"), "onnxruntime", 1024)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [MEDIUM, WIDE, LARGE_TOWER], ids=["medium", "wide", "large tower"])
@pytest.mark.parametrize(
    "storage",
    [
        Storage(lm_head="int8"),
        Storage(lm_head="int8", vision="int8", symmetric=True),
        Storage(decoder="fp16"),
        Storage("fp32", "fp32", "fp32", "fp32"),
    ],
    ids=["int4", "int4 and int8", "fp16", "fp32"],
)
@pytest.mark.parametrize("tiles", [1, 4])
def test_every_form_is_planned(cfg: VilaConfig, storage: Storage, tiles: int, tmp_path: Path) -> None:
    check_against_a_process(tmp_path, cfg, storage, "onnxruntime", 2048, tiles)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [MEDIUM, WIDE], ids=["medium", "wide"])
def test_the_reference_is_planned(cfg: VilaConfig, tmp_path: Path) -> None:
    check_against_a_process(tmp_path, cfg, Storage(lm_head="int8"), "numpy", 2048)


def test_the_kv_cache_is_planned_to_the_byte(tiny_bundle: Path) -> None:
    cache = OnnxruntimeEngine(Bundle.open(tiny_bundle), threads=1).new_cache(77)
    assert kv_cache_bytes(TINY, 77) == sum(buffer.numpy().nbytes for buffer in cache.buffers.values())
    llm = TINY.llm
    assert kv_cache_bytes(TINY, 77) == 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * 4 * 77


def test_the_references_weights_are_planned_to_the_byte(tiny_bundle: Path) -> None:
    want = sum(values.nbytes for values in bundle_parameters(Bundle.open(tiny_bundle)).values())
    assert planned(tiny_bundle, "numpy", 128).weights == want


def test_fewer_bits_are_planned_as_less(tmp_path: Path) -> None:
    forms = (Storage("fp16", "fp16"), Storage("int4", "fp16"), Storage("int4", "int8"), Storage("int4", "int4"))
    wide = dataclasses.replace(WIDE, llm=dataclasses.replace(WIDE.llm, num_hidden_layers=1, vocab_size=4000))
    plans = [planned(random_bundle(wide, form, tmp_path / str(i)), "onnxruntime", 64) for i, form in enumerate(forms)]
    weights = [memory.weights for memory in plans]
    assert weights == sorted(weights, reverse=True)
    assert len(set(weights)) == len(weights)


def test_each_part_grows_with_its_own_measure(tiny_bundle: Path) -> None:
    parts = parts_of(tiny_bundle)
    for backend in ("onnxruntime", "numpy"):
        base, longer = (plan(TINY, parts, backend, context, 32, 1) for context in (64, 128))
        two, more = (plan(TINY, parts, backend, 64, 32, tiles) for tiles in (2, 4))
        assert (longer.kv_cache, longer.images, longer.weights) == (2 * base.kv_cache, base.images, base.weights)
        assert more.images - two.images == 2 * (two.images - base.images) > 0
        assert (more.prefill, more.kv_cache) == (base.prefill, base.kv_cache)
        assert longer.total > base.total
        assert plan(TINY, parts, backend, 64, 64, 1).prefill > base.prefill
        assert plan(TINY, parts, backend, 64, 512, 1) == plan(TINY, parts, backend, 64, 64, 1)


def test_tiles_follow_how_an_image_is_looked_at() -> None:
    def tiles(aspect: str, scales: ScalesConfig | None, image_size: int) -> int:
        preprocess = dataclasses.replace(TINY.preprocess, image_aspect_ratio=aspect, image_size=image_size)  # type: ignore[arg-type]
        return tiles_at_once(dataclasses.replace(TINY, preprocess=preprocess, scales=scales), 16)

    s2 = ScalesConfig(False, (46, 92), 1)
    assert tiles("resize", None, 46) == 1
    assert tiles("dynamic", None, 46) == 12 + 1
    assert tiles("resize", s2, 92) == 1 + 4
    assert tiles("dynamic_s2", dataclasses.replace(s2, dynamic=True), 46) == 1 + 12
    three = ScalesConfig(True, (46, 92, 138), 2)
    assert tiles("dynamic_s2", three, 46) == 16  # of 17, a batch at a time


def test_the_largest_context_that_fits(tiny_bundle: Path) -> None:
    plans = [planned(tiny_bundle, "onnxruntime", context) for context in (32, 64, 128)]
    assert largest_context(plans[2].total, plans) == 128
    assert largest_context(plans[2].total - 1, plans) == 64
    assert largest_context(0, plans) == 0
    assert json.dumps(dataclasses.asdict(plans[0]))
