"""`vila-edge bench`: what it times is what answers prompts, and what it says of bytes is what is stored."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.test_cli import Done, in_process
from tests.tiny import TINY
from vila_edge.bench import agreement, bandwidth, cold, machine, run, stages
from vila_edge.bench.report import markdown, sheets
from vila_edge.bench.run import bench
from vila_edge.bench.traffic import kv_cache_bytes, parts_of, weight_bytes
from vila_edge.bench.workload import Options, Workload, noise_images, plan_workload, random_ids
from vila_edge.bundle import Bundle
from vila_edge.engine.onnxruntime_session import OLDEST_INT8_CACHE
from vila_edge.errors import BackendError, BundleError, InputError, UsageError
from vila_edge.pipeline import Pipeline, load
from vila_edge.sampler import Sampling

__all__ = ["in_process"]

INSTALLED = tuple(map(int, version("onnxruntime").split(".")[:2]))
OPTIONS = Options(threads=1, prompt_tokens=40, contexts=(100, 8), new_tokens=4, repeat=3, images=2, warmup=1)


@pytest.fixture(scope="module")
def found(tiny_bundle: Path) -> dict[str, Any]:
    """One whole run."""
    return bench(tiny_bundle, OPTIONS)


@pytest.fixture
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not matter: a probe takes a second."""
    monkeypatch.setattr(run, "read_bandwidth", lambda threads: [1e9])


