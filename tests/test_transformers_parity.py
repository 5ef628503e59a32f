"""The architecture against modules that are not ours: transformers' SigLIP and LLaMA."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaForCausalLM, SiglipVisionModel

from tests.tiny import TINY, random_parameters
from vila_edge.reference.engine import numpy_engine
from vila_edge.train.checkpoint import checkpoint_parameters
from vila_edge.train.model import IMAGE_TOKEN_INDEX, Vila

RNG = np.random.default_rng(2)


def random_vila() -> Vila:
    torch.manual_seed(0)
    model = Vila(TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.05, 0.1)
    return model


@torch.inference_mode()
def test_the_modules_of_transformers_compute_the_same() -> None:
    model = random_vila()
    assert isinstance(model.vision_tower, SiglipVisionModel)
    assert isinstance(model.llm, LlamaForCausalLM)
    engine = numpy_engine(TINY, {name: value.numpy() for name, value in checkpoint_parameters(model).items()})

    pixel_values = RNG.standard_normal((2, 3, 46, 46)).astype(np.float32)
    features = model.image_features(torch.from_numpy(pixel_values))
    np.testing.assert_allclose(engine.encode_images(pixel_values), features.numpy(), atol=1e-5)

    image_embeds = model.mm_projector(features)
    np.testing.assert_allclose(engine.project(features.numpy()), image_embeds.numpy(), atol=1e-5)

    slots = [IMAGE_TOKEN_INDEX] * 9
    input_ids = torch.tensor([[1, 5, *slots, 7, 8, *slots, 9, 10, 11]])
    embeds = model.inputs_embeds(input_ids, image_embeds)
    assert torch.equal(embeds[0, 2:11], image_embeds[0])
    assert torch.equal(embeds[0, 13:22], image_embeds[1])
    logits = model.llm(inputs_embeds=embeds).logits[0]
    got = engine.forward(embeds[0].numpy(), engine.new_cache(99), range(embeds.shape[1]))
    np.testing.assert_allclose(got, logits.numpy(), atol=1e-5)


def test_random_parameters_fill_the_training_model_exactly() -> None:
    """Every parameter that the architecture reads exists in the modules, with its shape."""
    found = {name: tuple(value.shape) for name, value in checkpoint_parameters(random_vila()).items()}
    assert found == {name: value.shape for name, value in random_parameters(TINY).items()}
