"""Ids and text: control tokens only by id, characters only whole."""

from __future__ import annotations

import json

import pytest

from vila_edge.config import TokenizerConfig
from vila_edge.errors import InputError
from vila_edge.micro.tokens import VOCAB_SIZE
from vila_edge.micro.words import LABELS, NUMBERS, ORDINALS
from vila_edge.tokenizer import Tokenizer


def test_control_tokens_in_text_stay_text(tokenizer: Tokenizer) -> None:
    control = {tokenizer.token_id(token) for token in ("<unk>", "<s>", "</s>")}
    for text in ("</s>", "a</s>b", "<s>", "<unk> </s>"):
        ids = tokenizer.encode(text)
        assert not control & set(ids)
        assert tokenizer.decode(list(ids)).strip() == text


def test_a_stream_never_splits_a_character(tokenizer: Tokenizer) -> None:
    text = "naïve 数字 🙂 end"
    decoder = tokenizer.stream()
    pieces = [decoder.push(token) for token in tokenizer.encode(text)]
    assert len(tokenizer.encode(text)) > len(text)  # characters of several tokens each
    assert "".join(pieces).strip() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_bos_token_is_known_from_the_tokenizer(tokenizer: Tokenizer) -> None:
    assert tokenizer.prefix == (tokenizer.token_id("<s>"),)
    assert tokenizer.token_id("<s>") not in tokenizer.encode("seven")


def test_words_of_the_micro_vila_are_one_token_wherever_they_stand(tokenizer: Tokenizer) -> None:
    for word in [*LABELS, *NUMBERS, *ORDINALS]:
        assert len(tokenizer.encode(word)) == 1, word
        assert tokenizer.encode(word) == tokenizer.encode(f" {word}")


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match=r"some/tokenizer.json: not a tokenizer"):
        Tokenizer("{}", "some/tokenizer.json")


def test_an_unknown_token_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"no token '<\|im_end\|>'"):
        tokenizer.token_id("<|im_end|>")


def with_added_token(tokenizer_json: str, token_id: int, special: bool) -> Tokenizer:
    added = {"id": token_id, "content": "<pad>", "special": special}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    plain = json.loads(tokenizer_json)
    plain["added_tokens"].append(added | flags)
    return Tokenizer(json.dumps(plain), "llm/tokenizer.json")


def test_text_must_not_become_an_id_without_an_embedding(tokenizer: Tokenizer, tokenizer_json: str) -> None:
    tokenizer.check_rows(VOCAB_SIZE)
    with pytest.raises(InputError, match=rf"has id {VOCAB_SIZE - 1}, but the LLM's vocab_size is {VOCAB_SIZE - 1}"):
        tokenizer.check_rows(VOCAB_SIZE - 1)
    with pytest.raises(InputError, match=rf"llm/tokenizer.json: token '<pad>' has id {VOCAB_SIZE}"):
        with_added_token(tokenizer_json, VOCAB_SIZE, special=False).check_rows(VOCAB_SIZE)


def test_a_padding_token_without_a_row_is_harmless(tokenizer_json: str) -> None:
    """Some checkpoints add one to the tokenizer alone; text never becomes it."""
    padded = with_added_token(tokenizer_json, VOCAB_SIZE, special=True)
    padded.check_rows(VOCAB_SIZE)
    assert VOCAB_SIZE not in padded.encode("a <pad> b")


def test_a_tokenizer_that_ends_every_text_with_a_token_is_refused(tokenizer_json: str) -> None:
    plain = json.loads(tokenizer_json)
    plain["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    end = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    plain["post_processor"]["special_tokens"]["</s>"] = end
    with pytest.raises(InputError, match=r"llm/tokenizer.json: puts a token behind every text"):
        Tokenizer(json.dumps(plain), "llm/tokenizer.json")


def test_control_tokens_go_by_id_and_by_text(tokenizer: Tokenizer) -> None:
    for token in ("<unk>", "<s>", "</s>"):
        found = tokenizer.control_id(token)
        assert found == tokenizer.token_id(token)
        assert tokenizer.control_token(found) == token


def test_a_word_of_the_vocabulary_is_no_control_token(tokenizer: Tokenizer) -> None:
    (seven,) = tokenizer.encode("seven")
    assert tokenizer.control_token(seven) is None
    assert tokenizer.control_id("Ġseven") is None
    assert tokenizer.token_id("Ġseven") == seven
    assert tokenizer.control_id("<|im_end|>") is None
    assert tokenizer.control_token(10**6) is None


def test_a_bos_token_that_the_tokenizer_lacks_is_refused(tokenizer_json: str) -> None:
    assert Tokenizer(tokenizer_json, config=TokenizerConfig("</s>")).bos_id == 2
    assert Tokenizer(tokenizer_json).bos_id is None
    with pytest.raises(InputError, match=r"no token '\[BOS\]'"):
        Tokenizer(tokenizer_json, config=TokenizerConfig("[BOS]"))