class Recorder:
    """An engine that notes what is asked of it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.engine = pipeline.engine
        self.forwards: list[tuple[int, int]] = []  # new positions, and those that were there before
        self.images: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def encode_images(self, pixel_values: NDArray[np.float32]) -> Any:
        self.images.append(len(pixel_values))
        return self.engine.encode_images(pixel_values)

    def forward(self, inputs_embeds: NDArray[np.float32], cache: Any, logits_to_keep: Any = (-1,)) -> Any:
        self.forwards.append((len(inputs_embeds), cache.length))
        return self.engine.forward(inputs_embeds, cache, logits_to_keep)


def test_every_stage_is_run_on_the_pipelines_engine(pipeline: Pipeline) -> None:
    recorder = Recorder(pipeline)
    pipeline.engine = recorder
    work = Workload(prompt_tokens=40, contexts=(8, 100), new_tokens=4, repeat=3, warmup=2, images=2, image_tokens=18)
    samples = stages.measure(pipeline, work)
    decode = {context: [(1, context + step) for step in range(4)] for context in (8, 100)}
    want = [(40, 0)] * 5 + [(8, 0)] + decode[8] * 5 + [(100, 0)] + decode[100] * 5
    assert recorder.forwards == want
    assert recorder.images == [1] * 2 * 5
    assert [len(getattr(samples, stage)) for stage in ("preprocess", "encode", "project", "prefill")] == [3] * 4
    assert {context: len(times) for context, times in samples.decode.items()} == {8: 12, 100: 12}


def test_a_long_prefill_goes_in_chunks_as_in_a_reply(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(pipeline.engine), "prefill_chunk", 16)
    recorder = Recorder(pipeline)
    embeds = pipeline.engine.embed_tokens(random_ids(TINY, 40))
    logits = stages.prefill(recorder, embeds, pipeline.engine.new_cache(40))
    assert recorder.forwards == [(16, 0), (16, 16), (8, 32)]
    assert logits.shape == (TINY.llm.vocab_size,)


def test_without_images_nothing_is_looked_at(pipeline: Pipeline) -> None:
    recorder = Recorder(pipeline)
    pipeline.engine = recorder
    samples = stages.measure(pipeline, Workload(4, (4,), 1, 1, 0, 0, 0))
    assert (recorder.images, samples.encode, len(samples.prefill)) == ([], [], 1)


def test_the_result_has_every_sample_and_what_it_was_measured_on(found: dict[str, Any], tiny_bundle: Path) -> None:
    assert {"preprocess", "encode", "project", "prefill"} == found["stages"].keys()
    for times in found["stages"].values():
        assert len(times["samples_ms"]) == OPTIONS.repeat
        assert 0 < times["p50_ms"] <= times["p95_ms"] <= max(times["samples_ms"]) + 1e-4
    prefill = found["stages"]["prefill"]
    assert prefill["tokens_per_s"] == pytest.approx(40 / prefill["p50_ms"] * 1e3)
    assert [row["context"] for row in found["decode"]] == [8, 100]
    for row in found["decode"]:
        assert len(row["samples_ms"]) == OPTIONS.repeat * OPTIONS.new_tokens
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["p50_ms"])
    manifest = Bundle.open(tiny_bundle).manifest
    assert found["bundle"] == {"name": manifest.name, "sha256": manifest.digest}
    assert found["threads"] == 1
    assert found["backend"].startswith("onnxruntime")
    assert {"python", "numpy", "onnxruntime", "vila-edge"} <= found["versions"].keys()
    assert found["machine"]["cpu"]
    assert found["options"]["prompt_tokens"] == 40
    assert json.dumps(found, allow_nan=False)


def test_decode_is_held_against_the_bandwidth_of_the_same_run(found: dict[str, Any]) -> None:
    best = found["read_bandwidth"]["bytes_per_s"]
    assert best == max(found["read_bandwidth"]["samples"]) > 1e8
    for row in found["decode"]:
        assert row["bytes_per_token"] == row["weight_bytes"] + row["kv_cache_bytes"]
        assert row["bytes_per_s"] == pytest.approx(row["bytes_per_token"] / row["p50_ms"] * 1e3)
        assert row["fraction_of_read_bandwidth"] == pytest.approx(row["bytes_per_s"] / best)
        # 4 tokens, each of which reads all before it and itself: 2.5 positions more than the context, in the mean
        assert row["kv_cache_bytes"] == (row["context"] + 2.5) * 2 * 2 * 2 * 16 * 4


def test_memory_is_measured_and_planned(found: dict[str, Any]) -> None:
    memory = found["memory"]
    assert memory["peak"] >= memory["resident"] > 1e7
    assert memory["kv_cache_positions"] == 104
    assert memory["kv_cache"] == 104 * 2 * 2 * 2 * 16 * 4
    assert memory["planned"] > memory["kv_cache"]
    assert found["cold_start"]["memory"]["peak"] > 1e7


def test_a_tokens_weights_are_counted_as_they_are_stored(tiny_bundle: Path, make_bundle: Callable[[str], Path]) -> None:
    llm = TINY.llm
    parts = parts_of(Bundle.open(tiny_bundle))
    others = ("vision_tower", "mm_projector", "llm.model.embed_tokens")
    row = 2 * llm.hidden_size
    want = sum(part.size for name, part in parts.items() if not name.startswith(others)) + row
    assert weight_bytes(TINY, parts) == want
    wide = parts_of(Bundle.open(make_bundle("fp32")))
    numbers = sum(part.numbers for name, part in wide.items() if not name.startswith(others)) + llm.hidden_size
    assert weight_bytes(TINY, wide) == 4 * numbers
    tied = dataclasses.replace(TINY, llm=dataclasses.replace(llm, tie_word_embeddings=True))
    assert weight_bytes(tied, parts) == want - row + llm.vocab_size * row


def test_a_shorter_form_of_the_kv_cache_is_fewer_bytes() -> None:
    sizes = [kv_cache_bytes(TINY, 10, form) for form in ("float32", "float16", "int8")]
    assert sizes == [10 * 2 * 2 * 2 * 16 * number for number in (4, 2, 1)]


@pytest.mark.skipif(INSTALLED < OLDEST_INT8_CACHE, reason="this onnxruntime is too old for a kv_cache in 8 bits")
def test_a_kv_cache_in_8_bits_is_measured_as_such(tiny_bundle: Path, known_bandwidth: None) -> None:
    found = bench(tiny_bundle, dataclasses.replace(OPTIONS, kv_cache="int8", images=0, contexts=(8,), repeat=1))
    assert "int8" in found["backend"]
    assert found["decode"][0]["kv_cache_bytes"] == (8 + 2.5) * 2 * 2 * 2 * 16
    wide, narrow = (load(tiny_bundle, threads=1, kv_cache=kind) for kind in ("float32", "int8"))
    ids, want = agreement.answer(wide, 0)
    again, got = agreement.answer(narrow, 0, ids)
    assert again == ids
    assert found["agreement"]["positions"] == len(ids) > 50
    same = float((want.argmax(-1) == got.argmax(-1)).mean())
    assert found["agreement"]["top1_agreement"] == pytest.approx(same)
    assert same > 0.5
    assert 0 < found["agreement"]["mean_kl"] < 0.1
    assert f"| same most likely token | {same:.1%} |" in markdown(found)


def test_an_answer_is_what_the_model_says_greedily(tiny_bundle: Path, pipeline: Pipeline) -> None:
    ids, logits = agreement.answer(pipeline, 1)
    assert ids == [int(row.argmax()) for row in logits]
    reply = pipeline.generate(agreement.QUESTION, noise_images(1), Sampling(temperature=0, max_new_tokens=len(ids)))
    assert ids[: len(reply.token_ids)] == reply.token_ids
    found = agreement.compare(agreement.wider_answer(tiny_bundle, OPTIONS), OPTIONS, pipeline)  # with itself
    assert found["top1_agreement"] == 1
    assert found["mean_kl"] == pytest.approx(0, abs=1e-9)


def test_an_answer_to_compare_with_that_fails_is_said(tmp_path: Path) -> None:
    for backend, bits in (("auto", 32), ("cuda", 16)):
        options = dataclasses.replace(OPTIONS, backend=backend)
        with pytest.raises(BackendError, match=rf"{bits} bits, to compare with, was not given: .*no such directory"):
            agreement.wider_answer(tmp_path / "nowhere", options)


def test_the_defaults_are_as_long_as_the_model_allows(tiny_bundle: Path) -> None:
    work = plan_workload(Bundle.open(tiny_bundle), Options())
    assert (work.prompt_tokens, work.contexts, work.capacity) == (128, (64, 96), 128)
    assert plan_workload(Bundle.open(tiny_bundle), Options(new_tokens=100)).contexts == (28,)


def test_the_first_prompt_has_room_for_its_images() -> None:
    work = Workload(prompt_tokens=40, contexts=(8,), new_tokens=4, repeat=1, warmup=0, images=9, image_tokens=81)
    assert (work.first_prompt, work.capacity) == (82, 82)
    assert dataclasses.replace(work, image_tokens=9).first_prompt == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(contexts=(64, 97)), "--context 97: with 32 new tokens, this model has 1 to 96"),
        (Options(contexts=(0,)), "--context 0"),
        (Options(prompt_tokens=129), "--prompt-tokens 129: this model has 1 to 128"),
        (Options(new_tokens=128), "--new-tokens 128: this model has 128 positions"),
        (Options(images=15), "--images 15: they take 135 positions, this model has 128"),
        (Options(images=-1), "--images -1: expected at least 0"),
        (Options(repeat=0), "--repeat 0: expected at least 1"),
        (Options(warmup=-1), "--warmup -1: expected at least 0"),
        (Options(threads=0), "--threads 0: expected at least 1"),
        (Options(backend="cudnn"), "--backend cudnn: not known"),
        (Options(kv_cache="int3"), "--kv-cache int3: not known"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(options: Options, message: str, tiny_bundle: Path) -> None:
    steps: list[str] = []
    with pytest.raises(UsageError) as raised:
        bench(tiny_bundle, options, steps.append)
    assert message in raised.value.message
    assert not steps


def test_a_fresh_process_gives_the_models_own_first_token(tiny_bundle: Path, pipeline: Pipeline) -> None:
    work = plan_workload(Bundle.open(tiny_bundle), OPTIONS)
    found = cold.cold_start(tiny_bundle, OPTIONS, work)
    _, embeds = stages.see(pipeline, 2)
    assert [len(slot) for slot in embeds] == [9, 9]
    text = pipeline.engine.embed_tokens(random_ids(TINY, 40 - 18))
    logits = pipeline.engine.forward(np.concatenate([*embeds, text]), pipeline.engine.new_cache(40))[0]
    assert found["token"] == logits.argmax()
    parts = found["load_ms"] + found["images_ms"] + found["prefill_ms"]
    assert 0 < parts < found["first_token_ms"]


def test_what_ends_a_fresh_process_is_said(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(4, (4,), 1, 1, 0, 0, 0)
    with pytest.raises(UsageError, match="unknown backend 'cudnn'"):
        cold.cold_start(tiny_bundle, Options(backend="cudnn"), work)
    with pytest.raises(InputError, match="no such directory"):
        cold.cold_start(tiny_bundle / "nowhere", Options(), work)
    monkeypatch.setattr(cold, "command", lambda *_: [shutil.which("sh") or "sh", "-c", "echo killed >&2; exit 9"])
    with pytest.raises(BackendError, match="killed"):
        cold.cold_start(tiny_bundle, Options(), work)


def test_the_probe_reads_all_it_says() -> None:
    samples = bandwidth.probe(2, size=1 << 20, passes=3)
    assert len(samples) == 3
    assert all(sample > 0 for sample in samples)
    with pytest.raises(BackendError, match="could not be measured: .*[Zz]ero"):
        bandwidth.read_bandwidth(0)


def test_the_probe_is_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bandwidth, "CPU_CACHES", tmp_path)
    assert bandwidth.more_than_caches() == bandwidth.LEAST
    for index, size in enumerate(("32K", "1024K", "393216K", "odd")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert bandwidth.more_than_caches() == 4 * 393216 * 1024


def test_inputs_are_the_same_each_time_and_no_two_images_alike() -> None:
    first, second = noise_images(2)
    assert first.sha256 == noise_images(1)[0].sha256 != second.sha256
    assert random_ids(TINY, 50) == random_ids(TINY, 50)
    assert set(random_ids(TINY, 500)) <= set(range(TINY.llm.vocab_size))


def test_the_machine_is_named(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU: fast\n")
    assert machine.cpu_model(tmp_path / "cpuinfo") == "Some CPU: fast"
    assert machine.cpu_model(tmp_path / "nothing")
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t   2048 kB\nVmRSS:\t    1024 kB\n")
    assert machine.process_memory(tmp_path / "status") == {"peak": 2 << 20, "resident": 1 << 20}
    assert machine.process_memory(tmp_path / "nothing") is None
    own = machine.process_memory()
    assert own is None or own["peak"] > 1e7


def test_tables_for_people_have_every_stage(found: dict[str, Any]) -> None:
    text = markdown(found)
    for row in ("preprocess, 2 images", "prefill, 40 tokens", "decode, a token behind 8", "decode, a token behind 100"):
        assert f"| {row} |" in text
    for sheet in sheets(found):
        assert {len(row) for row in sheet.rows} == {len(sheet.columns)}
    unknown = found | {"memory": found["memory"] | {"peak": None, "resident": None, "planned": None}}
    assert "| memory planned, MB | - |" in markdown(unknown)
    elsewhere = [row | {"fraction_of_read_bandwidth": None} for row in found["decode"]]
    assert "| - |" in markdown(found | {"decode": elsewhere})


def test_the_command_writes_what_it_shows(
    tiny_bundle: Path, tmp_path: Path, in_process: Callable[..., Done], known_bandwidth: None
) -> None:
    files = tmp_path / "found.json", tmp_path / "found.md"
    options = ["-t", "1", "--prompt-tokens", "16", "-c", "8", "-n", "2", "--repeat", "2", "--images", "0"]
    done = in_process("bench", tiny_bundle, *options, "--json", files[0], "--markdown", files[1])
    assert done.returncode == 0, done.stderr
    assert "prefill, 16 tokens" in done.stdout
    found = json.loads(files[0].read_text())
    assert found["workload"]["contexts"] == [8]
    assert "encode" not in found["stages"]
    assert files[1].read_text() == markdown(found)
    assert found["bundle"]["sha256"][:12] in done.stderr


def test_the_command_says_what_is_wrong(tiny_bundle: Path, tmp_path: Path, in_process: Callable[..., Done]) -> None:
    for options, message in (
        (["--context", "1000"], "--context 1000"),
        (["--repeat", "0"], "--repeat 0"),
        (["--json", tmp_path / "no" / "file"], "expected a file in a directory that exists"),
        (["--markdown", tmp_path], "expected a file in a directory that exists"),
    ):
        done = in_process("bench", tiny_bundle, *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
    assert in_process("bench", tmp_path / "nowhere").returncode == BundleError.exit_code


def test_the_reference_is_measured_too(tiny_bundle: Path, known_bandwidth: None) -> None:
    found = bench(tiny_bundle, Options("numpy", 1, 8, (4,), 2, 1, 0, 0))
    assert found["backend"].startswith("numpy")
    assert found["memory"]["planned"] > 0
