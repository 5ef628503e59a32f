"""vila-edge bench kernels"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vila_edge.cli.console import console, print_note
from vila_edge.cli.results import check_results, give_results
from vila_edge.errors import UsageError

TABLE_WIDTH = 120  # what the widest table needs


def bench_kernels(
    model: Annotated[
        list[str] | None, typer.Option("-m", "--model", help="As VILA1.5-3B; may be repeated. All by default.")
    ] = None,
    device: Annotated[int, typer.Option(help="Number of the GPU.")] = 0,
    repeat: Annotated[int, typer.Option("-r", "--repeat", min=1, help="Samples of each measurement.")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write it there, with every sample.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Also write the tables there.")] = None,
) -> None:
    """Measure the CUDA kernels on this GPU, as fractions of its memory's speed in the same run.

    Launches come back to back from a CUDA graph, and weights from memory, never from a cache. What the kernels are
    wanted to reach is a table with what they did; it does not change the exit code.
    """
    from vila_edge.bench.kernels.report import headline, markdown, sheets
    from vila_edge.bench.kernels.run import Options
    from vila_edge.bench.kernels.run import bench_kernels as run
    from vila_edge.bench.kernels.shapes import Shapes
    from vila_edge.engine.cuda import open_device

    check_results(json_file, markdown_file)
    try:
        shapes = Shapes().of(model or ())
    except ValueError as error:
        raise UsageError(f"--model: {error}") from None
    with open_device(device) as gpu, console.status("starting") as status:
        found = run(gpu, shapes, Options(repeat=repeat), lambda step: status.update(step))
    give_results(found, sheets(found), markdown(found), TABLE_WIDTH, json_file, markdown_file)
    print_note(headline(found))
