"""Slow LLaMA tokenizers: converted they give the same ids, or they are refused."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer as Backend

from vila_edge.errors import InputError
from vila_edge.export import sentencepiece_model
from vila_edge.export.sentencepiece_model import ConvertedTokenizer, convert
from vila_edge.tokenizer import Tokenizer

# A blank leads each line, as the blank would that LLaMA's models put there themselves.
CORPUS = [
    *(
        f" {word} {other} of the {word}er, {other}ing"
        for word in ("red", "stone", "light")
        for other in ("walk", "read")
    ),
    *(" " * n + f"for i in range({n}): x[i] += {n * 37}  # step {n}" for n in range(1, 12)),
    " The quick brown fox jumps over the lazy dog; the other dogs are sleeping in the other house.",
    " Der naïve Bär fährt über die Brücke. Où est la bibliothèque? El niño está aquí.",
    " 东西南北 这是一张图片。 Что это такое? <a> </b> <unkn> 0x4100 3.14159 aaaa bbbb ==== ----",
    *(f" An example, number {n}: {n * n} things and {n} others, all of them seen from the station." for n in range(20)),
]
UNK, BOS, EOS = (
    {"content": text, "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    for text in ("<unk>", "<s>", "</s>")
)
CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
    "added_tokens_decoder": {"0": UNK, "1": BOS, "2": EOS},
}
SPECIAL_TOKENS_MAP = {"bos_token": BOS, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
DEFINED = ("<sep>", "xy", "x", "two▁words", "▁▁▁▁▁")
TURN = {"<|im_start|>": True, "<|im_end|>": True, "<image>": False, "<im": False}
PROBE = [
    "a",
    "e",
    "th",
    " ",
    "  ",
    "▁",
    "\n",
    "\t",
    "é",
    "字",
    "东",
    "🙂",
    "\x00",
    "the other",
    "x",
    "xy",
    "<sep>",
    "two words",
]
PROBE += [
    "two",
    "</s>",
    "<s>",
    "<unk>",
    "<0x41>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<im",
    "s>",
    "=",
    "1",
    ".",
]


def train(folder: Path, **options: Any) -> Path:
    """The folder, with a tokenizer as LLaMA's is but for `options` of the trainer."""
    defaults: dict[str, Any] = {"model_type": "bpe", "vocab_size": 500, "byte_fallback": True}
    defaults |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    defaults |= {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True}
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        **(defaults | options),
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    write(folder, {})
    return folder


def write(folder: Path, config: dict[str, Any], special: dict[str, Any] | None = None) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | config))
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL_TOKENS_MAP | (special or {})))


def append_piece(folder: Path, text: str, score: bytes, kind: int) -> None:
    piece = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15" + score + b"\x18" + bytes([kind])
    append(folder, b"\x0a" + bytes([len(piece)]) + piece)


