"""Calibration samples: the built-in ones, and a user's folder with its mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import TINY, random_parameters
from vila_edge.errors import InputError, PromptError
from vila_edge.export.calibration import batches, built_in, inputs_embeds, read_samples, write_samples
from vila_edge.tokenizer import Tokenizer


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((20, 30), value, np.uint8))


def test_the_built_in_samples_have_text_and_images(tokenizer: Tokenizer) -> None:
    samples = built_in()
    kinds = [len(sample.images) for sample in samples.search]
    assert {0, 1, 2} <= set(kinds)
    assert {len(sample.images) for sample in samples.held_out} >= {1, 2}
    params = {name: torch.from_numpy(value) for name, value in random_parameters(TINY).items()}
    sequences = inputs_embeds(samples.search, TINY, tokenizer, params)
    assert all(s.shape[0] == 1 and 1 < s.shape[1] <= TINY.llm.context_length and s.shape[2] == 64 for s in sequences)
    joined = batches(sequences)
    assert sum(b.shape[0] * b.shape[1] for b in joined) == sum(s.shape[1] for s in sequences) >= 512


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
        ('{"prompt": "<image> <image>", "images": ["x.png"]}', "2 <image> marks, but 1 image"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises((InputError, PromptError), match=message):
        read_samples(tmp_path)


def test_a_missing_folder_and_too_few_samples(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="samples.jsonl: No such file"):
        read_samples(tmp_path)
    (tmp_path / "samples.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(InputError, match="1 samples, expected at least 4"):
        read_samples(tmp_path)
