"""From images and turns to streamed text: the walk of a prompt, readable from top to bottom."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vila_edge.bundle import Bundle
from vila_edge.caches import ImageCache, Prefix
from vila_edge.config import VilaConfig
from vila_edge.engine.protocol import Engine
from vila_edge.errors import ContextError, UsageError
from vila_edge.media.image import ImageSource, RgbImage, load_image
from vila_edge.preprocess import preprocess
from vila_edge.prompt import Chunk, ImageSlot, Turn, assemble, check_slots, place_images
from vila_edge.reference.engine import bundle_parameters, numpy_engine
from vila_edge.sampler import Sampler, Sampling
from vila_edge.templates import get_template
from vila_edge.timing import Timings
from vila_edge.tokenizer import Tokenizer

BACKENDS = ("auto", "onnxruntime", "numpy")
PREFILL_CHUNK = 512  # positions per call of a long prefill: bounds the memory of activations

FloatArray = NDArray[np.float32]
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass
class Reply:
    """An answer as it comes: iterate for pieces of text; the other fields are complete at the end."""

    seed: int
    images: tuple[RgbImage, ...] = ()
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    timings: Timings = field(default_factory=Timings)
    cancelled: bool = False
    _pieces: Iterator[str] = field(default=iter(()), repr=False)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def cancel(self) -> None:
        """Stop before the next token. May be called from a signal handler or another thread."""
        self.cancelled = True

    def finish(self) -> Reply:
        """Take the rest of the answer at once."""
        for _ in self._pieces:
            pass
        return self


class Pipeline:
    """A model ready to answer."""

    def __init__(
        self,
        name: str,
        config: VilaConfig,
        tokenizer: Tokenizer,
        engine: Engine,
        context: int = 0,
        bundle_digest: str = "",
    ) -> None:
        """`context`: positions of a conversation, at most (and by default) what the model was made for.

        Raises UsageError if it is out of range, InputError if the tokenizer is not the model's.
        """
        longest = config.llm.context_length
        if not 0 <= context <= longest:
            raise UsageError(f"a context of {context} positions: this model has 1 to {longest:,}")
        tokenizer.check_rows(config.llm.vocab_size)
        self.name, self.config, self.tokenizer, self.engine = name, config, tokenizer, engine
        self.context = context or longest
        self.bundle_digest = bundle_digest
        self.stop_ids = frozenset({tokenizer.token_id(get_template(config.profile.template).stop)})
        self._image_cache = ImageCache()

    def new_prefix(self) -> Prefix:
        """The empty kv_cache of a new conversation."""
        return Prefix(self.engine.new_cache(self.context))

    def forget_images(self) -> None:
        """Encode every image anew, as a benchmark wants it."""
        self._image_cache = ImageCache()

    def generate(self, prompt: str, images: Sequence[ImageSource] = (), sampling: Sampling | None = None) -> Reply:
        """The whole answer to one prompt. `<image>` in it places an image; without marks, the images go first."""
        return self.stream([Turn("user", place_images(prompt, len(images)))], images, sampling).finish()

    def stream(
        self,
        turns: Sequence[Turn],
        images: Sequence[ImageSource] = (),
        sampling: Sampling | None = None,
        prefix: Prefix | None = None,
    ) -> Reply:
        """Answer the last turn, piece by piece. One image for each mark in the turns, in that order.

        The prompt is read before this returns, so that what is wrong with it is raised here: ImageError,
        PromptError, ContextError. `prefix` is the conversation's kv_cache, if it is to be kept.
        """
        sampler = Sampler(sampling or Sampling())
        timings = Timings()
        chunks = assemble(turns, self.tokenizer, self.config.profile)
        check_slots(chunks, len(images))
        with timings.measure("load_ms"):
            pictures = tuple(load_image(source) for source in images)
            keys = self._keys(chunks, pictures)
        self._check_length(keys, len(pictures))
        prefix = prefix or self.new_prefix()
        start = prefix.reuse(keys)
        embeds = self._image_embeds(pictures, timings)
        timings.prompt_tokens, timings.cached_tokens = len(keys), start
        timings.image_tokens = len(pictures) * self.config.tokens_per_image
        with timings.measure("prefill_ms"):
            inputs_embeds = self._inputs_embeds(chunks, embeds)
            for begin in range(start, len(keys), PREFILL_CHUNK):
                logits = self.engine.forward(inputs_embeds[begin : begin + PREFILL_CHUNK], prefix.cache)
                prefix.keys.extend(keys[begin : begin + PREFILL_CHUNK])
        reply = Reply(sampler.seed, pictures, timings=timings)
        reply._pieces = self._decode(reply, logits[0], sampler, prefix)
        return reply

    def _decode(self, reply: Reply, logits: FloatArray, sampler: Sampler, prefix: Prefix) -> Iterator[str]:
        """Sample, stream, feed back, until the model stops or there is no room."""
        decoder = self.tokenizer.stream()
        limit = min(sampler.sampling.max_new_tokens, self.context - len(prefix.keys))
        while not reply.cancelled:
            token = sampler(logits)
            if token in self.stop_ids:
                reply.finish_reason = "stop"
                return
            reply.token_ids.append(token)
            reply.timings.new_tokens += 1
            if piece := decoder.push(token):
                piece = piece if reply.text else piece.lstrip()  # a template's answer starts with a blank
                reply.text += piece
                yield piece
            if len(reply.token_ids) >= limit:
                reply.finish_reason = "length"
                return
            with reply.timings.measure("decode_ms"):
                logits = self.engine.forward(self.engine.embed_tokens([token]), prefix.cache)[0]
                prefix.keys.append(token)
            reply.timings.decode_steps += 1
        reply.finish_reason = "cancelled"

    def _keys(self, chunks: Sequence[Chunk], pictures: Sequence[RgbImage]) -> list[Hashable]:
        """What stands at each position of the sequence."""
        keys: list[Hashable] = []
        for chunk in chunks:
            if isinstance(chunk, ImageSlot):
                digest = pictures[chunk.index].sha256
                keys.extend((digest, place) for place in range(self.config.tokens_per_image))
            else:
                keys.extend(chunk.ids)
        return keys

    def _check_length(self, keys: Sequence[Hashable], images: int) -> None:
        if len(keys) >= self.context:
            image_tokens = images * self.config.tokens_per_image
            raise ContextError(
                f"the prompt takes {len(keys):,} positions ({images} images of {self.config.tokens_per_image} and "
                f"{len(keys) - image_tokens:,} of text), the context has {self.context:,} with the answer",
                "shorten the prompt, use fewer images, or start a new conversation",
            )

    def _image_embeds(self, pictures: Sequence[RgbImage], timings: Timings) -> list[FloatArray]:
        """image_embeds [T, D] of each picture; those seen before are not encoded again."""
        found: list[FloatArray] = []
        for picture in pictures:
            image_embeds = self._image_cache.get(picture.sha256)
            if image_embeds is None:
                with timings.measure("preprocess_ms"):
                    pixel_values = preprocess([picture], self.config.preprocess)
                with timings.measure("vision_ms"):
                    features = self.engine.encode_images(pixel_values)
                with timings.measure("projector_ms"):
                    image_embeds = self.engine.project(features)[0]
                self._image_cache.put(picture.sha256, image_embeds)
            found.append(image_embeds)
        return found

    def _inputs_embeds(self, chunks: Sequence[Chunk], image_embeds: Sequence[FloatArray]) -> FloatArray:
        """The whole sequence [S, D]: embeddings of the text, and image_embeds in the slots."""
        return np.concatenate(
            [
                image_embeds[chunk.index] if isinstance(chunk, ImageSlot) else self.engine.embed_tokens(chunk.ids)
                for chunk in chunks
            ]
        )


def load(
    bundle: str | os.PathLike[str], backend: str = "auto", threads: int | None = None, context: int = 0
) -> Pipeline:
    """A pipeline for a bundle, on the chosen backend (`auto` takes onnxruntime on the CPU).

    Every file is checked against the manifest first. Raises BundleError, BackendError or UsageError.
    """
    opened = Bundle.open(bundle)
    tokenizer = Tokenizer(opened.tokenizer_json(), str(opened.path / "tokenizer.json"))
    engine = _engine(opened, backend, threads)
    return Pipeline(opened.manifest.name, opened.config, tokenizer, engine, context, opened.manifest.digest)


def _engine(bundle: Bundle, backend: str, threads: int | None) -> Engine:
    if backend == "numpy":
        return numpy_engine(bundle.config, bundle_parameters(bundle))
    if backend in ("auto", "onnxruntime"):
        from vila_edge.engine.onnxruntime import OnnxruntimeEngine

        return OnnxruntimeEngine(bundle, threads)
    raise UsageError(f"unknown backend {backend!r}", f"known backends: {', '.join(BACKENDS)}")
