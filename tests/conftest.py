"""Tiny models that every test can afford, and the markers that skip."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.kernels.host import Compiled
from tests.tiny import TINY, random_parameters
from vila_edge.export.recipe import Recipe
from vila_edge.export.run import export_bundle
from vila_edge.micro.tokens import TOKENIZER_CONFIG, make_tokenizer
from vila_edge.pipeline import Pipeline, load
from vila_edge.tokenizer import Tokenizer
from vila_edge.train.checkpoint import save_checkpoint
from vila_edge.train.model import Vila


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("VILA_EDGE_FAKE_DRIVER"):  # of tests/kernels/test_pycuda.py
        return
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is left in the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    """Kernels compiled for the CPU, each file once a session."""
    compiled = Compiled(tmp_path_factory.mktemp("kernels"))
    with compiled.beside():
        yield compiled


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tokenizer(tokenizer_json: str) -> Tokenizer:
    return Tokenizer(tokenizer_json, config=TINY.tokenizer)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> Path:
    """A checkpoint in the VILA1.5 layout with random weights. Copy it to change it."""
    model = Vila(TINY)
    parameters = random_parameters(TINY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
            if stored in parameters:
                parameter.copy_(torch.from_numpy(parameters[stored]))
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    folder.mkdir()
    save_checkpoint(model, tokenizer_json, folder, TOKENIZER_CONFIG)
    return folder


@pytest.fixture(scope="session")
def make_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Export the tiny checkpoint, once for each quantisation."""
    made: dict[str, Path] = {}

    def make(quantization: str) -> Path:
        if quantization not in made:
            target = tmp_path_factory.mktemp("bundles") / quantization
            recipe = Recipe(quantization, group_size=32)  # type: ignore[arg-type]
            export_bundle(tiny_checkpoint, target, recipe, lambda phase, done, total: None)
            made[quantization] = target
        return made[quantization]

    return make


@pytest.fixture(scope="session")
def tiny_bundle(make_bundle: Callable[[str], Path]) -> Path:
    """The tiny checkpoint in 4 bits. Copy it to change it."""
    return make_bundle("int4")


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def pipeline(tiny_bundle: Path) -> Pipeline:
    return load(tiny_bundle, threads=1)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three image files of noise."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = [folder / f"{name}.png" for name in "abc"]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return paths
