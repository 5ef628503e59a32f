"""vila-edge bench BUNDLE; `bench kernels`, `bench decoder` and `bench predict` are in files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vila_edge.cli.console import console, print_note
from vila_edge.cli.results import check_results, give_results

TABLE_WIDTH = 80  # what the widest table needs


def bench(
    bundle: Annotated[Path, typer.Argument(help="Made by vila-edge export.")],
    backend: Annotated[
        str, typer.Option(help="auto, onnxruntime, onnxruntime-cuda, tensorrt, tensorrt_rtx, cuda or numpy.")
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
    kv_cache: Annotated[str, typer.Option(help="float32 (on a GPU it is float16) or int8.")] = "float32",
    projector: Annotated[
        str, typer.Option(help="With --backend tensorrt: its engine, or kernel: vila-edge's own.")
    ] = "engine",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write it there, with every sample.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Also write the tables there.")] = None,
) -> None:
    """Measure a bundle on this machine: time of each stage, memory, and how near decode is to the memory's speed.

    Prompts are random tokens and images are noise: the time does not depend on what they say. Sampling is left out,
    except with cuda, whose GPU samples in each step.
    `bench kernels` measures the CUDA kernels alone, `bench decoder` a decoder of random weights on them, `bench predict`
    counts what a token would cost; a bundle of such a name is ./kernels.
    """
    from vila_edge.bench.report import headline, markdown, sheets
    from vila_edge.bench.run import bench as run
    from vila_edge.bench.workload import Options

    check_results(json_file, markdown_file)
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
        projector=projector,
    )
    with console.status("starting") as status:
        found = run(bundle, options, lambda step: status.update(step))
    give_results(found, sheets(found), markdown(found), TABLE_WIDTH, json_file, markdown_file)
    print_note(headline(found))
