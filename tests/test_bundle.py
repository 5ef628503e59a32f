"""A bundle is whole and unchanged, or it is refused with the name of the file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.closed import close_folder
from vila_edge import fsio
from vila_edge.bundle import MANIFEST, Bundle
from vila_edge.errors import BundleError

FILES = [
    "tokenizer.json",
    "weights/embed_tokens.safetensors",
    "weights/llm.layers.000.safetensors",
    "weights/llm.layers.001.safetensors",
    "weights/kv_scales.safetensors",
    "weights/llm.safetensors",
    "weights/mm_projector.safetensors",
    "weights/vision_tower.safetensors",
    "graphs/onnxruntime/decoder.onnx",
    "graphs/onnxruntime/decoder_float16.onnx",
    "graphs/onnxruntime/decoder_int8.onnx",
    "graphs/onnxruntime/mm_projector.onnx",
    "graphs/onnxruntime/vision_tower.onnx",
]


def flip_a_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= 1 << offset % 8
    path.write_bytes(data)


def test_a_bundle_lists_all_that_is_in_it(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert sorted(bundle.manifest.files) == sorted(FILES)
    assert bundle.manifest.quantization["method"] == "awq"
    assert bundle.manifest.parity["llm"]["mean_cosine"] > 0.9
    assert bundle.manifest.parity["vision_tower"]["min_cosine"] > 0.999


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_anywhere_is_found(name: str, bundle_copy: Path) -> None:
    path = bundle_copy / name
    whole = path.read_bytes()
    for offset in np.random.default_rng(0).integers(0, len(whole), 10):
        flip_a_bit(path, int(offset))
        with pytest.raises(BundleError, match=f"{name}: changed since the export"):
            Bundle.open(bundle_copy)
        path.write_bytes(whole)
    Bundle.open(bundle_copy)


def test_one_changed_bit_in_the_manifest_is_found(bundle_copy: Path) -> None:
    path = bundle_copy / MANIFEST
    whole = path.read_bytes()
    for offset in np.random.default_rng(0).integers(0, len(whole), 300):
        flip_a_bit(path, int(offset))
        with pytest.raises(BundleError, match=MANIFEST):
            Bundle.open(bundle_copy)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_half_a_bundle_is_refused(name: str, bundle_copy: Path) -> None:
    path = bundle_copy / name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(BundleError, match=f"{name}: .* bytes, the manifest says"):
        Bundle.open(bundle_copy)
    path.unlink()
    with pytest.raises(BundleError, match=f"{name}: missing from the bundle"):
        Bundle.open(bundle_copy)
    path.mkdir()
    with pytest.raises(BundleError, match=f"{name}: missing from the bundle"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_out_of_the_bundle_is_refused(link: str, bundle_copy: Path, tmp_path: Path) -> None:
    moved = bundle_copy / "weights" / ("llm.safetensors" if link == "file" else "")
    shutil.move(moved, tmp_path / "elsewhere")
    moved.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="a link, expected a file of the bundle itself"):
        Bundle.open(bundle_copy)


def test_a_file_that_blocks_its_reader_is_refused_at_once(bundle_copy: Path) -> None:
    (bundle_copy / "tokenizer.json").unlink()
    os.mkfifo(bundle_copy / "tokenizer.json")
    with pytest.raises(BundleError, match="tokenizer.json: missing"):
        Bundle.open(bundle_copy)


def test_a_file_too_many_is_refused(bundle_copy: Path) -> None:
    (bundle_copy / "weights" / "more.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match=r"more.safetensors: not listed in the manifest"):
        Bundle.open(bundle_copy)


def reseal(bundle: Path, **changes: object) -> None:
    """A manifest that a stranger wrote: other content, right digest."""
    from vila_edge.bundle import _digest

    plain = json.loads((bundle / MANIFEST).read_text()) | changes
    (bundle / MANIFEST).write_bytes(fsio.json_bytes(plain | {"digest": _digest(plain)}))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "weights/../x", "Weights/x", ".hidden", "a//b"])
def test_names_that_leave_the_bundle_are_refused(name: str, bundle_copy: Path) -> None:
    reseal(bundle_copy, files={name: {"sha256": "0" * 64, "size": 0}})
    with pytest.raises(BundleError, match="is not the name of a bundle's file"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "something"}, "'format' is 'something'"),
        ({"format_version": 1}, "'format_version' is 1, this version reads 3"),
        ({"files": []}, "expected dict"),
        ({"files": {"tokenizer.json": {"size": 1}}}, "'sha256' is missing"),
        ({"config": {}}, "is missing"),
        ({"surprise": 1}, "unknown field 'surprise'"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(changes: dict[str, object], message: str, bundle_copy: Path) -> None:
    reseal(bundle_copy, **changes)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle_copy)


def test_sizes_that_make_no_model_are_refused(bundle_copy: Path) -> None:
    plain = json.loads((bundle_copy / MANIFEST).read_text())
    plain["config"]["llm"]["num_key_value_heads"] = 3
    reseal(bundle_copy, config=plain["config"])
    with pytest.raises(BundleError, match="num_attention_heads 4 is not a multiple of num_key_value_heads 3"):
        Bundle.open(bundle_copy)


def test_what_is_no_bundle_is_told_from_what_is_none(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(BundleError, match="no such directory") as missing:
        Bundle.open(tmp_path / "nowhere")
    assert "vila-edge export" in missing.value.hint
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="is a checkpoint, expected a bundle"):
        Bundle.open(tiny_checkpoint)
    (tmp_path / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(BundleError, match="not JSON"):
        Bundle.open(tmp_path)


def damaged(bundle: Path, name: str) -> Path:
    """One byte of a file is another one."""
    content = bytearray((bundle / name).read_bytes())
    content[-1] ^= 1
    (bundle / name).write_bytes(content)
    return bundle


def test_weights_that_are_read_meanwhile_are_checked_all_the_same(bundle_copy: Path) -> None:
    with Bundle.checked_meanwhile(bundle_copy) as bundle:
        assert bundle.manifest == Bundle.open(bundle_copy).manifest
    damaged(bundle_copy, "weights/llm.layers.001.safetensors")
    entered = False
    with (
        pytest.raises(BundleError, match=r"llm.layers.001.safetensors: changed since the export"),
        Bundle.checked_meanwhile(bundle_copy),
    ):
        entered = True
        raise RuntimeError("what a runtime makes of damaged weights")
    assert entered


@pytest.mark.parametrize("name", ["graphs/onnxruntime/decoder.onnx", "tokenizer.json"])
def test_what_a_runtime_executes_is_checked_before(bundle_copy: Path, name: str) -> None:
    damaged(bundle_copy, name)
    entered = False
    with pytest.raises(BundleError, match="changed since the export"), Bundle.checked_meanwhile(bundle_copy):
        entered = True
    assert not entered


@pytest.mark.parametrize("folder", [".", "weights"])
def test_a_folder_that_may_not_be_entered_is_named(
    folder: str, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close_folder(bundle_copy / folder, monkeypatch)
    with pytest.raises(BundleError, match="bundle.*: (Permission denied|has no manifest)"):
        Bundle.open(bundle_copy)
