"""What the decoder is wanted to reach, as ratios within one run, and whether it did."""

from __future__ import annotations

from typing import Any

from vila_edge.bench.kernels.targets import Found, Judged, least

CONTEXT = 256  # of decode
TOKENS = 1024  # of a prefill
LARGE = ("VILA1.5-8B", "NVILA-8B")
SMALL = ("NVILA-2B",)

Row = dict[str, Any]


def judge(result: dict[str, Any]) -> list[Judged]:
    """Every target, of a result of `run.bench_decoder`. Decode is of one sequence; the worst that was found counts."""
    large, small = (_steps(result, models) for models in (LARGE, SMALL))
    torch = result["torch"]
    return [
        least(
            f"decode of an 8B behind {CONTEXT}, of the copy bandwidth",
            0.55,
            [(step["of_copy_bandwidth"], where) for step, _, where in large],
        ),
        least(f"decode of an 8B behind {CONTEXT}, over torch's in 16 bits", 3.0, _over_torch(large, torch)),
        least(f"decode of a 2B behind {CONTEXT}, over torch's in 16 bits", 2.5, _over_torch(small, torch)),
        least(f"prefill of {TOKENS}, dequantise + library over ours", 0.9, _prefills(result)),
    ]


def _steps(result: dict[str, Any], models: tuple[str, ...]) -> list[tuple[Row, str, str]]:
    """Steps of one sequence behind CONTEXT: what was measured, its model, and both in words."""
    return [
        (step, row["model"], f"{row['model']}, {row['kv_cache']}")
        for row in result["models"]
        for step in row["decode"]
        if row["model"] in models and (step["batch"], step["context"]) == (1, CONTEXT) and step["absent"] is None
    ]


def _over_torch(steps: list[tuple[Row, str, str]], torch: Any) -> list[Found]:
    peers = [(step, torch_decode(torch, model, step["batch"], step["context"]), where) for step, model, where in steps]
    return [(step["tokens_per_s"] / peer, where) for step, peer, where in peers if peer]


def _prefills(result: dict[str, Any]) -> list[Found]:
    found = list[Found]()
    for row in result["models"]:
        for prefill in row["prefill"]:
            peer = torch_prefill(result["torch"], row["model"], prefill["tokens"]).get("dequantise_ms")
            if prefill["tokens"] == TOKENS and peer:
                found.append((peer / prefill["p50_ms"], f"{row['model']}, {row['kv_cache']}"))
    return found


def torch_decode(torch: Any, model: str, batch: int, context: int) -> float | None:
    """Tokens a second, None if torch was not asked or had no room: see `benchmarks/gpu_peers/torch_decoder.py`."""
    return _model(torch, model).get("decode", {}).get(f"{batch}x{context}")


def torch_prefill(torch: Any, model: str, tokens: int) -> dict[str, float]:
    """`library_ms` and `dequantise_ms` of a prefill, as far as they are there."""
    return _model(torch, model).get("prefill", {}).get(str(tokens), {})


def torch_absent(torch: Any, model: str) -> str | None:
    """Why torch has no figures, or not all, of a model."""
    return _model(torch, model).get("absent")


def _model(torch: Any, model: str) -> dict[str, Any]:
    return ((torch or {}).get("models") or {}).get(model) or {}
