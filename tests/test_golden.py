"""Every family against golden cases, stage by stage: text, token ids, pixels, features, embeddings, logits."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.graphs import graph_engine
from vila_edge.engine.protocol import Engine
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.parity import TOLERANCE, case_prompts, measure
from vila_edge.prompt import Turn, prompt_text, render
from vila_edge.reference.engine import numpy_engine
from vila_edge.reference.torch_engine import numpy_parameters_engine
from vila_edge.templates import get_template
from vila_edge.tiles import closest_grid

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/checkpoint"))
ENGINES: dict[str, Callable[..., Engine]] = {
    "numpy": numpy_engine,
    "torch": numpy_parameters_engine,
    "onnxruntime": graph_engine,
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Checkpoint]]:
    folder = GOLDEN / request.param
    yield folder, Checkpoint(folder / "checkpoint")


@pytest.mark.parametrize("backend", ENGINES)
@torch.inference_mode()
def test_every_stage_equals_the_original(backend: str, case: tuple[Path, Checkpoint], tmp_path: Path) -> None:
    folder, checkpoint = case
    cfg, params = checkpoint.config, checkpoint.parameters()
    place = (tmp_path / "bundle",) if backend == "onnxruntime" else ()
    engine = ENGINES[backend](cfg, params, *place)
    for prompt in case_prompts(folder):
        found = measure(folder, prompt, cfg, checkpoint.tokenizer(), engine)
        assert found.text_equal, found
        assert found.ids_equal, found
        assert found.differences["logits"] is not None
        assert found.passed(TOLERANCE), found


@pytest.mark.parametrize(
    ("name", "era", "token_order", "template"),
    [
        ("v10_linear_crop", "v1.0", "row_major", "vicuna_v1"),
        ("v15_siglip_mlp_downsample_resize", "vila1.5", "column_major", "vicuna_v1"),
        ("v15_hermes_pad_decoder", "vila1.5", "column_major", "hermes-2"),
        ("nvila_dynamic_s2", "nvila", "row_major", "qwen2"),
    ],
)
def test_the_era_is_detected_from_the_files(name: str, era: str, token_order: str, template: str) -> None:
    checkpoint = Checkpoint(GOLDEN / name / "checkpoint")
    profile = checkpoint.config.profile
    assert (profile.era, profile.token_order, profile.template) == (era, token_order, template)
    assert checkpoint.warnings == []


def test_the_smallest_of_the_stored_limits_is_the_context() -> None:
    config = Checkpoint(GOLDEN / "v15_siglip_mlp_downsample_resize" / "checkpoint").config
    assert config.llm.context_length == 512  # the stored model_max_length is below the 1024 positions


def test_tiling_tables() -> None:
    """Some thousand sizes, a third of them with an exact tie between two grids."""
    with (GOLDEN / "tiling.csv").open() as file:
        rows = [tuple(map(int, row)) for row in csv.reader(file) if not row[0].startswith("#")]
    assert len(rows) > 3000
    for width, height, columns, dynamic_rows, *block in rows:
        assert closest_grid(width, height, 448, 1, 12) == (dynamic_rows, columns), (width, height)
        assert closest_grid(width, height, 448, 9, 12) == tuple(block), (width, height)


def _templates() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((GOLDEN / "templates.json").read_text())
    return found


@pytest.mark.parametrize("case_", _templates(), ids=lambda c: f"{c['template']}-{len(c['turns'])}")
def test_prompt_strings_of_every_template(case_: dict[str, Any]) -> None:
    strip = case_["template"] == "qwen2"
    turns = [
        Turn("assistant" if i % 2 else "user", text.strip() if strip else text) for i, text in enumerate(case_["turns"])
    ]
    assert prompt_text(render(turns, get_template(case_["template"]))) == case_["prompt"]


def test_a_wrong_model_does_not_pass() -> None:
    """The comparison itself can fail: one bit of one weight's largest value is seen in the logits."""
    folder = GOLDEN / "v10_linear_crop"
    checkpoint = Checkpoint(folder / "checkpoint")
    params = checkpoint.parameters()
    params["llm.model.norm.weight"] = params["llm.model.norm.weight"] * np.float32(1.001)
    found = measure(folder, "text", checkpoint.config, checkpoint.tokenizer(), numpy_engine(checkpoint.config, params))
    assert not found.passed(TOLERANCE)
    assert found.differences["inputs_embeds"] == 0
