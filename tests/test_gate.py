"""The parity gate: a bundle that does not compute what its checkpoint does is not made, and the culprit is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tests.tiny import TINY
from vila_edge import int8, kv_scales
from vila_edge.bundle import Bundle
from vila_edge.config import Heads
from vila_edge.errors import ParityError
from vila_edge.export import awq
from vila_edge.export.built_in_samples import built_in
from vila_edge.export.calibration import embed
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.encoder import WatchingOps
from vila_edge.export.gate import Difference, Gate, GateError, LogitDifference, check_answers, checked, rounded
from vila_edge.export.recipe import Recipe
from vila_edge.export.run import export_bundle
from vila_edge.export.verify import POSITIONS
from vila_edge.reference.engine import bundle_parameters
from vila_edge.reference.torch_engine import numpy_parameters_engine
from vila_edge.tokenizer import Tokenizer


def quiet(phase: str, done: int, total: int) -> None:
    pass


def scale(checkpoint: Path, part: str, name: str, factor: float) -> None:
    path = checkpoint / part / "model.safetensors"
    tensors = load_file(path)
    tensors[name] *= factor
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("part", "name", "component"),
    [
        ("llm", "model.layers.1.mlp.up_proj.weight", "llm.model.layers.1"),
        ("vision_tower", "vision_model.encoder.layers.0.mlp.fc1.weight", "vision_tower"),
        ("mm_projector", "layers.2.weight", "mm_projector"),
    ],
)
@pytest.mark.parametrize("quantization", ["fp16", "int4"])
def test_activations_that_sixteen_bits_cannot_hold_are_caught(
    quantization: Any, part: str, name: str, component: str, checkpoint_copy: Path, tmp_path: Path
) -> None:
    """All weights fit; what they make of the samples does not, and an engine on a GPU would give infinities."""
    scale(checkpoint_copy, part, name, 1.45e5 if part == "mm_projector" else 9e4)
    recipe = Recipe(quantization, group_size=32)
    with pytest.raises(ParityError, match=rf"^{component}: activations reach .*, above 65504") as error:
        export_bundle(checkpoint_copy, tmp_path / "b", recipe, quiet)
    assert "--gate max_activation=inf" in error.value.hint
    assert not (tmp_path / "b").exists()


def test_a_tower_is_measured_though_the_samples_are_texts(checkpoint_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text("".join(f'{{"text": "line {i}"}}\n' for i in range(8)))
    scale(checkpoint_copy, "vision_tower", "vision_model.encoder.layers.0.mlp.fc1.weight", 9e4)
    with pytest.raises(ParityError, match=r"^vision_tower: activations reach .*, above 65504"):
        export_bundle(checkpoint_copy, tmp_path / "b", Recipe("fp16", calibration=tmp_path), quiet)


LAYER = "model.layers.1"
PLANTS = {
    "scores": ("llm.model.layers.1", {f"{LAYER}.self_attn.{part}_proj.weight": 400.0 for part in "qk"}),
    "norm of the MLP": (
        "llm.model.layers.1",
        {f"{LAYER}.post_attention_layernorm.weight": 5e4}
        | {f"{LAYER}.mlp.{part}_proj.weight": 1e-4 for part in ("gate", "up")},
    ),
    "norm of attention": (
        "llm.model.layers.1",
        {f"{LAYER}.input_layernorm.weight": 5e4} | {f"{LAYER}.self_attn.{part}_proj.weight": 1e-4 for part in "qkv"},
    ),
    "last norm": ("lm_head", {"model.norm.weight": 5e4, "lm_head.weight": 1e-4}),
    "logits": ("lm_head", {"lm_head.weight": 1e5}),
}


@pytest.mark.parametrize("plant", list(PLANTS))
@pytest.mark.parametrize("quantization", ["fp16", "int4"])
def test_one_operation_that_overflows_is_caught(
    quantization: Any, plant: str, checkpoint_copy: Path, tmp_path: Path
) -> None:
    """What every other operation gives out fits."""
    component, factors = PLANTS[plant]
    for name, factor in factors.items():
        scale(checkpoint_copy, "llm", name, factor)
    said: list[str] = []
    recipe = Recipe(quantization, group_size=32, method="rtn")
    with pytest.raises(ParityError, match=rf"^{component}: activations reach .*, above 65504"):
        export_bundle(checkpoint_copy, tmp_path / "b", recipe, quiet, warn=said.append)
    assert not any("stays in 16 bits" in line for line in said)  # no form of lm_head mends that


@pytest.mark.parametrize(
    "operation",
    [
        lambda ops, x: ops.layer_norm(x, "norm", 1e-6),
        lambda ops, x: ops.rms_norm(x, "norm", 1e-6),
        lambda ops, x: ops.quick_gelu(40_000 * x / x.abs().max()),
        lambda ops, x: ops.position_embedding(x, "norm"),
        lambda ops, x: ops.attention(600 * x, 600 * x, x, Heads(1, 1, 4)),
        lambda ops, x: ops.add(4e4 * x, 4e4 * x),
        lambda ops, x: ops.mul(600 * x, 600 * x),
        lambda ops, x: ops.linear(x, "matrix", 4, bias=False),
    ],
)
def test_every_operation_that_can_overflow_is_watched(operation: Any) -> None:
    weights = {"norm.weight": torch.full((4,), 7e4), "norm.bias": torch.zeros(4), "matrix.weight": 7e4 * torch.eye(4)}
    ops = WatchingOps(weights)
    operation(ops, torch.tensor([[[1.0, -1.5, 1.2, -1.1]]]))
    assert ops.largest > 65504


def test_what_the_search_makes_larger_is_watched_too(
    checkpoint_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle's norm gives out what the checkpoint's does, divided by scales."""

    def tiny_scales(group: awq.ScaleGroup, *arguments: Any) -> torch.Tensor:
        return torch.full((arguments[0][f"{group.linears[0]}.weight"].shape[1],), 1e-4)

    monkeypatch.setattr(awq, "search_scales", tiny_scales)
    scale(checkpoint_copy, "llm", f"{LAYER}.post_attention_layernorm.weight", 4.0)
    with pytest.raises(ParityError, match=r"^llm.model.layers.1: activations reach .*, above 65504"):
        export_bundle(checkpoint_copy, tmp_path / "b", Recipe(group_size=32, calibration_tokens=300), quiet)


