"""The training loop: one stage, on whatever accelerate finds."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.optim import Optimizer
from transformers import get_scheduler

from vila_edge.errors import VilaEdgeError
from vila_edge.train.batches import Batches
from vila_edge.train.model import Vila
from vila_edge.train.stages import Stage

OnStep = Callable[[int, float], None]  # steps done, loss of the last one


def run_stage(
    model: Vila, stage: Stage, batches: Batches, on_step: OnStep = lambda step, loss: None, cpu: bool = False
) -> None:
    """Train `model` in place, on the CPU even where there is a GPU if `cpu`.

    Raises VilaEdgeError if the loss is not finite.
    """
    freeze_all_but(model, stage.trains)
    model.train()
    accelerator = Accelerator(cpu=cpu)
    optimizers = make_optimizers(model, stage)
    wrapped, *optimizers = accelerator.prepare(model, *optimizers)
    warmup = round(stage.warmup_share * stage.steps)
    schedulers = [get_scheduler(stage.schedule, o, warmup, stage.steps) for o in optimizers]
    for step, batch in enumerate(batches.of_process(accelerator.process_index), 1):
        loss = wrapped(**send_to_device(batch, accelerator.device))
        value = loss.item()
        if not math.isfinite(value):
            raise VilaEdgeError(f"stage {stage.name}: the loss is {value} at step {step}", "lower the learning rate")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), stage.max_grad_norm)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        on_step(step, value)
    model.eval()


def freeze_all_but(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))


def make_optimizers(model: nn.Module, stage: Stage) -> list[Optimizer]:
    """Optimizers for the parameters that are not frozen."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            muon = stage.optimizer == "muon" and is_hidden_matrix(name, parameter)
            (hidden if muon else rest).append(parameter)
    rate = stage.learning_rate
    optimizers: list[Optimizer] = []
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=rate, weight_decay=0.0, betas=(0.9, 0.95)))
    return optimizers


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """A matrix between hidden layers, as against a table of tokens: Muon is for the former."""
    return parameter.ndim == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight"))
