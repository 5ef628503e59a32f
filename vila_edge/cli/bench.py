"""vila-edge bench BUNDLE"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vila_edge.cli.console import console, print_note
from vila_edge.errors import UsageError

TABLE_WIDTH = 80  # what the widest table needs


def bench(
    bundle: Annotated[Path, typer.Argument(help="Made by vila-edge export.")],
    backend: Annotated[
        str, typer.Option(help="auto, onnxruntime, onnxruntime-cuda, tensorrt, tensorrt_rtx or numpy (slow reference).")
    ] = "auto",
    threads: Annotated[int | None, typer.Option("-t", "--threads", help="Threads; all cores by default.")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Positions of the prefill. Default: 512, as far as the model goes.")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option("-c", "--context", help="Measure decode behind so many positions; may be repeated. 64 and 512."),
    ] = None,
    new_tokens: Annotated[int, typer.Option("-n", "--new-tokens", help="Tokens of one decode.")] = 32,
    repeat: Annotated[int, typer.Option("-r", "--repeat", help="Times that each stage is measured.")] = 5,
    images: Annotated[int, typer.Option(help="Images of noise that are looked at; 0 leaves them out.")] = 1,
    warmup: Annotated[int, typer.Option(help="Times that each stage runs before.")] = 1,
    kv_cache: Annotated[str, typer.Option(help="float32 or int8.")] = "float32",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write it there, with every sample.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Also write the tables there.")] = None,
) -> None:
    """Measure a bundle on this machine: time of each stage, memory, and how near decode is to the memory's speed.

    Prompts are random tokens and images are noise: the time does not depend on what they say. Sampling is left out.
    """
    from vila_edge import fsio
    from vila_edge.bench.report import headline, markdown, sheets
    from vila_edge.bench.run import bench as run
    from vila_edge.bench.workload import Options

    for option, file in (("--json", json_file), ("--markdown", markdown_file)):
        if file and (file.is_dir() or not file.parent.is_dir()):
            raise UsageError(f"{option} {file}: expected a file in a directory that exists")
    options = Options(
        backend=backend,
        threads=threads,
        prompt_tokens=prompt_tokens,
        contexts=tuple(context or ()),
        new_tokens=new_tokens,
        repeat=repeat,
        images=images,
        warmup=warmup,
        kv_cache=kv_cache,
    )
    with console.status("starting") as status:
        found = run(bundle, options, lambda step: status.update(step))
    if json_file:
        fsio.replace_bytes(json_file, fsio.json_bytes(found))
    if markdown_file:
        fsio.replace_bytes(markdown_file, markdown(found).encode())
    out = Console(width=max(console.width, TABLE_WIDTH), highlight=False)
    for sheet in sheets(found):
        table = Table(title=sheet.title, title_justify="left")
        for number, column in enumerate(sheet.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in sheet.rows:
            table.add_row(*row)
        out.print(table)
    print_note(headline(found))
