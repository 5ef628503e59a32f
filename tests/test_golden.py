"""A checkpoint of VILA1.5's own layout against values that the original implementation computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.graphs import graph_engine
from tests.test_architecture import torch_engine
from vila_edge.engine.protocol import Engine
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.media.image import load_image
from vila_edge.preprocess import preprocess
from vila_edge.reference.engine import numpy_engine

CASE = Path(__file__).parent / "golden" / "vila1_5"
CHECKPOINT = Checkpoint(CASE / "checkpoint")
ENGINES: dict[str, Callable[..., Engine]] = {
    "numpy": numpy_engine,
    "torch": torch_engine,
    "onnxruntime": graph_engine,
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    make = ENGINES[request.param]
    if make is graph_engine:
        return make(CHECKPOINT.config, CHECKPOINT.parameters(), tmp_path_factory.mktemp("golden"))
    return make(CHECKPOINT.config, CHECKPOINT.parameters())


@pytest.mark.parametrize("prompt", ["single", "multi3"])
@torch.inference_mode()
def test_every_stage_equals_the_original(prompt: str, engine: Engine) -> None:
    case: dict[str, Any] = json.loads((CASE / f"{prompt}.json").read_text())
    want: dict[str, NDArray[np.float32]] = dict(np.load(CASE / f"{prompt}.npz"))
    images = [load_image(CASE / "images" / f"{name}.png") for name in case["images"]]

    pixel_values = preprocess(images, CHECKPOINT.config.preprocess)
    np.testing.assert_allclose(pixel_values, want["pixel_values"], atol=1e-6)
    features = engine.encode_images(pixel_values)
    np.testing.assert_allclose(features, want["vision_features"], atol=1e-4)
    image_embeds = engine.project(features)
    np.testing.assert_allclose(image_embeds, want["projected"], atol=1e-4)

    slots = iter(image_embeds)
    embeds = np.concatenate(
        [next(slots) if token == -200 else engine.embed_tokens([token]) for token in case["input_ids"]]
    )
    np.testing.assert_allclose(embeds, want["inputs_embeds"].reshape(embeds.shape), atol=1e-4)
    logits = engine.forward(embeds, engine.new_cache(512), range(len(embeds)))
    np.testing.assert_allclose(logits, want["logits"].reshape(logits.shape), atol=1e-4)


def test_the_era_is_detected_from_the_files() -> None:
    assert CHECKPOINT.config.profile.era == "vila1.5"
    assert CHECKPOINT.config.profile.token_order == "column_major"
    assert CHECKPOINT.config.llm.context_length == 512  # the stored model_max_length is below the 1024 positions
