"""What 4 bits cost each decoder block: plain rounding against AWQ, on samples that the search did not see.

    python export/quantisation_error.py CHECKPOINT [--calibration DIR] [--group-size 128] [--symmetric] [--recipe NAME]

Errors are squared, of each block's output, relative to what the block adds to its input; the input is that of the
unquantised model. One block is in memory at a time. `quantise_block.py` does one block.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from export.common import (
    chosen,
    cost_of_4_bits,
    peak_mib,
    run_script,
    samples_of,
    searched,
    states_before,
    threads_or_all,
    to_quantise,
)
from vila_edge.cli.console import print_note
from vila_edge.export.grid import Grid
from vila_edge.export.source import Source
from vila_edge.export.workers import workers


def main(
    checkpoint: Annotated[Path, typer.Argument()],
    calibration: Annotated[Path | None, typer.Option(help="Folder of samples; default: built-in.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Default: 128.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric")] = None,
    recipe: Annotated[str | None, typer.Option(help="Its choices, groups and calibration.")] = None,
    threads: Annotated[int, typer.Option(help="Default: all cores.")] = 0,
) -> None:
    """Print what 4 bits cost every block."""
    how = chosen(recipe, group_size=group_size, symmetric=symmetric, calibration=calibration)
    opened, samples = to_quantise(checkpoint, how), samples_of(how)
    layers, source = opened.config.llm.num_hidden_layers, Source(opened)
    table = Table(title=f"Relative squared error of each block, int4 in groups of {how.group_size}")
    for column in ("block", "rounded", "AWQ", "AWQ / rounded", "search, s"):
        table.add_column(column, justify="right")
    with workers(threads_or_all(threads)) as pool, torch.inference_mode():
        search = states_before(0, searched(how, samples, opened), source, pool)
        held_out = states_before(0, samples.held_out, source, pool)
        for layer in range(layers):
            cost = cost_of_4_bits(layer, source, search, held_out, Grid(how.group_size, how.symmetric), pool)
            search, held_out = cost.search, cost.held_out
            errors = (f"{cost.rounded:.2e}", f"{cost.awq:.2e}", f"{cost.awq / cost.rounded:.2f}")
            table.add_row(str(layer), *errors, f"{cost.seconds:.1f}")
            print_note(f"block {layer + 1} of {layers}, peak memory {peak_mib():,} MiB")
    Console().print(table)


if __name__ == "__main__":
    run_script(main)
