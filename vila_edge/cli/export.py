"""vila-edge export CHECKPOINT -o BUNDLE"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vila_edge.cli.console import PROGRAM, PhaseDisplay, console, print_warning
from vila_edge.errors import UsageError


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A trained VILA of any era: v1.0, VILA1.5 or NVILA.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle to write.")],
    quant: Annotated[str, typer.Option(help="int4 (AWQ), fp16 or fp32.")] = "int4",
    group_size: Annotated[int, typer.Option("-g", "--group-size", help="Inputs that share a scale in int4.")] = 128,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder with samples.jsonl and its images. Default: built-in samples.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the model. Default: the checkpoint's folder.")] = "",
    license_note: Annotated[str, typer.Option("--license", help="Licence of the weights, kept in the bundle.")] = "",
    era: Annotated[str | None, typer.Option(help="v1.0, vila1.5 or nvila, if the files do not tell.")] = None,
    token_order: Annotated[
        str | None, typer.Option(help="Of an mlp_downsample projector: row_major or column_major. Default: the era's.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Conversation template. Default: by era and tokenizer.")] = None,
    vision_tower: Annotated[Path | None, typer.Option(help="Folder of the tower, if it is elsewhere (v1.0).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that exists.")] = False,
) -> None:
    """Turn a trained checkpoint into a bundle: 4-bit AWQ weights and graphs that a device runs."""
    try:
        from vila_edge.export.eras import Choices
        from vila_edge.export.run import QUANTIZATIONS, Recipe, export_bundle
    except ModuleNotFoundError as error:
        raise UsageError(
            f"export needs the package {error.name!r}, which is not installed", "pip install 'vila-edge[export]'"
        ) from None
    method = next((known for known in QUANTIZATIONS if known == quant), None)
    if method is None:
        raise UsageError(f"--quant {quant}: expected one of {', '.join(QUANTIZATIONS)}")
    choices = Choices(era, token_order, template, vision_tower)
    recipe = Recipe(method, group_size, calibration, name, license_note, choices)
    with PhaseDisplay() as display:
        started: set[str] = set()

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in started:
                started.add(phase)
                display.start(phase)
            display.advance(phase, done, total)

        bundle = export_bundle(checkpoint, output, recipe, progress, force, print_warning)
    profile = bundle.config.profile
    console.print(
        f"era {profile.era}, template {profile.template}, {profile.token_order} tokens, tokenised "
        f"{profile.tokenization}, images: {bundle.config.preprocess.image_aspect_ratio}, "
        f"stops: {' '.join(profile.stop_tokens)}",
        markup=False,
        soft_wrap=True,
    )
    size = sum(entry.size for entry in bundle.manifest.files.values())
    parity, llm = bundle.manifest.parity, bundle.manifest.parity["llm"]
    console.print(
        f"{output}: {size / 1e6:,.1f} MB, {quant}, sha256 {bundle.manifest.digest[:12]}", markup=False, soft_wrap=True
    )
    console.print(
        f"against the checkpoint, on {parity['prompts']} held-out prompts: same most likely token "
        f"in {llm['top1_agreement']:.1%} of positions, KL {llm['mean_kl']:.2g}",
        markup=False,
        soft_wrap=True,
    )
    console.print(f'ask it:  {PROGRAM} chat {output} -i IMAGE "What is in the image?"', markup=False, soft_wrap=True)
