"""`vila-edge show`: what it says of a bundle is what is there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import cuda_engines
from tests.test_cli import Done, in_process
from tests.test_verify import LAYER, reseal, rewrite
from tests.tiny import TINY
from vila_edge import fsio
from vila_edge.bundle import read_manifest
from vila_edge.cli.show import describe
from vila_edge.engine.plan import available_memory
from vila_edge.errors import BundleError, UsageError
from vila_edge.parameters import count_parameters

__all__ = ["in_process"]


def test_the_divergence_says_of_which_from_which(tiny_bundle: Path, in_process: Callable[..., Done]) -> None:
    found = in_process("show", tiny_bundle).stdout
    kl = read_manifest(tiny_bundle).parity["llm"]["mean_kl"]
    assert f"KL(bundle || checkpoint) {kl:.2g}," in found


def test_everything_is_counted_once(tiny_bundle: Path) -> None:
    found = describe(tiny_bundle)
    assert found["parameters"] == count_parameters(TINY)
    size = found["size"]
    rows = {row["component"]: row for row in size["components"]}
    assert sum(row["parameters"] for row in rows.values()) == count_parameters(TINY)
    assert sum(row["bytes"] for row in rows.values()) == size["parameter_bytes"]
    assert size["total_bytes"] == sum(path.stat().st_size for path in tiny_bundle.rglob("*") if path.is_file())
    assert size["total_bytes"] - size["other_bytes"] == size["parameter_bytes"]
    assert rows["embed_tokens"]["bytes"] == 2 * TINY.llm.vocab_size * TINY.llm.hidden_size
    assert rows["decoder blocks"]["forms"] == ["int4", "fp16"]
    assert rows["lm_head"]["forms"] == [read_manifest(tiny_bundle).quantization["lm_head"]]


@pytest.mark.parametrize(("quantization", "bits"), [("fp16", 16), ("fp32", 32)])
def test_bits_of_a_parameter_are_those_of_its_form(
    quantization: str, bits: int, make_bundle: Callable[[str], Path]
) -> None:
    for row in describe(make_bundle(quantization))["size"]["components"]:
        assert 8 * row["bytes"] == bits * row["parameters"] > 0


def test_the_table_is_for_people(tiny_bundle: Path, bundle_copy: Path, in_process: Callable[..., Done]) -> None:
    done = in_process("show", tiny_bundle)
    said = read_manifest(tiny_bundle)
    assert done.returncode == 0
    for text in (
        said.name,
        said.digest[:12],
        "vila1.5, template vicuna_v1_nosys, column_major tokens",
        "siglip, 3 blocks of 32, 46 pixels in patches of 9",
        "mlp_downsample",
        "4 heads on 2, 640 tokens",
        "0.18 M",
        "9 tokens for an image or tile, up to 1 at once",
        "128 positions",
        "awq, 4 bits, asymmetric, groups of 32; lm_head int8, vision fp16",
        said.provenance["calibration"],
        said.provenance["checkpoint_sha256"][:12],
        f"{said.parity['llm']['top1_agreement']:.1%} of positions",
        "not said",
        "4.69",  # bits of a parameter of a decoder block
    ):
        assert text in done.stdout, text
    assert f"verify {tiny_bundle}" in done.stderr


def test_a_bundle_by_hand_need_not_say_how_it_was_made(bundle_copy: Path, in_process: Callable[..., Done]) -> None:
    from vila_edge.bundle import write_manifest

    write_manifest(bundle_copy, name="hand", config=TINY, quantization={}, provenance={}, license_note="CC0", parity={})
    done = in_process("show", bundle_copy)
    assert (done.returncode, done.stdout.count("unknown")) == (0, 5)
    assert "CC0" in done.stdout


def test_contexts_are_planned_as_asked(tiny_bundle: Path, in_process: Callable[..., Done]) -> None:
    found = json.loads(in_process("show", tiny_bundle, "--json").stdout)
    assert [(row["backend"], row["context"]) for row in found["memory"]] == [
        ("onnxruntime", 128),
        ("onnxruntime, int8", 128),
        ("numpy", 128),
        ("tensorrt", 128),
        ("onnxruntime-cuda", 128),
    ]
    assert all(row["total"] >= row["weights"] + row["kv_cache"] for row in found["memory"])
    assert [row["measured"] for row in found["memory"]] == [True, True, True, False, False]
    assert {row["fits"] for row in found["memory"] if not row["measured"]} == {None}
    found = json.loads(in_process("show", tiny_bundle, "--json", "-c", "50").stdout)
    assert {row["context"] for row in found["memory"]} == {50}
    for size in (-1, 129):
        with pytest.raises(UsageError, match=f"--ctx-size {size}: this model has 1 to 128"):
            describe(tiny_bundle, size)


def test_our_own_kernels_are_planned_where_they_run(tmp_path: Path) -> None:
    rows = describe(cuda_engines.bundle_of("llama", tmp_path, [1, 2, 3]).path)["memory"]
    planned = {row["backend"]: row for row in rows if row["backend"].startswith("cuda")}
    assert planned.keys() == {"cuda", "cuda, int8"}
    assert planned["cuda"]["kv_cache"] == 2 * planned["cuda, int8"]["kv_cache"]
    assert not planned["cuda"]["measured"]
    others: dict[str, dict[str, Any]] = {"groups": {"group_size": 32}, "head": {"head": "fp16"}}
    for name, how in others.items():
        rows = describe(cuda_engines.bundle_of("llama", tmp_path / name, **how).path)["memory"]
        assert not any(row["backend"].startswith("cuda") for row in rows)


def test_it_says_what_fits_here(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., Done]
) -> None:
    need = {row["backend"]: row["total"] for row in describe(tiny_bundle)["memory"]}
    for available, fits, largest, text in (
        (need["onnxruntime"], True, 128, "a context of 128 fits on onnxruntime"),
        (need["onnxruntime"] - 1, False, 0, "none of these contexts fits on onnxruntime"),
        (None, None, None, "how much memory is available here is unknown"),
    ):
        monkeypatch.setattr("vila_edge.engine.plan.available_memory", lambda available=available: available)
        found = describe(tiny_bundle)
        assert found["largest_context"] == largest
        assert found["memory"][0]["fits"] is fits
        done = in_process("show", tiny_bundle)
        assert text in done.stderr
        assert {True: " yes ", False: " NO ", None: " unknown "}[fits] in done.stdout


def test_available_memory_is_the_systems_own(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000 kB\nMemFree:  1 kB\nMemAvailable:    5000 kB\n")
    assert available_memory(meminfo) == 5000 * 1024
    meminfo.write_text("MemTotal: 16000 kB\nMemAvailable:\n")
    assert available_memory(meminfo) is None
    assert available_memory(tmp_path / "nowhere") is None


def test_contents_are_not_read_but_all_else_is_checked(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise AssertionError(path)

    monkeypatch.setattr(fsio, "sha256", refuse)
    assert describe(bundle_copy)["name"]
    os.truncate(bundle_copy / LAYER, 100)
    with pytest.raises(BundleError, match=f"{LAYER}: 100 bytes, the manifest says"):
        describe(bundle_copy)
    (bundle_copy / LAYER).unlink()
    with pytest.raises(BundleError, match=f"{LAYER}: missing"):
        describe(bundle_copy)
    (bundle_copy / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="'format' is None"):
        describe(bundle_copy)


def test_a_bundle_that_lacks_a_parameter_is_sent_to_verify(bundle_copy: Path) -> None:
    name = "llm.model.layers.0.input_layernorm.weight"
    rewrite(bundle_copy, LAYER, lambda tensors: tensors.pop(name))
    reseal(bundle_copy)
    with pytest.raises(BundleError, match=f"{name}: missing") as error:
        describe(bundle_copy)
    assert "verify" in error.value.hint
