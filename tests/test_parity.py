"""`vila-edge parity`: equal where nothing is wrong, and not equal where one thing is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from tests import test_cli
from tests.test_checkpoint import edit
from tests.test_golden import GOLDEN
from vila_edge import preprocess, templates
from vila_edge.config import TokenOrder, VisionConfig
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.parity import PIXEL_TOLERANCE, STAGES, TOLERANCE, PromptParity, measure
from vila_edge.export.recipe import Recipe
from vila_edge.export.run import export_bundle
from vila_edge.reference.engine import numpy_engine
from vila_edge.reference.numpy_ops import Array, NumpyOps

V15, LLAMA_3 = "v15_siglip_mlp_downsample_resize", "v15_llama3_gqa"
in_process = test_cli.in_process


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A VILA1.5 case with three images, to be changed."""
    folder = Path(shutil.copytree(GOLDEN / V15, tmp_path / "case"))
    for name in ("text", "gray_rgba"):
        (folder / f"{name}.json").unlink()
    return folder


def only(stdout: str) -> dict[str, Any]:
    """What `--json` says of the one prompt of the one case."""
    (found,) = json.loads(stdout)["cases"]
    (prompt,) = found["prompts"]
    return dict(prompt)


def test_the_table_has_a_row_for_each_prompt_and_a_column_for_each_stage(in_process: Any) -> None:
    done = in_process("parity", GOLDEN / V15, GOLDEN / "nvila_dynamic_s2")
    assert done.returncode == 0
    assert done.stderr == "all equal\n"
    for column in ("prompt", "text", "ids", *STAGES):
        assert column in done.stdout
    for case, prompts in ((V15, ["multi3", "text"]), ("nvila_dynamic_s2", ["single_wide", "video8_as_video"])):
        assert f"{case} on numpy (reference): largest difference" in done.stdout
        for prompt in prompts:
            (row,) = [line for line in done.stdout.splitlines() if f"│ {prompt} " in line]
            assert row.count("equal") == 2
            assert row.rstrip().endswith("ok │")


def test_json_has_every_stage_of_every_prompt(in_process: Any) -> None:
    done = in_process("parity", GOLDEN / V15, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr, found["passed"]) == (0, "", True)
    assert (found["tolerance"], found["pixel_tolerance"]) == (TOLERANCE, PIXEL_TOLERANCE)
    (case,) = found["cases"]
    assert (case["case"], case["backend"], case["passed"]) == (str(GOLDEN / V15), "numpy (reference)", True)
    prompts = {prompt.pop("prompt"): prompt for prompt in case["prompts"]}
    assert sorted(prompts) == ["gray_rgba", "multi3", "text"]
    for prompt in prompts.values():
        assert set(prompt) == {"passed", "text_equal", "ids_equal", *STAGES}
        assert prompt["passed"] is prompt["text_equal"] is prompt["ids_equal"] is True
    assert prompts["multi3"]["pixel_values"] <= PIXEL_TOLERANCE
    assert 0 < prompts["multi3"]["logits"] <= TOLERANCE
    assert prompts["text"]["pixel_values"] is None  # it has no image


