"""vila-edge bench decoder"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vila_edge.cli.console import console, print_note
from vila_edge.cli.results import check_results, give_results
from vila_edge.errors import UsageError

TABLE_WIDTH = 160  # what the widest table needs


def bench_decoder(
    model: Annotated[
        list[str] | None, typer.Option("-m", "--model", help="As VILA1.5-3B; may be repeated. All by default.")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option("-c", "--context", help="Decode behind so many positions; may be repeated. 256, 1024, 2048."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option("-b", "--batch", help="Sequences decoded together, 1 to 8; may be repeated. 1 and 8."),
    ] = None,
    kv_cache: Annotated[
        list[str] | None, typer.Option(help="float16 or int8; may be repeated. Both by default.")
    ] = None,
    device: Annotated[int, typer.Option(help="Number of the GPU.")] = 0,
    repeat: Annotated[int, typer.Option("-r", "--repeat", min=1, help="Samples of each measurement.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write it there, with every sample.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Also write the tables there.")] = None,
) -> None:
    """Measure the decoder of the cuda engine on this GPU, with released sizes and random weights: no bundle is needed.

    Decode, prefill, and the first token as projector, prefill and a step; of the bytes that a step reads, the fraction of
    the memory's speed in the same run. The vision tower is not in it: `bench BUNDLE --backend cuda` has it. A model that
    the GPU has no room for is left out, and the reason told.
    """
    from vila_edge.bench.decoder.options import BATCHES, CONTEXTS, KV_CACHES, Options, check
    from vila_edge.bench.decoder.report import headline, markdown, sheets
    from vila_edge.bench.decoder.run import bench_decoder as run
    from vila_edge.bench.decoder.shapes import chosen
    from vila_edge.engine.cuda import open_device

    check_results(json_file, markdown_file)
    try:
        models = chosen(model or ())
    except ValueError as error:
        raise UsageError(f"--model: {error}") from None
    kinds = tuple(known for known in KV_CACHES if known in (kv_cache or KV_CACHES))
    for kind in kv_cache or ():
        if kind not in KV_CACHES:
            raise UsageError(f"--kv-cache {kind}: not known", f"known: {', '.join(KV_CACHES)}")
    options = Options(tuple(context or CONTEXTS), tuple(batch or BATCHES), kinds, repeat=repeat)
    check(options, models)
    with open_device(device) as gpu, console.status("starting") as status:
        found = run(gpu, models, options, lambda step: status.update(step))
    give_results(found, sheets(found), markdown(found), TABLE_WIDTH, json_file, markdown_file)
    print_note(headline(found))
