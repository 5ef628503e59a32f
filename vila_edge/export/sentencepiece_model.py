"""A slow LLaMA tokenizer becomes a `tokenizer.json`, proved equal to sentencepiece text by text.

Slow means a sentencepiece model as LlamaTokenizer of transformers 4.36 runs it with `legacy=False`, whatever
`legacy` says in its files. `tokenizer.json` encodes plain text; what uses it splits at the added tokens.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from vila_edge import fsio
from vila_edge.errors import InputError
from vila_edge.tokenizer import Tokenizer

BLANK = "▁"  # how sentencepiece writes a space
MODEL_TYPES = {1: "UNIGRAM", 2: "BPE", 3: "WORD", 4: "CHAR"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
NO_PREFIX = b"\x1a\x02\x18\x00"  # normalizer_spec.add_dummy_prefix = false, to append: the last value counts
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # with LlamaTokenizer's defaults
ROLES |= dict.fromkeys(("sep_token", "pad_token", "cls_token", "mask_token"), "")
Added = dict[str, tuple[int, bool]]  # added tokens: id, and whether the token is special
TEXTS = """<s> </s> <unk> a</s>b <0x41> <0x0A> <|im_start|>user [INST] <<SYS>> <image> https://example.org/a?b=c&d=%20#e
The quick brown fox jumps over the lazy dog. It's 3:45 p.m., isn't it? (Yes!) 0 12 1234 -2,000,000 1e-5 0xFF 50% $9.99
def f(x: int) -> int:\r\treturn x**2 if x else -1  # comment\r\r for (i = 0; i < n; ++i)  { a[i] += b->c; }   \t  \\n
Größe façade naïve Ærøskøbing Łódź e\u0301 \ufb01 ①②③ ½ \uff21\uff22 “quoted” — … ▁a ▁ b 🙂 👩\u200d👩\u200d👧 🇩🇪 👍🏽 \ufeffbom \u200b\u3000
这是一张图片\uff0c里面有什么\uff1f 画像には何が写っていますか。 이 사진에는 무엇이 있나요? हिन्दी में लिखा है Что изображено на картинке?
ما الموجود في الصورة؟ מה יש בתמונה? รูปนี้มีอะไร Γειά \x00\x01\x7f\x80\xff\u00a0 \ufffd\uffff\U0010ffff"""


@dataclass(frozen=True)
class ConvertedTokenizer:
    """What a runtime without sentencepiece needs of a slow LLaMA tokenizer."""

    tokenizer_json: str  # for the tokenizers library: puts no blank before a text, only bos
    bos_token: str | None
    adds_bos: bool
    special_tokens: tuple[str, ...]  # bos, eos, unk, sep, pad, cls, mask and the additional ones, as far as there


@dataclass(frozen=True)
class _Model:
    """A sentencepiece model: one that runs, with no blank put before the text, and its pieces."""

    path: Path
    processor: SentencePieceProcessor
    ids: dict[str, int]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]

    def texts(self, *kinds: int) -> list[str]:
        return [text for text, i in self.ids.items() if self.kinds[i] in kinds]


def convert(folder: Path) -> ConvertedTokenizer:
    """The tokenizer of a folder, for the tokenizers library. Raises InputError if that would encode differently."""
    model = _read_model(folder / "tokenizer.model")
    source = folder / "tokenizer_config.json"
    config = {"add_bos_token": True, "add_eos_token": False, "sp_model_kwargs": {}} | fsio.read_json(
        source, follow_links=True
    )
    understood: dict[str, tuple[Any, ...]] = {"tokenizer_class": ("LlamaTokenizer", "LlamaTokenizerFast")}
    understood |= {"add_bos_token": (True, False), "add_eos_token": (False,), "sp_model_kwargs": ({}, None)}
    for key, values in understood.items():
        if config.get(key) not in values:
            raise InputError(f"{source}: {key} is {config.get(key)!r}, expected {' or '.join(map(repr, values))}")
    roles, special = _special_tokens(config, folder)
    bos, adds_bos = roles["bos_token"], bool(config["add_bos_token"])
    if adds_bos and not re.fullmatch("[^$:]+", bos):
        raise InputError(f"{source}: add_bos_token is true, and bos_token {bos!r}, expected a token without $ and :")
    if [roles["unk_token"]] != model.texts(UNKNOWN):
        raise InputError(f"{source}: unk_token is {roles['unk_token']!r}, expected {model.texts(UNKNOWN)[0]!r}")
    added = _added_tokens(model, config, special, folder)
    backend = _backend(model, added)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing([bos, "$A"], special_tokens=[(bos, added[bos][0])])
    _prove(model, added, Tokenizer(backend.to_str(), f"{model.path}, converted"))
    return ConvertedTokenizer(backend.to_str(), bos or None, adds_bos, tuple(special))


def _read_model(path: Path) -> _Model:
    """A BPE model. Raises InputError if it is damaged, or encodes in a way that the tokenizers library cannot."""
    data, processor = fsio.read_bytes(path, 64 << 20, follow_links=True), SentencePieceProcessor()
    try:
        for proto in (data, data + NO_PREFIX):
            processor.load_from_serialized_proto(proto)
        file = _message(data)
        trainer, normalizer, denormalizer = (_message(b"".join(file[number])) for number in (2, 3, 5))
        kinds = tuple((_message(piece)[3] or [NORMAL])[-1] for piece in file[1])
        ids = {text: i for i, text in enumerate(processor.id_to_piece(list(range(len(kinds)))))}
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise InputError(f"{path}: not a sentencepiece model: {error}") from None
    model_type = (trainer[3] or [1])[-1]
    refused = {
        # UNIGRAM adds scores in float32, and the rounding decides between segmentations that are equally good.
        f"model_type {MODEL_TYPES.get(model_type, model_type)}": MODEL_TYPES.get(model_type) != "BPE",
        "normalizer_spec.precompiled_charsmap": any(normalizer[2]),
        "normalizer_spec.remove_extra_whitespaces": (normalizer[4] or [1])[-1],
        "normalizer_spec.escape_whitespaces off": not (normalizer[5] or [1])[-1],
        "denormalizer_spec.precompiled_charsmap": any(denormalizer[2]),
        "a piece of type UNUSED": UNUSED in kinds,
    }
    if what := [name for name, there in refused.items() if there]:
        raise InputError(f"{path}: has {what[0]}, expected a BPE model that takes text as it is, like LLaMA's")
    return _Model(path, processor, ids, tuple(processor.get_score(list(range(len(kinds))))), kinds)


def _message(data: bytes) -> defaultdict[int, list[Any]]:
    """All values of a protobuf message's fields, by number. Raises ValueError at a type that is not understood."""
    # Not with the reader that sentencepiece brings: that one demands the protobuf release it was made with.
    fields, at = defaultdict[int, list[Any]](list), 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 not in (0, 2, 5):
            raise ValueError(f"field {tag >> 3} is of type {tag & 7}")
        value, start = (4, at) if tag & 7 == 5 else _varint(data, at)
        at = start + value if tag & 7 else start
        fields[tag >> 3].append(data[start:at] if tag & 7 else value)
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    end = next(i for i in range(at, len(data)) if data[i] < 0x80) + 1
    return sum((byte & 0x7F) << 7 * i for i, byte in enumerate(data[at:end])), end


