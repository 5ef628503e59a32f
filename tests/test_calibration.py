"""Calibration samples: the built-in ones, and a user's folder with its mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny import TINY, random_parameters
from vila_edge.errors import InputError
from vila_edge.export import calibration
from vila_edge.export.built_in_samples import built_in, calibration_set
from vila_edge.export.calibration import Sample, choose, embed, read_samples, too_few, write_samples
from vila_edge.reference.torch_engine import numpy_parameters_engine
from vila_edge.tokenizer import Tokenizer


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((20, 30), value, np.uint8))


def test_the_built_in_samples_have_text_and_images(tokenizer: Tokenizer) -> None:
    samples = built_in()
    kinds = [len(sample.images) for sample in samples.search]
    assert {0, 1, 2} <= set(kinds)
    assert {len(sample.images) for sample in samples.held_out} == {0, 1, 2}
    engine = numpy_parameters_engine(TINY, random_parameters(TINY))
    sequences = [embed(sample, TINY, tokenizer, engine) for sample in samples.search]
    assert all(1 < len(x) <= TINY.llm.context_length and x.shape[1] == 64 for x in sequences)
    assert sum(map(len, sequences)) >= 512
    assert [sample.positions(tokenizer, TINY) for sample in samples.search] == [len(x) for x in sequences]


def test_of_a_long_sample_the_beginning_is_taken(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence without its bos, or from the middle of an image on, is none that the model was trained on."""
    engine = numpy_parameters_engine(TINY, random_parameters(TINY))
    (sample, *_) = built_in().search
    whole = embed(sample, TINY, tokenizer, engine)
    monkeypatch.setattr(calibration, "SAMPLE_TOKENS", 20)
    np.testing.assert_array_equal(embed(sample, TINY, tokenizer, engine), whole[:20])
    assert sample.positions(tokenizer, TINY) == 20


