"""From images and turns to streamed text: the walk of a prompt, readable from top to bottom."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vila_edge.backends import open_engine
from vila_edge.bundle import Bundle
from vila_edge.caches import ImageCache, Prefix
from vila_edge.config import VilaConfig
from vila_edge.engine.protocol import Engine, Generating
from vila_edge.errors import ContextError, InputError, UsageError
from vila_edge.media.image import ImageSource, load_image
from vila_edge.media.video import Video, VideoSource, load_video
from vila_edge.prompt import (
    IMAGE_MARK,
    VIDEO_MARK,
    Chunk,
    ImageSlot,
    Turn,
    assemble,
    expand_marks,
    few_shot,
    place_media,
)
from vila_edge.sampler import Sampler, Sampling
from vila_edge.timing import Timings
from vila_edge.tokenizer import Tokenizer
from vila_edge.visual import Medium, Visual, look, plan, slot_embeds, splice

FloatArray = NDArray[np.float32]
FinishReason = Literal["stop", "length", "cancelled"]
MediaSource = ImageSource | Video


@dataclass(frozen=True)
class Shot:
    """An answered example that goes before a question."""

    image: ImageSource
    answer: str


def load_media(source: MediaSource) -> Medium:
    """An image, or a video that `load_video` made. Raises ImageError that names the source."""
    return source if isinstance(source, Video) else load_image(source)


def mark_of(medium: Medium) -> str:
    return VIDEO_MARK if isinstance(medium, Video) else IMAGE_MARK


@dataclass
class Reply:
    """An answer as it comes: iterate for pieces of text; the other fields are complete at the end."""

    seed: int
    visuals: tuple[Visual, ...] = ()
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    timings: Timings = field(default_factory=Timings)
    cancelled: bool = False
    _pieces: Iterator[str] = field(default=iter(()), repr=False)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def media(self) -> tuple[Medium, ...]:
        """The images and videos that were shown, in order."""
        return tuple(visual.medium for visual in self.visuals)

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
        """`context`: positions of a conversation, at most what the model was made for, by default what `engine` can.

        Raises UsageError if it is out of range, InputError if the tokenizer is not the model's.
        """
        longest = config.llm.context_length
        if not 0 <= context <= longest:
            raise UsageError(f"a context of {context} positions: this model has 1 to {longest:,}")
        tokenizer.check_rows(config.llm.vocab_size)
        self.name, self.config, self.tokenizer, self.engine = name, config, tokenizer, engine
        self.context = context or min(longest, engine.max_context)
        self.bundle_digest = bundle_digest
        stops = (tokenizer.control_id(token) for token in config.profile.stop_tokens)
        self.stop_ids = frozenset(stop for stop in stops if stop is not None)
        if not self.stop_ids:
            raise InputError(f"{tokenizer.source}: has none of the stop tokens {', '.join(config.profile.stop_tokens)}")
        self._image_end = tokenizer.encode(config.profile.image_end) if config.profile.image_end else ()
        self._image_cache = ImageCache()

    def new_prefix(self) -> Prefix:
        """The empty kv_cache of a new conversation."""
        return Prefix(self.engine.new_cache(self.context))

    def forget_images(self) -> None:
        """Encode every image anew, as a benchmark wants it."""
        self._image_cache = ImageCache()

    def generate(
        self,
        prompt: str,
        media: Sequence[MediaSource] = (),
        sampling: Sampling | None = None,
        shots: Sequence[Shot] = (),
    ) -> Reply:
        """The whole answer to one prompt, behind answered examples if there are `shots`.

        `<image>` or `<video>` in it is the place of the next of `media`; without marks, the media go first.
        """
        turn, media = self.ask(prompt, media, shots)
        return self.stream([turn], media, sampling).finish()

    def ask(
        self, prompt: str, media: Sequence[MediaSource] = (), shots: Sequence[Shot] = ()
    ) -> tuple[Turn, list[Medium]]:
        """A user's turn with a mark for each image and video, and those, loaded. Raises ImageError, PromptError."""
        asked = [load_media(source) for source in media]
        shown = [load_media(shot.image) for shot in shots]
        question = place_media(prompt, [mark_of(medium) for medium in asked], self.config.profile)
        text = few_shot([shot.answer for shot in shots], question, self.config.profile)
        return Turn("user", text), [*shown, *asked]

    def load_video(self, source: VideoSource, frames: int | None = None, fps: float | None = None) -> Video:
        """A video as this model looks at it: so many frames, chosen by its rule. Raises ImageError, UsageError."""
        video = self.config.video
        return load_video(
            source, frames or video.num_video_frames, self.config.profile.frame_rule, video.fps if fps is None else fps
        )

    def plan(self, media: Sequence[Medium]) -> list[Visual]:
        """How the images and videos of one prompt would be looked at. Raises PromptError."""
        return plan(media, self.config, len(self._image_end))

    def stream(
        self,
        turns: Sequence[Turn],
        media: Sequence[MediaSource] = (),
        sampling: Sampling | None = None,
        prefix: Prefix | None = None,
    ) -> Reply:
        """Answer the last turn, piece by piece. One image or video for each mark in the turns, in that order.

        The prompt is read before this returns, so that what is wrong with it is raised here: ImageError,
        PromptError, ContextError. `prefix` is the conversation's kv_cache, if it is to be kept.
        """
        sampler = Sampler(sampling or Sampling())
        timings = Timings()
        with timings.measure("load_ms"):
            visuals = self.plan([load_media(source) for source in media])
            expanded = expand_marks(turns, [visual.shown for visual in visuals], self.config.profile)
            chunks = assemble(expanded, self.tokenizer, self.config.profile)
            keys = self._keys(chunks, visuals)
        self._check_length(keys, visuals)
        prefix = prefix or self.new_prefix()
        start = prefix.reuse(keys)
        embeds = self._slot_embeds(visuals, timings)
        timings.prompt_tokens, timings.cached_tokens = len(keys), start
        timings.image_tokens = sum(visual.tokens for visual in visuals)
        with timings.measure("prefill_ms"):
            inputs_embeds = splice(chunks, embeds, self.engine)
            chunk = self.engine.prefill_chunk
            for begin in range(start, len(keys), chunk):
                logits = self.engine.forward(inputs_embeds[begin : begin + chunk], prefix.cache)
                prefix.keys.extend(keys[begin : begin + chunk])
        reply = Reply(sampler.seed, tuple(visuals), timings=timings)
        reply._pieces = self._decode(reply, logits[0], sampler, prefix)
        return reply

    def _decode(self, reply: Reply, logits: FloatArray, sampler: Sampler, prefix: Prefix) -> Iterator[str]:
        """Take tokens and stream their text until the model stops or there is no room."""
        decoder, timings = self.tokenizer.stream(), reply.timings
        limit = min(sampler.sampling.max_new_tokens, self.context - len(prefix.keys))
        tokens = self._tokens(logits, sampler, prefix)
        while not reply.cancelled:
            if reply.token_ids:
                with timings.measure("decode_ms"):
                    token = next(tokens)
                timings.decode_steps += 1
            else:
                token = next(tokens)
            if token in self.stop_ids:
                reply.finish_reason = "stop"
                return
            reply.token_ids.append(token)
            timings.new_tokens += 1
            if piece := decoder.push(token):
                piece = piece if reply.text else piece.lstrip()  # a template's answer starts with a blank
                reply.text += piece
                yield piece
            if len(reply.token_ids) >= limit:
                reply.finish_reason = "length"
                return
        reply.finish_reason = "cancelled"

    def _tokens(self, logits: FloatArray, sampler: Sampler, prefix: Prefix) -> Iterator[int]:
        """Token after token, for as long as there is room: sampled from logits, or by an engine that samples itself."""
        token = sampler(logits)
        yield token
        if isinstance(self.engine, Generating):
            stops = tuple(self.stop_ids)
            for following in self.engine.generate(token, prefix.cache, sampler.sampling, sampler.seed, stops):
                prefix.keys.append(token)
                token = following
                yield token
            return
        while True:
            logits = self.engine.forward(self.engine.embed_tokens([token]), prefix.cache)[0]
            prefix.keys.append(token)
            token = sampler(logits)
            yield token

    def _keys(self, chunks: Sequence[Chunk], visuals: Sequence[Visual]) -> list[Hashable]:
        """What stands at each position of the sequence."""
        slots = [(visual.key, number, n) for visual in visuals for number, n in enumerate(visual.slot_lengths)]
        keys: list[Hashable] = []
        for chunk in chunks:
            if isinstance(chunk, ImageSlot):
                visual, number, length = slots[chunk.index]
                keys.extend((visual, number, place) for place in range(length))
            else:
                keys.extend(chunk.ids)
        return keys

    def _check_length(self, keys: Sequence[Hashable], visuals: Sequence[Visual]) -> None:
        if len(keys) >= self.context:
            image_tokens = sum(visual.tokens for visual in visuals)
            raise ContextError(
                f"the prompt takes {len(keys):,} positions ({image_tokens:,} of {_count(visuals)} and "
                f"{len(keys) - image_tokens:,} of text), the context has {self.context:,} with the answer",
                "shorten the prompt, use fewer images or frames, or start a new conversation",
            )

    def _slot_embeds(self, visuals: Sequence[Visual], timings: Timings) -> list[FloatArray]:
        """What stands in each slot [slot length, D]; what was seen before is not encoded again."""
        image_end = self.engine.embed_tokens(self._image_end)
        found: list[FloatArray] = []
        for visual in visuals:
            image_embeds = self._image_cache.get(visual.key)
            if image_embeds is None:
                image_embeds = look(visual, self.engine, self.config, timings).image_embeds
                self._image_cache.put(visual.key, image_embeds)
            found += slot_embeds(visual, image_embeds, self.config, image_end)
        return found


def _count(visuals: Sequence[Visual]) -> str:
    videos = sum(isinstance(visual.medium, Video) for visual in visuals)
    return f"{len(visuals) - videos} images" + (f" and {videos} videos" if videos else "")


def load(
    bundle: str | os.PathLike[str],
    backend: str = "auto",
    threads: int | None = None,
    context: int = 0,
    kv_cache: str = "float32",
    projector: str = "engine",
    tower: str = "auto",
) -> Pipeline:
    """A pipeline for a bundle, on the chosen backend: see `backends.open_engine`.

    Every file is checked against the manifest before this returns. Raises BundleError, BackendError or UsageError.
    """
    with Bundle.checked_meanwhile(bundle) as opened:  # an engine takes as long to load as its weights to be read
        tokenizer = Tokenizer(opened.tokenizer_json(), str(opened.path / "tokenizer.json"), opened.config.tokenizer)
        engine = open_engine(opened, backend, threads, kv_cache, context, projector, tower)
    return Pipeline(opened.manifest.name, opened.config, tokenizer, engine, context, opened.manifest.digest)
