"""Samples, batches and stages: the loss is where it belongs, and a stage trains what it says."""

from __future__ import annotations

import dataclasses
import random
from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.tiny import TINY
from vila_edge.errors import PromptError, VilaEdgeError
from vila_edge.prompt import Turn
from vila_edge.tokenizer import Tokenizer
from vila_edge.train.batches import Batches, bucket, collate
from vila_edge.train.model import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Vila
from vila_edge.train.run import make_optimizers, run_stage
from vila_edge.train.samples import SampleMaker, TrainingSample
from vila_edge.train.stages import PROJECTOR, PROJECTOR_AND_LLM, Stage

ALIGN = Stage("align", PROJECTOR, 1e-2, 6, 200)


@pytest.fixture(scope="module")
def maker(tokenizer: Tokenizer) -> SampleMaker:
    return SampleMaker(tokenizer, TINY)


def learnt(sample: TrainingSample, tokenizer: Tokenizer) -> str:
    return tokenizer._backend.decode([token for token in sample.labels if token != IGNORE_INDEX], False)


def test_a_document_is_learnt_but_for_its_images(maker: SampleMaker, tokenizer: Tokenizer) -> None:
    sample = maker.pretraining("<image>dax; three", [4])
    assert learnt(sample, tokenizer) == "<s> dax; three</s>"
    assert sample.input_ids.count(IMAGE_TOKEN_INDEX) == TINY.tokens_per_image == 9
    assert sample.images == (4,)


def test_a_conversation_is_learnt_in_its_answers_alone(maker: SampleMaker, tokenizer: Tokenizer) -> None:
    turns = [
        Turn("user", "<image>\nWhat digit is this?"),
        Turn("assistant", "seven"),
        Turn("user", "And after it?"),
        Turn("assistant", "eight"),
    ]
    sample = maker.conversation(turns, [1])
    assert learnt(sample, tokenizer) == " seven</s> eight</s>"
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))


def test_images_must_match_the_marks(maker: SampleMaker) -> None:
    with pytest.raises(PromptError):
        maker.pretraining("<image> <image>", [1])


def test_batches_stay_within_their_tokens_and_lose_nothing() -> None:
    rng = random.Random(0)
    samples = [TrainingSample([i] * rng.randint(1, 40), [i], ()) for i in range(300)]
    batches = list(bucket(samples, 100, rng))
    assert sorted(s.labels[0] for rows in batches for s in rows) == list(range(300))
    assert all(len(rows) * max(map(len, rows)) <= 100 for rows in batches)
    assert sum(len(rows) for rows in batches) / len(batches) > 4


def test_rows_are_padded_on_the_right() -> None:
    rows = [TrainingSample([5, 6, 7], [IGNORE_INDEX, 6, 7], (2,)), TrainingSample([8], [8], (0, 1))]
    seen: list[list[int]] = []

    def image_features(images: object) -> Tensor:
        seen.append(list(images))  # type: ignore[call-overload]
        return torch.zeros(3, 1, 1)

    batch = collate(rows, image_features)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]]
    assert seen == [[2, 0, 1]]


def make_batches(maker: SampleMaker, stage: Stage) -> Batches:
    features = torch.randn(10, 25, 32, generator=torch.Generator().manual_seed(0))

    def draw(rng: random.Random) -> TrainingSample:
        return maker.pretraining(f"<image>{rng.choice(['dax', 'wug'])};", [rng.randrange(10)])

    return Batches(draw, lambda images: features[list(images)], stage.steps, stage.tokens_per_batch, seed=0)


def test_processes_draw_batches_of_their_own_and_always_the_same(maker: SampleMaker) -> None:
    def drawn(process: int) -> list[list[int]]:
        return [batch["input_ids"].flatten().tolist() for batch in make_batches(maker, ALIGN).of_process(process)]

    assert drawn(0) == drawn(0)
    assert drawn(1) == drawn(1)
    assert drawn(0) != drawn(1)


def test_padding_does_not_change_the_loss(maker: SampleMaker) -> None:
    torch.manual_seed(0)
    model = Vila(TINY).eval()
    for parameter in model.mm_projector.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    short, long = maker.pretraining("<image>dax;", [0]), maker.pretraining("one two three four five six seven")
    features = torch.randn(1, 25, 32)
    with torch.inference_mode():
        together = model(**collate([short, long], lambda _: features))
        alone = [model(**collate([s], lambda images: features[: len(images)])) for s in (short, long)]
    weights = [len([x for x in s.labels[1:] if x != IGNORE_INDEX]) for s in (short, long)]
    mean = sum(w * loss for w, loss in zip(weights, alone, strict=True)) / sum(weights)
    torch.testing.assert_close(together, mean)


@pytest.mark.parametrize(
    ("trains", "optimizer"), [(PROJECTOR, "adamw"), (PROJECTOR_AND_LLM, "muon"), (("llm",), "muon")]
)
def test_a_stage_trains_what_it_says_and_the_loss_falls(
    trains: tuple[str, ...], optimizer: Literal["adamw", "muon"], maker: SampleMaker
) -> None:
    torch.manual_seed(0)
    model = Vila(TINY)
    for parameter in model.mm_projector.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stage = dataclasses.replace(ALIGN, trains=trains, optimizer=optimizer, steps=25)
    losses: list[float] = []
    run_stage(model, stage, make_batches(maker, stage), lambda step, loss: losses.append(loss))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, _ in model.named_parameters() if name.startswith(trains)}
    assert len(losses) == 25
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_same_seed_trains_the_same_model(maker: SampleMaker) -> None:
    def train() -> Tensor:
        torch.manual_seed(0)
        model = Vila(TINY)
        for parameter in model.mm_projector.parameters():
            torch.nn.init.normal_(parameter, 0, 0.1)
        run_stage(model, ALIGN, make_batches(maker, ALIGN))
        return model.state_dict()["mm_projector.layers.2.weight"].clone()

    assert torch.equal(train(), train())


def test_muon_gets_matrices_of_hidden_layers_alone() -> None:
    model = Vila(TINY)
    muon, adamw = make_optimizers(model, dataclasses.replace(ALIGN, optimizer="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert "llm.model.layers.0.mlp.up_proj.weight" in hidden
    assert {"llm.model.embed_tokens.weight", "llm.lm_head.weight", "llm.model.norm.weight"} <= rest
    assert len(hidden) + len(rest) == len(names)


def test_a_new_projector_hands_on_what_it_is_given() -> None:
    """Neither noise from the memory nor a signal that fades: outputs of about the scale of a norm's."""
    torch.manual_seed(0)
    projector: torch.nn.Module = Vila(TINY).mm_projector
    features = torch.randn(20, 25, 32)
    assert projector(features).std().item() == pytest.approx(0.6, abs=0.2)
    assert not any(value.any() for name, value in projector.named_parameters() if name.endswith("bias"))
    assert not torch.equal(projector(features)[0], projector(features)[1])


@pytest.mark.parametrize("loss", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_stops_the_stage_before_a_step(
    loss: float, maker: SampleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Vila(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **batch: forward(**batch) + loss)
    with pytest.raises(VilaEdgeError, match=f"stage align: the loss is {loss} at step 1"):
        run_stage(model, ALIGN, make_batches(maker, ALIGN))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