def test_lm_head_stays_in_sixteen_bits_where_eight_would_change_the_answers(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = int8.quantize

    def coarse(weight: NDArray[Any]) -> int8.Int8:
        found = quantize(weight)
        return int8.Int8((found.q.astype(int) // 64 * 64).astype(np.uint8), found.scales)

    monkeypatch.setattr(int8, "quantize", coarse)
    said: list[str] = []
    recipe = Recipe(group_size=32, calibration_tokens=500)
    bundle = export_bundle(tiny_checkpoint, tmp_path / "b", recipe, quiet, warn=said.append)
    assert bundle.manifest.quantization["lm_head"] == "fp16"
    assert any("lm_head stays in 16 bits: with int8, lm_head: mean cosine" in line for line in said)
    assert bundle.manifest.parity["lm_head"]["mean_cosine"] > 0.9999


def test_the_report_names_every_component(tiny_bundle: Path) -> None:
    parity = Bundle.open(tiny_bundle).manifest.parity
    assert len(parity["blocks"]) == 2
    for part in (parity["vision_tower"], parity["mm_projector"], *parity["blocks"]):
        assert 0 < part["max_activation"] < 65504
    for part in (parity["vision_tower"], parity["mm_projector"], *parity["blocks"], parity["lm_head"], parity["llm"]):
        assert part["max_error"] >= 0
        assert part["min_cosine"] <= part["mean_cosine"] <= 1
        assert part["vectors"] > 0
    for part in (parity["llm"], parity["llm_int8_cache"]):
        assert part["mean_kl"] >= 0
        assert 0 <= part["top1_agreement"] <= 1
    assert 0 < parity["lm_head"]["max_activation"] < 65504


def test_the_llm_is_measured_on_the_bundles_own_activations(
    tiny_bundle: Path, tiny_checkpoint: Path, tokenizer: Tokenizer
) -> None:
    """An oracle without graphs: both models whole, on the same prompts. What blocks do wrong adds up."""
    bundle, checkpoint = Bundle.open(tiny_bundle), Checkpoint(tiny_checkpoint)
    exact = numpy_parameters_engine(TINY, checkpoint.parameters())
    rounded_weights = numpy_parameters_engine(TINY, bundle_parameters(bundle))
    difference, parity = LogitDifference(), bundle.manifest.parity
    for sample in built_in().held_out:
        want, got = (
            engine.forward(x, engine.new_cache(len(x)), range(len(x)))
            for engine in (exact, rounded_weights)
            for x in [embed(sample, TINY, tokenizer, engine)]
        )
        kept = np.unique(np.linspace(0, len(want) - 1, POSITIONS).astype(np.int64))
        difference.add(want[kept], got[kept])
    found = difference.report()
    assert parity["llm"]["vectors"] == found["vectors"]
    assert parity["llm"]["mean_kl"] == pytest.approx(found["mean_kl"], rel=0.02)
    assert parity["llm"]["max_error"] == pytest.approx(found["max_error"], rel=0.1)
    assert parity["llm"]["mean_kl"] > 10 * parity["lm_head"]["mean_kl"]


def test_the_decoder_with_a_cache_of_8_bits_is_measured_on_what_it_read_there(make_bundle: Any) -> None:
    """Of a bundle whose weights are nearly exact, what is left is the cache's."""
    parity = Bundle.open(make_bundle("fp16")).manifest.parity
    assert 5 * parity["llm"]["mean_kl"] < parity["llm_int8_cache"]["mean_kl"] < 1e-3
    assert parity["llm_int8_cache"]["max_error"] > 2 * parity["llm"]["max_error"]


def test_a_broken_cache_of_8_bits_is_named(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are far too large leave nothing of keys and values."""
    monkeypatch.setattr(kv_scales, "HEADROOM", 1e4)
    with pytest.raises(ParityError, match=r"^llm_int8_cache: mean cosine .* expected 0.9999"):
        recipe = Recipe("fp16", gate=Gate(llm_int8_cache=0.9999))
        export_bundle(tiny_checkpoint, tmp_path / "b", recipe, quiet)


def test_known_differences() -> None:
    difference = LogitDifference()
    want = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    got = np.log(np.array([[0.5, 0.5], [0.4, 0.6]], np.float32))
    difference.add(want, got)
    report = difference.report()
    assert report["top1_agreement"] == 0.5
    divergence = 0.4 * np.log(0.4 / 0.9) + 0.6 * np.log(0.6 / 0.1)  # of the bundle from the checkpoint
    assert report["mean_kl"] == pytest.approx(divergence / 2, rel=1e-3)
    assert report["max_error"] == pytest.approx(np.log(6), rel=1e-3)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_passes(wrong: float) -> None:
    difference = Difference()
    difference.add(np.ones((100, 4), np.float32), np.ones((100, 4), np.float32))
    broken = np.ones((3, 4), np.float32)
    broken[1, 2] = wrong
    difference.add(np.ones((3, 4), np.float32), broken)
    with pytest.raises(GateError, match="x: the bundle's output is not finite"):
        checked("x", difference.report(), 0.0, Gate())
    with pytest.raises(GateError, match="activations reach"):
        checked("x", {"max_activation": rounded(abs(wrong))}, 0.0, Gate())


def limits() -> Iterator[tuple[dict[str, float], dict[str, float], str]]:
    yield {"top1_agreement": 0.9, "mean_kl": 0.0}, {"top1_agreement": 0.95}, "in 90.0% of positions, expected 95.0%"
    yield (
        {"top1_agreement": 0.9, "mean_kl": 0.2},
        {"mean_kl": 0.1},
        r"mean KL\(bundle \|\| checkpoint\) 0.2 nats, expected 0.1",
    )


@pytest.mark.parametrize(("report", "gate", "message"), list(limits()))
def test_answers_have_limits_of_their_own(report: dict[str, float], gate: dict[str, float], message: str) -> None:
    check_answers("llm", report, Gate(), "fp16")
    with pytest.raises(GateError, match=message) as error:
        check_answers("llm", report, Gate(**gate), "int8")
    assert error.value.hint.endswith("or take --lm-head fp16")
    with pytest.raises(GateError, match=message) as error:
        check_answers("llm", report, Gate(**gate), "fp16")
    assert "lm-head" not in error.value.hint  # there is no larger one
