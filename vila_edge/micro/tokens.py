"""The micro VILA's tokenizer: byte-level BPE, made on the spot from its own documents."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vila_edge.micro.documents import text_document
from vila_edge.micro.instructions import conversation
from vila_edge.micro.words import CAPITALS, COLOURS, LABELS, NUMBERS, ORDINALS
from vila_edge.prompt import IMAGE_MARK

VOCAB_SIZE = 640
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": UNK,
    "bos_token": BOS,
    "eos_token": EOS,
    "model_max_length": 512,
}


def make_tokenizer() -> str:
    """A `tokenizer.json`. Labels, numbers and ordinals are tokens of their own. Always the same."""
    tokenizer = Tokenizer(models.BPE())
    # A word is the same token behind a blank and at the start of a chunk, as with LLaMA's own tokenizer.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[UNK, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return str(tokenizer.to_str(pretty=True))


def _corpus() -> Iterator[str]:
    rng = random.Random(0)
    words = [*LABELS, *NUMBERS, *ORDINALS, *CAPITALS.values(), *COLOURS.values()]
    yield from (f" {word}" for word in words for _ in range(100))
    for _ in range(2000):
        yield text_document(rng).text
    for _ in range(1000):
        for exchange in conversation(rng):
            yield f" USER: {exchange.question.replace(IMAGE_MARK, '')} ASSISTANT: {exchange.answer}"
