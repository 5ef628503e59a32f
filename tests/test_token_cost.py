"""`vila-edge bench predict`: its counts are those of a hand and of the packers, its constants those of a measurement."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_cli import Done, in_process
from vila_edge.bench.boards import BOARDS, PUBLISHED
from vila_edge.bench.kernels.shapes import MODELS, Product
from vila_edge.bench.predict import find_models, markdown, predict, read_constants, sheets
from vila_edge.bench.token_cost import (
    ASSUMED,
    Constants,
    Decode,
    Measurement,
    decode_cost,
    decode_us,
    fit,
    prefill_us,
    weight_bytes,
)
from vila_edge.bundle import Bundle
from vila_edge.errors import ConfigError, InputError, UsageError
from vila_edge.int4 import Int4
from vila_edge.int8 import Int8
from vila_edge.kernels import w4_layout, w8_layout

__all__ = ["in_process"]

VILA_3B, AGX = MODELS[0], BOARDS[0]
NOT_AT_ALL = "the source of a test"


def test_a_token_of_vila_3b_is_what_a_hand_counts() -> None:
    """2560 wide, 32 layers, 20 heads of 128, 6912, 32000 tokens; 536 bytes for 1024 weights of 4 bits."""
    cost = decode_cost(VILA_3B, Decode(context=256))
    assert cost.bytes == {
        "qkv weights": 32 * (7680 * 2560 // 2 + 7680 * 20 * 3),
        "o weights": 32 * (2560 * 2560 // 2 + 2560 * 20 * 3),
        "gate+up weights": 32 * (13824 * 2560 // 2 + 13824 * 20 * 3),
        "down weights": 32 * (2560 * 6912 // 2 + 2560 * 54 * 3),
        "lm_head weights": 32000 * 2560 + 32000 * 20 * 2,
        "kv_cache read": 256 * 327_680,
        "kv_cache written": 327_680,
        "embeddings, norms": 337_920,
        "activations": 2_861_056,
        "logits": 256_000,
    }
    assert cost.total_bytes == 1_499_119_616
    assert cost.launches == 197
    assert cost.flops == 5_322_833_920


def test_a_time_is_launches_and_bytes() -> None:
    cost = decode_cost(VILA_3B, Decode(context=256))
    assert decode_us(cost, AGX, Constants(2.0, 0.5)) == pytest.approx(197 * 2 + 1_499_119_616 / 102_400)


def test_what_a_batch_shares_is_counted_once() -> None:
    one, eight = (decode_cost(VILA_3B, Decode(context=100, batch=batch)) for batch in (1, 8))
    shared = [part for part in one.bytes if part.endswith("weights")]
    assert [eight.bytes[part] for part in shared] == [one.bytes[part] for part in shared]
    for part in ("kv_cache read", "kv_cache written", "activations", "logits"):
        assert eight.bytes[part] == 8 * one.bytes[part]
    assert (eight.launches, eight.flops) == (one.launches, 8 * one.flops)


def test_forms_and_launches_are_choices() -> None:
    base, int8, single = (
        decode_cost(VILA_3B, decode) for decode in (Decode(), Decode(kv_cache="int8"), Decode(attention_launches=1))
    )
    assert 2 * int8.bytes["kv_cache read"] == base.bytes["kv_cache read"]
    assert base.launches - single.launches == 32


@pytest.mark.parametrize(("rows", "columns"), [(70, 256), (64, 384)])
def test_a_weight_is_as_large_as_it_is_packed(rows: int, columns: int) -> None:
    q = np.zeros((rows, columns), np.uint8)
    scales = np.ones((rows, columns // 128), np.float16)
    four = w4_layout.pack(Int4(q, scales, np.zeros(scales.shape, np.uint8)), w4_layout.plain_order(rows))
    eight = w8_layout.pack(Int8(q, scales))
    product = Product("o", rows, columns)
    assert weight_bytes(product, "int4") == four.qweight.nbytes + four.scales.nbytes + four.qzeros.nbytes
    assert weight_bytes(product, "int8") == eight.qweight.nbytes + eight.scales.nbytes


def test_a_prefill_is_bound_by_memory_and_then_by_operations() -> None:
    constants, decode = Constants(0.0, 0.5, 0.25), Decode(context=1)
    cost = decode_cost(VILA_3B, decode)
    assert prefill_us(VILA_3B, 1, decode, AGX, constants) == pytest.approx(decode_us(cost, AGX, constants))
    flops = 1000 * 5_075_107_840 + 163_840_000 + 4 * 32 * 2560 * 500_500
    peak = 64 * 512 * 1.3e9
    assert prefill_us(VILA_3B, 1000, decode, AGX, constants) == pytest.approx(4e6 * flops / peak)


def planted(t0_us: float, us_per_byte: float, noise: float = 0) -> list[Measurement]:
    rng = np.random.default_rng(0)
    sizes = [(1e6, 1), (9e6, 2), (60e6, 1), (270e6, 5), (1.5e9, 197)]
    return [
        Measurement(size, launches, (launches * t0_us + size * us_per_byte) * (1 + noise * rng.standard_normal()))
        for size, launches in sizes
    ]


def test_a_fit_finds_the_constants_again() -> None:
    found = fit(planted(2.5, 1e6 / (0.7 * 200e9)), 200e9, NOT_AT_ALL)
    assert [found.t0_us, found.efficiency] == pytest.approx([2.5, 0.7])
    assert found.source == NOT_AT_ALL
    noisy = fit(planted(2.5, 1e6 / (0.7 * 200e9), noise=0.01), 200e9, NOT_AT_ALL)
    assert noisy.efficiency == pytest.approx(0.7, rel=0.02)
    assert noisy.t0_us == pytest.approx(2.5, rel=0.1)


GOOD = planted(2.5, 1e6 / 140e9)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (GOOD[:2], "2 measurements: expected at least 3"),
        ([*GOOD, Measurement(1e6, 1, 0)], "times above 0"),
        ([*GOOD, Measurement(float("nan"), 1, 1)], "finite numbers"),
        ([Measurement(0, 1, 3)] * 3, "without launches or without bytes"),
        ([Measurement(1e6 * n, n, 10 * n) for n in range(1, 5)], "cannot tell launches from bytes"),
        ([Measurement(1e6 * n, 1, 20 - n) for n in range(1, 5)], "more bytes take less time"),
        (planted(2.5, 1e6 / 300e9), "expected 0 or more, and two shares"),
        ([Measurement(1e8 * n, 1, 1000 * n - 400) for n in range(1, 5)], "t0_us -"),
    ],
)
def test_measurements_that_say_nothing_are_refused(rows: list[Measurement], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(rows, 200e9, NOT_AT_ALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 9}, "a batch of 9"),
        ({"context": 0}, "a context of 0"),
        ({"kv_cache": "int4"}, "kv_cache int4"),
        ({"attention_launches": 3}, "3 launches"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Decode(**changes)
    with pytest.raises(UsageError, match="a prompt of 0 tokens"):
        prefill_us(VILA_3B, 0, Decode(), AGX, Constants())


def test_every_table_says_what_is_predicted_and_what_is_assumed() -> None:
    found = predict(MODELS, Decode(), 512, Constants())
    text = markdown(found)
    assert ASSUMED in text
    assert "PREDICTION, not a measurement" in text
    for board in BOARDS:
        assert all(board.name in model["boards"] for model in found["models"])
    assert all(published.source and published.source in text for published in PUBLISHED)
    assert {published.board for published in PUBLISHED} <= {board.name for board in BOARDS}
    beside = {row[0]: row[4] for row in sheets(found)[1].rows if row[1] == AGX.name}
    assert beside == {"VILA1.5-3B": "42.5", "VILA1.5-8B": "28.7", "NVILA-2B": "44.9", "NVILA-8B": "32.8"}
    batch = predict(MODELS, Decode(batch=2), 512, Constants())
    assert {row[4] for row in sheets(batch)[1].rows} == {"-"}, "others' figures are for a batch of 1"


def kernels_result(us_per_byte: float) -> dict[str, Any]:
    """As much of a result of `bench kernels` as a fit looks at."""
    row = {"group": "decode", "rows": 1, "default": True, "launches": ["ve_gemv"]}
    rows = [row | {"bytes": size, "p50_us": 4 + size * us_per_byte} for size in (1e6, 1e7, 1e8)]
    other = row | {"bytes": 1e6, "p50_us": 99.0}
    others = [other | {"rows": 8}, other | {"default": False}, other | {"group": "prefill"}]
    return {"kernels": rows + others, "gpu": {"name": "G"}, "date": "today", "bandwidth": {"copy": 100e9}}


def test_constants_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text('{"t0_us": 1.5, "efficiency": 0.9}')
    assert read_constants(file) == Constants(1.5, 0.9, source=str(file))
    file.write_text(json.dumps(kernels_result(1e6 / 50e9)))
    fitted = read_constants(file)
    assert [fitted.t0_us, fitted.efficiency] == pytest.approx([4, 0.5])
    assert "bench kernels on G, today" in fitted.source
    for text, message in (("{", "not JSON"), ("[]", "expected a JSON object, found list")):
        file.write_text(text)
        with pytest.raises(InputError, match=rf"found\.json: {message}"):
            read_constants(file)
    for text in ('{"t0_us": 1}', '{"t0_us": 1, "efficiency": 2}', '{"kernels": []}', '{"kernels": [{}]}'):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"found\.json"):
            read_constants(file)
    with pytest.raises(InputError):
        read_constants(tmp_path / "none.json")


def test_the_command_predicts_for_a_name_and_for_a_bundle(
    in_process: Callable[..., Done], tiny_bundle: Path, tmp_path: Path
) -> None:
    files = tmp_path / "found.json", tmp_path / "found.md"
    done = in_process("bench", "predict", "nvila-2b", "-c", 1024, "--json", files[0], "--markdown", files[1])
    assert done.returncode == 0
    assert "PREDICTED" in done.stdout
    assert ASSUMED in done.stderr.replace("\n", " ")
    found = predict(find_models("NVILA-2B"), Decode(1024), 512, Constants())
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(found))
    assert files[1].read_text() == markdown(found)
    assert in_process("bench", "predict", tiny_bundle).returncode == 0
    (model,) = find_models(str(tiny_bundle))
    llm = Bundle.open(tiny_bundle).config.llm
    assert (model.layers, model.vocab_size, model.heads) == (llm.num_hidden_layers, llm.vocab_size, llm.heads)
    assert in_process("bench", "predict", "VILA-9").returncode == UsageError.exit_code
    assert in_process("bench", "predict", "--lm-head", "int2").returncode == UsageError.exit_code