@pytest.mark.parametrize("backend", ["numpy", "torch", "onnxruntime"])
def test_every_backend_computes_the_same(backend: str, case: Path, in_process: Any) -> None:
    done = in_process("parity", case, "--backend", backend, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["cases"][0]["backend"].startswith(backend)
    assert 0 < only(done.stdout)["logits"] <= TOLERANCE


def test_a_tolerance_below_rounding_fails(case: Path, in_process: Any) -> None:
    done = in_process("parity", case, "--tolerance", "1e-9")
    assert done.returncode == 1
    assert "NOT EQUAL" in done.stderr
    assert "FAILED" in done.stdout


def test_one_bad_case_among_good_ones_fails(case: Path, in_process: Any) -> None:
    edit(case / "multi3.json", prompt="x")
    done = in_process("parity", GOLDEN / "v10_linear_crop", case, "--json")
    assert done.returncode == 1
    assert [found["passed"] for found in json.loads(done.stdout)["cases"]] == [True, False]


def test_the_wrong_token_order_shows_in_the_embeddings_and_not_before(case: Path, in_process: Any) -> None:
    done = in_process("parity", case, "--token-order", "row_major", "--json")
    found = only(done.stdout)
    assert done.returncode == 1
    assert found["text_equal"] is found["ids_equal"] is True
    assert found["features"] <= TOLERANCE
    assert found["embeds"] > 100 * TOLERANCE
    assert not found["passed"]


def test_other_token_ids_fail(case: Path, in_process: Any) -> None:
    ids = json.loads((case / "multi3.json").read_text())["input_ids"]
    edit(case / "multi3.json", input_ids=[*ids[:-1], ids[-1] + 1])
    done = in_process("parity", case, "--json")
    found = only(done.stdout)
    assert (done.returncode, found["passed"], found["text_equal"], found["ids_equal"]) == (1, False, True, False)


def test_another_prompt_text_fails(case: Path, in_process: Any) -> None:
    prompt = json.loads((case / "multi3.json").read_text())["prompt"]
    edit(case / "multi3.json", prompt=prompt + " ")
    found = only(in_process("parity", case, "--json").stdout)
    assert (found["passed"], found["text_equal"], found["ids_equal"]) == (False, False, True)
    assert "DIFFERS" in in_process("parity", case).stdout


def test_without_arrays_text_and_ids_alone_are_compared(case: Path, in_process: Any) -> None:
    (case / "multi3.npz").unlink()
    done = in_process("parity", case, "--json")
    found = only(done.stdout)
    assert (done.returncode, found["text_equal"], found["ids_equal"]) == (0, True, True)
    assert [found[stage] for stage in STAGES] == [None] * len(STAGES)
    edit(case / "multi3.json", input_ids=[1])
    assert in_process("parity", case).returncode == 1


def test_an_array_of_another_shape_or_not_finite_is_no_number(case: Path, in_process: Any) -> None:
    with np.load(case / "multi3.npz") as file:
        arrays = dict(file)
    arrays["projected"], arrays["logits"] = arrays["projected"][:2], arrays["logits"] * np.nan
    np.savez(case / "multi3.npz", **arrays)
    done = in_process("parity", case, "--json")
    found = only(done.stdout)
    assert (done.returncode, found["embeds"], found["logits"]) == (1, "not comparable", "not comparable")
    assert found["features"] <= TOLERANCE


def no_prompts(case: Path) -> None:
    (case / "multi3.json").unlink()


def garbage(case: Path) -> None:
    (case / "multi3.npz").write_bytes(b"not an archive")


def truncated(case: Path) -> None:
    data = (case / "multi3.npz").read_bytes()
    (case / "multi3.npz").write_bytes(data[: len(data) // 2])


def corrupted(case: Path) -> None:
    data = bytearray((case / "multi3.npz").read_bytes())
    data[len(data) // 2] ^= 255
    (case / "multi3.npz").write_bytes(data)


def one_array(case: Path) -> None:
    with (case / "multi3.npz").open("wb") as file:
        np.save(file, np.zeros(3))


def pickled(case: Path) -> None:
    np.savez(case / "multi3.npz", logits=np.array([{"a": 1}], object))


def change(**changes: Any) -> Callable[[Path], None]:
    return lambda case: edit(case / "multi3.json", **changes)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (no_prompts, "case: no prompts, expected files <prompt>.json and <prompt>.npz"),
        (garbage, "multi3.npz: not an npz file"),
        (truncated, "multi3.npz: not an npz file"),
        (corrupted, "multi3.npz: not an npz file"),
        (one_array, "multi3.npz: not an npz file"),
        (pickled, "multi3.npz: not an npz file"),
        (change(conv_mode="chatml"), "unknown conversation template 'chatml'"),
        (change(images=["../a", "b", "c"]), "multi3.json: '../a' is not the name of an image in"),
        (change(images=["a", "b", 5]), "multi3.json: 5 is not the name of an image in"),
        (change(images=["a", "b", "nowhere"]), "images/nowhere.png: no such file"),
        (change(images=["a"]), "the prompt has 3 <image> marks, but 1 image came with it"),
        (change(query=None), "multi3.json: neither 'query' nor 'parts'"),
    ],
)
def test_a_case_that_cannot_be_read_is_one_error(
    break_it: Callable[[Path], None], message: str, case: Path, in_process: Any
) -> None:
    break_it(case)
    done = in_process("parity", case)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("error: ") == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "cuda"], "--backend cuda: expected one of numpy, torch, onnxruntime"),
        (["--tolerance", "0"], "--tolerance 0.0: expected a positive number"),
        (["--tolerance", "nan"], "--tolerance nan: expected a positive number"),
        (["--era", "vila2"], "--era vila2: expected one of"),
        (["--backend", "torch", "--bundle", "."], "--backend torch runs checkpoints, not bundles"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(options: list[str], message: str, in_process: Any) -> None:
    done = in_process("parity", GOLDEN / V15, *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_what_had_to_be_guessed_is_said(in_process: Any) -> None:
    done = in_process("parity", GOLDEN / LLAMA_3)
    assert done.returncode == 0
    assert "warning: " in done.stderr
    assert "--template" in done.stderr


@pytest.mark.parametrize("backend", ["numpy", "onnxruntime"])
def test_a_bundle_in_full_precision_is_equal_to_its_checkpoint(backend: str, tmp_path: Path, in_process: Any) -> None:
    bundle = tmp_path / "bundle"
    export_bundle(GOLDEN / V15 / "checkpoint", bundle, Recipe("fp32"), lambda phase, done, total: None)
    done = in_process("parity", GOLDEN / V15, "--bundle", bundle, "--backend", backend)
    assert done.returncode == 0, done.stdout
    done = in_process("parity", GOLDEN / "v15_tied", "--bundle", bundle, "--backend", backend)
    assert done.returncode == 1  # another model's values


def measured(name: str = "multi3", case: str = V15) -> PromptParity:
    checkpoint = Checkpoint(GOLDEN / case / "checkpoint")
    engine = numpy_engine(checkpoint.config, checkpoint.parameters())
    return measure(GOLDEN / case, name, checkpoint.config, checkpoint.tokenizer(), engine)


def check_breaks_at(stage: str, found: PromptParity) -> None:
    """The prompt fails, from this stage on and not before."""
    near = {name: value is not None and value <= TOLERANCE for name, value in found.differences.items()}
    assert not found.passed(TOLERANCE), found
    assert next(name for name in STAGES if not near[name]) == stage, found


def test_nothing_is_wrong_unless_something_is_broken() -> None:
    assert measured().passed(TOLERANCE)


def test_swapped_rows_and_columns_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = NumpyOps.space_to_depth

    def swapped(self: NumpyOps, x: Array, grid: int, block: int, order: TokenOrder) -> Array:
        return fold(self, x, grid, block, "row_major" if order == "column_major" else "column_major")

    monkeypatch.setattr(NumpyOps, "space_to_depth", swapped)
    check_breaks_at("embeds", measured())


def test_features_of_the_last_layer_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VisionConfig, "num_layers_run", property(lambda self: self.num_hidden_layers))
    check_breaks_at("features", measured())


def test_the_exact_gelu_in_siglip_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    gelu = NumpyOps.gelu

    def exact(self: NumpyOps, x: Array, approximate: Literal["none", "tanh"]) -> Array:
        return gelu(self, x, "none")

    monkeypatch.setattr(NumpyOps, "gelu", exact)
    check_breaks_at("features", measured())


def test_another_epsilon_of_the_decoder_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = NumpyOps.rms_norm
    monkeypatch.setattr(NumpyOps, "rms_norm", lambda self, x, name, eps: norm(self, x, name, 1e-3))
    check_breaks_at("logits", measured())


def test_a_bilinear_resize_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "RESAMPLE", Image.Resampling.BILINEAR)
    check_breaks_at("pixel_values", measured())


def test_a_blank_less_in_the_template_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    vicuna = templates.TEMPLATES["vicuna_v1"]
    monkeypatch.setitem(templates.TEMPLATES, "vicuna_v1", dataclasses.replace(vicuna, before_user="USER:"))
    found = measured()
    assert found.text_equal is found.ids_equal is False
    check_breaks_at("inputs_embeds", found)
