"""vila-edge bench predict"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vila_edge.cli.console import print_note
from vila_edge.cli.results import check_results, give_results

TABLE_WIDTH = 136  # what the widest table needs


def bench_predict(
    model: Annotated[str | None, typer.Argument(help="As NVILA-2B, or a bundle. All models by default.")] = None,
    context: Annotated[int, typer.Option("-c", "--context", help="Positions that attention reads.")] = 256,
    batch: Annotated[int, typer.Option("-b", "--batch", help="Sequences, 1 to 8.")] = 1,
    kv_cache: Annotated[str, typer.Option(help="float16 or int8.")] = "float16",
    prompt_tokens: Annotated[int, typer.Option(help="Positions of the prefill.")] = 512,
    constants: Annotated[
        Path | None, typer.Option(help="JSON with t0_us and efficiency, or of `bench kernels` on a GPU.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write it there.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Also write the tables there.")] = None,
) -> None:
    """Count what a token of a model reads and launches, and PREDICT what it would take on Jetson Orin.

    Nothing is measured: bytes and launches are those of our CUDA kernels, times follow from two constants, which are
    assumed unless a file has them. Figures that others have published stand beside.
    """
    from vila_edge.bench import predict
    from vila_edge.bench.token_cost import Constants, Decode

    check_results(json_file, markdown_file)
    decode = Decode(context, batch, kv_cache)
    used = predict.read_constants(constants) if constants else Constants()
    found = predict.predict(predict.find_models(model), decode, prompt_tokens, used)
    give_results(found, predict.sheets(found), predict.markdown(found), TABLE_WIDTH, json_file, markdown_file)
    print_note(predict.headline(found))