def _special_tokens(config: dict[str, Any], folder: Path) -> tuple[dict[str, str], list[str]]:
    """The special token of each role, "" for none, and all special tokens in the order of transformers."""
    path = folder / "special_tokens_map.json"
    files = {folder / "tokenizer_config.json": config, path: fsio.read_json(path, follow_links=True)}
    roles, additional = {}, []
    for role, default in ROLES.items():
        found = {_token(data[role], f"{name}: {role}") for name, data in files.items() if data.get(role)}
        if len(found) > 1:
            raise InputError(f"{path}: {role} differs from tokenizer_config.json: {' and '.join(sorted(found))}")
        roles[role] = found.pop() if found else "" if any(role in data for data in files.values()) else default
    for name, data in files.items():
        tokens = data.get("additional_special_tokens") or []
        for token in tokens if isinstance(tokens, list) else [tokens]:
            additional.append(_token(token, f"{name}: additional_special_tokens"))
    return roles, list(dict.fromkeys([*filter(None, roles.values()), *additional]))


def _token(value: Any, where: str) -> str:
    """The text of a token, given as such or as an object. Raises InputError if it takes blanks beside it along."""
    fields = value if isinstance(value, dict) else {"content": value}
    if strips := [flag for flag in ("lstrip", "rstrip", "single_word") if fields.get(flag)]:
        raise InputError(f"{where}: {strips[0]} is {fields[strips[0]]!r}, expected false")
    content = fields.get("content")
    if not isinstance(content, str) or not content or re.search("[\ud800-\udfff]", content):
        raise InputError(f"{where}: expected a token, found {value!r}")
    return content


