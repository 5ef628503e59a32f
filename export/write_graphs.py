"""The ONNX graphs of a bundle, without its weights: what a recipe makes of a model, to look at in a viewer.

    python export/write_graphs.py CHECKPOINT -o DIR [--quant int4|fp16|fp32] [--group-size 128] [--lm-head int8]
                                  [--vision fp16|int8] [--recipe NAME]

Graphs name the files, offsets and lengths where a bundle would have its weights. No weights are read.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import onnx
import typer

from export.common import chosen, open_checkpoint, run_script
from vila_edge import fsio
from vila_edge.bundle import GRAPHS
from vila_edge.engine.onnxruntime_session import DIALECT
from vila_edge.errors import UsageError
from vila_edge.export import recipe as recipes
from vila_edge.export.storage import StoragePlan
from vila_edge.export.weights import write_graph_files


def main(
    checkpoint: Annotated[Path, typer.Argument()],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to make.")],
    quant: Annotated[str | None, typer.Option(help="int4 (default), fp16 or fp32.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Default: 128.")] = None,
    lm_head: Annotated[str | None, typer.Option(help="fp16, int8 or int4; auto is drawn as int8.")] = None,
    vision: Annotated[str | None, typer.Option(help="fp16 (default) or int8.")] = None,
    recipe: Annotated[str | None, typer.Option(help="What the options do not say.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that exists.")] = False,
) -> None:
    """Write the graphs for a storage plan."""
    for option, value, known in (
        ("--quant", quant, recipes.QUANTIZATIONS),
        ("--lm-head", lm_head, recipes.LM_HEADS),
        ("--vision", vision, recipes.VISIONS),
    ):
        if value is not None and value not in known:
            raise UsageError(f"{option} {value}: expected one of {', '.join(known)}")
    how = chosen(recipe, quantization=quant, group_size=group_size, lm_head=lm_head, vision=vision)
    fsio.check_absent(output, force)
    if output.exists() and not (output.is_dir() and {path.name for path in output.iterdir()} <= {GRAPHS}):
        raise UsageError(f"{output} holds more than graphs, and --force replaces nothing else", "choose another folder")
    opened = open_checkpoint(checkpoint, how)
    how.check(opened.config)
    plan = StoragePlan(opened.config, how.storage(opened.packed, "int8" if how.lm_head == "auto" else how.lm_head))
    with fsio.new_folder(output, force) as folder:
        write_graph_files(folder, opened.config, plan.places())
    for path in sorted((output / GRAPHS / DIALECT).glob("*.onnx")):
        graph = onnx.load(path, load_external_data=False).graph
        often = ", ".join(f"{count} {kind}" for kind, count in Counter(n.op_type for n in graph.node).most_common(4))
        print(f"{path}: {len(graph.node)} nodes ({often}), {len(graph.initializer)} constants")
    print(f"weights would take {plan.parameter_bytes() / 1e6:,.1f} MB in {len(plan.files)} files")


if __name__ == "__main__":
    run_script(main)
