"""What a checkpoint's files tell of its era and its template, what has to be guessed, and what a user may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import test_cli
from tests.families import FAMILIES, shrink, write_checkpoint
from tests.test_checkpoint import edit
from vila_edge.bundle import Bundle
from vila_edge.config import Profile
from vila_edge.errors import ConfigError, UsageError
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.eras import Choices

in_process = test_cli.in_process


def made(name: str, folder: Path) -> Path:
    """A tiny checkpoint of a released family."""
    return write_checkpoint(shrink(FAMILIES[name]), folder)


def profile_of(checkpoint: Path, **choices: Any) -> Profile:
    return Checkpoint(checkpoint, Choices(**choices)).config.profile


@pytest.mark.parametrize(
    ("name", "era", "token_order", "tokenization", "template", "stops"),
    [
        ("VILA-7b", "v1.0", "row_major", "per_chunk", "vicuna_v1", ("</s>",)),
        ("VILA1.5-3b", "vila1.5", "column_major", "per_chunk", "vicuna_v1", ("</s>",)),
        ("NVILA-8B", "nvila", "row_major", "whole", "qwen2", ("<|im_end|>",)),
    ],
)
def test_a_released_family_is_known_by_its_files(
    name: str, era: str, token_order: str, tokenization: str, template: str, stops: tuple[str, ...], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(made(name, tmp_path))
    profile = checkpoint.config.profile
    assert (profile.era, profile.token_order, profile.tokenization) == (era, token_order, tokenization)
    assert (profile.template, profile.stop_tokens) == (template, stops)
    assert checkpoint.warnings == []


@pytest.mark.parametrize("version", ["4.36.2", "4.37.2"])
def test_a_llama_of_the_transformers_of_its_time_is_a_vila_1_5(version: str, tmp_path: Path) -> None:
    folder = made("VILA1.5-3b", tmp_path)
    edit(folder / "llm" / "config.json", transformers_version=version)
    assert Checkpoint(folder).warnings == []
    edit(folder / "llm" / "config.json", transformers_version=None)
    edit(folder / "config.json", transformers_version=version)
    assert Checkpoint(folder).warnings == []


@pytest.mark.parametrize("version", ["4.46.0", "4.3.6", "4.360.0", None])
def test_a_llama_of_a_later_transformers_may_be_of_either_era(version: str | None, tmp_path: Path) -> None:
    folder = made("VILA1.5-3b", tmp_path)
    edit(folder / "llm" / "config.json", transformers_version=version)
    checkpoint = Checkpoint(folder)
    assert (checkpoint.config.profile.era, checkpoint.config.profile.token_order) == ("vila1.5", "column_major")
    (warning,) = checkpoint.warnings
    assert str(folder) in warning
    assert version is None or version in warning
    assert "--era nvila" in warning
    assert "--token-order row_major" in warning
    assert "taken for vila1.5, with column_major tokens" in warning


def test_a_qwen2_of_the_transformers_of_vila_1_5_is_doubtful_too(tmp_path: Path) -> None:
    folder = made("NVILA-Lite-2B", tmp_path)
    edit(folder / "llm" / "config.json", transformers_version="4.37.2")
    checkpoint = Checkpoint(folder)
    assert checkpoint.config.profile.era == "nvila"
    (warning,) = checkpoint.warnings
    assert "--era vila1.5" in warning
    assert "--token-order column_major" in warning


@pytest.mark.parametrize(
    ("folder_name", "template", "other", "stops"),
    [
        ("Llama-3-VILA1.5-8B", "llama_3_may_2024", "llama_3", ("<|end_of_text|>",)),
        ("Llama-3-VILA1.5-8B-Fix", "llama_3", "llama_3_may_2024", ("<|eot_id|>", "<|end_of_text|>")),
    ],
)
def test_llama_3_has_two_templates_and_the_folder_is_asked(
    folder_name: str, template: str, other: str, stops: tuple[str, ...], tmp_path: Path
) -> None:
    folder = made("Llama-3-VILA1.5-8B", tmp_path).rename(tmp_path / folder_name)
    checkpoint = Checkpoint(folder)
    assert (checkpoint.config.profile.template, checkpoint.config.profile.stop_tokens) == (template, stops)
    (warning,) = checkpoint.warnings
    assert f"{template} is used" in warning
    assert f"--template {other}" in warning


def eot_by_tokenizer(folder: Path) -> None:
    edit(folder / "llm" / "tokenizer_config.json", eos_token="<|eot_id|>")


def eot_by_generation_config(folder: Path) -> None:
    edit(folder / "llm" / "generation_config.json", eos_token_id=[499, 502])


@pytest.mark.parametrize("says_so", [eot_by_tokenizer, eot_by_generation_config])
def test_a_llama_3_that_ends_with_eot_is_a_fixed_one(says_so: Any, tmp_path: Path) -> None:
    folder = made("Llama-3-VILA1.5-8B", tmp_path)
    says_so(folder)
    assert profile_of(folder).template == "llama_3"


def test_a_chosen_template_needs_no_warning(tmp_path: Path) -> None:
    folder = made("Llama-3-VILA1.5-8B", tmp_path)
    for template in ("llama_3", "llama_3_may_2024"):
        checkpoint = Checkpoint(folder, Choices(template=template))
        assert checkpoint.config.profile.template == template
        assert checkpoint.warnings == []


def test_a_user_may_say_the_era_and_all_that_it_implies(tmp_path: Path) -> None:
    folder = made("VILA1.5-3b", tmp_path)
    edit(folder / "llm" / "config.json", transformers_version="4.46.0")
    checkpoint = Checkpoint(folder, Choices(era="nvila", template="vicuna_v1"))
    profile = checkpoint.config.profile
    assert (profile.era, profile.token_order, profile.tokenization) == ("nvila", "row_major", "whole")
    assert (profile.template, profile.image_end, profile.video_as) == ("vicuna_v1", "\n", "video")
    assert checkpoint.warnings == []


@pytest.mark.parametrize(("name", "order"), [("VILA1.5-3b", "row_major"), ("NVILA-8B", "column_major")])
def test_a_user_may_say_the_token_order_alone(name: str, order: str, tmp_path: Path) -> None:
    folder = made(name, tmp_path)
    usual, said = profile_of(folder), profile_of(folder, token_order=order)
    assert usual.token_order != order
    assert said.token_order == order
    assert (said.era, said.tokenization, said.template) == (usual.era, usual.tokenization, usual.template)


def test_a_checkpoint_of_our_own_says_what_it_is_and_a_user_may_still_object(tiny_checkpoint: Path) -> None:
    assert profile_of(tiny_checkpoint).template == "vicuna_v1_nosys"
    assert profile_of(tiny_checkpoint, template="vicuna_v1").template == "vicuna_v1"
    assert profile_of(tiny_checkpoint, token_order="row_major").token_order == "row_major"
    assert profile_of(tiny_checkpoint, era="v1.0").era == "v1.0"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"era": "vila2"}, "--era vila2: expected one of v1.0, vila1.5, nvila"),
        ({"token_order": "diagonal"}, "--token-order diagonal: expected one of row_major, column_major"),
        ({"template": "chatml"}, "--template chatml: expected one of vicuna_v1, .*hermes-2.*qwen2"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Choices(**choice)


def test_a_template_whose_control_tokens_are_only_text_is_said(tmp_path: Path) -> None:
    checkpoint = Checkpoint(made("VILA1.5-3b", tmp_path), Choices(template="hermes-2"))
    (warning,) = checkpoint.warnings
    assert "the tokenizer has no token '<|im_start|>', which the template hermes-2 uses" in warning
    assert checkpoint.config.profile.stop_tokens == ("</s>",)


def test_a_template_none_of_whose_stop_tokens_exist_is_refused(tmp_path: Path) -> None:
    folder = made("NVILA-8B", tmp_path)
    edit(folder / "llm" / "tokenizer_config.json", eos_token=None)
    edit(folder / "llm" / "generation_config.json", eos_token_id=None)
    edit(folder / "llm" / "config.json", eos_token_id=None)
    with pytest.raises(ConfigError, match="none of the stop tokens </s>"):
        Checkpoint(folder, Choices(template="vicuna_v1"))


def test_a_foreign_chat_template_is_not_run_but_said(tmp_path: Path) -> None:
    folder = made("NVILA-8B", tmp_path)
    edit(folder / "llm" / "tokenizer_config.json", chat_template="{{ cycler.__init__.__globals__.os.system('x') }}")
    checkpoint = Checkpoint(folder)
    assert checkpoint.config.profile.template == "qwen2"
    (warning,) = checkpoint.warnings
    assert str(folder / "llm" / "tokenizer_config.json") in warning
    assert "carries a chat_template that is not NVILA's; qwen2 is used" in warning
    edit(folder / "llm" / "tokenizer_config.json", chat_template=None)
    assert Checkpoint(folder).warnings == []


def test_a_template_that_config_json_names_is_taken(tmp_path: Path) -> None:
    folder = made("VILA1.5-3b", tmp_path)
    edit(folder / "config.json", chat_template="vicuna_v1_nosys")
    assert profile_of(folder).template == "vicuna_v1_nosys"
    edit(folder / "config.json", chat_template="{{ messages }}")
    assert profile_of(folder).template == "vicuna_v1"


@pytest.mark.parametrize(
    ("eos", "stops"),
    [
        (562, ("<|im_end|>",)),
        ([562, 560], ("<|im_end|>", "<|endoftext|>")),
        ([5, 10**6, True, "x"], ("<|im_end|>",)),  # no control tokens
    ],
)
def test_an_answer_ends_with_the_stops_of_the_template_and_of_generation_config(
    eos: Any, stops: tuple[str, ...], tmp_path: Path
) -> None:
    folder = made("NVILA-8B", tmp_path)
    edit(folder / "llm" / "generation_config.json", eos_token_id=eos)
    assert profile_of(folder).stop_tokens == stops


def test_export_says_what_it_took_the_checkpoint_for_and_the_bundle_keeps_it(tmp_path: Path, in_process: Any) -> None:
    folder, bundle = made("Llama-3-VILA1.5-8B", tmp_path), tmp_path / "bundle"
    edit(folder / "llm" / "config.json", transformers_version="4.46.0")
    done = in_process("export", folder, "-o", bundle, "--quant", "fp32", "--token-order", "row_major")
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr.count("warning: ") == 2
    assert "--era nvila" in done.stderr
    assert "llama_3_may_2024 is used" in done.stderr
    assert "era vila1.5, template llama_3_may_2024, row_major tokens, tokenised per_chunk" in done.stderr
    assert "stops: <|end_of_text|>" in done.stderr
    kept = json.loads((bundle / "manifest.json").read_text())["config"]["profile"]
    assert (kept["era"], kept["token_order"], kept["template"]) == ("vila1.5", "row_major", "llama_3_may_2024")
    assert kept["stop_tokens"] == ["<|end_of_text|>"]
    assert Bundle.open(bundle).config.profile == profile_of(folder, token_order="row_major")


@pytest.mark.parametrize(("option", "value"), [("--era", "x"), ("--token-order", "y"), ("--template", "z")])
def test_export_refuses_unknown_names(option: str, value: str, tmp_path: Path, in_process: Any) -> None:
    done = in_process("export", made("VILA1.5-3b", tmp_path), "-o", tmp_path / "bundle", option, value)
    assert done.returncode == 2
    assert f"error: {option} {value}: expected one of" in done.stderr
    assert not (tmp_path / "bundle").exists()
