"""What 4 bits cost each decoder block: plain rounding against AWQ, on activations held back from the search.

    python export/quantisation_error.py CHECKPOINT [--calibration DIR] [--group-size 128]

Prints the squared error of each block's output, relative to the output, on the same input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vila_edge import architecture, int4
from vila_edge.config import LlmConfig
from vila_edge.export.awq import quantise_blocks
from vila_edge.export.calibration import batches, built_in, inputs_embeds, read_samples
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.reference.torch_ops import TorchOps

Params = dict[str, Tensor]


def main(
    checkpoint: Annotated[Path, typer.Argument()],
    calibration: Annotated[Path | None, typer.Option(help="Folder of samples; default: built-in.")] = None,
    group_size: Annotated[int, typer.Option()] = 128,
) -> None:
    opened = Checkpoint(checkpoint)
    cfg, tokenizer = opened.config, opened.tokenizer()
    samples = read_samples(calibration) if calibration else built_in()
    params = {name: torch.from_numpy(value) for name, value in opened.parameters().items()}
    table = Table(title=f"Relative squared error of each block's output, int4 in groups of {group_size}")
    for column in ("block", "rounded", "AWQ", "AWQ / rounded"):
        table.add_column(column, justify="right")
    with torch.inference_mode():
        search, held_out = (
            batches(inputs_embeds(part, cfg, tokenizer, params)) for part in (samples.search, samples.held_out)
        )
        for layer, block in enumerate(quantise_blocks(params, search, cfg.llm, group_size)):
            awq, rounded = dict(params), dict(params)
            awq |= {name: torch.from_numpy(value) for name, value in block.floats.items()}
            for name, linear in block.linears.items():
                weight = f"{name}.weight"
                awq[weight] = torch.from_numpy(linear.dequantize())
                rounded[weight] = torch.from_numpy(int4.quantize(params[weight].numpy(), group_size).dequantize())
            want = run_block(params, held_out, layer, cfg.llm)
            errors = [relative_error(run_block(p, held_out, layer, cfg.llm), want) for p in (rounded, awq)]
            table.add_row(str(layer), *(f"{error:.2e}" for error in errors), f"{errors[1] / errors[0]:.2f}")
            held_out = want
    Console().print(table)


def run_block(params: Params, hidden_states: list[Tensor], layer: int, cfg: LlmConfig) -> list[Tensor]:
    return [architecture.decoder_layer(TorchOps(params), x, layer, cfg) for x in hidden_states]


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    wrong = sum(float((g - w).square().sum()) for g, w in zip(got, want, strict=True))
    return wrong / sum(float(w.square().sum()) for w in want)


if __name__ == "__main__":
    typer.run(main)
