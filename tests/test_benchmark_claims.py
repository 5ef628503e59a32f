"""Benchmarks that end with exit code 1 where what they are run for does not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import export_memory
from benchmarks.export_memory import too_much
from benchmarks.quantisation_loss import wrong_order


@pytest.mark.parametrize(
    ("kl", "problem"),
    [
        ((0.1, 0.2, 0.3), ""),
        ((0.1, 0.1, 0.1), ""),
        ((0.3, 0.2, 0.4), "AWQ, images and text: KL 0.30000, expected at most 0.20000 (AWQ, text alone)"),
        ((0.1, 0.5, 0.4), "AWQ, text alone: KL 0.50000, expected at most 0.40000 (rounded to nearest)"),
        ((float("nan"), 0.5, 0.6), "KL nan, expected at most 0.50000 (AWQ, text alone)"),
    ],
)
def test_a_calibration_must_not_lose_more_than_a_lesser_one(kl: tuple[float, ...], problem: str) -> None:
    found = wrong_order(dict(zip(("image+text", "text", "rtn"), kl, strict=True)))
    assert found.endswith(problem) and bool(found) == bool(problem)


@pytest.mark.parametrize(
    ("peaks", "problem"),
    [
        ({8: 1500.0, 32: 1574.0}, ""),
        ({32: 1500.0}, ""),
        ({32: 1574.0, 8: 1600.0}, ""),
        ({8: 2000.0, 32: 2049.0}, "2049 MiB with 32 layers, expected at most 2048"),
        ({32: 1598.2, 8: 1456.0}, "+9.8% from 8 to 32 layers, expected at most 5%"),
    ],
)
def test_memory_must_not_grow_with_depth(peaks: dict[int, float], problem: str) -> None:
    found = too_much(peaks)
    assert found.endswith(problem) and bool(found) == bool(problem)


def test_too_much_memory_is_exit_code_1_after_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(command: list[str]) -> dict[str, Any]:
        return {"seconds": 1.0, "peak_mib": 3000.0 if "export" in command else 100.0}

    for layers in (8, 32):
        (tmp_path / f"checkpoint-{layers}").mkdir()
        (tmp_path / f"bundle-{layers}").mkdir()
        manifest = {"files": {"a": {"size": 5}}, "quantization": {"parameter_bytes": 5}, "digest": ""}
        (tmp_path / f"bundle-{layers}" / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(export_memory, "measure", measure)
    with pytest.raises(SystemExit, match="2900 MiB with 8 layers") as end:
        export_memory.main(tmp_path, None, 64, tmp_path / "figures.json")
    assert end.value.code not in (0, None)
    assert (tmp_path / "figures.json").is_file()
