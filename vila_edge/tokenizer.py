"""Text to ids and back, with the `tokenizers` library alone: no transformers on the device."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from vila_edge.config import TokenizerConfig
from vila_edge.errors import InputError


class Tokenizer:
    """A `tokenizer.json`. Special tokens in text stay text: only `control_id` and `token_id` give their ids."""

    def __init__(
        self, tokenizer_json: str, source: str = "tokenizer.json", config: TokenizerConfig | None = None
    ) -> None:
        """Raises InputError if `tokenizer_json` is not a tokenizer, or lacks a token that `config` names."""
        self.source, self.config = source, config or TokenizerConfig()
        try:
            self._backend = Backend.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{source}: not a tokenizer: {error}") from None
        self._backend.encode_special_tokens = True
        self._backend.no_padding()
        self._backend.no_truncation()
        self._controls = {token.content: i for i, token in self._backend.get_added_tokens_decoder().items()}
        self.encode = lru_cache(maxsize=4096)(self._encode)
        self.prefix = tuple(self._backend.encode("").ids)  # what the tokenizer puts first: () or (bos,)
        if self._backend.encode("a").ids[len(self.prefix) :] != list(self._encode("a")):
            raise InputError(f"{source}: puts a token behind every text, expected at most one in front")
        bos = self.config.bos_token
        self.bos_id = None if bos is None else self.token_id(bos)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Ids of `text` alone, without a leading bos."""
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def control_id(self, token: str) -> int | None:
        """Id of a control token; None if the tokenizer knows the characters as text alone."""
        return self._controls.get(token)

    def control_token(self, token_id: int) -> str | None:
        """The control token of an id, if it is one."""
        return next((token for token, i in self._controls.items() if i == token_id), None)

    def token_id(self, token: str) -> int:
        """Id of a token of the vocabulary. Raises InputError if there is none."""
        found = self._backend.token_to_id(token)
        if found is None:
            raise InputError(f"{self.source}: no token {token!r}, which the model needs")
        return int(found)

    def decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=True))

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self._backend)

    def check_rows(self, rows: int) -> None:
        """Raises InputError if text can become an id for which an embedding table of `rows` rows has none.

        Special tokens are left out: text never becomes one, and some checkpoints add one that has no row.
        """
        special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        beyond = [(i, token) for token, i in vocabulary.items() if i >= rows and i not in special]
        if beyond:
            first, token = min(beyond)
            raise InputError(
                f"{self.source}: token {token!r} has id {first:,}, but the LLM's vocab_size is {rows:,}",
                "the tokenizer is of another model: take the one that came with the LLM",
            )


class StreamDecoder:
    """Ids to text, piece by piece: a character that is not complete yet is held back."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that has become certain with this token, possibly none."""
        return self._stream.step(self._backend, token) or ""
