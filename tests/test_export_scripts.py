"""The scripts in export/: each does its step on a tiny checkpoint, and says in one line what is wrong with a call."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export.common import run_script
from tests.families import FAMILIES, shrink, write_checkpoint
from tests.packed import pack_checkpoint
from tests.tiny import TINY, random_parameters
from vila_edge.bundle import Bundle, file_problems, read_manifest
from vila_edge.export.built_in_samples import built_in
from vila_edge.export.calibration import embed
from vila_edge.export.states import read_states
from vila_edge.parameters import count_parameters
from vila_edge.reference.torch_engine import numpy_parameters_engine
from vila_edge.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
ERRORS = re.compile(r"rounded (\S+), AWQ (\S+),")


class Done(NamedTuple):
    code: object
    out: str
    err: str


Script = Callable[..., Done]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Runs a script in this process."""

    def run(name: str, *arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run_script(importlib.import_module(f"export.{name}").main)
        captured = capsys.readouterr()
        return Done(left.value.code, captured.out, captured.err)

    return run


def errors(out: str) -> list[float]:
    """Of rounding and of AWQ."""
    found = ERRORS.search(out)
    assert found, out
    return [float(number) for number in found.groups()]


def test_scripts_start_as_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "export" / "inspect_checkpoint.py"), str(tiny_checkpoint)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("era vila1.5, template vicuna_v1_nosys")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "export").glob("*.py") if path.stem != "common"))
def test_its_options_are_those_of_its_docstring(name: str, script: Script) -> None:
    said = importlib.import_module(f"export.{name}").__doc__ or ""
    assert f"python export/{name}.py" in said
    done = script(name, "--help")
    assert done.code == 0
    for option in re.findall(r"\[(?:-o )?(--[\w-]+)", said):
        assert option in done.out


def test_inspect_says_what_the_checkpoint_is(tiny_checkpoint: Path, script: Script) -> None:
    done = script("inspect_checkpoint", tiny_checkpoint)
    assert (done.code, done.err) == (0, "")
    for part in ("column_major", "siglip_vision_model, 3 blocks of 32 x 48", "mlp_downsample, 9 tokens", "4 bits  "):
        assert part in done.out
    report = json.loads(script("inspect_checkpoint", tiny_checkpoint, "--json").out)
    assert sum(row["parameters"] for row in report["tensors"]) == count_parameters(TINY)
    assert {row["dtype"] for row in report["tensors"]} == {"F32"}
    assert (report["config"]["llm"]["hidden_size"], report["packed"]) == (64, None)


def test_inspect_says_what_is_packed_and_what_is_uncertain(
    checkpoint_copy: Path, tmp_path: Path, script: Script
) -> None:
    pack_checkpoint(checkpoint_copy, "autoawq-gemm", 32)
    assert "autoawq-gemm, groups of 32, asymmetric" in script("inspect_checkpoint", checkpoint_copy).out
    report = json.loads(script("inspect_checkpoint", checkpoint_copy, "--json").out)
    assert report["packed"]["group_size"] == 32
    assert {row["tensors"] for row in report["tensors"] if row["dtype"] == "I4"} == {14}
    llama_3 = write_checkpoint(shrink(FAMILIES["Llama-3-VILA1.5-8B"]), tmp_path / "llama_3")
    assert "warning: " in script("inspect_checkpoint", llama_3).err
    done = script("inspect_checkpoint", llama_3, "--recipe", "Llama-3-VILA1.5-8B-Fix")
    assert done.err == "" and "template llama_3," in done.out


def test_calibrate_writes_what_the_decoder_is_given(
    tiny_checkpoint: Path, tmp_path: Path, script: Script, tokenizer: Tokenizer
) -> None:
    """Against another engine."""
    engine = numpy_parameters_engine(TINY, random_parameters(TINY))
    for options, samples in (((), built_in().search), (("--held-out",), built_in().held_out)):
        path = tmp_path / f"states{len(options)}"
        done = script("calibrate", tiny_checkpoint, "-o", path, *options)
        assert done.code == 0 and f"{len(samples)} x [" in done.out
        for got, sample in zip(read_states(path), samples, strict=True):
            np.testing.assert_allclose(got, embed(sample, TINY, tokenizer, engine), atol=1e-5)
    before = path.read_bytes()
    done = script("calibrate", tiny_checkpoint, "-o", path)
    assert done.code == 2 and "exists already" in done.err and path.read_bytes() == before


