"""Every released family: real configs without their weights, and export and chat on tiny models of the same structure."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.families import FAMILIES, config_of, shrink, write_checkpoint
from vila_edge.export.recipe import Recipe
from vila_edge.export.run import export_bundle
from vila_edge.media.image import load_image
from vila_edge.media.video import Video
from vila_edge.parameters import component, parameter_shapes
from vila_edge.pipeline import Pipeline, Shot, load
from vila_edge.sampler import Sampling
from vila_edge.timing import Timings
from vila_edge.visual import plan

SHORT = Sampling(max_new_tokens=3)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(family: str, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The tiny family after an export to 4 bits."""
    folder = tmp_path_factory.mktemp("family")
    checkpoint = write_checkpoint(shrink(FAMILIES[family]), folder)
    export_bundle(checkpoint, folder / "bundle", Recipe("int4", group_size=16), lambda phase, done, total: None)
    return load(folder / "bundle", threads=1)


def picture(width: int, height: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)


def weights(name: str, part: str, folder: Path) -> int:
    shapes = parameter_shapes(config_of(FAMILIES[name], folder))
    return sum(math.prod(shape) for parameter, shape in shapes.items() if component(parameter) == part)


def test_tokens_per_image_are_those_of_the_table(family: str, tmp_path: Path) -> None:
    assert config_of(FAMILIES[family], tmp_path).tokens_per_image == FAMILIES[family].tokens


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [("Llama-3-VILA1.5-8B", 71.3), ("NVILA-8B", 125), ("NVILA-Lite-8B", 122), ("NVILA-Lite-15B", 160)],
)
def test_projectors_are_as_large_as_the_published_files(name: str, megabytes: float, tmp_path: Path) -> None:
    assert 2 * weights(name, "mm_projector", tmp_path) / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_the_7b_of_v10_is_as_large_as_its_published_shards(tmp_path: Path) -> None:
    """4.94 + 4.95 + 4.24 GB in 16 bits, with the 24 blocks of the CLIP tower (303.5 M) in them."""
    here = weights("VILA-7b", "llm", tmp_path) + weights("VILA-7b", "mm_projector", tmp_path)
    assert 2 * (here + 303.5e6) / 1e9 == pytest.approx(4.94 + 4.95 + 4.24, rel=0.002)


def test_shrinking_keeps_the_structure(family: str, tmp_path: Path) -> None:
    real, tiny = (config_of(f, tmp_path) for f in (FAMILIES[family], shrink(FAMILIES[family])))
    names = [{name for name in parameter_shapes(cfg) if ".layers.1" not in name} for cfg in (real, tiny)]
    assert {name for name in names[1] if component(name) != "llm"} <= names[0]
    assert tiny.profile == real.profile
    assert tiny.llm.heads.query // tiny.llm.heads.key_value == real.llm.heads.query // real.llm.heads.key_value
    assert tiny.tokens_per_image == shrink(FAMILIES[family]).tokens


@pytest.mark.parametrize("count", [1, 2, 16])
def test_prompts_of_many_images(count: int, family: str, pipeline: Pipeline) -> None:
    images = [picture(60 + i, 50) for i in range(count)]
    reply = pipeline.generate("What is the common thing?", images, SHORT)
    assert len(reply.visuals) == count
    assert reply.timings.new_tokens > 0 or reply.finish_reason == "stop"
    end = len(pipeline._image_end)
    if count > 1:
        assert reply.timings.image_tokens == count * (tokens_of(family) + end)


def tokens_of(family: str) -> int:
    return shrink(FAMILIES[family]).tokens


def test_a_video_is_read(family: str, pipeline: Pipeline) -> None:
    video = Video(tuple(load_image(picture(64 + i, 48)) for i in range(8)), "frames")
    reply = pipeline.generate("Describe the video.", [video], SHORT)
    per_frame = tokens_of(family) + len(pipeline._image_end)
    pooled = 1 if pipeline.config.video.pool_sizes else 8
    assert reply.timings.image_tokens == pooled * per_frame


def test_examples_go_in_front_of_the_question(pipeline: Pipeline) -> None:
    shots = [Shot(picture(50, 50), "dax"), Shot(picture(60, 50), "wug")]
    turn, media = pipeline.ask("", [picture(70, 50)], shots)
    lead = "<image>" if pipeline.config.profile.era == "nvila" else "<image>\n"
    assert turn.text == f"<image>\ndax\n<image>\nwug\n{lead}"
    assert [medium.sha256 for medium in media] == [load_image(picture(w, 50)).sha256 for w in (50, 60, 70)]


def test_one_large_image_of_each_tiling_family(tmp_path: Path) -> None:
    """Spec 2.4: Lite 121 tokens a tile with a thumbnail, dynamic_s2 256 times 9 to 12, all with a newline."""
    wide = load_image(picture(1344, 448))
    lite = plan([wide], config_of(FAMILIES["NVILA-Lite-8B"], tmp_path), end_length=1)[0]
    assert lite.slot_lengths == (122,) * 4  # 3 x 1 and the thumbnail
    assert lite.expansion == "<image>\n" * 4
    scaled = plan([wide], config_of(FAMILIES["NVILA-8B"], tmp_path), end_length=1)[0]
    assert (scaled.layout.rows, scaled.layout.columns) == (2, 6)
    assert scaled.slot_lengths == (12 * 256 + 1,)
    pair = plan([wide, wide], config_of(FAMILIES["NVILA-8B"], tmp_path), end_length=1)
    assert [visual.slot_lengths for visual in pair] == [(257,), (257,)]


def test_an_image_seen_in_tiles_is_looked_at_anew_beside_another(pipeline: Pipeline) -> None:
    wide, other = load_image(picture(300, 80)), load_image(picture(80, 80))
    pipeline.generate("Describe.", [wide], SHORT)
    visuals = pipeline.plan([wide, other])
    lengths = [len(slot) for slot in pipeline._slot_embeds(visuals, Timings())]
    assert lengths == [length for visual in visuals for length in visual.slot_lengths]
