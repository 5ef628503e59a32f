"""Torch beside our decoder: what it is timed at computes what the oracle says, here on the CPU with a clock of ours."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import gpu_decoder
from benchmarks.gpu_peers import torch_decoder
from benchmarks.gpu_peers.torch_decoder import Clock, measure, prefill_ms, tokens_per_s
from benchmarks.gpu_peers.torch_gpu import dequantise
from benchmarks.gpu_peers.torch_model import Dequantised, TorchDecoder, make
from tests.cuda_engines import MODELS, config
from tests.test_bench_decoder import TINY
from tests.tiny import random_parameters
from vila_edge.bench.decoder.targets import torch_absent, torch_decode, torch_prefill
from vila_edge.reference.engine import numpy_engine

IDS = np.random.default_rng(3).integers(0, 256, 14).tolist()
JOB = {"models": ["Tiny"], "contexts": [5, 9], "batches": [1, 2], "prompt_tokens": 12, "new_tokens": 3, "repeat": 1}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Seconds:
    """Every piece of work takes 0.5 seconds, and is run once."""

    def median(self, work: Callable[[], object], prepare: Callable[[], object]) -> float:
        prepare()
        work()
        return 0.5


SECONDS: Any = Seconds()


def noting(arguments: list[Any], found: Any) -> Callable[..., Any]:
    """A function that keeps what it is given, and gives `found`."""

    def note(*given: Any) -> Any:
        arguments.extend(given)
        return found

    return note


def decoder_of(model: str) -> tuple[TorchDecoder, Any]:
    """A torch decoder and the oracle of the same random parameters."""
    cfg = config(model)
    params = random_parameters(cfg)
    state = {
        name.removeprefix("llm."): torch.from_numpy(value) for name, value in params.items() if name.startswith("llm.")
    }
    if cfg.llm.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    decoder = make(cfg.llm, "cpu")
    decoder.load_state_dict(state)
    return decoder, numpy_engine(cfg, params)


@pytest.mark.parametrize("model", MODELS)
def test_torch_computes_what_the_oracle_does(model: str) -> None:
    """In two prefills and steps, for two sequences at once."""
    decoder, oracle = decoder_of(model)
    prompts = np.stack([oracle.embed_tokens(ids) for ids in (IDS, IDS[::-1])])
    cache, caches = decoder.new_cache(2, 20), [oracle.new_cache(20) for _ in prompts]
    for start, stop in ((0, 9), (9, 13), (13, 14)):
        got = decoder(torch.from_numpy(prompts[:, start:stop]), cache)
        want = [oracle.forward(prompt[start:stop], each)[0] for prompt, each in zip(prompts, caches, strict=True)]
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-4)
    chosen = [int(row.argmax()) for row in want]
    said = decoder.step(torch.tensor(chosen), cache)
    steps = [oracle.forward(oracle.embed_tokens([t]), each)[0] for t, each in zip(chosen, caches, strict=True)]
    assert said.tolist() == [int(row.argmax()) for row in steps] and cache.length == caches[0].length


def test_weights_of_4_bits_are_taken_apart_before_each_product() -> None:
    quantised, dense = make(TINY.llm, "cpu", dequantise), make(TINY.llm, "cpu")
    state = {name: value for name, value in quantised.state_dict().items() if name in dense.state_dict()}
    for name, module in quantised.named_modules():
        if isinstance(module, Dequantised):
            state[f"{name}.weight"] = dequantise(module.packed, module.scales, module.zeros)
    assert len(state) == len(dense.state_dict())
    dense.load_state_dict(state)
    embeds = torch.randn(1, 7, TINY.llm.hidden_size)
    got, want = (each(embeds, each.new_cache(1, 7)) for each in (quantised, dense))
    assert torch.equal(got, want) and got.isfinite().all() and got.std() > 0.1
    linears = [module for module in quantised.modules() if isinstance(module, nn.Linear)]
    assert linears == [quantised.lm_head], "all but lm_head are in 4 bits"


def test_a_rate_is_of_all_sequences_and_a_prefill_begins_anew() -> None:
    decoder = make(TINY.llm, "cpu")
    lengths = list[tuple[int, int]]()  # of the cache, new positions
    decoder.register_forward_pre_hook(lambda _, given: lengths.append((given[1].length, given[0].shape[1])))
    assert tokens_per_s(decoder, 2, 9, 3, SECONDS) == 2 * 3 / 0.5
    assert lengths == [(9 + step, 1) for step in range(torch_decoder.WARM + 3)]
    lengths.clear()
    assert prefill_ms(decoder, 12, Clock(2, lambda: None)) > 0
    assert lengths == [(0, 12)] * 3


def test_every_case_of_ours_finds_its_peer() -> None:
    torch_found = {"models": measure([TINY], JOB, SECONDS, dequantise, "cpu")}
    for batch in (1, 2):
        for context in (5, 9):
            assert torch_decode(torch_found, "Tiny", batch, context) == batch * 3 / 0.5
    for tokens in (4, 12):
        assert torch_prefill(torch_found, "Tiny", tokens) == {"library_ms": 500.0, "dequantise_ms": 500.0}
    assert torch_absent(torch_found, "Tiny") is None
    assert torch_decode(torch_found, "Tiny", 4, 5) is None and torch_prefill(torch_found, "Other", 4) == {}


def test_a_model_without_room_is_told_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_small(llm: Any, device: str, by: Any = None) -> TorchDecoder:
        if by is None and llm.num_hidden_layers > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
        return make(llm, device, by)

    monkeypatch.setattr(torch_decoder, "make", make_small)
    wide = dataclasses.replace(TINY, name="Wide", llm=dataclasses.replace(TINY.llm, num_hidden_layers=3))
    found = measure([wide, TINY], JOB, SECONDS, dequantise, "cpu")
    assert found["Wide"]["absent"] == "CUDA out of memory. Tried to allocate 9 GiB." and found["Wide"]["decode"] == {}
    assert found["Wide"]["prefill"]["12"] == {"dequantise_ms": 500.0}
    assert found["Tiny"]["absent"] is None and len(found["Tiny"]["decode"]) == 4


def test_without_a_gpu_torch_is_absent_and_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = {name: JOB[name] for name in JOB if name != "models"}
    found = {"models": [{"model": "NVILA-2B"}] * 2, "options": options}
    assert gpu_decoder.beside(sys.executable, found) == {"absent": f"torch {torch.__version__} finds no GPU"}


def test_torch_is_told_what_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` on a machine with a GPU, as far as that can be seen without one."""
    asked = list[Any]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch_decoder, "compile_every_shape", lambda: None)
    monkeypatch.setattr(torch_decoder, "compiled_dequantise", lambda device: (dequantise, "torch.compile"))
    monkeypatch.setattr(torch_decoder, "measure", noting(asked, {"NVILA-2B": {}}))
    found = torch_decoder.main(JOB | {"models": ["NVILA-2B"]})
    models, job, _, _, device = asked
    assert ([model.name for model in models], job["contexts"], device) == (["NVILA-2B"], [5, 9], "cuda")
    assert found["gpu"] == "H200" and found["dequantise_by"] == "torch.compile" and found["models"] == {"NVILA-2B": {}}