def _added_tokens(model: _Model, config: dict[str, Any], special: list[str], folder: Path) -> Added:
    """Id of each added token, and whether it is special, by id. Raises InputError if ids leave a gap or collide."""
    name, path = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder", folder / "added_tokens.json"
    table = config.get("added_tokens_decoder") or {}
    if not isinstance(table, dict):
        raise InputError(f"{name}: expected an object, found {table!r}")
    listed = [(f"{name}: {i}", i, token) for i, token in table.items()]
    if path.exists():
        listed += [(f"{path}: {text!r}", str(i), text) for text, i in fsio.read_json(path, follow_links=True).items()]
    added = {text: (model.ids[text], True) for text in model.texts(UNKNOWN, CONTROL)}
    for where, number, token in listed:
        if not re.fullmatch("[0-9]{1,9}", number):
            raise InputError(f"{where}: expected an id, found {number!r}")
        text, flagged = _token(token, where), isinstance(token, dict) and bool(token.get("special"))
        i, was_special = added.get(text, (int(number), False))
        if i != int(number):
            raise InputError(f"{where}: token {text!r} has id {int(number):,} here, and {i:,} elsewhere")
        added[text] = (i, was_special or flagged or text in special)
    for text in special:  # transformers appends those that have no id
        following = max(len(model.ids), 1 + max(i for i, _ in added.values()))
        added.setdefault(text, (model.ids.get(text, following), True))
    added = dict(sorted(added.items(), key=lambda item: item[1]))
    ids = dict(model.ids)
    for text, (i, _) in added.items():
        if i != ids.setdefault(text, len(ids)):
            raise InputError(f"{folder}: added token {text!r} has id {i:,}, expected {ids[text]:,}, leaving no gap")
    return added


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces in the order in which sentencepiece merges them: by the score of what they make."""
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, left, right))
    return [(left, right) for _, left, right in sorted(found)]


def _backend(model: _Model, added: Added) -> Backend:
    """The tokenizer without what it puts before a text. Raises InputError if scores leave the order open."""
    scores = {text: model.scores[model.ids[text]] for text in model.texts(NORMAL)}
    merges = _merges(scores)
    owners: dict[float, str] = {}
    # Of equal scores sentencepiece takes the leftmost; a list of merges cannot say that.
    for piece in (left + right for left, right in merges):
        if (owner := owners.setdefault(scores[piece], piece)) != piece:
            raise InputError(f"{model.path}: pieces {owner!r} and {piece!r} have the same score, expected an order")
    unknown, fallback = model.texts(UNKNOWN)[0], BYTE in model.kinds
    backend = Backend(models.BPE(model.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    backend.normalizer = normalizers.Replace(" ", BLANK)
    backend.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken(text, special=special, normalized=False) for text, (_, special) in added.items()])
    # Pieces that the user defined are found behind the normalizer, where spaces are written as in the piece.
    backend.add_tokens([AddedToken(text, normalized=True) for text in model.texts(USER_DEFINED) if text not in added])
    return backend


def _prove(model: _Model, added: Added, tokenizer: Tokenizer) -> None:
    """Raises InputError that names the first text whose ids are not those of the slow tokenizer."""
    defined, unknown = set(model.texts(USER_DEFINED)), model.texts(UNKNOWN)[0]
    # Plain text never holds these: it is split at them before.
    absent = [text for text, (_, special) in added.items() if not special or text in defined]
    split = re.compile("|".join(map(re.escape, absent)) or "(?!)")
    texts = [text for text in _texts(list(model.ids)) if not split.search(text)]
    led = [unknown + text if text.startswith((BLANK, " ")) else text for text in texts]
    lead = len(model.processor.encode(unknown))
    for text, given, ids in zip(texts, led, model.processor.encode(led), strict=True):
        expected = ids[lead:] if given != text else ids
        if (found := list(tokenizer.encode(text))) != expected:
            raise InputError(f"{model.path}: {text!r} would become {found}, expected {expected} by sentencepiece")


def _texts(pieces: list[str]) -> list[str]:
    """Texts to compare: all pieces, written texts, runs of a character, any characters, pieces joined."""
    rng = random.Random(0)
    texts = [text for line in TEXTS.split("\n") for text in (line, *line.split(" "))]
    texts += [BLANK + text for text in texts]
    for character in sorted({" ", "\n", "\t", *(piece[0] for piece in pieces if piece == 2 * piece[0])}):
        texts += [before + character * length for length in range(1, 41) for before in ("", "a")]
    for low, high in ((0x20, 0x800), (0x800, 0xD800), (0xE000, 0x110000)):
        texts += ["".join(chr(rng.randrange(low, high)) for _ in range(4)) for _ in range(200)]
    return pieces + texts + [piece + "".join(rng.choices(pieces, k=rng.randint(1, 3))) for piece in pieces]
