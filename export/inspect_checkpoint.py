"""What an export would read: era, profile and config of a checkpoint, and its tensors. No weights are read.

    python export/inspect_checkpoint.py CHECKPOINT [--recipe NAME] [--json]

Of a checkpoint in 4 bits, zero points are read until one is found that is not symmetric.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from export.common import chosen, open_checkpoint, run_script
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.parameters import component, parameter_shapes


def main(
    checkpoint: Annotated[Path, typer.Argument()],
    recipe: Annotated[str | None, typer.Option(help="Its choices.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One object, with all fields.")] = False,
) -> None:
    """Print what a checkpoint is."""
    opened = open_checkpoint(checkpoint, chosen(recipe))
    cfg, packed, found = opened.config, opened.packed, tensors(opened)
    if json_:
        report = {"config": dataclasses.asdict(cfg), "packed": dataclasses.asdict(packed) if packed else None}
        print(json.dumps(report | {"tensors": found, "warnings": opened.warnings}, indent=2))
        return
    profile, tower, llm = cfg.profile, cfg.vision_tower, cfg.llm
    print(f"era {profile.era}, template {profile.template}, stops at {' '.join(profile.stop_tokens)}")
    print(f"tokens of the projector {profile.token_order}, text tokenised {profile.tokenization}")
    print(
        f"vision_tower  {tower.model_type}, {_sizes(tower)}, {tower.image_size} pixels, patches of {tower.patch_size}"
    )
    print(f"mm_projector  {cfg.mm_projector.mm_projector_type}, {cfg.tokens_per_image} tokens an image")
    print(
        f"llm           {llm.model_type}, {_sizes(llm)}, {llm.num_key_value_heads} for keys, vocabulary {llm.vocab_size}"
    )
    print(f"images        {cfg.preprocess.image_aspect_ratio}; context {llm.context_length}")
    kind = "symmetric" if packed and packed.symmetric else "asymmetric"
    print(f"4 bits        {f'{packed.format}, groups of {packed.group_size}, {kind}' if packed else 'none'}")
    table = Table("component", "dtype", "tensors", "parameters")
    for row in found:
        table.add_row(row["component"], row["dtype"], str(row["tensors"]), f"{row['parameters']:,}")
    Console().print(table)


def tensors(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Number of parameters, by component and by the type in which they are stored."""
    count, parameters = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for name, shape in parameter_shapes(checkpoint.config).items():
        key = (component(name), checkpoint.stored_dtype(name))
        count[key] += 1
        parameters[key] += math.prod(shape)
    return [
        {"component": part, "dtype": dtype, "tensors": count[part, dtype], "parameters": parameters[part, dtype]}
        for part, dtype in count
    ]


def _sizes(cfg: Any) -> str:
    """Of a tower or an LLM."""
    sizes = f"{cfg.hidden_size} x {cfg.intermediate_size}"
    return f"{cfg.num_hidden_layers} blocks of {sizes}, {cfg.num_attention_heads} heads"


if __name__ == "__main__":
    run_script(main)