def test_the_merged_result_has_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = {"contexts": [9], "batches": [2], "prompt_tokens": 1024, "new_tokens": 64, "repeat": 3, "kv_caches": []}
    rows = [{"model": "VILA1.5-3B"}, {"model": "VILA1.5-3B"}]
    given, jobs = list[Any](), list[Any]()
    monkeypatch.setattr(gpu_decoder, "run_ours", noting(given, {"models": rows, "options": options}))
    monkeypatch.setattr(gpu_decoder, "run_peer", noting(jobs, {"of": "torch"}))
    for name in ("markdown", "headline"):
        monkeypatch.setattr(gpu_decoder, name, lambda found: f"{found['torch']}")
    monkeypatch.setattr(gpu_decoder, "sheets", lambda found: [])
    gpu_decoder.main(["VILA1.5-3B"], [9], [2], 3, "python", None, tmp_path / "d.md")
    lengths = ["--context", "9", "--batch", "2", "--repeat", "3"]
    assert given == [["bench", "decoder", "--model", "VILA1.5-3B", *lengths]]
    job = {"models": ["VILA1.5-3B"], **{name: value for name, value in options.items() if name != "kv_caches"}}
    assert jobs == ["python", "benchmarks.gpu_peers.torch_decoder", job]
    assert (tmp_path / "d.md").read_text() == "{'of': 'torch'}" and "{'of': 'torch'}" in capsys.readouterr().out
