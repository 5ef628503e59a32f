"""Checkpoints that are in 4 bits already become bundles with the same integers; and bundles become such checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.families import FAMILIES, shrink, write_checkpoint
from tests.packed import pack_checkpoint
from tests.tiny import TINY
from vila_edge.bundle import Bundle
from vila_edge.cli import app
from vila_edge.errors import UsageError
from vila_edge.export.awq_formats import Packed, unpack_gemm
from vila_edge.export.recipe import Recipe
from vila_edge.export.run import export_autoawq, export_bundle
from vila_edge.stored import StoredParameters
from vila_edge.tensorfile import TensorFile


def quiet(phase: str, done: int, total: int) -> None:
    pass


def stored(folder: Path) -> StoredParameters:
    return StoredParameters(TensorFile(path) for path in sorted((folder / "weights").iterdir()))


@pytest.mark.parametrize("fmt", ["autoawq-gemm", "llm-awq-v2"])
def test_integers_are_taken_over_as_they_are(fmt: Any, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(shrink(FAMILIES["VILA1.5-3b"]), tmp_path)
    linears = pack_checkpoint(checkpoint, fmt, 32)
    phases, said = set[str](), list[str]()
    bundle = export_bundle(checkpoint, tmp_path / "b", Recipe(), lambda phase, *_: phases.add(phase), warn=said.append)
    assert any(f"in 4 bits already ({fmt}, groups of 32)" in line for line in said)
    assert "quantise" not in phases
    quantization = bundle.manifest.quantization
    assert (quantization["method"], quantization["group_size"]) == (fmt, 32)
    assert "none" in bundle.manifest.provenance["calibration"]
    found = stored(tmp_path / "b")
    assert len(linears) == 14
    for name, want in linears.items():
        got = found.int4(name)
        np.testing.assert_array_equal(got.q, want.q)
        np.testing.assert_array_equal(got.zeros, want.zeros)
        np.testing.assert_array_equal(got.scales, want.scales)
    assert bundle.manifest.parity["llm"]["mean_cosine"] > 0.99


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (Recipe(group_size=16), "-g 16"),
        (Recipe(symmetric=True, method="rtn"), "--symmetric, --method rtn"),
    ],
)
def test_another_form_of_4_bits_is_refused(recipe: Recipe, options: str, checkpoint_copy: Path, tmp_path: Path) -> None:
    pack_checkpoint(checkpoint_copy, "autoawq-gemm", 32)
    with pytest.raises(UsageError, match=f"^{options}: the checkpoint is in 4 bits already .*groups of 32.*are kept"):
        export_bundle(checkpoint_copy, tmp_path / "b", recipe, quiet)
    Recipe(group_size=32).check(TINY, Packed("autoawq-gemm", 32, False))
    dataclasses.replace(recipe, quantization="fp16").check(TINY, Packed("autoawq-gemm", 32, False))


def test_a_packed_checkpoint_can_be_stored_in_sixteen_bits(checkpoint_copy: Path, tmp_path: Path) -> None:
    linears = pack_checkpoint(checkpoint_copy, "autoawq-gemm", 32)
    bundle = export_bundle(checkpoint_copy, tmp_path / "b", Recipe("fp16"), quiet)
    name = "llm.model.layers.0.mlp.up_proj"
    got = stored(bundle.path).float32(f"{name}.weight", linears[name].q.shape)
    np.testing.assert_array_equal(got, linears[name].dequantize().astype(np.float16).astype(np.float32))


def test_to_autoawq_writes_the_searched_integers(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "llm"
    export_autoawq(tiny_checkpoint, target, Recipe(group_size=32), quiet)
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == 32
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    want = stored(tiny_bundle)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        file = TensorFile(target / index[f"{name}.qweight"])
        parts = {part: file.array(part) for part in file.entries if part.startswith(f"{name}.")}
        got = unpack_gemm(name, parts)
        np.testing.assert_array_equal(got.q, want.int4(f"llm.{name}").q)
        np.testing.assert_array_equal(got.zeros, want.int4(f"llm.{name}").zeros)
    assert not (tmp_path / ".llm.work").exists()


def test_what_autoawq_cannot_hold_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--to autoawq: that format has decoder blocks in 4 bits"):
        export_autoawq(tiny_checkpoint, tmp_path / "llm", Recipe("fp16"), quiet)
    assert not list(tmp_path.iterdir())


def test_the_whole_way_round(checkpoint_copy: Path, tmp_path: Path) -> None:
    """A checkpoint's LLM to AutoAWQ's layout, put in the place of the float one, and to a bundle: the same integers."""
    run = CliRunner().invoke
    llm, bundle = tmp_path / "llm", tmp_path / "b"
    assert run(app, ["export", str(checkpoint_copy), "-o", str(llm), "--to", "autoawq", "-g", "32"]).exit_code == 0
    want = {path.name: TensorFile(path) for path in llm.glob("*.safetensors")}
    assert len(want) == 3
    for path in (checkpoint_copy / "llm").glob("*.safetensors"):
        path.unlink()
    for path in llm.iterdir():
        (checkpoint_copy / "llm" / path.name).write_bytes(path.read_bytes())
    assert run(app, ["export", str(checkpoint_copy), "-o", str(bundle)]).exit_code == 0
    assert Bundle.open(bundle).manifest.quantization["method"] == "autoawq-gemm"
    found = stored(bundle)
    for file in want.values():
        for part in file.entries:
            if part.endswith(".qweight"):
                name = part.removesuffix(".qweight")
                parts = {p: file.array(p) for p in file.entries if p.startswith(f"{name}.")}
                np.testing.assert_array_equal(found.int4(f"llm.{name}").q, unpack_gemm(name, parts).q)
