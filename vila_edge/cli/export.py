"""vila-edge export CHECKPOINT -o BUNDLE"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from vila_edge.cli.console import PROGRAM, PhaseDisplay, console, print_note, print_warning
from vila_edge.errors import UsageError

if TYPE_CHECKING:
    from vila_edge.bundle import Bundle
    from vila_edge.export.gate import Gate
    from vila_edge.export.recipe import Recipe

T = TypeVar("T")


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A trained VILA of any era: v1.0, VILA1.5 or NVILA.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle to write.")],
    recipe: Annotated[
        str | None, typer.Option(help="A TOML file, or the name of a recipe that comes with vila-edge.")
    ] = None,
    quant: Annotated[str | None, typer.Option(help="int4 (AWQ, the default), fp16 or fp32.")] = None,
    group_size: Annotated[
        int | None, typer.Option("-g", "--group-size", help="Inputs that share a scale in int4. Default: 128.")
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="4-bit grids around zero. Default: asymmetric.")
    ] = None,
    lm_head: Annotated[
        str | None, typer.Option(help="fp16, int8, int4, or auto (the default): int8 where the answers stay the same.")
    ] = None,
    vision: Annotated[str | None, typer.Option(help="Tower and projector: fp16 (the default) or int8.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder with samples.jsonl and its images. Default: built-in samples.")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Positions of the samples to search with, at most. Default: 2048.")
    ] = None,
    search_dtype: Annotated[
        str | None, typer.Option(help="float32 (the default) or bfloat16: faster where the CPU multiplies in it.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="awq (the default), or rtn: round to nearest.")] = None,
    gate: Annotated[
        list[str] | None, typer.Option(help="A limit of the parity gate, as in top1_agreement=0.95. Repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model. Default: the checkpoint's folder.")] = None,
    license_note: Annotated[
        str | None, typer.Option("--license", help="Licence of the weights, kept in the bundle.")
    ] = None,
    era: Annotated[str | None, typer.Option(help="v1.0, vila1.5 or nvila, if the files do not tell.")] = None,
    token_order: Annotated[
        str | None, typer.Option(help="Of an mlp_downsample projector: row_major or column_major. Default: the era's.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Conversation template. Default: by era and tokenizer.")] = None,
    vision_tower: Annotated[Path | None, typer.Option(help="Folder of the tower, if it is elsewhere (v1.0).")] = None,
    to: Annotated[
        str, typer.Option(help="bundle, or autoawq: the LLM alone, as a directory for transformers and vLLM.")
    ] = "bundle",
    device: Annotated[str, typer.Option(help="Where AWQ searches: cpu, cuda, or auto.")] = "auto",
    threads: Annotated[int, typer.Option(help="Default: all cores that may be used.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that exists.")] = False,
) -> None:
    """Turn a trained checkpoint into a bundle: 4-bit AWQ weights and graphs that a device runs.

    An export that is interrupted goes on where it stopped when it is started again.
    """
    try:
        from vila_edge.export import recipe as recipes
        from vila_edge.export.device import pick_device
        from vila_edge.export.run import export_autoawq, export_bundle
        from vila_edge.export.steps import folder_beside
    except ModuleNotFoundError as error:
        raise UsageError(
            f"export needs the package {error.name!r}, which is not installed", "pip install 'vila-edge[export]'"
        ) from None
    from vila_edge.cores import usable_cores

    if to not in ("bundle", "autoawq"):
        raise UsageError(f"--to {to}: expected bundle or autoawq")
    if threads < 0:
        raise UsageError(f"--threads {threads}: expected a positive number")
    said: dict[str, Any] = {
        "quantization": _one_of("--quant", quant, recipes.QUANTIZATIONS),
        "method": _one_of("--method", method, recipes.METHODS),
        "group_size": group_size,
        "symmetric": symmetric,
        "lm_head": _one_of("--lm-head", lm_head, recipes.LM_HEADS),
        "vision": _one_of("--vision", vision, recipes.VISIONS),
        "calibration": calibration,
        "calibration_tokens": calibration_tokens,
        "search_dtype": _one_of("--search-dtype", search_dtype, recipes.SEARCH_DTYPES),
        "name": name,
        "license_note": license_note,
    }
    chosen = recipes.read_recipe(recipe) if recipe else recipes.Recipe()
    chosen = dataclasses.replace(
        chosen,
        **_given(said),
        gate=_gate(chosen.gate, gate or []),
        choices=dataclasses.replace(
            chosen.choices,
            **_given({"era": era, "token_order": token_order, "template": template, "vision_tower": vision_tower}),
        ),
    )
    where, why = pick_device(device)
    print_note(why)
    write = export_bundle if to == "bundle" else export_autoawq
    work = folder_beside(output)
    try:
        with PhaseDisplay() as display:
            made = write(
                checkpoint, output, chosen, display.progress, force, print_warning, threads or usable_cores(), where
            )
    except BaseException:
        if work.is_dir():
            print_note(f"what is finished is kept in {work}: the same command goes on from there, rm -r discards it")
        raise
    if made is None:
        print_note(
            f"{output}: the LLM in 4 bits, for transformers (AutoModelForCausalLM) and vLLM (--quantization awq)"
        )
    else:
        _report(made, output, chosen)


def _report(bundle: Bundle, output: Path, recipe: Recipe) -> None:
    from vila_edge.export.gate import KL

    profile, quantization = bundle.config.profile, bundle.manifest.quantization
    lines = [
        f"era {profile.era}, template {profile.template}, {profile.token_order} tokens, tokenised "
        f"{profile.tokenization}, images: {bundle.config.preprocess.image_aspect_ratio}, "
        f"stops: {' '.join(profile.stop_tokens)}"
    ]
    size = sum(entry.size for entry in bundle.manifest.files.values())
    least = int(quantization["parameter_bytes"])
    lines.append(f"{output}: {size / 1e6:,.1f} MB, sha256 {bundle.manifest.digest[:12]}")
    if recipe.quantization == "int4":
        kind = "symmetric" if quantization["symmetric"] else "asymmetric"
        lines.append(
            f"decoder blocks int4 ({quantization['method']}, {kind}, groups of {quantization['group_size']}), "
            f"lm_head {quantization['lm_head']}, vision tower and projector {quantization['vision']}; "
            f"{size / least:.3f} of what the parameters alone take"
        )
    parity = bundle.manifest.parity
    llm = parity["llm"]
    lines.append(
        f"against the checkpoint, on {parity['prompts']} held-out prompts: same most likely token "
        f"in {llm['top1_agreement']:.1%} of positions, {KL} {llm['mean_kl']:.2g}"
    )
    lines.append(f'ask it:  {PROGRAM} chat {output} -i IMAGE "What is in the image?"')
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _one_of(option: str, value: str | None, known: tuple[T, ...]) -> T | None:
    if value is None:
        return None
    found = next((choice for choice in known if choice == value), None)
    if found is None:
        raise UsageError(f"{option} {value}: expected one of {', '.join(map(str, known))}")
    return found


def _gate(gate: Gate, limits: list[str]) -> Gate:
    known = [field.name for field in dataclasses.fields(gate)]
    values = dict[str, float]()
    for limit in limits:
        key, equals, value = limit.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if key not in known or not equals or number != number:
            raise UsageError(f"--gate {limit}: expected NAME=NUMBER", f"names: {', '.join(known)}")
        values[key] = number
    return dataclasses.replace(gate, **values)