def append(folder: Path, data: bytes) -> None:
    with (folder / "tokenizer.model").open("ab") as file:
        file.write(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return train(tmp_path)


def plain(folder: Path) -> None:
    train(folder)


def without_byte_fallback(folder: Path) -> None:
    train(folder, byte_fallback=False, character_coverage=0.98)


def with_pieces_of_the_user(folder: Path) -> None:
    train(folder, user_defined_symbols=list(DEFINED))


def with_added_tokens(folder: Path) -> None:
    train(folder)
    size = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    table = {str(size + i): {"content": text, "special": flag} for i, (text, flag) in enumerate(TURN.items())}
    special = {"additional_special_tokens": ["<|im_end|>"]}
    write(folder, {"added_tokens_decoder": CONFIG["added_tokens_decoder"] | table}, special)  # type: ignore[operator]
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": size + 2, "<pad>": size + 4}))


KINDS = pytest.mark.parametrize("make", [plain, without_byte_fallback, with_pieces_of_the_user, with_added_tokens])


class Slow:
    """LlamaTokenizer of transformers 4.36 with legacy=False, after its rules, on sentencepiece."""

    def __init__(self, folder: Path) -> None:
        self.model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        self.added = {token["content"]: int(i) for i, token in config["added_tokens_decoder"].items()}
        if (folder / "added_tokens.json").exists():
            self.added |= json.loads((folder / "added_tokens.json").read_text())
        special = json.loads((folder / "special_tokens_map.json").read_text())
        self.special = ["<s>", "</s>", "<unk>", *special.get("additional_special_tokens", [])]

    def tokens(self, text: str) -> list[str]:
        if text == "":
            return []
        tokens = []
        for part in split("▁" + text.replace("▁", " "), self.added):
            tokens += [part] if part in self.added else self.pieces(part)
        if len(tokens) > 1 and tokens[0] == "▁" and tokens[1] in self.special:
            tokens = tokens[1:]
        return tokens

    def pieces(self, segment: str) -> list[str]:
        if not segment.startswith(("▁", " ")):
            return list(self.model.encode(segment, out_type=str))
        unknown = len(self.model.encode("<unk>", out_type=str))
        return list(self.model.encode("<unk>" + segment, out_type=str))[unknown:]

    def ids(self, text: str) -> list[int]:
        return [
            self.added[token] if token in self.added else self.model.piece_to_id(token) for token in self.tokens(text)
        ]


class Runtime:
    """What the device does with a converted tokenizer: `tokenizers` and nothing of sentencepiece."""

    def __init__(self, converted: ConvertedTokenizer) -> None:
        self.tokenizer = Tokenizer(converted.tokenizer_json)
        self.special = converted.special_tokens
        tokens = json.loads(converted.tokenizer_json)["added_tokens"]
        self.added = {token["content"]: token["id"] for token in tokens if not token["normalized"]}

    def ids(self, text: str) -> list[int]:
        parts = split("▁" + text.replace("▁", " "), self.added) if text else []
        if len(parts) > 1 and parts[0] == "▁" and parts[1] in self.special:
            parts = parts[1:]
        return [
            i for part in parts for i in ([self.added[part]] if part in self.added else self.tokenizer.encode(part))
        ]


def split(text: str, added: dict[str, int]) -> list[str]:
    longest_first = sorted(added, key=len, reverse=True)
    return [part for part in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if part]


@KINDS
def test_any_text_becomes_the_ids_of_the_slow_tokenizer(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    slow, runtime = Slow(tmp_path), Runtime(convert(tmp_path))
    rng = random.Random(3)
    probe = [*PROBE, *(slow.model.id_to_piece(i) for i in range(300, slow.model.get_piece_size(), 10))]
    for text in [
        "",
        " ",
        "</s>",
        " </s>",
        "<s>a",
        "▁",
        *("".join(rng.choices(probe, k=rng.randint(1, 12))) for _ in range(4000)),
    ]:
        assert runtime.ids(text) == slow.ids(text), repr(text)


def test_the_blank_that_a_model_puts_first_is_left_to_the_runtime(tmp_path: Path) -> None:
    converted = convert(train(tmp_path, add_dummy_prefix=True))
    leading = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = Tokenizer(converted.tokenizer_json)
    for text in ("the other", " the", "a\n b", "字"):
        assert list(tokenizer.encode("▁" + text)) == leading.encode(text) != list(tokenizer.encode(text))


def test_ids_decode_to_the_text(folder: Path) -> None:
    tokenizer = Tokenizer(convert(folder).tokenizer_json)
    for text in (" the naïve 🙂 dog", "a  b\n\tc", "typed </s> stays"):
        assert tokenizer.decode(list(tokenizer.encode(text))) == text
    assert tokenizer.decode([1, *tokenizer.encode("one"), 2]) == "one"


def test_control_tokens_typed_as_text_stay_text(folder: Path) -> None:
    tokenizer = Tokenizer(convert(folder).tokenizer_json)
    for text in ("</s>", "<s>", "<unk>", "<0x41>", "a</s>b"):
        assert min(tokenizer.encode(text)) >= 259, text  # behind the control and byte pieces
        assert tokenizer.decode(list(tokenizer.encode(text))) == text


def test_bos_is_put_first_if_the_config_says_so(folder: Path) -> None:
    converted = convert(folder)
    assert (converted.bos_token, converted.adds_bos) == ("<s>", True)
    assert Tokenizer(converted.tokenizer_json).prefix == (1,)
    write(folder, {"add_bos_token": False})
    converted = convert(folder)
    assert (converted.bos_token, converted.adds_bos) == ("<s>", False)
    assert Tokenizer(converted.tokenizer_json).prefix == ()


def test_what_the_files_leave_out_is_llamas_default(folder: Path) -> None:
    expected = convert(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    (folder / "special_tokens_map.json").write_text("{}")
    assert convert(folder) == expected
    (folder / "special_tokens_map.json").write_text('{"bos_token": null}')
    with pytest.raises(InputError, match="add_bos_token is true, and bos_token '', expected a token"):
        convert(folder)


def test_only_the_special_tokens_are_listed_as_such(tmp_path: Path) -> None:
    with_added_tokens(tmp_path)
    converted = convert(tmp_path)
    assert converted.special_tokens == ("<s>", "</s>", "<unk>", "<|im_end|>")
    flags = {token["content"]: token["special"] for token in json.loads(converted.tokenizer_json)["added_tokens"]}
    assert flags == dict.fromkeys(("<unk>", "<s>", "</s>"), True) | TURN | {"<pad>": False}


def test_a_special_token_without_an_id_gets_the_next_one(folder: Path) -> None:
    write(folder, {}, {"pad_token": "[PAD]"})
    converted = convert(folder)
    assert converted.special_tokens == ("<s>", "</s>", "<unk>", "[PAD]")
    size = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    assert Tokenizer(converted.tokenizer_json).token_id("[PAD]") == size


def test_the_proof_finds_merges_in_a_wrong_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merges = sentencepiece_model._merges
    monkeypatch.setattr(sentencepiece_model, "_merges", lambda scores: merges(scores)[::-1])
    with pytest.raises(
        InputError, match=r"tokenizer.model: '\S+' would become \[.+\], expected \[.+\] by sentencepiece"
    ):
        convert(folder)


def test_the_proof_finds_a_single_missing_merge(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merges = sentencepiece_model._merges
    monkeypatch.setattr(sentencepiece_model, "_merges", lambda scores: merges(scores)[:-1])
    with pytest.raises(InputError, match="would become"):
        convert(folder)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (plain, {"byte_fallback": False}),
        (without_byte_fallback, {"fuse_unk": False}),
    ],
)
def test_the_proof_finds_unknown_characters_treated_otherwise(
    make: Callable[[Path], None], wrong: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = sentencepiece_model._backend

    def altered(*arguments: Any) -> Backend:
        made = backend(*arguments)
        for name, value in wrong.items():
            setattr(made.model, name, value)
        return made

    make(tmp_path)
    monkeypatch.setattr(sentencepiece_model, "_backend", altered)
    with pytest.raises(InputError, match="would become"):
        convert(tmp_path)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"model_type": "unigram", "vocab_size": 400}, "model_type UNIGRAM"),
        ({"model_type": "word"}, "model_type WORD"),
        ({"model_type": "char"}, "model_type CHAR"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizer_spec.precompiled_charsmap"),
        ({"remove_extra_whitespaces": True}, "normalizer_spec.remove_extra_whitespaces"),
    ],
)
def test_models_that_would_encode_differently_are_refused(options: dict[str, Any], found: str, tmp_path: Path) -> None:
    train(tmp_path, **options)
    with pytest.raises(InputError, match=f"tokenizer.model: has {found}, expected a BPE model"):
        convert(tmp_path)


