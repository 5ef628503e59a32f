"""Where the parts of a checkpoint lie, in what form, and one error for each way in which they may not."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tests import test_cli
from tests.families import FAMILIES, shrink, write_checkpoint
from tests.test_checkpoint import edit
from tests.test_eras import made
from vila_edge.errors import CheckpointError, InputError
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.eras import Choices

TOWER, WEIGHTS = "clip-vit-large-patch14-336", "model.safetensors"
Parameters = dict[str, NDArray[np.float32]]
in_process = test_cli.in_process


@pytest.fixture
def v10(tmp_path: Path) -> Path:
    """A v1.0 checkpoint; its tower lies beside it."""
    return made("VILA-7b", tmp_path)


@pytest.fixture
def v15(tmp_path: Path) -> Path:
    return made("VILA1.5-3b", tmp_path)


def same(found: Parameters, want: Parameters) -> bool:
    return found.keys() == want.keys() and all(np.array_equal(found[name], want[name]) for name in want)


def add_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(load_file(path) | tensors, path)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (f"openai/{TOWER}", TOWER),  # beside the checkpoint
        (f"openai/{TOWER}", f"openai/{TOWER}"),
        (f"openai/{TOWER}/", f"checkpoint/{TOWER}"),  # in it
        (f"openai/{TOWER}", "checkpoint/vision_tower"),
        ("../towers/clip", "towers/clip"),  # a path
        ("{here}/anywhere/clip", "anywhere/clip"),
    ],
)
def test_the_tower_of_v10_is_found(name: str, place: str, v10: Path, tmp_path: Path) -> None:
    want = Checkpoint(v10).parameters()
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / TOWER).rename(tmp_path / place)
    edit(v10 / "config.json", mm_vision_tower=name.format(here=tmp_path))
    assert same(Checkpoint(v10).parameters(), want)


def test_a_tower_that_the_user_names_goes_before_the_one_that_is_there(v10: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tmp_path / TOWER, tmp_path / "far" / "other"))
    tensors = load_file(other / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / WEIGHTS)
    name = "vision_tower.vision_model.embeddings.class_embedding"
    usual, said = Checkpoint(v10), Checkpoint(v10, Choices(vision_tower=other))
    np.testing.assert_allclose(said.parameter(name), usual.parameter(name) + 1, atol=2e-3)
    with pytest.raises(CheckpointError, match="nowhere: no such folder, expected a vision tower"):
        Checkpoint(v10, Choices(vision_tower=tmp_path / "nowhere"))


def test_a_missing_tower_is_one_error_that_says_what_to_do(v10: Path, tmp_path: Path, in_process: Any) -> None:
    (tmp_path / TOWER).rename(tmp_path / "elsewhere")
    done = in_process("export", v10, "-o", tmp_path / "bundle", "-g", "16")
    assert done.returncode == 3
    assert done.stderr.count("error: ") == 1
    assert f"config.json: the vision tower 'openai/{TOWER}' is not here" in done.stderr
    assert f"hint: download it and put it beside the checkpoint as {tmp_path / TOWER}" in done.stderr
    assert "--vision-tower DIR" in done.stderr
    options = ["--quant", "fp32", "--vision-tower", tmp_path / "elsewhere"]
    assert in_process("export", v10, "-o", tmp_path / "bundle", *options).returncode == 0


@pytest.mark.parametrize("name", [None, "", 5, ["a"]])
def test_the_name_of_a_tower_is_text(name: Any, v10: Path) -> None:
    path = v10 / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mm_vision_tower": name}))
    with pytest.raises(CheckpointError, match="'mm_vision_tower' is .*, expected a path or a name"):
        Checkpoint(v10)


def test_a_tower_inside_the_main_weights_is_not_read(v10: Path) -> None:
    """The original reads the tower's own folder."""
    want = Checkpoint(v10).parameters()
    name = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    add_tensors(v10 / WEIGHTS, {name: torch.full((24,), torch.nan), "model.vision_tower.mystery": torch.ones(2)})
    assert same(Checkpoint(v10).parameters(), want)