def test_an_image_longer_than_a_sample_is_read_whole(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = next(sample for sample in built_in().search if len(sample.images) == 1)
    _, (visual,) = sample.read(tokenizer, TINY)
    monkeypatch.setattr(calibration, "SAMPLE_TOKENS", 8)
    assert sample.positions(tokenizer, TINY) == visual.tokens + 2


def kinds(samples: Sequence[Sample]) -> str:
    return "".join("i" if sample.images else "t" for sample in samples)


@pytest.mark.parametrize(
    ("order", "searched", "held_out"),
    [
        ("titititititititi", "titititititi", "titi"),
        ("iiitiiitiiitiiit", "iiitiitiitii", "iiit"),  # every fourth is a text
        ("tttttttt", "tttttt", "tt"),
        ("ttttti", "tttti", "t"),
        ("ttii", "ti", "ti"),
        ("t" * 80 + "i" * 80, "t" * 60 + "i" * 60, "ttttiiii"),
        ("t" * 80 + "i" * 4, "t" * 60 + "i" * 3, "ttttttti"),
    ],
)
def test_texts_and_images_are_held_out_alike(order: str, searched: str, held_out: str) -> None:
    samples = [Sample(text=str(i), images=(picture(i),) if kind == "i" else ()) for i, kind in enumerate(order)]
    found = calibration.split(samples, "some")
    assert (kinds(found.search), kinds(found.held_out)) == (searched, held_out)
    assert not {sample.text for sample in found.search} & {sample.text for sample in found.held_out}


def test_what_is_measured_has_images_though_the_samples_have_none(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text("".join(f'{{"text": "line {i}"}}\n' for i in range(8)))
    found = calibration_set(tmp_path)
    assert kinds(found.held_out) == "ttiii"
    assert kinds(found.search) == "tttttt"
    assert found.sha256 == read_samples(tmp_path).sha256
    assert calibration_set(None).held_out == built_in().held_out


def test_as_many_samples_are_chosen_as_there_is_room_for(tokenizer: Tokenizer) -> None:
    samples = built_in().search
    assert choose(samples, TINY, tokenizer, 10_000) == list(samples)
    some = choose(samples, TINY, tokenizer, 600)
    assert 300 < sum(sample.positions(tokenizer, TINY) for sample in some) <= 600
    assert {bool(sample.images) for sample in some} == {True, False}  # a mixture
    assert some == [sample for sample in samples if sample in some]  # in order
    few = choose(samples, TINY, tokenizer, 1)
    assert sorted(bool(sample.images) for sample in few) == [False, True]  # one of each kind, whatever it takes


def test_a_changed_image_is_another_calibration(tmp_path: Path) -> None:
    write_samples(tmp_path, [(f"<image>\nWhat is {i}?", f"{i}", [picture(i)]) for i in range(8)])
    before = read_samples(tmp_path)
    picture(99).save(tmp_path / "0003_0.png")
    assert read_samples(tmp_path).sha256 != before.sha256


def test_a_missing_image_is_named_before_anything_is_computed(tmp_path: Path) -> None:
    write_samples(tmp_path, [(f"<image>\nWhat is {i}?", f"{i}", [picture(i)]) for i in range(8)])
    (tmp_path / "0003_0.png").unlink()
    with pytest.raises(InputError, match="0003_0.png"):
        read_samples(tmp_path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_samples(tmp_path, [(f"<image>\nWhat is {i}?", f"{i}", [picture(i)]) for i in range(8)])
    samples = read_samples(tmp_path)
    assert (len(samples.search), len(samples.held_out)) == (6, 2)
    turns = samples.held_out[0].turns
    assert [(t.role, t.text) for t in turns] == [("user", "<image>\nWhat is 3?"), ("assistant", "3")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"samples.jsonl:2: not JSON"),
        ("[]", r"samples.jsonl:2: expected an object with either 'prompt' or 'text'"),
        ('{"prompt": "a", "text": "b"}', "either 'prompt' or 'text'"),
        ('{"prompt": "a", "images": ["../x.png"]}', r"'images' is \['../x.png'\], expected a list of file names"),
        ('{"prompt": "<image> <image>", "images": ["x.png"]}', "samples.jsonl:2: .* 2 <image> marks, but 1 image"),
        ('{"prompt": null}', "samples.jsonl:2: 'prompt' is null, expected text"),
        ('{"text": ["a"]}', r"'text' is \[\"a\"\], expected text"),
        ('{"text": " "}', "'text' is \" \", expected text"),
        ('{"prompt": "a", "answer": {"b": 1}}', "'answer' is {\"b\": 1}, expected text"),
        ('{"prompt": "\\ud800"}', "'prompt' has half a character"),
        ("[" * 100_000, "samples.jsonl:2: not JSON"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(InputError, match=message):
        read_samples(tmp_path)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_bytes(b'{"text": "caf\xe9"}\n' * 4)
    with pytest.raises(InputError, match=r"samples.jsonl: not UTF-8 text: .* at byte 13"):
        read_samples(tmp_path)


def test_a_text_may_hold_what_unicode_calls_an_end_of_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\x0bfour"
    write_samples(tmp_path, [(text, text, [])] * 4)
    samples = read_samples(tmp_path)
    assert [turn.text for turn in samples.held_out[0].turns] == [text, text]


def test_where_the_folder_is_and_how_it_is_called_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cal").mkdir()
    write_samples(tmp_path / "cal", [(f"<image>\nWhat is {i}?", f"{i}", [picture(i)]) for i in range(4)])
    want = read_samples(tmp_path / "cal")
    monkeypatch.chdir(tmp_path / "cal")
    found = read_samples(Path())
    assert (found.description, found.sha256) == (want.description, want.sha256)


def test_few_positions_are_said(tokenizer: Tokenizer) -> None:
    assert "only 4 positions of 2 samples" in too_few([Sample("one"), Sample("two")], TINY, tokenizer)
    assert too_few(built_in().search, TINY, tokenizer) == ""


def test_a_missing_folder_and_too_few_samples(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="samples.jsonl: No such file"):
        read_samples(tmp_path)
    (tmp_path / "samples.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(InputError, match=r"samples.jsonl: 1 samples, expected at least 4"):
        read_samples(tmp_path)
