"""AWQ on one decoder block beside rounding to nearest, on samples that the search did not see. Nothing is written.

    python export/quantise_block.py CHECKPOINT --layer N [--states FILE] [--held-out FILE] [--group-size 128]
                                    [--symmetric] [--calibration DIR] [--recipe NAME]

The files are what `calibrate.py --layer N` makes, without and with `--held-out`; what is not given is computed, a
block at a time. Errors are squared, of the block's output, relative to what the block adds to its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from export.common import (
    check_layer,
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
from vila_edge.errors import InputError
from vila_edge.export.grid import Grid
from vila_edge.export.source import Source
from vila_edge.export.states import States, read_states
from vila_edge.export.workers import workers


def main(
    checkpoint: Annotated[Path, typer.Argument()],
    layer: Annotated[int, typer.Option(help="The decoder block, from 0.")],
    states: Annotated[Path | None, typer.Option(help="What it is given, to search with.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="What it is given, to measure with.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Default: 128.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Folder of samples; default: built-in.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Its choices, groups and calibration.")] = None,
    threads: Annotated[int, typer.Option(help="Default: all cores.")] = 0,
) -> None:
    """Print what 4 bits cost one block."""
    how = chosen(recipe, group_size=group_size, symmetric=symmetric, calibration=calibration)
    opened, samples = to_quantise(checkpoint, how), samples_of(how)
    source, cfg = Source(opened), opened.config.llm
    check_layer(layer, cfg)
    with workers(threads_or_all(threads)) as pool, torch.inference_mode():
        search = _read(states, cfg.hidden_size) if states else None
        if search is None:
            search = states_before(layer, searched(how, samples, opened), source, pool)
        measure = _read(held_out, cfg.hidden_size) if held_out else None
        if measure is None:
            measure = states_before(layer, samples.held_out, source, pool)
        cost = cost_of_4_bits(layer, source, search, measure, Grid(how.group_size, how.symmetric), pool)
    print(f"block {layer}, groups of {how.group_size}, {'symmetric' if how.symmetric else 'asymmetric'}")
    print(f"searched on {sum(map(len, search))} positions in {cost.seconds:.1f} s, peak memory {peak_mib():,} MiB")
    print(f"error on {sum(map(len, measure))} others: rounded {cost.rounded:.3e}, AWQ {cost.awq:.3e}", end="")
    print(f", {cost.awq / cost.rounded:.2f} of it")


def _read(path: Path, width: int) -> Sequence[States]:
    """Raises InputError if they are not of a model of this width."""
    found = read_states(path)
    for x in found:
        if x.ndim != 2 or x.shape[1] != width or not len(x):
            raise InputError(f"{path}: states of shape {list(x.shape)}, expected [positions, {width}]")
    if not found:
        raise InputError(f"{path}: no states in it", "make it with: python export/calibrate.py")
    return found


if __name__ == "__main__":
    run_script(main)