def test_fewer_positions_can_be_asked_for(tiny_checkpoint: Path, tmp_path: Path, script: Script) -> None:
    done = script("calibrate", tiny_checkpoint, "-o", tmp_path / "states", "--calibration-tokens", 300)
    assert 200 < sum(map(len, read_states(tmp_path / "states"))) <= 300
    assert "peak memory" in done.out


def test_a_block_costs_less_with_awq_and_the_same_from_files(
    tiny_checkpoint: Path, tmp_path: Path, script: Script
) -> None:
    """And in the table of all blocks: three ways to the same states."""
    computed = script("quantise_block", tiny_checkpoint, "--layer", 1, "--group-size", 32)
    assert computed.code == 0 and re.search(r"in \d+\.\d s, peak memory [\d,]+ MiB", computed.out)
    rounded, awq = errors(computed.out)
    assert 0 < awq < rounded < 0.1
    files = []
    for option, flag in (("--states", ()), ("--held-out", ("--held-out",))):
        path = tmp_path / option
        script("calibrate", tiny_checkpoint, "--layer", 1, "-o", path, *flag)
        files += [option, path]
    read = script("quantise_block", tiny_checkpoint, "--layer", 1, "--group-size", 32, *files)
    assert errors(read.out) == [rounded, awq]
    table = script("quantisation_error", tiny_checkpoint, "--group-size", 32).out
    assert f"{rounded:.2e} │ {awq:.2e} │" in table and table.count("│\n") == 2


def test_graphs_are_those_of_the_bundle(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, script: Script
) -> None:
    done = script("write_graphs", tiny_checkpoint, "-o", tmp_path / "made", "--group-size", 32)
    assert done.code == 0 and "MatMulNBits" in done.out
    made = sorted(path.relative_to(tmp_path / "made") for path in (tmp_path / "made").rglob("*") if path.is_file())
    assert len(made) == 5 == done.out.count(" nodes ")
    for path in made:
        assert (tmp_path / "made" / path).read_bytes() == (tiny_bundle / path).read_bytes()
    done = script("write_graphs", tiny_checkpoint, "-o", tmp_path / "made", "--quant", "fp16", "--force")
    assert done.code == 0 and "MatMulNBits" not in done.out
    (tmp_path / "made" / "mine").touch()
    done = script("write_graphs", tiny_checkpoint, "-o", tmp_path / "made", "--quant", "fp16", "--force")
    assert done.code == 2 and "holds more than graphs" in done.err and (tmp_path / "made" / "mine").exists()


def test_verify_finds_what_the_export_found(tiny_bundle: Path, tiny_checkpoint: Path, script: Script) -> None:
    done = script("verify_bundle", tiny_bundle, tiny_checkpoint)
    assert done.code == 0 and "warning" not in done.err
    assert "block 1" in done.out and "same most likely token in" in done.out
    assert done.out.count("mean KL(bundle || checkpoint)") == 2  # and with a kv_cache in 8 bits
    report = json.loads(script("verify_bundle", tiny_bundle, tiny_checkpoint, "--json").out)
    assert report == Bundle.open(tiny_bundle).manifest.parity


def test_verify_on_other_samples_changes_no_byte_of_the_bundle(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, script: Script
) -> None:
    """Steps of a kv_cache in 8 bits are part of it, and other samples would give others."""
    (tmp_path / "samples.jsonl").write_text("".join(f'{{"text": "line {i}"}}\n' for i in range(8)))
    report = json.loads(script("verify_bundle", tiny_bundle, tiny_checkpoint, "--calibration", tmp_path, "--json").out)
    assert report["llm"] != Bundle.open(tiny_bundle).manifest.parity["llm"]
    for _, problem in file_problems(tiny_bundle, read_manifest(tiny_bundle).files, contents=True):
        raise problem


