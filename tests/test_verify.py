"""`vila-edge verify`: whatever is wrong with a bundle is named, and a sound one passes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from tests.test_cli import Done, in_process
from vila_edge import fsio
from vila_edge.architecture import EMBED_TOKENS
from vila_edge.bundle import MANIFEST, _digest, write_manifest
from vila_edge.bundle import read_manifest as read
from vila_edge.export.onnxruntime_ops import ROPE_COS, ROPE_SIN
from vila_edge.inspection import CHECKS, inspect
from vila_edge.inventory import ROPE_TABLES
from vila_edge.parameters import storage_order
from vila_edge.tensorfile import TensorFile, write_tensors

__all__ = ["in_process"]

LAYER = "weights/llm.layers.000.safetensors"
Q_PROJ = "llm.model.layers.0.self_attn.q_proj"
O_PROJ, QKV_PROJ = Q_PROJ.replace("q_proj", "o_proj"), Q_PROJ.replace("q_proj", "qkv_proj")  # alone, and fused
DECODER = "graphs/onnxruntime/decoder.onnx"
Tensors = dict[str, NDArray[Any]]


def problems(bundle: Path) -> dict[str, list[str]]:
    """Check -> what it found, "skipped" for one that could not be made."""
    found = inspect(bundle)
    assert [check.name for check in found.checks] == list(CHECKS)
    texts = {
        check.name: [p.message for p in check.problems] + ["skipped"] * bool(check.skipped) for check in found.checks
    }
    return {name: messages for name, messages in texts.items() if messages}


def reseal(bundle: Path, **quantization: object) -> None:
    """What a careless exporter would write: the files as they are now, with right digests."""
    said = read(bundle)
    write_manifest(
        bundle,
        name=said.name,
        config=said.config,
        quantization=said.quantization | quantization,
        provenance=said.provenance,
        license_note=said.license,
        parity=said.parity,
    )


def change_config(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    plain = json.loads((bundle / MANIFEST).read_text())
    change(plain["config"])
    (bundle / MANIFEST).write_bytes(fsio.json_bytes(plain | {"digest": _digest(plain)}))


def rewrite(bundle: Path, file: str, change: Callable[[Tensors], object]) -> None:
    """Other tensors in a file of the weights. Graphs still point to where they were."""
    stored = TensorFile(bundle / file)
    tensors = {name: np.array(stored.array(name)) for name in stored.entries}
    change(tensors)
    (bundle / file).unlink()
    write_tensors(bundle / file, tensors, storage_order)
    reseal(bundle)


def rewrite_graph(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(str(bundle / DECODER), load_external_data=False)
    change(model)
    (bundle / DECODER).write_bytes(model.SerializeToString())
    reseal(bundle)


def external(model: onnx.ModelProto, name: str) -> Mapping[str, onnx.StringStringEntryProto]:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return {entry.key: entry for entry in tensor.external_data}


@pytest.mark.parametrize("quantization", ["int4", "fp16", "fp32"])
def test_what_an_export_writes_is_sound(quantization: str, make_bundle: Callable[[str], Path]) -> None:
    assert problems(make_bundle(quantization)) == {}


def test_a_flipped_byte_is_named_whatever_the_file(bundle_copy: Path) -> None:
    names = [MANIFEST, *read(bundle_copy).files]
    for name in names:
        path = bundle_copy / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
        found = problems(bundle_copy)
        first = found["manifest" if name == MANIFEST else "files"]
        assert len(first) == 1
        assert name in first[0]
        assert all(messages == ["skipped"] for check, messages in found.items() if messages != first), found
        path.write_bytes(whole)
    assert len(names) >= 10


def test_every_damaged_file_is_named_not_the_first_alone(bundle_copy: Path) -> None:
    os.truncate(bundle_copy / LAYER, 100)
    (bundle_copy / "tokenizer.json").unlink()
    (bundle_copy / "weights" / "more").write_bytes(b"")
    (bundle_copy / DECODER).write_bytes(bytes((bundle_copy / DECODER).stat().st_size))
    found = problems(bundle_copy)
    assert len(found["files"]) == 4
    for part in (f"{LAYER}: 100 bytes", "tokenizer.json: missing", "more: not listed", f"{DECODER}: changed"):
        assert any(part in message for message in found["files"]), part
    for check in ("parameters", "values", "graphs", "tokenizer", "size"):
        assert found[check] == ["skipped"], check


def test_a_file_that_nothing_reads_is_named(bundle_copy: Path) -> None:
    (bundle_copy / "weights" / "notes.txt").write_text("hello")
    reseal(bundle_copy)
    assert "weights/notes.txt: no part of a bundle reads such a file" in problems(bundle_copy)["files"][0]


def test_a_missing_parameter_is_named(bundle_copy: Path) -> None:
    name = "llm.model.layers.0.input_layernorm.weight"
    rewrite(bundle_copy, LAYER, lambda tensors: tensors.pop(name))
    assert any(name in message for message in problems(bundle_copy)["parameters"])


def test_a_tensor_without_a_use_is_named(bundle_copy: Path) -> None:
    rewrite(bundle_copy, LAYER, lambda tensors: tensors.update({"extra": np.zeros(3, np.float16)}))
    assert "tensor 'extra': no parameter needs it" in problems(bundle_copy)["parameters"][0]


def test_a_parameter_in_two_files_or_two_forms_is_named(bundle_copy: Path) -> None:
    again = {"llm.model.norm.weight": np.zeros(64, np.float16), f"{Q_PROJ}.weight": np.zeros((64, 64), np.float16)}
    rewrite(bundle_copy, LAYER, lambda tensors: tensors.update(again))
    found = problems(bundle_copy)["parameters"]
    assert any("'llm.model.norm.weight' is in " in message for message in found)
    assert any(f"{Q_PROJ}.weight is stored as {Q_PROJ}.qweight and as {Q_PROJ}.weight" in message for message in found)


WRONG_PARTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "type": (lambda t: {"scales": t["scales"].astype(np.float32)}, "scales is F32 [64, 2], expected F16 [64, 2]"),
    "shape": (lambda t: {"qweight": t["qweight"][:, :-1]}, "qweight is U8 [64, 31], expected U8 [64, 32]"),
    "groups": (lambda t: {"scales": t["scales"][:, [0, 1, 1]]}, "3 groups do not divide 64 inputs"),
    "too small groups": (lambda t: {"scales": np.repeat(t["scales"], 4, 1)}, "8 groups do not divide 64 inputs"),
    "zero points": (lambda t: {"qzeros": t["qzeros"][:-1]}, "qzeros is U8 [63, 1], expected U8 [64, 1]"),
}


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_a_tensor_of_another_type_or_shape_is_named(case: str, bundle_copy: Path) -> None:
    change, message = WRONG_PARTS[case]

    def change_all(tensors: Tensors) -> None:
        parts = {part: tensors[f"{Q_PROJ}.{part}"] for part in ("qweight", "scales", "qzeros")}
        tensors |= {f"{Q_PROJ}.{part}": np.ascontiguousarray(values) for part, values in change(parts).items()}

    rewrite(bundle_copy, LAYER, change_all)
    (found,) = problems(bundle_copy)["parameters"]
    assert LAYER in found
    assert f"{Q_PROJ}.{'scales: ' if message[0].isdigit() else ''}{message}" in found


def test_missing_scales_are_named_once(bundle_copy: Path) -> None:
    rewrite(bundle_copy, LAYER, lambda tensors: tensors.pop(f"{Q_PROJ}.scales"))
    (found,) = problems(bundle_copy)["parameters"]
    assert f"{Q_PROJ}.scales: missing" in found


def test_a_form_that_the_manifest_does_not_say_is_named(bundle_copy: Path) -> None:
    for key, value in {"group_size": 64, "symmetric": True, "lm_head": "fp16", "vision": "int8", "bits": 8}.items():
        before = read(bundle_copy).quantization[key]
        reseal(bundle_copy, **{key: value})
        (found,) = problems(bundle_copy)["parameters"]
        assert f"quantization.{key} is {value!r}, but {before} is stored" in found
        reseal(bundle_copy, **{key: before})


def test_the_embedding_table_has_its_own_file(bundle_copy: Path) -> None:
    table = f"{EMBED_TOKENS}.weight"
    values = np.array(TensorFile(bundle_copy / "weights/embed_tokens.safetensors").array(table))
    (bundle_copy / "weights/embed_tokens.safetensors").unlink()
    rewrite(bundle_copy, "weights/llm.safetensors", lambda tensors: tensors.update({table: values}))
    found = problems(bundle_copy)["parameters"]
    assert any("expected in weights/embed_tokens.safetensors" in message for message in found)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_values_that_are_not_finite_are_named(value: float, bundle_copy: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{Q_PROJ}.scales"][-1, -1] = value

    rewrite(bundle_copy, LAYER, spoil)
    found = problems(bundle_copy)
    assert list(found) == ["values"]
    assert f"{LAYER}: {Q_PROJ}.scales has values that are not finite" in found["values"][0]


def test_zero_points_beyond_the_last_group_are_named(bundle_copy: Path) -> None:
    name = "llm.model.layers.0.mlp.down_proj.qzeros"  # 96 inputs, groups of 32: half of the last byte fills it up

    def spoil(tensors: Tensors) -> None:
        tensors[name][5, -1] |= 0x70

    rewrite(bundle_copy, LAYER, spoil)
    assert f"{name} has zero points for groups that are not there" in problems(bundle_copy)["values"][0]


@pytest.mark.parametrize("name", [O_PROJ, QKV_PROJ])
@pytest.mark.parametrize(("key", "by"), [("offset", 2), ("length", -2), ("offset", -64)])
def test_a_graph_that_points_between_tensors_is_named(key: str, by: int, name: str, bundle_copy: Path) -> None:
    def move(model: onnx.ModelProto) -> None:
        entry = external(model, f"{name}.qweight")[key]
        entry.value = str(int(entry.value) + by)

    rewrite_graph(bundle_copy, move)
    found = problems(bundle_copy)
    assert list(found) == ["graphs"]
    assert any(f"{DECODER}: bytes " in message and "are no tensor" in message for message in found["graphs"])


def test_a_graph_that_reads_elsewhere_is_named(bundle_copy: Path) -> None:
    def steal(model: onnx.ModelProto) -> None:
        external(model, f"{O_PROJ}.qweight")["location"].value = "../../secret"

    rewrite_graph(bundle_copy, steal)
    assert "reads weights from '../../secret'" in problems(bundle_copy)["graphs"][0]


def test_a_weight_that_no_graph_reads_is_named(bundle_copy: Path) -> None:
    def repeat(model: onnx.ModelProto) -> None:
        alone, fused = (external(model, f"{name}.scales") for name in (O_PROJ, QKV_PROJ))
        alone["offset"].value = fused["offset"].value  # those of q_proj, which are as many

    rewrite_graph(bundle_copy, repeat)
    (found,) = problems(bundle_copy)["graphs"]
    assert "o_proj.scales: no graph of onnxruntime reads it" in found


def test_a_part_of_a_fused_weight_that_no_graph_reads_is_named(bundle_copy: Path) -> None:
    v_proj = TensorFile(bundle_copy / LAYER).entries[f"{Q_PROJ.replace('q_proj', 'v_proj')}.qweight"]

    def shorten(model: onnx.ModelProto) -> None:
        length = external(model, f"{QKV_PROJ}.qweight")["length"]
        length.value = str(int(length.value) - v_proj.length)

    rewrite_graph(bundle_copy, shorten)
    (found,) = problems(bundle_copy)["graphs"]
    assert "v_proj.qweight: no graph of onnxruntime reads it" in found


def test_every_dialect_has_all_graphs(bundle_copy: Path) -> None:
    shutil.copytree(bundle_copy / "graphs" / "onnxruntime", bundle_copy / "graphs" / "other")
    reseal(bundle_copy)
    assert problems(bundle_copy) == {}
    (bundle_copy / "graphs" / "other" / "decoder.onnx").unlink()
    reseal(bundle_copy)
    assert "graphs/other/decoder.onnx: missing" in problems(bundle_copy)["graphs"][0]
    shutil.rmtree(bundle_copy / "graphs")
    reseal(bundle_copy)
    found = problems(bundle_copy)["graphs"]
    assert sum("graphs/onnxruntime/" in message for message in found) == 5


def test_damaged_graphs_and_headers_are_problems_and_no_crash(bundle_copy: Path) -> None:
    for name in (DECODER, LAYER, "tokenizer.json"):
        whole = (bundle_copy / name).read_bytes()
        for data in (b"", b"\xff" * 300, whole[: len(whole) // 2]):
            (bundle_copy / name).write_bytes(data)
            reseal(bundle_copy)
            assert any(name in message for found in problems(bundle_copy).values() for message in found), (name, data)
        (bundle_copy / name).write_bytes(whole)
    reseal(bundle_copy)
    assert problems(bundle_copy) == {}


def test_a_tokenizer_of_another_model_is_named(bundle_copy: Path) -> None:
    def stop_elsewhere(config: dict[str, Any]) -> None:
        config["profile"]["stop_tokens"] = ["<|im_end|>"]

    def other_template(config: dict[str, Any]) -> None:
        config["profile"] |= {"template": "nonsense", "stop_tokens": ["</s>"]}

    change_config(bundle_copy, stop_elsewhere)
    assert "has none of the stop tokens <|im_end|>" in problems(bundle_copy)["tokenizer"][0]
    change_config(bundle_copy, other_template)
    assert "unknown conversation template 'nonsense'" in problems(bundle_copy)["tokenizer"][0]
    change_config(bundle_copy, lambda config: config["llm"].update(vocab_size=600))
    assert "but the LLM's vocab_size is 600" in problems(bundle_copy)["tokenizer"][0]


def test_a_size_that_is_not_the_parameters_is_named(bundle_copy: Path) -> None:
    least = read(bundle_copy).quantization["parameter_bytes"]
    for stated in (least + 1, None, "1"):
        reseal(bundle_copy, parameter_bytes=stated)
        found = problems(bundle_copy)
        assert list(found) == ["size"]
        assert "manifest.json: quantization.parameter_bytes is " in found["size"][0]


def test_the_rope_tables_go_by_the_exporters_names() -> None:
    assert ROPE_TABLES == (ROPE_COS, ROPE_SIN)


def test_a_rope_table_of_another_context_is_named(bundle_copy: Path) -> None:
    def shorten(tensors: Tensors) -> None:
        tensors[ROPE_COS] = tensors[ROPE_COS][:-1]

    rewrite(bundle_copy, "weights/llm.safetensors", shorten)
    assert f"{ROPE_COS} is F32 [127, 8], expected F32 [128, 8]" in problems(bundle_copy)["parameters"][0]


def test_the_command_tells_by_its_exit_code(
    tiny_bundle: Path, bundle_copy: Path, in_process: Callable[..., Done]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_bundle.rglob("*")}
    done = in_process("verify", tiny_bundle)
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["ok"] * 8
    assert {path: path.stat().st_mtime_ns for path in tiny_bundle.rglob("*")} == before

    for name in (LAYER, DECODER):
        os.truncate(bundle_copy / name, 100)
    done = in_process("verify", tiny_bundle, bundle_copy, bundle_copy / "nowhere")
    assert done.returncode == 3
    assert f"{bundle_copy}: FAILED" in done.stdout
    assert f"{bundle_copy / LAYER}: 100 bytes, the manifest says" in done.stdout
    assert "nowhere: no such directory, expected a bundle" in done.stdout
    assert done.stderr.count("hint: ") == 2  # each once


def test_json_has_every_check_of_every_bundle(
    tiny_bundle: Path, bundle_copy: Path, in_process: Callable[..., Done]
) -> None:
    os.truncate(bundle_copy / LAYER, 100)
    done = in_process("verify", tiny_bundle, bundle_copy, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["passed"], done.stderr) == (3, False, "")
    sound, damaged = found["bundles"]
    assert (sound["passed"], sound["bundle_sha256"]) == (True, read(tiny_bundle).digest)
    assert [check["check"] for check in damaged["checks"]] == list(CHECKS)
    assert [p["file"] for check in damaged["checks"] for p in check["problems"]] == [LAYER]


def test_the_parts_of_a_weight_lie_in_one_file(bundle_copy: Path) -> None:
    moved: Tensors = {}
    scales = f"{Q_PROJ}.scales"
    rewrite(bundle_copy, LAYER, lambda tensors: moved.update({scales: tensors.pop(scales)}))
    rewrite(bundle_copy, "weights/llm.safetensors", lambda tensors: tensors.update(moved))
    (found,) = problems(bundle_copy)["parameters"]
    assert f"{LAYER}: {scales} is in weights/llm.safetensors, expected beside the rest" in found


@pytest.mark.parametrize("command", ["verify", "show"])
def test_neither_torch_nor_onnx_is_needed(command: str, tiny_bundle: Path) -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'transformers')));"
        f"sys.argv = ['vila-edge', {command!r}, {str(tiny_bundle)!r}]; from vila_edge.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
