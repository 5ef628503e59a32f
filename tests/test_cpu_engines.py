"""The comparison with llama.cpp: models of noise that compute, and a report whose ratios are those of its figures."""

from __future__ import annotations

import importlib
import json
import math
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.cpu_engines import OURS, choose, markdown, report
from benchmarks.cpu_peers import llama_bench, ours, random_bundle, random_gguf
from benchmarks.cpu_peers.job import Figures, Job
from benchmarks.cpu_peers.process import watch
from benchmarks.cpu_peers.shape import Shape
from vila_edge.bench.traffic import parts_of, weight_bytes
from vila_edge.bundle import Bundle
from vila_edge.inspection import inspect
from vila_edge.pipeline import load

SHAPE = Shape(2, 256, 512, 4, 2, 64, 1000, 64)
JOB = Job(threads=1, prompt_tokens=16, contexts=(4, 32), new_tokens=2, repetitions=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("noise") / "bundle"
    random_bundle.write(SHAPE, target)
    return target


def test_the_bundle_is_one_that_passes_and_computes(bundle: Path, tmp_path: Path) -> None:
    assert inspect(bundle).passed
    pipeline = load(bundle, threads=1)
    cache = pipeline.engine.new_cache(64)
    logits = pipeline.engine.forward(pipeline.engine.embed_tokens(range(20)), cache, range(20))
    assert np.isfinite(logits).all()
    assert 0.2 < logits.std() < 5  # as of a model that keeps the size of its activations
    assert len(set(logits.argmax(-1))) > 10
    random_bundle.write(SHAPE, tmp_path / "again")
    assert Bundle.open(tmp_path / "again").manifest.digest == Bundle.open(bundle).manifest.digest


def dequantised(blocks: NDArray[Any], kind: str) -> NDArray[np.float32]:
    """What the bytes of a GGUF tensor stand for, by the layout of ggml."""
    flat = blocks.reshape(-1, random_gguf.BYTES[kind])
    scales = flat[:, :2].copy().view("<f2").astype(np.float32)
    if kind == "Q8_0":
        return scales * flat[:, 2:].view(np.int8)
    packed = flat[:, -16:]
    integers = np.concatenate([packed & 15, packed >> 4], 1).astype(np.float32)
    if kind == "Q4_0":
        return scales * (integers - 8)
    return scales * integers + flat[:, 2:4].copy().view("<f2").astype(np.float32)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_noise_for_llama_cpp_is_as_large_as_ours(kind: str) -> None:
    blocks = random_gguf.noise("blk.0.ffn_up.weight", (512, 1024), kind)
    assert blocks.shape == (512, 1024 // 32 * random_gguf.BYTES[kind])
    values = dequantised(blocks, kind)
    assert values.std() == pytest.approx(1 / math.sqrt(1024), rel=0.1)
    assert abs(values.mean()) < 0.2 * values.std()


def test_both_have_the_same_parameters() -> None:
    shapes = sorted(shape for shape, _ in random_gguf.tensors(SHAPE, "Q4_0").values())
    from vila_edge.parameters import parameter_shapes

    llm = {name: shape for name, shape in parameter_shapes(random_bundle.config(SHAPE)).items() if "llm." in name}
    assert shapes == sorted(llm.values())


def test_a_gguf_file_says_what_is_in_it(tmp_path: Path) -> None:
    gguf: Any = pytest.importorskip("gguf", reason="gguf is for the comparison with llama.cpp alone")
    random_gguf.write(tmp_path / "model.gguf", SHAPE, "Q4_1")
    read = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {t.name: (tuple(map(int, t.shape[::-1])), t.tensor_type.name) for t in read.tensors}
    assert found == random_gguf.tensors(SHAPE, "Q4_1")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_what_gguf_is_missing_is_said(tmp_path: Path) -> None:
    if importlib.util.find_spec("gguf"):
        pytest.skip("gguf is installed")
    command = [sys.executable, "-m", "benchmarks.cpu_peers.random_gguf", str(tmp_path / "x"), SHAPE.to_json(), "Q4_0"]
    with pytest.raises(SystemExit, match="pip install gguf"):
        watch(command)


def test_ours_is_measured_by_processes_of_its_own(bundle: Path) -> None:
    found = ours.run(bundle, "float32", JOB)
    assert len(found.prefill_ms) == 2
    assert {context: len(samples) for context, samples in found.decode_ms.items()} == {"4": 2, "32": 2}
    opened = Bundle.open(bundle)
    assert found.weight_bytes == weight_bytes(opened.config, parts_of(opened))
    assert found.first_token_ms > 50  # an interpreter takes longer than that
    assert min(found.peak_bytes, found.cold_peak_bytes) > 2e7


def test_means_are_of_one_run_each() -> None:
    assert ours.means([1.0, 3.0, 5.0, 9.0], 2) == [2.0, 7.0]


FAKE = """#!{python}
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert given["-m"] == "model.gguf" and given["-t"] == "1" and given["-o"] == "jsonl", given
for depth in given.get("-d", "0").split(","):
    scale = int(given["-p"]) or int(given["-n"])
    samples = [scale * 1_000_000 * (1 + int(depth))] * int(given["-r"])
    row = dict(samples_ns=samples, n_depth=int(depth), model_size=1_000_000, build_commit="abc", build_number=7)
    print(json.dumps(row), flush=True)
"""


def test_llama_bench_is_asked_and_understood(tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    found = llama_bench.run(program, Path("model.gguf"), SHAPE, JOB)
    assert found.prefill_ms == [16.0, 16.0]
    assert found.decode_ms == {"4": [5.0, 5.0], "32": [33.0, 33.0]}  # of a token
    assert found.weight_bytes == 1_000_000 - 2 * 999 * 256
    assert found.versions == {"llama.cpp": "abc (7)"}
    assert found.first_token_ms > 0


def test_without_llama_bench_it_is_said_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="llama-cpp-python"):
        choose(None, None)
    with pytest.raises(SystemExit, match="no such file; build it"):
        choose(None, tmp_path / "llama-bench")
    with pytest.raises(SystemExit, match="expected one of"):
        choose(["genai"], None)
    assert choose(list(reversed(OURS)), None) == list(OURS)


def figures(factor: float) -> Figures:
    decode = {"4": [1.0 * factor, 4.0 * factor], "32": [2.0 * factor, 3.0 * factor]}
    return Figures([10 * factor, 30 * factor], decode, 100 * factor, 10**8, 10**7, 0.25, {"x": "1"}, 1_000_000)


def test_ratios_are_of_the_first_engines_best_and_median() -> None:
    found = report(
        {"ours-int8": [figures(1), figures(3)], "llama.cpp-Q4_0": [figures(2), figures(2)]}, SHAPE, JOB, [1e9, 2e9]
    )
    rows = {(row["measure"], row["engine"]): row for row in found["summary"]}
    peer = rows["decode behind 4, ms a token", "llama.cpp-Q4_0"]
    assert (peer["best"], peer["median"]) == (2.0, 5.0)
    assert (peer["best_over_first"], peer["median_over_first"]) == (2.0, 5.0 / 3.5)
    position = 2 * 2 * 2 * 64
    fractions = found["fraction_of_read_bandwidth"]
    assert fractions["ours-int8"]["4"] == pytest.approx((1e6 + position * 5.5) / 1e-3 / 2e9)
    assert fractions["llama.cpp-Q4_0"]["32"] == pytest.approx((1e6 + 2 * position * 33.5) / 4e-3 / 2e9)
    text = markdown(json.loads(json.dumps(found)))
    assert "| decode behind 4, ms a token | 1 (1.00 / 1.00) | 2 (2.00 / 1.43) |" in text
    assert "| busy, at most | 25% | 25% |" in text


def test_a_program_that_fails_is_named() -> None:
    with pytest.raises(SystemExit, match="exit code 3\nbroken"):
        watch([sys.executable, "-c", "import sys; print('broken', file=sys.stderr); sys.exit(3)"])
    done = watch([sys.executable, "-c", "import time; print('a', flush=True); time.sleep(0.3); print('b')"])
    assert done.lines == ["a\n", "b\n"]
    assert done.first_line_s < done.seconds - 0.2
    assert done.peak_bytes > 1e6
