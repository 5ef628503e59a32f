"""The micro VILA's sizes and stages, and the run that makes its checkpoint.

What makes it train in minutes: Muon, embeddings of standard deviation 0.3 with a head that starts as their copy,
small batches, and few-shot episodes in the SFT whose loss is on the answer alone. Held labels stay usable
because they occur as answers in text.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import get_scheduler

from vila_edge.config import (
    LlmConfig,
    PreprocessConfig,
    ProjectorConfig,
    RopeConfig,
    TokenizerConfig,
    VilaConfig,
    VisionConfig,
)
from vila_edge.media.image import load_image
from vila_edge.micro.digits import Digits, augment
from vila_edge.micro.documents import Document, interleaved_document, pair, text_document
from vila_edge.micro.instructions import Exchange, conversation
from vila_edge.micro.tokens import BOS, TOKENIZER_CONFIG, VOCAB_SIZE, make_tokenizer
from vila_edge.preprocess import preprocess
from vila_edge.profiles import VILA_1_5
from vila_edge.prompt import Turn
from vila_edge.tokenizer import Tokenizer
from vila_edge.train.batches import Batches
from vila_edge.train.checkpoint import save_checkpoint
from vila_edge.train.model import Vila, select_features
from vila_edge.train.run import run_stage
from vila_edge.train.samples import SampleMaker, TrainingSample
from vila_edge.train.stages import PROJECTOR, PROJECTOR_AND_LLM, Stage

CONFIG = VilaConfig(
    vision_tower=VisionConfig(
        model_type="siglip_vision_model",
        hidden_act="gelu_pytorch_tanh",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        layer_norm_eps=1e-6,
        select_layer=-2,
        select_feature="cls_patch",
    ),
    mm_projector=ProjectorConfig("mlp_downsample"),
    llm=LlmConfig(
        model_type="llama",
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=VOCAB_SIZE,
        context_length=512,
        rms_norm_eps=1e-5,
        rope=RopeConfig(rope_theta=10_000.0),
        tie_word_embeddings=False,
    ),
    preprocess=PreprocessConfig(
        image_aspect_ratio="resize",
        image_size=28,
        rescale_factor=1 / 255,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    ),
    profile=replace(VILA_1_5, template="vicuna_v1_nosys", few_shot="<image>{answer};"),
    tokenizer=TokenizerConfig(bos_token=BOS),
)

DARK_ON_LIGHT_SHARE = 0.15  # of the training pictures; the others are light ink on a dark ground
COPIES = 10  # of each training scan: itself, and nine that are turned, moved and scaled
NEAREST_SHARE = 0.2  # of the training pictures; the others are enlarged smoothly
TOWER_BATCH = 64
FEATURE_BATCH = 512

Progress = Callable[[int, int], None]  # steps done, steps in all


TEXT = Stage(
    "text",
    trains=("llm",),
    learning_rate=5e-3,
    steps=380,
    tokens_per_batch=1024,
    optimizer="muon",
    schedule="linear",
    warmup_share=0.05,
)
ALIGN = replace(TEXT, name="align", trains=PROJECTOR, steps=120)
PRETRAIN = replace(TEXT, name="pretrain", trains=PROJECTOR_AND_LLM, learning_rate=3e-3, steps=250)
SFT = replace(TEXT, name="sft", trains=PROJECTOR_AND_LLM, learning_rate=3e-3, steps=600)


@dataclass(frozen=True)
class Recipe:
    """Stages and seed. The defaults are the demo's."""

    seed: int = 0
    tower_steps: int = 1500
    tower_learning_rate: float = 3e-3
    text: Stage = TEXT
    align: Stage = ALIGN
    pretrain: Stage = PRETRAIN
    sft: Stage = SFT


