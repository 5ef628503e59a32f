"""`vila-edge export` as a user types it: what it prints, and what it says to a wrong call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vila_edge.bundle import Bundle
from vila_edge.export.layouts import PULLED_FROM


def vila_edge(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vila_edge", *map(str, arguments)], capture_output=True, text=True)


def test_an_export_says_what_it_does_and_what_came_out(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ["-g", "32", "--symmetric", "--lm-head", "int4", "--vision", "int8", "--device", "cpu", "--threads", "2"]
    done = vila_edge("export", tiny_checkpoint, "-o", tmp_path / "b", *options, "--license", "mine")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    said = " ".join(done.stderr.split())
    assert "AWQ searches on the CPU" in said
    assert "quantise 2/2" in said
    assert "int4 (awq, symmetric, groups of 32), lm_head int4, vision tower and projector int8;" in said
    assert "same most likely token in" in said
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.manifest.quantization["symmetric"]
    assert bundle.manifest.license == "mine"
    answered = vila_edge("chat", tmp_path / "b", "-n", "3", "hello")
    assert answered.returncode == 0, answered.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quant", "int3"], "--quant int3: expected one of int4, fp16, fp32"),
        (["--lm-head", "int2"], "--lm-head int2: expected one of auto, fp16, int8, int4"),
        (["--vision", "int4"], "--vision int4: expected one of fp16, int8"),
        (["--method", "gptq"], "--method gptq: expected one of awq, rtn"),
        (["--to", "gguf"], "--to gguf: expected bundle or autoawq"),
        (["--to", "autoawq", "--quant", "fp16"], "--to autoawq: that format has decoder blocks in 4 bits"),
        (["--device", "tpu"], "--device tpu: expected cpu, cuda or auto"),
        (["--threads", "-1"], "--threads -1: expected a positive number"),
        (["--gate", "top1"], "--gate top1: expected NAME=NUMBER"),
        (["--gate", "top2=1"], "--gate top2=1: expected NAME=NUMBER"),
        (["--gate", "mean_kl=nan"], "--gate mean_kl=nan: expected NAME=NUMBER"),
        (["--recipe", "VILA-9"], "no recipe 'VILA-9'"),
        (["--calibration-tokens", "0"], "--calibration-tokens 0: expected a positive number"),
        (["--quant", "fp16", "--lm-head", "int8"], "--quant fp16 stores all weights so"),
        (["-g", "48"], "group_size 48: expected a power of two"),
    ],
)
def test_a_wrong_call_is_one_error_and_leaves_nothing(
    options: list[str], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    done = vila_edge("export", tiny_checkpoint, "-o", tmp_path / "b", *options)
    assert done.returncode == 2, done.stderr
    assert f"error: {message}" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_failed_gate_names_the_component_and_where_the_work_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command: list[str | Path] = ["export", tiny_checkpoint, "-o", tmp_path / "b", "-g", "32"]
    done = vila_edge(*command, "--gate", "top1_agreement=1.01")
    assert done.returncode == 1
    assert "error: llm: the same most likely token in" in done.stderr
    assert f"kept in {tmp_path / '.b.work'}" in " ".join(done.stderr.split())
    assert not (tmp_path / "b").exists()
    again = vila_edge(*command)
    assert again.returncode == 0
    assert "going on with what is finished" in again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_pulled_checkpoint_says_where_it_is_from(checkpoint_copy: Path, tmp_path: Path) -> None:
    source = {"repo": "org/name", "revision": "0" * 40, "license": "cc-by-nc-4.0"}
    before = vila_edge("export", checkpoint_copy, "-o", tmp_path / "a", "--quant", "fp16")
    (checkpoint_copy / PULLED_FROM).write_text(json.dumps(source))
    after = vila_edge("export", checkpoint_copy, "-o", tmp_path / "b", "--quant", "fp16")
    assert (before.returncode, after.returncode) == (0, 0), after.stderr
    one, two = (Bundle.open(tmp_path / name).manifest for name in "ab")
    assert (two.provenance["repo"], two.provenance["revision"], two.license) == tuple(source.values())
    assert one.provenance["checkpoint_sha256"] == two.provenance["checkpoint_sha256"]
