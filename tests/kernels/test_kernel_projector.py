"""A bundle's projector as kernels, on a device that here is host memory: every family, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fake_cuda import FakeDevice, FakeStream, as_array
from tests.families import FAMILIES, config_of, shrink
from tests.graphs import handmade_bundle
from tests.kernels.host import Compiled
from tests.kernels.projections import ROUNDING, config, error, image_embeds, projector_parameters
from tests.tiny import random_parameters
from vila_edge import int8
from vila_edge.bundle import Bundle
from vila_edge.config import VilaConfig
from vila_edge.engine.cuda.kernels import Kernels
from vila_edge.engine.cuda.projector import KernelProjector
from vila_edge.errors import BackendError
from vila_edge.kernels.manifest import Manifest
from vila_edge.kernels.store import Image, Version
from vila_edge.parameters import component


def bundle_of(cfg: VilaConfig, parameters: dict[str, Any], folder: Path) -> Bundle:
    others = {name: value for name, value in random_parameters(cfg).items() if component(name) != "mm_projector"}
    return handmade_bundle(cfg, others | parameters, folder / "bundle")


def features_of(cfg: VilaConfig, images: int) -> Any:
    shape = (images, cfg.vision_tower.num_features, cfg.mm_hidden_size)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class Place:
    """Where projectors are opened."""

    device: FakeDevice
    stream: FakeStream
    kernels: Kernels

    def open(self, bundle: Bundle, images: int) -> KernelProjector:
        return KernelProjector(bundle, self.device, self.stream, self.kernels, images)


@pytest.fixture
def place(compiled: Compiled) -> Place:
    def find(manifest: Manifest, file: str, compute_capability: Version, driver: Version) -> Image:
        return Image(compiled.image(file), "built", "built for the CPU")

    device = FakeDevice()
    return Place(device, device.stream(), Kernels(device, find))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_what_the_architecture_computes(family: str, place: Place, tmp_path: Path) -> None:
    cfg = config_of(shrink(FAMILIES[family]), tmp_path)
    parameters = projector_parameters(cfg)
    projector, features = place.open(bundle_of(cfg, parameters, tmp_path), images=2), features_of(cfg, images=3)
    found = projector(features)
    assert found.dtype == np.float32 and found.shape == (3, cfg.tokens_per_image, cfg.llm.hidden_size)
    expected = image_embeds(cfg, parameters, features.astype(np.float16))
    assert error(found, expected) < ROUNDING * 3


def test_weights_of_8_bits(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vila_edge.engine.cuda.upload.PIECE", 1000)  # so that each goes up in several
    cfg = config("mlp_downsample")
    parameters, meant = projector_parameters(cfg), projector_parameters(cfg)
    for name in [name for name, value in parameters.items() if value.ndim == 2]:
        weight = int8.quantize(parameters.pop(name).astype(np.float32))
        parameters |= dict(zip(int8.part_names(name.removesuffix(".weight")), (weight.q, weight.scales), strict=True))
        meant[name] = weight.dequantize(meant[name].shape[1])
    features = features_of(cfg, images=1)
    found = place.open(bundle_of(cfg, parameters, tmp_path), images=1)(features)
    assert error(found, image_embeds(cfg, meant, features.astype(np.float16))) < ROUNDING * 3


def test_images_are_written_among_the_embeddings_of_tokens(place: Place, tmp_path: Path) -> None:
    """By addresses alone, as an engine would whose prompt lies on the device."""
    cfg, device = config("mlp2x_gelu", grid=3), place.device
    parameters, features = projector_parameters(cfg), features_of(cfg, images=2).astype(np.float16)
    projector = place.open(bundle_of(cfg, parameters, tmp_path), images=2)
    x, rows, first = (device.alloc(nbytes) for nbytes in (features.nbytes, 40 * 72 * 2, 8))
    as_array(x.content, np.float16, features.shape)[...] = features
    as_array(first.content, np.int32, (2,))[...] = (25, 4)
    embeds = as_array(rows.content, np.float16, (40, 72))
    embeds.fill(7)
    projector.launch(x.address, rows.address, images=2, first_rows=first.address)
    place.stream.synchronize()
    expected = np.full((40, 72), 7.0)
    expected[25:34], expected[4:13] = image_embeds(cfg, parameters, features)
    assert error(embeds, expected) < ROUNDING * 2
    assert np.array_equal(embeds == 7, expected == 7)


def test_everything_is_given_back(place: Place, tmp_path: Path) -> None:
    cfg, device = config("linear"), place.device
    projector = place.open(bundle_of(cfg, projector_parameters(cfg), tmp_path), images=1)
    assert (device.calls["load_module"], device.calls["kernel"]) == (1, 0), "code is loaded before the first image"
    assert projector.origin == "built" and device.used
    projector.free()
    projector.free()
    assert (device.used, device.pins) == (0, {})


def test_a_gpu_without_code_or_room_says_so_at_load(place: Place, tmp_path: Path) -> None:
    cfg = config("linear")
    bundle = bundle_of(cfg, projector_parameters(cfg), tmp_path)

    def none(manifest: Manifest, file: str, compute_capability: Version, driver: Version) -> Image:
        raise BackendError(f"no code of {file}", "pip install")

    with pytest.raises(BackendError, match="no code of projector.cu"):
        KernelProjector(bundle, place.device, place.stream, Kernels(place.device, none))
    place.device.total = 20_000
    with pytest.raises(BackendError, match="no room for"):
        place.open(bundle, images=1)
    assert (place.device.used, place.device.pins) == (0, {})


def test_widths_that_the_kernels_cannot_read_are_told_with_what_to_do(place: Place, tmp_path: Path) -> None:
    cfg = config("linear", width=12)
    with pytest.raises(BackendError, match="cannot compute this projector: features of 12 ") as caught:
        place.open(bundle_of(cfg, projector_parameters(cfg), tmp_path), images=1)
    assert "--projector engine" in caught.value.hint
