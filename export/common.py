"""What the scripts here share: errors in one line, the samples' hidden states, and the cost of 4 bits for a block."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch import Tensor

from vila_edge import architecture
from vila_edge.cli.console import print_error, print_warning
from vila_edge.config import LlmConfig
from vila_edge.cores import usable_cores
from vila_edge.errors import UsageError, VilaEdgeError
from vila_edge.export.awq import Params, quantise_block
from vila_edge.export.built_in_samples import calibration_set
from vila_edge.export.calibration import CalibrationSet, Sample, choose, embed
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.export.encoder import CheckpointEncoder
from vila_edge.export.grid import Grid
from vila_edge.export.recipe import Recipe, read_recipe
from vila_edge.export.source import Source
from vila_edge.export.states import States
from vila_edge.export.workers import Workers
from vila_edge.reference.torch_ops import TorchOps


def run_script(main: Callable[..., None]) -> None:
    """Run a script with the arguments of the command line. Errors that a user can act on come without a traceback."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except VilaEdgeError as error:
        print_error(error.message, error.hint)
        sys.exit(error.exit_code)


def chosen(recipe: str | None, **options: Any) -> Recipe:
    """A recipe by name or path, or the default one, under the options that were given."""
    found = read_recipe(recipe) if recipe else Recipe()
    return dataclasses.replace(found, **{key: value for key, value in options.items() if value is not None})


def open_checkpoint(path: Path, recipe: Recipe) -> Checkpoint:
    """Opened as a recipe reads it, its warnings said."""
    checkpoint = Checkpoint(path, recipe.choices)
    for warning in checkpoint.warnings:
        print_warning(warning)
    return checkpoint


def to_quantise(path: Path, recipe: Recipe) -> Checkpoint:
    """The same. Raises UsageError if the recipe's groups do not fit it, or if it is in 4 bits already."""
    checkpoint = open_checkpoint(path, recipe)
    recipe.check(checkpoint.config)
    if checkpoint.packed:
        raise UsageError(
            f"{path} is in 4 bits already ({checkpoint.packed.format})", "take the checkpoint it came from"
        )
    return checkpoint


def threads_or_all(threads: int) -> int:
    """0 stands for all cores that may be used. Raises UsageError."""
    if threads < 0:
        raise UsageError(f"--threads {threads}: expected a positive number")
    return threads or usable_cores()


def samples_of(recipe: Recipe) -> CalibrationSet:
    return calibration_set(recipe.calibration)


def searched(recipe: Recipe, samples: CalibrationSet, checkpoint: Checkpoint) -> list[Sample]:
    """The samples that an export searches with."""
    return choose(samples.search, checkpoint.config, checkpoint.tokenizer(), recipe.calibration_tokens)


def check_layer(layer: int, cfg: LlmConfig) -> None:
    """Raises UsageError if there is no such decoder block."""
    if not 0 <= layer < cfg.num_hidden_layers:
        raise UsageError(f"--layer {layer}: expected from 0 to {cfg.num_hidden_layers - 1}")


def states_before(layer: int, samples: Sequence[Sample], source: Source, pool: Workers) -> Sequence[States]:
    """What a decoder block is given for each sample [S, D], with one block in memory. Raises UsageError."""
    cfg, tokenizer = source.checkpoint.config, source.checkpoint.tokenizer()
    check_layer(layer, cfg.llm)
    encoder = CheckpointEncoder(cfg, source, pool)
    states = [embed(sample, cfg, tokenizer, encoder) for sample in samples]
    source.forget()
    for before in range(layer):
        states = run_block(block_of(before, source), states, before, cfg.llm, pool)
    return states


def block_of(layer: int, source: Source) -> dict[str, Tensor]:
    """The parameters of a decoder block."""
    return source.layer(f"{architecture.LLM}.layers.{layer}.")


def run_block(block: Params, states: Sequence[States], layer: int, cfg: LlmConfig, pool: Workers) -> list[States]:
    """A decoder block's outputs."""

    def run(x: States) -> States:
        return architecture.decoder_layer(TorchOps(block), torch.from_numpy(np.array(x))[None], layer, cfg)[0].numpy()

    return list(pool.map(run, states))


@dataclass(frozen=True)
class Cost:
    """Squared errors of a block's output, relative to what it adds to its input; states after the block."""

    rounded: float
    awq: float
    seconds: float  # of the search
    search: Sequence[States]
    held_out: Sequence[States]


def cost_of_4_bits(
    layer: int, source: Source, search: Sequence[States], held_out: Sequence[States], grid: Grid, pool: Workers
) -> Cost:
    """AWQ on one block beside rounding to nearest, both measured on states that the search did not see."""
    cfg, block = source.checkpoint.config.llm, block_of(layer, source)
    started = time.monotonic()
    quantised, after = quantise_block(dict(block), search, layer, cfg, grid, pool)
    seconds = time.monotonic() - started
    want = run_block(block, held_out, layer, cfg, pool)
    added = sum(float(np.square(w - x).sum()) for w, x in zip(want, held_out, strict=True))

    def error(parameters: dict[str, Tensor]) -> float:
        got = run_block(parameters, held_out, layer, cfg, pool)
        return sum(float(np.square(g - w).sum()) for g, w in zip(got, want, strict=True)) / added

    for name in quantised.linears:  # in place: two blocks in memory are enough
        weight = f"{name}.weight"
        block[weight] = torch.from_numpy(grid.quantize(block[weight], pool).dequantize())
    rounded = error(block)
    block.update({name: torch.from_numpy(value) for name, value in quantised.floats.items()})
    for name, linear in quantised.linears.items():
        block[f"{name}.weight"] = torch.from_numpy(linear.dequantize())
    return Cost(rounded, error(block), seconds, after, want)


def peak_mib() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return peak >> (20 if sys.platform == "darwin" else 10)
