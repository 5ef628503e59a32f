"""What a benchmark runs: lengths that fit the model, and inputs that are the same each time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vila_edge.backends import BACKENDS, KV_CACHES
from vila_edge.bundle import Bundle
from vila_edge.config import VilaConfig
from vila_edge.engine.tensorrt_options import PROJECTOR_CHOICES
from vila_edge.errors import UsageError
from vila_edge.media.image import RgbImage
from vila_edge.tokenizer import Tokenizer
from vila_edge.visual import plan

PROMPT_TOKENS = 512
CONTEXTS = (64, 512)
IMAGE_SIZE = (480, 640)  # height and width: what a camera gives


@dataclass(frozen=True)
class Options:
    """What was asked for. `prompt_tokens` None and no `contexts`: the defaults, as far as the model goes."""

    backend: str = "auto"
    threads: int | None = None
    prompt_tokens: int | None = None
    contexts: tuple[int, ...] = ()
    new_tokens: int = 32
    repeat: int = 5
    images: int = 1
    warmup: int = 1
    kv_cache: str = "float32"
    projector: str = "engine"

    @property
    def on_cpu(self) -> bool:
        return self.backend in ("auto", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Workload:
    """What is run. Decode is measured from each of `contexts` on, positions that are in the kv_cache before."""

    prompt_tokens: int
    contexts: tuple[int, ...]
    new_tokens: int
    repeat: int
    warmup: int
    images: int
    image_tokens: int  # positions of all images together

    @property
    def capacity(self) -> int:
        """Positions that the kv_cache needs room for."""
        return max(self.first_prompt, *(context + self.new_tokens for context in self.contexts))

    @property
    def first_prompt(self) -> int:
        """Positions of the prompt that a fresh process answers: the images, and text up to `prompt_tokens`."""
        return max(self.prompt_tokens, self.image_tokens + 1)


def plan_workload(bundle: Bundle, options: Options) -> Workload:
    """The lengths that fit the model. Raises UsageError that says which option does not fit."""
    _check(options)
    longest = bundle.config.llm.context_length
    room = longest - options.new_tokens
    if room < 1:
        raise UsageError(f"--new-tokens {options.new_tokens}: this model has {longest:,} positions")
    for context in options.contexts:
        if not 1 <= context <= room:
            raise UsageError(
                f"--context {context}: with {options.new_tokens} new tokens, this model has 1 to {room:,}",
                "choose a shorter context or fewer --new-tokens",
            )
    if options.prompt_tokens is not None and not 1 <= options.prompt_tokens <= longest:
        raise UsageError(f"--prompt-tokens {options.prompt_tokens}: this model has 1 to {longest:,} positions")
    image_tokens = _image_tokens(bundle, options.images)
    if image_tokens >= longest:
        raise UsageError(
            f"--images {options.images}: they take {image_tokens:,} positions, this model has {longest:,}",
            "use fewer images",
        )
    return Workload(
        prompt_tokens=options.prompt_tokens or min(PROMPT_TOKENS, longest),
        contexts=tuple(sorted(set(options.contexts or (min(context, room) for context in CONTEXTS)))),
        new_tokens=options.new_tokens,
        repeat=options.repeat,
        warmup=options.warmup,
        images=options.images,
        image_tokens=image_tokens,
    )


def _check(options: Options) -> None:
    least = {"threads": 1, "new_tokens": 1, "repeat": 1, "images": 0, "warmup": 0}
    values = dataclasses.asdict(options)
    for name, minimum in least.items():
        if values[name] is not None and values[name] < minimum:
            raise UsageError(f"--{name.replace('_', '-')} {values[name]}: expected at least {minimum}")
    for name, known in (("backend", BACKENDS), ("kv_cache", KV_CACHES), ("projector", PROJECTOR_CHOICES)):
        if values[name] not in known:
            raise UsageError(f"--{name.replace('_', '-')} {values[name]}: not known", f"known: {', '.join(known)}")


def _image_tokens(bundle: Bundle, images: int) -> int:
    cfg = bundle.config
    source = str(bundle.path / "tokenizer.json")
    end = Tokenizer(bundle.tokenizer_json(), source, cfg.tokenizer).encode(cfg.profile.image_end)
    return sum(visual.tokens for visual in plan(noise_images(images), cfg, len(end)))


def noise_images(count: int) -> list[RgbImage]:
    """The same every time, no two alike: nothing that was seen is found in a cache."""
    return [
        RgbImage(np.random.default_rng(seed).integers(0, 256, (*IMAGE_SIZE, 3), np.uint8), f"noise {seed}")
        for seed in range(count)
    ]


def random_ids(cfg: VilaConfig, count: int) -> Sequence[int]:
    """Token ids, the same every time."""
    return [int(token) for token in np.random.default_rng(0).integers(0, cfg.llm.vocab_size, count)]
