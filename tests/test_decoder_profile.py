"""The profile of a decoder: operators of the runs that count, products beside the bytes that they read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.decoder_profile import Operator, markdown, operators, profile, summary, weights_of
from tests.tiny import TINY
from vila_edge.bench.traffic import parts_of
from vila_edge.bundle import Bundle

LAYERS = TINY.llm.num_hidden_layers


@pytest.mark.parametrize(("new_tokens", "runs"), [(3, 3), (0, 1)])
def test_the_runs_that_count_are_told_operator_by_operator(tiny_bundle: Path, new_tokens: int, runs: int) -> None:
    found = profile(Bundle.open(tiny_bundle), "float32", 1, 20, new_tokens)
    assert sum(operator.kind == "GroupQueryAttention" for operator in found) == runs * LAYERS
    assert all(operator.milliseconds >= 0 for operator in found)
    linears = {operator.node.rpartition("/")[0] for operator in found if operator.kind == "MatMulNBits"}
    assert linears <= weights_of(Bundle.open(tiny_bundle)).keys()


def test_a_fused_product_reads_the_bytes_of_its_parts(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    parts, mlp = parts_of(bundle), "llm.model.layers.0.mlp"
    want = [sum(getattr(parts[f"{mlp}.{p}_proj.weight"], what) for p in ("gate", "up")) for what in ("size", "numbers")]
    assert [*weights_of(bundle)[f"{mlp}.gate_up_proj"]] == want


def test_warm_up_does_not_count(tmp_path: Path) -> None:
    def node(ts: int) -> dict[str, object]:
        return {"cat": "Node", "name": f"n{ts}_kernel_time", "ts": ts, "dur": 2000, "args": {"op_name": "Add"}}

    runs = [{"cat": "Session", "name": "model_run", "ts": ts, "dur": 5} for ts in (10, 20)]
    (tmp_path / "profile").write_text(json.dumps([*runs, node(11), node(21)]))
    assert operators(tmp_path / "profile", 1) == [Operator("Add", "n21", 2.0)]


def test_shares_add_up_and_rates_are_of_the_time() -> None:
    weights = {"llm.a.down_proj": (1_000_000, 2_000_000), "llm.lm_head": (10, 20)}
    found = [Operator("MatMulNBits", f"llm.a.down_proj/{run}", 2.0) for run in ("x", "x")]
    found += [Operator("Add", "llm.a.down_proj/Add", 4.0), Operator("MatMulNBits", "llm.lm_head/x", 2.0)]
    decode = {row["operator"]: row for row in summary(found, 2, weights, 1e9)}
    assert sum(row["share"] for row in decode.values()) == pytest.approx(1)
    assert decode["MatMulNBits down_proj"]["milliseconds"] == 2
    assert decode["MatMulNBits down_proj"]["fraction_of_read_bandwidth"] == pytest.approx(1e6 / 2e-3 / 1e9)
    assert "fraction_of_read_bandwidth" not in decode["Add"]
    prefill = {row["operator"]: row for row in summary(found, 2, weights, 1e9, rows=8)}
    assert prefill["MatMulNBits down_proj"]["gflop_per_s"] == pytest.approx(2 * 2e6 * 8 / 2e-3 / 1e9)
    assert "gflop_per_s" not in prefill["MatMulNBits lm_head"]
    result = {"date": "", "machine": {"cpu": ""}, "threads": 1, "kv_cache": "", "read_bandwidth": {"bytes_per_s": 1.0}}
    text = markdown(result | {"context": 4, "prompt_tokens": 8, "decode": [*decode.values()], "prefill": []})
    assert "| MatMulNBits down_proj | 40.0% | 50% |" in text