class MicroTraining:
    """One run, from random weights to a checkpoint: call the stages in their order."""

    def __init__(self, digits: Digits, recipe: Recipe) -> None:
        """`digits` are the training split."""
        self.digits, self.recipe = digits, recipe
        self.tokenizer_json = make_tokenizer()
        self.maker = SampleMaker(Tokenizer(self.tokenizer_json, config=CONFIG.tokenizer), CONFIG)
        self.labels = torch.from_numpy(np.tile(digits.labels, COPIES))
        self.by_label = [torch.nonzero(self.labels == digit).flatten().tolist() for digit in range(10)]
        torch.manual_seed(recipe.seed)
        self.model = Vila(CONFIG)
        self.digit_head = nn.Linear(CONFIG.vision_tower.hidden_size, 10)
        _initialise(self.model)
        self.features = torch.zeros(1, CONFIG.vision_tower.grid_size**2, CONFIG.vision_tower.hidden_size)

    def base(self, progress: Progress) -> None:
        """What a VILA starts from: an LLM that knows text and, trained beside it, a tower that knows digits."""
        tower = copy.deepcopy(self.model.vision_tower)  # its own: a stage freezes what it does not train
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(self._train_tower, tower, stop)
            try:
                self._run(self.recipe.text, lambda rng: self._document(text_document(rng), rng), progress)
            except BaseException:
                stop.set()  # Ctrl-C does not wait for the tower
                raise
            pixel_values = training.result()
        self.model.vision_tower.load_state_dict(tower.state_dict())
        with torch.inference_mode():
            batches = [self.model.image_features(pixels) for pixels in pixel_values.split(FEATURE_BATCH)]
        self.features = torch.cat(batches).clone()  # the tower is frozen from here on

    def align(self, progress: Progress) -> None:
        """Stage 0: the projector alone, on image-text pairs."""
        self._run(self.recipe.align, lambda rng: self._document(pair(rng), rng), progress)

    def pretrain(self, progress: Progress) -> None:
        """Stage 1: projector and LLM, on interleaved documents, pairs and plain text."""
        self._run(self.recipe.pretrain, lambda rng: self._document(_mixture(rng), rng), progress)

    def sft(self, progress: Progress) -> None:
        """Stage 2: projector and LLM, on visual and text-only conversations together."""
        self._run(self.recipe.sft, lambda rng: self._conversation(conversation(rng), rng), progress)

    def save(self, folder: Path) -> None:
        """The checkpoint, into an empty folder."""
        save_checkpoint(self.model, self.tokenizer_json, folder, TOKENIZER_CONFIG)

    def _run(self, stage: Stage, draw: Callable[[random.Random], TrainingSample], progress: Progress) -> None:
        batches = Batches(draw, self._image_features, stage.steps, stage.tokens_per_batch, self.recipe.seed)
        run_stage(self.model, stage, batches, lambda step, loss: progress(step, stage.steps), cpu=True)

    def _image_features(self, images: Sequence[int]) -> Tensor:
        return self.features[list(images)]

    def _document(self, document: Document, rng: random.Random) -> TrainingSample:
        return self.maker.pretraining(document.text, self._pictures(document.digits, rng))

    def _conversation(self, exchanges: Sequence[Exchange], rng: random.Random) -> TrainingSample:
        turns = [turn for e in exchanges for turn in (Turn("user", e.question), Turn("assistant", e.answer))]
        return self.maker.conversation(turns, self._pictures([d for e in exchanges for d in e.digits], rng))

    def _pictures(self, digits: Sequence[int], rng: random.Random) -> list[int]:
        """A training picture of each digit."""
        return [rng.choice(self.by_label[digit]) for digit in digits]

    def _train_tower(self, tower: nn.Module, stop: threading.Event) -> Tensor:
        """The tower stand-in learns to tell digits by the mean of its features. Returns the pictures it saw."""
        pixel_values = torch.from_numpy(_pixel_values(self.digits, random.Random(self.recipe.seed)))
        head, steps = self.digit_head, self.recipe.tower_steps
        optimizer = torch.optim.AdamW(
            [*tower.parameters(), *head.parameters()], lr=self.recipe.tower_learning_rate, weight_decay=0.05
        )
        scheduler = get_scheduler("linear", optimizer, round(0.1 * steps), steps)
        generator = torch.Generator().manual_seed(self.recipe.seed)
        for _ in range(steps):
            if stop.is_set():
                break
            chosen = torch.randint(len(self.labels), (TOWER_BATCH,), generator=generator)
            features = select_features(tower, pixel_values[chosen], CONFIG.vision_tower)
            loss = F.cross_entropy(head(features.mean(1)), self.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        return pixel_values


def _pixel_values(digits: Digits, rng: random.Random) -> NDArray[np.float32]:
    """pixel_values of all copies of all scans, through the same preprocessing as at run time."""
    copies = []
    for copy_number in range(COPIES):
        images = []
        for index in range(len(digits)):
            nearest = rng.random() < NEAREST_SHARE
            picture = digits.picture(index, Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC)
            picture = augment(picture, rng) if copy_number else picture
            dark_on_light = rng.random() < DARK_ON_LIGHT_SHARE
            images.append(load_image(ImageOps.invert(picture) if dark_on_light else picture))
        copies.append(preprocess(images, CONFIG.preprocess))
    return np.concatenate(copies)


def _initialise(model: Vila) -> None:
    """Embeddings large enough to tell tokens apart at once, and a head that starts as their copy."""
    with torch.no_grad():
        embed_tokens = model.llm.model.embed_tokens.weight.normal_(0, 0.3)
        model.llm.lm_head.weight.copy_(embed_tokens * 0.17)


def _mixture(rng: random.Random) -> Document:
    """The corpus of stage 1."""
    kind = rng.random()
    if kind < 0.12:
        return text_document(rng)
    return pair(rng) if kind < 0.25 else interleaved_document(rng)