def test_the_tower_may_be_one_half_of_a_whole_clip(v10: Path, tmp_path: Path) -> None:
    want = Checkpoint(v10).parameters()
    folder = tmp_path / TOWER
    vision = json.loads((folder / "config.json").read_text())
    del vision["model_type"]
    whole = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 16, "text_config": {"x": 1}}
    (folder / "config.json").write_text(json.dumps(whole | {"vision_config": vision}))
    beside = ["text_model.final_layer_norm.weight", "text_projection.weight", "visual_projection.weight", "logit_scale"]
    beside += ["vision_model.post_layernorm.weight", "vision_model.embeddings.position_ids"]
    add_tensors(folder / WEIGHTS, {name: torch.ones(2) for name in beside})
    assert same(Checkpoint(v10).parameters(), want)
    edit(folder / "config.json", vision_config=vision | {"mystery": 1})
    with pytest.raises(InputError, match="config.json: vision_config: 'mystery' is set to 1"):
        Checkpoint(v10)


def test_the_digest_follows_the_weights_of_the_tower(v10: Path, tmp_path: Path) -> None:
    before = Checkpoint(v10).sha256()
    path = tmp_path / TOWER / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert Checkpoint(v10).sha256() != before
    path.write_bytes(data)
    assert Checkpoint(v10).sha256() == before
    edit(path.with_name("preprocessor_config.json"), image_mean=[0.5, 0.5, 0.5])
    assert Checkpoint(v10).sha256() != before


