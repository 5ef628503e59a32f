"""An export computes what its checkpoint computes, or it does not come into being."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.tiny import random_parameters
from vila_edge import int4
from vila_edge.bundle import Bundle
from vila_edge.errors import InputError, ParityError
from vila_edge.export.graph_ops import GraphOps
from vila_edge.export.recipe import Quantization, Recipe
from vila_edge.export.run import export_bundle
from vila_edge.reference.engine import bundle_parameters
from vila_edge.tensorfile import TensorFile


def quiet(phase: str, done: int, total: int) -> None:
    pass


def test_the_same_checkpoint_gives_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one, two = (
        export_bundle(tiny_checkpoint, tmp_path / name, Recipe(group_size=32), quiet) for name in ("one", "two")
    )
    assert one.manifest == two.manifest
    for name in one.manifest.files:
        assert one.file(name).read_bytes() == two.file(name).read_bytes()


@pytest.mark.parametrize(("quantization", "tolerance"), [("fp32", 0.0), ("fp16", 1e-3)])
def test_weights_are_stored_as_asked(
    quantization: Quantization, tolerance: float, make_bundle: Callable[[str], Path]
) -> None:
    bundle = Bundle.open(make_bundle(quantization))
    for name, got in bundle_parameters(bundle).items():
        np.testing.assert_allclose(got, random_parameters(bundle.config)[name], rtol=tolerance, atol=tolerance)
    assert bundle.manifest.quantization["method"] == "none"
    assert bundle.manifest.parity["llm"]["top1_agreement"] > (0.99 if quantization == "fp16" else 0.999)


def test_four_bits_are_for_the_decoders_linears_and_sixteen_for_the_rest(tiny_bundle: Path) -> None:
    weights = {path.stem: TensorFile(path) for path in (tiny_bundle / "weights").iterdir()}
    for part in ("vision_tower", "mm_projector", "embed_tokens"):
        assert {entry.dtype for entry in weights[part].entries.values()} == {"F16"}
    for layer in (0, 1):
        block = weights[f"llm.layers.{layer:03}"].entries
        assert sum(name.endswith(".qweight") for name in block) == 7
        assert {block[name].dtype for name in block if name.endswith("norm.weight")} == {"F16"}
    head = weights["llm"].entries
    assert (head["llm.lm_head.qweight_int8"].dtype, head["llm.model.norm.weight"].dtype) == ("U8", "F16")
    parts = int4.part_names("llm.model.layers.0.mlp.down_proj")
    block = weights["llm.layers.000"].entries
    assert [block[part].shape for part in parts] == [(64, 48), (64, 3), (64, 2)]


def test_progress_goes_through_all_phases_to_their_ends(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    export_bundle(
        tiny_checkpoint,
        tmp_path / "b",
        Recipe(group_size=32),
        lambda phase, done, total: seen.update({phase: (done, total)}),
    )
    assert seen == {"read": (1, 1), "calibrate": (1, 1), "quantise": (2, 2), "write": (1, 1), "verify": (4, 4)}


def test_samples_with_few_positions_are_warned_of(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"prompt": "<image>", "images": ["a.png"]}\n{"text": "one"}\n' * 2)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    said: list[str] = []
    export_bundle(tiny_checkpoint, tmp_path / "b", Recipe("fp16", calibration=tmp_path), quiet, warn=said.append)
    assert any("of 2 samples to search with, expected 512" in line for line in said)


def test_a_tokenizer_of_another_model_is_refused(checkpoint_copy: Path, tmp_path: Path) -> None:
    path = checkpoint_copy / "llm" / "tokenizer.json"
    plain = json.loads(path.read_text())
    rows = len(plain["model"]["vocab"])
    plain["model"]["vocab"]["elsewhere"] = rows
    path.write_text(json.dumps(plain))
    with pytest.raises(InputError, match=rf"tokenizer.json: token 'elsewhere' has id {rows}, .* vocab_size is {rows}"):
        export_bundle(checkpoint_copy, tmp_path / "bundle", Recipe(group_size=32), quiet)
    assert not (tmp_path / "bundle").exists()


def test_a_weight_beyond_sixteen_bits_is_named(checkpoint_copy: Path, tmp_path: Path) -> None:
    path = checkpoint_copy / "vision_tower" / "model.safetensors"
    tensors = load_file(path)
    tensors["vision_model.encoder.layers.0.mlp.fc2.bias"][3] = 7e4
    save_file(tensors, path)
    with pytest.raises(ParityError, match=r"vision_tower.*layers.0.mlp.fc2.bias: its largest value 7e\+04") as error:
        export_bundle(checkpoint_copy, tmp_path / "b", Recipe(group_size=32), quiet)
    assert "--quant fp32" in error.value.hint
    assert not (tmp_path / "b").exists()


def lost_positions(self: GraphOps, x: str, name: str) -> str:
    return x


def wrong_neighbours(self: GraphOps, x: str, grid: int, block: int, order: str) -> str:
    return SPACE_TO_DEPTH(self, x, grid, block, "row_major")


def wrong_activation(self: GraphOps, x: str) -> str:
    return self.node("Relu", x)


SPACE_TO_DEPTH = GraphOps.space_to_depth


@pytest.mark.parametrize(
    ("component", "verb", "wrong"),
    [
        ("vision_tower", "position_embedding", lost_positions),
        ("mm_projector", "space_to_depth", wrong_neighbours),
        ("llm.model.layers.0", "silu", wrong_activation),
    ],
)
def test_a_wrong_graph_is_not_exported(
    component: str,
    verb: str,
    wrong: Callable[..., str],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(GraphOps, verb, wrong)
    with pytest.raises(ParityError, match=rf"^{re.escape(component)}: mean cosine"):
        export_bundle(tiny_checkpoint, tmp_path / "b", Recipe("fp16"), quiet)
    assert os.listdir(tmp_path) == [".b.work"]  # what is finished is kept, the bundle is not


def test_four_bits_in_the_wrong_order_are_not_exported(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound for 4 bits is looser, and still catches weights that are not the model's."""
    pack = int4.pack
    monkeypatch.setattr(int4, "pack", lambda values: pack(values) >> 4 | pack(values) << 4)
    with pytest.raises(ParityError, match=r"^llm.model.layers.0: mean cosine .* expected 0.95"):
        export_bundle(tiny_checkpoint, tmp_path / "b", Recipe(group_size=32), quiet)
    assert os.listdir(tmp_path) == [".b.work"]  # what is finished is kept, the bundle is not


def test_an_output_that_is_not_finite_is_not_exported(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def root_of_negatives(self: GraphOps, x: str) -> str:
        return self.node("Sqrt", x)

    monkeypatch.setattr(GraphOps, "silu", root_of_negatives)
    with pytest.raises(ParityError, match="llm.model.layers.0: the bundle's output is not finite"):
        export_bundle(tiny_checkpoint, tmp_path / "b", Recipe("fp16"), quiet)
    assert os.listdir(tmp_path) == [".b.work"]  # what is finished is kept, the bundle is not


def test_an_interrupted_export_leaves_the_old_bundle(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "b"
    before = export_bundle(tiny_checkpoint, target, Recipe("fp16"), quiet).manifest.digest

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_checkpoint, target, Recipe("fp32"), interrupt, replace=True)
    assert sorted(os.listdir(tmp_path)) == [".b.work", "b"]
    assert Bundle.open(target).manifest.digest == before


def test_torch_is_left_as_it_was(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_bundle(tiny_checkpoint, tmp_path / "b", Recipe("fp16"), quiet)
    assert not torch.is_inference_mode_enabled()
