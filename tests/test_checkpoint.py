"""Checkpoints: what is written is read, and what is wrong is named."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.closed import close_folder
from tests.tiny import TINY, random_parameters
from vila_edge.config import Profile, VilaConfig
from vila_edge.errors import CheckpointError, ConfigError, InputError
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.fields import Fields
from vila_edge.plain import from_plain
from vila_edge.tokenizer import Tokenizer


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes a key."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_what_training_writes_export_reads(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint)
    assert checkpoint.config == TINY
    for name, want in random_parameters(TINY).items():
        np.testing.assert_array_equal(checkpoint.parameter(name), want)


def test_transformers_loads_the_llm_folder(tiny_checkpoint: Path, tokenizer: Tokenizer) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_checkpoint / "llm")
    want = random_parameters(TINY)["llm.model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, torch.from_numpy(want))
    theirs = AutoTokenizer.from_pretrained(tiny_checkpoint / "llm")
    assert theirs("three plus four").input_ids == [*tokenizer.prefix, *tokenizer.encode("three plus four")]


def test_the_digest_follows_the_content(checkpoint_copy: Path) -> None:
    before = Checkpoint(checkpoint_copy).sha256()
    assert Checkpoint(checkpoint_copy).sha256() == before
    edit(checkpoint_copy / "llm" / "config.json", bos_token_id=7)
    assert Checkpoint(checkpoint_copy).sha256() != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_shards_with_an_index(dtype: torch.dtype, checkpoint_copy: Path) -> None:
    folder = checkpoint_copy / "llm"
    tensors = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    halves = list(tensors)[::2], list(tensors)[1::2]
    weight_map: dict[str, str] = {}
    for number, names in enumerate(halves, 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    read = Checkpoint(checkpoint_copy).parameter("llm.lm_head.weight")
    np.testing.assert_array_equal(read, tensors["lm_head.weight"].float().numpy())

    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: missing .*index.json names"):
        Checkpoint(checkpoint_copy)
    index.write_text(json.dumps({"weight_map": {"a": "../vision_tower/model.safetensors"}}))
    with pytest.raises(CheckpointError, match="missing from the checkpoint"):
        Checkpoint(checkpoint_copy)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no object 'weight_map'"):
        Checkpoint(checkpoint_copy)


def test_a_wrong_shape_names_tensor_file_and_both_shapes(checkpoint_copy: Path) -> None:
    edit(checkpoint_copy / "llm" / "config.json", intermediate_size=128)
    with pytest.raises(CheckpointError) as error:
        Checkpoint(checkpoint_copy)
    assert "llm/model.safetensors: tensor 'model.layers.0.mlp.gate_proj.weight'" in error.value.message
    assert "has shape [96, 64], expected [128, 64]" in error.value.message


def test_weights_that_the_config_has_no_use_for_are_refused(checkpoint_copy: Path) -> None:
    """A config with a layer too few would silently make another model of the same weights."""
    config = checkpoint_copy / "llm" / "config.json"
    layers = TINY.llm.num_hidden_layers
    edit(config, num_hidden_layers=layers - 1)
    with pytest.raises(CheckpointError, match=rf"llm/model.safetensors: holds 'model.layers.{layers - 1}\..* no use"):
        Checkpoint(checkpoint_copy)
    edit(config, num_hidden_layers=layers, tie_word_embeddings=True)
    Checkpoint(checkpoint_copy)  # a head beside tied embeddings is a copy of them

    path = checkpoint_copy / "llm" / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    Checkpoint(checkpoint_copy)  # follows from the config
    save_file(load_file(path) | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, path)
    with pytest.raises(CheckpointError, match=r"holds 'model.layers.0.self_attn.q_proj.bias'"):
        Checkpoint(checkpoint_copy)


def test_a_tower_may_hold_what_lies_behind_the_selected_layer_and_no_more(checkpoint_copy: Path) -> None:
    path = checkpoint_copy / "vision_tower" / "model.safetensors"
    stored, last = load_file(path), TINY.vision_tower.num_hidden_layers - 1
    names = (f"encoder.layers.{last}.mlp.fc1.weight", "post_layernorm.weight", "head.probe")
    save_file(stored | {f"vision_model.{name}": torch.ones(2) for name in names}, path)
    Checkpoint(checkpoint_copy)
    save_file(stored | {f"vision_model.encoder.layers.{last + 1}.mlp.fc1.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=rf"holds 'vision_model.encoder.layers.{last + 1}.mlp.fc1.weight'"):
        Checkpoint(checkpoint_copy)


def test_a_missing_tensor_and_a_broken_one(checkpoint_copy: Path) -> None:
    path = checkpoint_copy / "mm_projector" / "model.safetensors"
    tensors = load_file(path)
    missing = tensors.pop("layers.4.bias")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"mm_projector: no tensor 'layers.4.bias', expected shape \[64\]"):
        Checkpoint(checkpoint_copy)
    save_file(tensors | {"layers.4.bias": torch.full_like(missing, torch.nan)}, path)
    with pytest.raises(CheckpointError, match="tensor 'layers.4.bias' is not finite"):
        Checkpoint(checkpoint_copy).parameters()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"mm_projector/model.safetensors: not a whole safetensors file"):
        Checkpoint(checkpoint_copy)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("llm/config.json", {"hidden_size": None}, "llm/config.json: 'hidden_size' is missing"),
        ("llm/config.json", {"hidden_size": "64"}, "'hidden_size' is '64', expected a positive whole number"),
        ("llm/config.json", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu', expected 'silu'"),
        ("llm/config.json", {"rope_scaling": {"type": "linear"}}, "rope_scaling: 'factor' is missing"),
        ("llm/config.json", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'type' is 'dynamic', expected"),
        ("llm/config.json", {"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, "'x' is set to 1"),
        ("llm/config.json", {"rope_parameters": {"rope_type": "yarn"}}, "'rope_type' is 'yarn'"),
        ("llm/config.json", {"attention_bias": True}, "'attention_bias' is True, expected False"),
        ("llm/config.json", {"use_sliding_window": True}, "'use_sliding_window' is True, expected False"),
        ("llm/config.json", {"mystery": 512}, "'mystery' is set to 512, .*does not understand"),
        ("llm/config.json", {"model_type": "mistral"}, "'model_type' is 'mistral', expected 'llama' or 'qwen2'"),
        ("llm/config.json", {"num_hidden_layers": 10**12}, "num_hidden_layers .*: expected at most 1,024"),
        ("llm/config.json", {"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads 3"),
        ("vision_tower/config.json", {"hidden_act": "quick_gelu"}, "expected 'gelu_pytorch_tanh'"),
        ("vision_tower/config.json", {"model_type": "vit"}, "expected 'siglip_vision_model' or 'clip_vision_model'"),
        ("vision_tower/config.json", {"model_type": "intern_vit_6b"}, "a tower that this version does not compute"),
        ("vision_tower/preprocessor_config.json", {"resample": 2}, "'resample' is 2, expected 3"),
        ("vision_tower/preprocessor_config.json", {"size": {"height": 9, "width": 9}}, "expected height and width 46"),
        ("vision_tower/preprocessor_config.json", {"image_mean": [0.5]}, "expected a list of three numbers"),
        ("vision_tower/preprocessor_config.json", {"image_std": [0.5, 0, 0.5]}, "image_std .*: expected positive"),
        ("vision_tower/preprocessor_config.json", {"image_mean": [0.5, 1e999, 0.5]}, "image_mean .*: expected finite"),
        (
            "mm_projector/config.json",
            {"mm_projector_type": "qformer"},
            "mm_projector_type 'qformer': expected one of linear",
        ),
        ("mm_projector/config.json", {"mm_projector_type": "mlp99x_gelu"}, "expected one of linear"),
        ("config.json", {"image_aspect_ratio": "anyres"}, "'image_aspect_ratio' is 'anyres', expected 'square' or"),
        ("config.json", {"image_aspect_ratio": "dynamic_s2"}, "does not go with scales None"),
        ("config.json", {"s2": True}, "'s2_scales' is missing"),
        ("config.json", {"s2": True, "s2_scales": "46,92", "s2_max_split_size": 92}, "'s2_max_split_size' is 92"),
        (
            "config.json",
            {"s2": True, "s2_scales": "46,100", "s2_max_split_size": 46},
            "expected multiples of the smallest",
        ),
        ("config.json", {"s2": True, "s2_scales": "50,100", "s2_max_split_size": 50}, "expected to start with 46"),
        ("config.json", {"s2": True, "s2_scales": "9" * 30}, "expected numbers with commas"),
        ("config.json", {"mm_vision_select_layer": -9}, "select_layer -9: expected from -3 to -1"),
        ("config.json", {"mm_vision_select_feature": "patch"}, "would drop the first patch"),
        ("config.json", {"vision_resolution": 512}, "'vision_resolution' is 512, expected -1"),
        ("config.json", {"ps3": True}, "'ps3' is True, expected False"),
        ("config.json", {"vila_edge_profile": {"era": "vila1.5"}}, "vila_edge_profile: field .* is missing"),
    ],
)
def test_what_is_not_understood_is_refused(file: str, changes: Any, message: str, checkpoint_copy: Path) -> None:
    edit(checkpoint_copy / file, **changes)
    with pytest.raises(ConfigError, match=message) as error:
        Checkpoint(checkpoint_copy)
    assert file in error.value.message


@pytest.mark.parametrize("missing", ["vision_tower", "mm_projector"])
def test_a_missing_folder_is_named(missing: str, checkpoint_copy: Path) -> None:
    (checkpoint_copy / missing).rename(checkpoint_copy / "other")
    with pytest.raises(CheckpointError, match=f"{missing}: no such folder"):
        Checkpoint(checkpoint_copy)


def test_a_folder_that_is_no_checkpoint(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "llm").rename(checkpoint_copy / "other")
    with pytest.raises(CheckpointError, match="no folder llm/, and config.json has no 'mm_vision_tower'"):
        Checkpoint(checkpoint_copy)


def test_a_checkpoint_without_a_tokenizer(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "llm" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json: missing; expected a tokenizer.json or a tokenizer"):
        Checkpoint(checkpoint_copy)


def test_a_tokenizer_that_is_no_text(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "llm" / "tokenizer.json").write_bytes(b'{"version": "\xff"}')
    with pytest.raises(InputError, match="tokenizer.json: not UTF-8 text: invalid start byte at byte 13"):
        Checkpoint(checkpoint_copy)


def test_a_part_that_may_not_be_entered_is_named(checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close_folder(checkpoint_copy / "llm", monkeypatch)
    with pytest.raises(CheckpointError, match=r"llm/.*: (Permission denied|missing)"):
        Checkpoint(checkpoint_copy)


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
def test_a_json_that_cannot_be_read_is_named(kind: str, checkpoint_copy: Path) -> None:
    path = checkpoint_copy / "llm" / "notes.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"llm/notes.json: .*, expected a part of the checkpoint that can be"):
        Checkpoint(checkpoint_copy).sha256()


def test_weights_that_may_not_be_read_are_not_called_missing(
    checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def denied(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(CheckpointError, match=r"model.safetensors: Permission denied") as error:
        Checkpoint(checkpoint_copy)
    assert error.value.hint.startswith("chmod u+r ")


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "llm").mkdir()
    with pytest.raises(InputError):
        Checkpoint(tmp_path)


def test_a_config_survives_its_plain_form() -> None:
    plain = json.loads(json.dumps(dataclasses.asdict(TINY)))
    assert from_plain(VilaConfig, plain, "manifest") == TINY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": 5}, "manifest.profile: expected an object, found 5"),
        ({"extra": 1}, "manifest: unknown field 'extra'"),
        ({"preprocess": {}}, "manifest.preprocess: field '.*' is missing"),
    ],
)
def test_a_plain_form_that_is_none(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_plain(VilaConfig, dataclasses.asdict(TINY) | changes, "manifest")


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 0), ("hidden_size", -8), ("hidden_size", 1.5), ("hidden_size", True), ("layer_norm_eps", -1.0)],
)
def test_sizes_must_be_positive_numbers(field: str, value: Any) -> None:
    plain = dataclasses.asdict(TINY)
    plain["vision_tower"][field] = value
    with pytest.raises(ConfigError, match=rf"manifest.vision_tower.*{field}.*expected"):
        from_plain(VilaConfig, plain, "manifest")


def test_a_profile_has_only_known_choices() -> None:
    plain = dataclasses.asdict(TINY.profile) | {"token_order": "diagonal"}
    with pytest.raises(ConfigError, match="token_order: expected .*row_major.*column_major.*, found 'diagonal'"):
        from_plain(Profile, plain, "profile")


def test_a_key_that_nobody_asked_for_is_refused() -> None:
    fields = Fields({"a": 1, "mystery": 2}, "config.json")
    assert fields.integer("a") == 1
    with pytest.raises(ConfigError, match="config.json: 'mystery' is set to 2"):
        fields.done()


def test_control_tokens_cannot_be_typed_even_if_the_tokenizer_would_let_them(checkpoint_copy: Path) -> None:
    path = checkpoint_copy / "llm" / "tokenizer.json"
    stored = json.loads(path.read_text())
    for token in stored["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(stored))
    tokenizer = Checkpoint(checkpoint_copy).tokenizer()
    assert tokenizer.token_id("</s>") not in tokenizer.encode("a</s>b")