@pytest.mark.parametrize("tower_name", [f"openai/{TOWER}", f"../{TOWER}"])
def test_the_digest_does_not_depend_on_where_the_checkpoint_lies(
    tower_name: str, v10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(v10 / "config.json", mm_vision_tower=tower_name)
    before = Checkpoint(v10).sha256()
    copy = tmp_path / "copy"
    for folder in (v10, tmp_path / TOWER):
        shutil.copytree(folder, copy / folder.name)
    assert Checkpoint(copy / "checkpoint").sha256() == before
    monkeypatch.chdir(tmp_path)
    assert Checkpoint("checkpoint").sha256() == before


@pytest.mark.parametrize("name", ["VILA-7b", "VILA1.5-3b", "NVILA-Lite-2B"])
@pytest.mark.parametrize("shards", [1, 2])
def test_weights_of_torch_are_the_same_parameters(name: str, shards: int, tmp_path: Path) -> None:
    checkpoint = made(name, tmp_path)
    want = Checkpoint(checkpoint).parameters()
    for path in [*tmp_path.rglob(WEIGHTS)]:
        tensors = load_file(path)
        path.unlink()
        save_bin(tensors, path.parent, shards)
    opened = Checkpoint(checkpoint)
    assert same(opened.parameters(), want)
    assert {stored.file.path.suffix for stored in opened.files.tensors.values()} == {".bin"}


def save_bin(tensors: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map: dict[str, str] = {}
    for number in range(shards):
        shard = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        names = list(tensors)[number::shards]
        torch.save({name: tensors[name] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


class RunsACommand(str):
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (str(self),))


def test_a_pickle_that_would_run_something_is_refused_and_nothing_runs(v15: Path, tmp_path: Path) -> None:
    folder, proof = v15 / "llm", tmp_path / "was-run"
    tensors: dict[str, Any] = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors | {"evil": RunsACommand(f"touch {proof}")}, path)
    with pytest.raises(CheckpointError, match=r"llm/pytorch_model.bin: data.pkl names '\w+.system'.*nothing was run"):
        Checkpoint(v15)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # the trap was a real one


def test_safetensors_go_before_weights_of_torch(v15: Path) -> None:
    want = Checkpoint(v15).parameters()
    (v15 / "llm" / "pytorch_model.bin").write_bytes(b"not read")
    assert same(Checkpoint(v15).parameters(), want)


def test_a_model_that_was_saved_as_one(v15: Path) -> None:
    """The previews: tensors at the root, with the names that the whole model has for them."""
    want = Checkpoint(v15).parameters()
    whole: dict[str, torch.Tensor] = {}
    for part, lead in (
        ("llm", "llm."),
        ("vision_tower", "vision_tower.vision_tower."),
        ("mm_projector", "mm_projector."),
    ):
        path = v15 / part / WEIGHTS
        whole |= {lead + name: tensor for name, tensor in load_file(path).items()}
        path.unlink()
    assert {"vision_tower.vision_tower.vision_model.embeddings.patch_embedding.bias"} < whole.keys()
    save_file(whole, v15 / WEIGHTS)
    assert same(Checkpoint(v15).parameters(), want)
    save_file(whole | {"mystery.weight": torch.ones(2)}, v15 / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"model.safetensors: holds 'mystery.weight'"):
        Checkpoint(v15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_of_any_width_are_read_as_they_are(dtype: torch.dtype, form: str, v15: Path) -> None:
    folder = v15 / "llm"
    exact = {name: (value.float() * 1.2345).to(dtype) for name, value in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    save_bin(exact, folder, 1) if form == "bin" else save_file(exact, folder / WEIGHTS)
    checkpoint = Checkpoint(v15)
    for name, value in exact.items():
        found = checkpoint.parameter(f"llm.{name}")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, value.float().numpy())


def test_tied_embeddings_need_no_head_and_ignore_a_stored_one(tmp_path: Path) -> None:
    checkpoint = made("NVILA-Lite-2B", tmp_path)
    path = checkpoint / "llm" / WEIGHTS
    assert "lm_head.weight" not in load_file(path)
    want = Checkpoint(checkpoint).parameters()
    assert "llm.lm_head.weight" not in want
    add_tensors(path, {"lm_head.weight": load_file(path)["model.embed_tokens.weight"]})
    assert same(Checkpoint(checkpoint).parameters(), want)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def reshape(path: Path, name: str) -> None:
    add_tensors(path, {name: load_file(path)[name][:-1].contiguous()})


def dangle(folder: Path) -> None:
    """An index whose shards are not there, and nothing in their place."""
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00004.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_shard(folder: Path) -> None:
    save_bin(load_file(folder / WEIGHTS), folder, 2)
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def lose_the_head(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / WEIGHTS)


YARN = {"rope_type": "yarn", "factor": 4.0}
BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("VILA-7b", lose_a_shard, "checkpoint/pytorch_model-00002-of-00002.bin: missing .*index.json names"),
    ("NVILA-8B", lambda c: dangle(c / "llm"), "llm/model-00001-of-00004.safetensors: missing .*index.json names"),
    ("NVILA-8B", lambda c: (c / "mm_projector" / WEIGHTS).unlink(), "mm_projector/model.safetensors: missing"),
    ("VILA1.5-3b", lambda c: reshape(c / "llm" / WEIGHTS, "model.norm.weight"), r"'model.norm.weight' has shape .63"),
    ("VILA-7b", lambda c: reshape(c / WEIGHTS, "model.mm_projector.2.bias"), r"tensor 'model.mm_projector.2.bias' has"),
    ("VILA1.5-3b", lambda c: cut_off(c / "vision_tower" / WEIGHTS), "vision_tower/model.safetensors: not a whole"),
    ("VILA-7b", lambda c: cut_off(c.parent / TOWER / WEIGHTS), f"{TOWER}/model.safetensors: not a whole"),
    ("VILA-7b", lambda c: edit(c / "config.json", mm_projector_type="cabs"), "/config.json: mm_projector_type 'cabs'"),
    ("NVILA-8B", lambda c: edit(c / "llm/config.json", rope_scaling=YARN), "llm/config.json: rope_scaling: 'rope_ty"),
    ("VILA1.5-3b", lambda c: lose_the_head(c / "llm"), "llm: no tensor 'lm_head.weight', expected shape"),
]


@pytest.mark.parametrize(("name", "break_it", "message"), BROKEN)
def test_what_is_broken_is_one_error_that_names_it(
    name: str, break_it: Callable[[Path], object], message: str, tmp_path: Path, in_process: Any
) -> None:
    checkpoint = made(name, tmp_path)
    break_it(checkpoint)
    done = in_process("export", checkpoint, "-o", tmp_path / "bundle", "--quant", "fp32")
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.count("error: ") == 1
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bundle").exists()


def test_a_download_cache_of_links_is_read(tmp_path: Path) -> None:
    """Hub caches keep each file once and link to it."""
    real = write_checkpoint(shrink(FAMILIES["VILA1.5-3b"]), tmp_path)
    linked = tmp_path / "snapshot"
    for path in sorted(real.rglob("*")):
        place = linked / path.relative_to(real)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            place.symlink_to(path)
    assert Checkpoint(linked).sha256() == Checkpoint(real).sha256()
    assert Checkpoint(linked).config == Checkpoint(real).config