def test_verify_fails_if_a_limit_is_broken_and_reports_all_the_same(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, script: Script
) -> None:
    recipe = tmp_path / "strict.toml"
    recipe.write_text("[gate]\nblock_int4 = 0.99999\n")
    done = script("verify_bundle", tiny_bundle, tiny_checkpoint, "--recipe", recipe)
    assert done.code == 1
    assert "lm_head" in done.out
    assert re.search(r"error: llm\S*layers\.0: mean cosine 0\.99\d+ .*expected 0\.99999\n", done.err)


def test_verify_against_other_weights_says_so(tiny_bundle: Path, checkpoint_copy: Path, script: Script) -> None:
    weights = checkpoint_copy / "llm" / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"] = -tensors["lm_head.weight"]
    save_file(tensors, weights)
    done = script("verify_bundle", tiny_bundle, checkpoint_copy)
    assert done.code == 1
    assert "warning: " in done.err and "was made of another checkpoint" in done.err
    assert "error: lm_head: mean cosine -1" in done.err


@pytest.mark.parametrize(
    ("name", "arguments", "code", "message"),
    [
        ("inspect_checkpoint", ["nowhere"], 3, "nowhere: no such directory"),
        ("inspect_checkpoint", ["CHECKPOINT", "--recipe", "vila2"], 2, "no recipe 'vila2'"),
        ("calibrate", ["CHECKPOINT", "-o", "states", "--layer", "2"], 2, "--layer 2: expected from 0 to 1"),
        ("calibrate", ["CHECKPOINT", "-o", "states", "--calibration", "nowhere"], 3, "nowhere/samples.jsonl"),
        ("calibrate", ["CHECKPOINT", "-o", "states", "--threads", "-1"], 2, "--threads -1"),
        ("quantise_block", ["CHECKPOINT", "--layer", "0"], 2, "group_size 128: expected a power of two"),
        ("quantise_block", ["CHECKPOINT", "--layer", "-1", "--group-size", "32"], 2, "--layer -1: expected"),
        ("quantise_block", ["CHECKPOINT", "--layer", "0", "--group-size", "32", "--states", "nowhere"], 3, "nowhere"),
        ("quantise_block", ["CHECKPOINT", "--layer", "0", "--group-size", "32", "--states", "OTHER"], 3, "expected"),
        ("quantise_block", ["PACKED", "--layer", "0", "--group-size", "32"], 2, "is in 4 bits already (autoawq-gemm)"),
        ("quantisation_error", ["PACKED", "--group-size", "32"], 2, "is in 4 bits already (autoawq-gemm)"),
        ("write_graphs", ["CHECKPOINT", "-o", "graphs", "--quant", "int3"], 2, "--quant int3: expected one of int4"),
        ("write_graphs", ["CHECKPOINT", "-o", "graphs"], 2, "group_size 128: expected a power of two"),
        ("verify_bundle", ["CHECKPOINT", "CHECKPOINT"], 3, "is a checkpoint, expected a bundle"),
        ("verify_bundle", ["BUNDLE", "FAMILY"], 3, "its vision_tower is"),
    ],
)
def test_a_wrong_call_is_one_line(
    name: str,
    arguments: list[str],
    code: int,
    message: str,
    script: Script,
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    checkpoint_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pack_checkpoint(checkpoint_copy, "autoawq-gemm", 32)
    save_file({"000000": np.zeros((3, 65), np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "family").mkdir()
    stand_for = {
        "CHECKPOINT": tiny_checkpoint,
        "PACKED": checkpoint_copy,
        "BUNDLE": tiny_bundle,
        "OTHER": tmp_path / "other.safetensors",
        "FAMILY": write_checkpoint(shrink(FAMILIES["VILA1.5-3b"]), tmp_path / "family"),
    }
    monkeypatch.chdir(tmp_path)
    done = script(name, *(stand_for.get(argument, argument) for argument in arguments))
    assert done.code == code
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in done.err
    assert not (tmp_path / "states").exists() and not (tmp_path / "graphs").exists()
