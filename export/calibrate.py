"""The hidden states that AWQ starts from: what a decoder block is given for the calibration samples.

    python export/calibrate.py CHECKPOINT -o STATES [--calibration DIR] [--layer 0] [--held-out] [--recipe NAME]

STATES is a safetensors file, one float32 tensor [positions, hidden_size] for each sample. With `--held-out`, of the
samples that are kept back to measure with. `quantise_block.py` takes both kinds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from export.common import (
    chosen,
    open_checkpoint,
    peak_mib,
    run_script,
    samples_of,
    searched,
    states_before,
    threads_or_all,
)
from vila_edge import fsio
from vila_edge.export.source import Source
from vila_edge.export.states import write_states
from vila_edge.export.workers import workers


def main(
    checkpoint: Annotated[Path, typer.Argument()],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    calibration: Annotated[Path | None, typer.Option(help="Folder of samples; default: built-in.")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="Positions, at most; default: 4096.")] = None,
    layer: Annotated[int, typer.Option(help="The decoder block that is given them.")] = 0,
    held_out: Annotated[bool, typer.Option("--held-out", help="The samples that are kept back.")] = False,
    recipe: Annotated[str | None, typer.Option(help="Its choices and calibration.")] = None,
    threads: Annotated[int, typer.Option(help="Default: all cores.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write the hidden states of the calibration samples."""
    fsio.check_absent(output, force)
    how = chosen(recipe, calibration=calibration, calibration_tokens=calibration_tokens)
    opened, samples = open_checkpoint(checkpoint, how), samples_of(how)
    taken = samples.held_out if held_out else searched(how, samples, opened)
    with workers(threads_or_all(threads)) as pool, torch.inference_mode():
        states = states_before(layer, taken, Source(opened), pool)
    lengths = [len(x) for x in states]
    write_states(output, states, lengths, opened.config.llm.hidden_size)
    kind = "held out" if held_out else "searched with"
    print(f"{samples.description}; {len(lengths)} {kind}")
    print(f"{output}: before block {layer}, {len(lengths)} x [{min(lengths)}..{max(lengths)}, {states[0].shape[1]}]")
    print(f"{sum(lengths)} positions, peak memory {peak_mib():,} MiB")


if __name__ == "__main__":
    run_script(main)