def test_pieces_that_are_not_understood_are_refused(tmp_path: Path) -> None:
    for text, score, kind, found in (
        ("unused", b"\x00\x00\xc8\xc3", 5, "has a piece of type UNUSED"),
        ("</s>", b"\x00\x00\xc8\xc3", 1, "</s>"),
        ("▁▁th", b"\x00\x00\x00\xc0", 1, "'.+' and '.+' have the same score"),
    ):
        append_piece(train(tmp_path), text, score, kind)
        with pytest.raises(InputError, match=found):
            convert(tmp_path)


def test_switches_of_the_normalizer_that_are_off_are_refused(folder: Path) -> None:
    append(folder, b"\x1a\x02\x28\x00")
    with pytest.raises(InputError, match="has normalizer_spec.escape_whitespaces off"):
        convert(folder)


def test_a_piece_that_merges_with_what_stands_before_the_text_is_refused(folder: Path) -> None:
    """The slow tokenizer encodes behind a written `<unk>`, so that such a piece eats the text's first blank."""
    append_piece(folder, ">▁", b"\x00\x00\x00\x3f", 1)
    with pytest.raises(InputError, match="would become"):
        convert(folder)


def test_a_damaged_model_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.model"
    data = path.read_bytes()
    for length in (0, 1, 100, *range(200, len(data), 97), len(data) - 4, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match="tokenizer.model"):
            convert(folder)
    rng = random.Random(5)
    for _ in range(100):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):  # nothing else; if it is a score that changed the model is whole
            convert(folder)
    path.write_bytes(data + b"\x7b\x7c")
    with pytest.raises(InputError, match="not a sentencepiece model: field 15 is of type 3"):
        convert(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: No such file"):
        convert(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_a_file_that_is_not_json_is_named(name: str, folder: Path) -> None:
    (folder / name).write_text("{")
    with pytest.raises(InputError, match=rf"{name}: not JSON"):
        convert(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokenizer_class": "GPT2Tokenizer"}, "tokenizer_class is 'GPT2Tokenizer', expected 'LlamaTokenizer' or"),
        ({"tokenizer_class": None}, "tokenizer_class is None, expected 'LlamaTokenizer' or"),
        ({"add_eos_token": True}, "add_eos_token is True, expected False"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes', expected True or False"),
        ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs is .*, expected {} or None"),
        ({"unk_token": "[UNK]"}, "special_tokens_map.json: unk_token differs from tokenizer_config.json"),
        ({"mask_token": {"content": "<m>", "lstrip": True}}, "mask_token: lstrip is True, expected false"),
        ({"additional_special_tokens": [7]}, "additional_special_tokens: expected a token, found 7"),
        ({"additional_special_tokens": 7}, "additional_special_tokens: expected a token, found 7"),
        ({"sep_token": "\ud800"}, "sep_token: expected a token"),
        ({"added_tokens_decoder": ["<a>"]}, r"added_tokens_decoder: expected an object, found \['<a>'\]"),
        ({"added_tokens_decoder": {"x": "<a>"}}, "added_tokens_decoder: x: expected an id, found 'x'"),
        ({"added_tokens_decoder": {"9": {"content": ""}}}, "added_tokens_decoder: 9: expected a token"),
        ({"added_tokens_decoder": {"3": {"content": "<a>"}}}, "added token '<a>' has id 3, expected"),
        ({"added_tokens_decoder": {"9999": {"content": "<a>"}}}, "added token '<a>' has id 9,999, expected"),
        ({"added_tokens_decoder": {"5": {"content": "</s>"}}}, "token '</s>' has id 5 here, and 2 elsewhere"),
        ({"added_tokens_decoder": {"9": {"content": "<a>", "rstrip": True}}}, "9: rstrip is True, expected false"),
        (
            {"added_tokens_decoder": {"9": {"content": "<a>", "single_word": True}}},
            "single_word is True, expected false",
        ),
    ],
)
def test_a_config_that_is_not_understood_is_refused(config: dict[str, Any], message: str, folder: Path) -> None:
    write(folder, config)
    with pytest.raises(InputError, match=message) as raised:
        convert(folder)
    assert str(folder) in str(raised.value)


def test_an_unknown_token_that_the_model_does_not_have_is_refused(folder: Path) -> None:
    write(folder, {"unk_token": "[UNK]"}, {"unk_token": None})
    with pytest.raises(InputError, match=r"unk_token is '\[UNK\]', expected '<unk>'"):
        convert(folder)


def test_a_bos_that_no_template_can_name_is_refused(folder: Path) -> None:
    write(folder, {}, {"bos_token": "a:b"})
    with pytest.raises(InputError, match=r"bos_token 'a:b', expected a token without \$ and :"):
        convert(folder)
