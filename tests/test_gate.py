"""The parity gate: a bundle that does not compute what its checkpoint does is not made, and the culprit is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from vila_edge import int8
from vila_edge.bundle import Bundle
from vila_edge.errors import ParityError
from vila_edge.export.gate import Difference, Gate, GateError, LogitDifference, check_answers, checked, rounded
from vila_edge.export.recipe import Recipe
from vila_edge.export.run import export_bundle


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
    with pytest.raises(
        ParityError, match=rf"^{component}: activations of the checkpoint reach .*, above 65504"
    ) as error:
        export_bundle(checkpoint_copy, tmp_path / "b", recipe, quiet)
    assert "--gate max_activation=inf" in error.value.hint
    assert not (tmp_path / "b").exists()


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
    assert parity["llm"]["mean_kl"] >= 0
    assert 0 <= parity["llm"]["top1_agreement"] <= 1


def test_known_differences() -> None:
    difference = LogitDifference()
    want = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    got = np.log(np.array([[0.5, 0.5], [0.4, 0.6]], np.float32))
    difference.add(want, got)
    report = difference.report()
    assert report["top1_agreement"] == 0.5
    assert report["mean_kl"] == pytest.approx((0.9 * np.log(0.9 / 0.4) + 0.1 * np.log(0.1 / 0.6)) / 2, rel=1e-3)
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
    with pytest.raises(GateError, match="activations of the checkpoint reach"):
        checked("x", {"max_activation": rounded(abs(wrong))}, 0.0, Gate())


def limits() -> Iterator[tuple[dict[str, float], dict[str, float], str]]:
    yield {"top1_agreement": 0.9, "mean_kl": 0.0}, {"top1_agreement": 0.95}, "in 90.0% of positions, expected 95.0%"
    yield {"top1_agreement": 0.9, "mean_kl": 0.2}, {"mean_kl": 0.1}, "mean KL divergence 0.2 nats, expected 0.1"


@pytest.mark.parametrize(("report", "gate", "message"), list(limits()))
def test_answers_have_limits_of_their_own(report: dict[str, float], gate: dict[str, float], message: str) -> None:
    check_answers(report, Gate())
    with pytest.raises(GateError, match=message):
        check_answers(report, Gate(**gate))
