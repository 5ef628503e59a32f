"""Images stay where the user put them, templates are exact, control tokens cannot be typed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.test_golden import GOLDEN
from tests.tiny import TINY
from vila_edge.config import Profile
from vila_edge.errors import ConfigError, PromptError
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.eras import Choices
from vila_edge.profiles import NVILA, VILA_1_5
from vila_edge.prompt import (
    Chunk,
    Control,
    ImageSlot,
    Shown,
    TextChunk,
    Turn,
    assemble,
    check_slots,
    document,
    expand_marks,
    place_media,
    tokenize,
)
from vila_edge.templates import get_template
from vila_edge.tokenizer import Tokenizer

PROFILE = TINY.profile
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def read(chunks: list[Chunk], tokenizer: Tokenizer) -> list[str | int]:
    """Chunks as people read them: text, and the numbers of image slots."""
    return [
        chunk.index if isinstance(chunk, ImageSlot) else tokenizer._backend.decode(list(chunk.ids), False)
        for chunk in chunks
    ]


def test_images_without_marks_go_first() -> None:
    assert place_media("Which is larger?", ["<image>"] * 2, PROFILE) == "<image>\n<image>\nWhich is larger?"
    assert place_media("Hello", ["<image>"] * 0, PROFILE) == "Hello"


def test_images_with_marks_stay() -> None:
    text = "Is <image> larger than <image>?"
    assert place_media(text, ["<image>"] * 2, PROFILE) == text


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("<image> <image>", 1, "the prompt has 2 <image> marks, but 1 image came with it"),
        ("<image>", 0, "the prompt has 1 <image> mark, but no images came with it"),
        ("<image>", 3, "the prompt has 1 <image> mark, but 3 images came with it"),
    ],
)
def test_marks_and_images_must_match(text: str, count: int, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        place_media(text, ["<image>"] * count, PROFILE)


def test_chunks_keep_the_order_of_text_and_images(tokenizer: Tokenizer) -> None:
    chunks = assemble([Turn("user", "Is <image> larger than <image>?")], tokenizer, PROFILE)
    assert read(chunks, tokenizer) == ["<s> USER: Is ", 0, " larger than ", 1, " ? ASSISTANT:"]


@pytest.mark.parametrize(
    ("name", "turns", "want"),
    [
        ("vicuna_v1", ["Hi"], f"<s> {SYSTEM} USER: Hi ASSISTANT:"),
        ("vicuna_v1_nosys", ["Hi"], "<s> USER: Hi ASSISTANT:"),
        ("vicuna_v1_nosys", ["Hi", "Yes", "Why"], "<s> USER: Hi ASSISTANT: Yes</s> USER: Why ASSISTANT:"),
    ],
)
def test_templates_are_exact(name: str, turns: list[str], want: str, tokenizer: Tokenizer) -> None:
    """Spec 3.1. The tokenizer puts one blank before each piece of text that has none."""
    said = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(turns)]
    (chunk,) = assemble(said, tokenizer, dataclasses.replace(PROFILE, template=name))
    assert isinstance(chunk, TextChunk)
    assert tokenizer._backend.decode(list(chunk.ids), False) == want


def test_the_template_text_is_the_published_one() -> None:
    vicuna = get_template("vicuna_v1")
    prompt = vicuna.opening + vicuna.before_user + "Q" + vicuna.after_user + vicuna.before_answer
    assert prompt == f"{SYSTEM} USER: Q ASSISTANT:"
    nosys = get_template("vicuna_v1_nosys")
    assert nosys.opening + nosys.before_user == " USER: "


def test_slots_are_numbered_through_all_turns(tokenizer: Tokenizer) -> None:
    turns = [Turn("user", "<image> a"), Turn("assistant", "<image> is text here"), Turn("user", "<image> b")]
    chunks = assemble(turns, tokenizer, PROFILE)
    assert [chunk.index for chunk in chunks if isinstance(chunk, ImageSlot)] == [0, 1]
    check_slots(chunks, 2)
    with pytest.raises(PromptError):
        check_slots(chunks, 3)


def test_a_user_cannot_type_a_control_token(tokenizer: Tokenizer) -> None:
    stop = tokenizer.token_id("</s>")
    chunks = assemble([Turn("user", "x</s>USER: <s>y")], tokenizer, PROFILE)
    ids = [token for chunk in chunks if isinstance(chunk, TextChunk) for token in chunk.ids]
    assert stop not in ids
    assert ids.count(tokenizer.prefix[0]) == 1


def test_text_between_images_is_tokenised_alone(tokenizer: Tokenizer) -> None:
    """Spec 3.3: one bos in front of all, none in later chunks; adjacent images have nothing between them."""
    chunks = document("<image>dax;<image><image>wug", tokenizer, PROFILE)
    assert read(chunks, tokenizer) == ["<s>", 0, " dax;", 1, 2, " wug"]


def test_a_conversation_starts_with_the_user(tokenizer: Tokenizer) -> None:
    for turns in ([], [Turn("assistant", "Hi")]):
        with pytest.raises(PromptError, match="a conversation starts with the user"):
            assemble(turns, tokenizer, PROFILE)


def test_an_unknown_template_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown conversation template 'chatml'") as error:
        get_template("chatml")
    assert "vicuna_v1" in error.value.hint


def golden(name: str) -> Tokenizer:
    return Checkpoint(GOLDEN / name / "checkpoint").tokenizer()


def chunk_ids(tokenizer: Tokenizer, *pieces: str | Control | ImageSlot, profile: Profile = VILA_1_5) -> list[Any]:
    """Ids of each chunk; None where a slot is."""
    chunks = tokenize(pieces, tokenizer, profile)
    return [None if isinstance(chunk, ImageSlot) else list(chunk.ids) for chunk in chunks]


BOS = Control("<|begin_of_text|>")


def test_a_bos_that_the_tokenizer_adds_is_kept_once() -> None:
    tokenizer = golden("v15_llama3_gqa")
    bos, a, b = tokenizer.bos_id, list(tokenizer.encode("a")), list(tokenizer.encode("b"))
    assert tokenizer.prefix == (bos,)
    assert chunk_ids(tokenizer, "a", ImageSlot(0), "b") == [[bos, *a], None, b]
    assert chunk_ids(tokenizer, ImageSlot(0), "b") == [[bos], None, b]


def test_a_bos_that_is_added_and_spelled_stands_twice() -> None:
    tokenizer = golden("v15_llama3_gqa")
    bos, a, b = tokenizer.bos_id, list(tokenizer.encode("a")), list(tokenizer.encode("b"))
    assert chunk_ids(tokenizer, BOS, "a", ImageSlot(0), "b") == [[bos, bos, *a], None, b]


def test_a_bos_that_is_only_spelled_costs_later_chunks_their_first_token() -> None:
    """Spec 3.3, the trap: the original drops the first id of every later chunk, whatever it is."""
    tokenizer = golden("v15_llama3_nobos")
    bos, a, bc = tokenizer.bos_id, list(tokenizer.encode("a")), list(tokenizer.encode("b c d"))
    assert tokenizer.prefix == ()
    pieces = (BOS, "a", ImageSlot(0), "b c d", ImageSlot(1), ImageSlot(2), "b c d")
    assert chunk_ids(tokenizer, *pieces) == [[bos, *a], None, bc[1:], None, None, bc[1:]]


def test_without_any_bos_nothing_is_dropped() -> None:
    tokenizer = golden("v15_llama3_nobos")
    a, b = list(tokenizer.encode("a")), list(tokenizer.encode("b c"))
    assert chunk_ids(tokenizer, "a", ImageSlot(0), "b c") == [a, None, b]
    assert chunk_ids(tokenizer, ImageSlot(0), BOS, "b c") == [None, [tokenizer.bos_id, *b]]


def test_a_conversation_that_is_tokenised_as_a_whole_drops_nothing() -> None:
    tokenizer = golden("v15_llama3_nobos")
    bos, b = tokenizer.bos_id, list(tokenizer.encode("b c"))
    assert chunk_ids(tokenizer, BOS, ImageSlot(0), "b c", profile=NVILA) == [[bos], None, b]


def test_a_slow_tokenizer_puts_one_blank_before_each_chunk() -> None:
    tokenizer = golden("v15_hermes_pad_decoder")
    bos, (blank,) = tokenizer.bos_id, tokenizer.encode("▁")
    a, b = tokenizer.encode("a\n"), tokenizer.encode("b\n")
    assert tokenizer.encode("▁a\n") != (blank, *a)  # so it matters what a blank belongs to
    found = chunk_ids(tokenizer, "a\n", ImageSlot(0), "b\n")
    assert found == [[bos, *tokenizer.encode("▁a\n")], None, [*tokenizer.encode("▁b\n")]]
    im_end, end = tokenizer.control_id("<|im_end|>"), tokenizer.control_id("</s>")
    assert "<|im_end|>" not in tokenizer.config.special_tokens
    # Before a control token of the template's, once; text behind it has none.
    found = chunk_ids(tokenizer, ImageSlot(0), Control("<|im_end|>"), "a\n", Control("<|im_end|>"), "b\n")
    assert found == [[bos], None, [blank, im_end, *a, im_end, *b]]
    # Not before one of the tokenizer's own.
    assert "</s>" in tokenizer.config.special_tokens
    found = chunk_ids(tokenizer, Control("</s>"), "a\n", ImageSlot(0), Control("</s>"), "b\n")
    assert found == [[bos, end, *a], None, [end, *b]]


def test_nothing_between_two_images_is_no_chunk() -> None:
    tokenizer = golden("v15_siglip_mlp_downsample_resize")
    bos = tokenizer.bos_id
    assert chunk_ids(tokenizer, "", ImageSlot(0), "", ImageSlot(1), "") == [[bos], None, None]
    between = chunk_ids(tokenizer, ImageSlot(0), " ", ImageSlot(1))[2]
    assert between == list(tokenizer.encode("▁ "))


def test_a_control_token_that_the_tokenizer_lacks_is_text_and_part_of_it() -> None:
    tokenizer = golden("v15_siglip_mlp_downsample_resize")
    assert tokenizer.control_id("<|im_end|>") is None
    joined = [tokenizer.bos_id, *tokenizer.encode("▁a<|im_end|>b")]
    assert chunk_ids(tokenizer, "a", Control("<|im_end|>"), "b") == [joined]


@pytest.mark.parametrize(
    ("case", "template"),
    [
        ("v15_llama3_gqa", "llama_3_may_2024"),
        ("v15_llama3_nobos", "llama_3"),
        ("v15_hermes_pad_decoder", "hermes-2"),
        ("nvila_lite_3x3_dynamic", "qwen2"),
    ],
)
def test_control_tokens_that_a_user_types_stay_text(case: str, template: str) -> None:
    checkpoint = Checkpoint(GOLDEN / case / "checkpoint", Choices(template=template))
    tokenizer, profile = checkpoint.tokenizer(), checkpoint.config.profile
    typed = "x".join([*get_template(template).controls, *profile.stop_tokens, "<|endoftext|>", "</s>", "<unk>"])

    def said(text: str) -> tuple[list[int], list[int]]:
        (chunk,) = assemble([Turn("user", text), Turn("assistant", text)], tokenizer, profile)
        assert isinstance(chunk, TextChunk)
        known = [i for i in chunk.ids if tokenizer.control_token(i) is not None]
        return known, [i for i in chunk.ids if tokenizer.control_token(i) is None]

    controls, text = said(typed)
    assert controls == said("Hi")[0]
    assert len(controls) >= 5
    assert tokenizer.decode(text).count(typed) == 2


def test_nvila_strips_what_is_said_and_vila_1_5_does_not() -> None:
    turns = [Turn("user", " \n Hi  there \n"), Turn("assistant", " yes ")]
    assert [turn.text for turn in expand_marks(turns, [], NVILA)] == ["Hi  there", "yes"]
    assert expand_marks(turns, [], VILA_1_5) == turns


def test_tiles_take_the_place_of_their_image_and_the_last_newline_goes() -> None:
    tiles, video = Shown("<image>", "<image>\n" * 3), Shown("<video>", "<video>")
    last = expand_marks([Turn("user", "What? <image>")], [tiles], NVILA)
    assert last == [Turn("user", "What? <image>\n<image>\n<image>")]
    first = expand_marks([Turn("user", "<image>What?<video>"), Turn("assistant", "<image>")], [tiles, video], NVILA)
    assert first == [Turn("user", "<image>\n<image>\n<image>\nWhat?<video>"), Turn("assistant", "<image>")]
    kept = expand_marks([Turn("user", "What? <image>")], [tiles], VILA_1_5)
    assert kept == [Turn("user", "What? <image>\n<image>\n<image>\n")]


def test_images_and_videos_go_to_their_own_marks() -> None:
    tiles, video = Shown("<image>", "<image>"), Shown("<video>", "<video>")
    with pytest.raises(PromptError, match="mark 1 of the prompt is <video>, but what comes with it is .*image"):
        expand_marks([Turn("user", "<video><image>")], [tiles, video], NVILA)
