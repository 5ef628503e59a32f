"""vila-edge show BUNDLE"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vila_edge.cli.console import PROGRAM, console, print_note
from vila_edge.errors import BundleError, UsageError

CONTEXTS = (512, 2048)  # positions, beside the whole context
CUDA_DECODER = "graphs/onnxruntime/decoder_float16.onnx"
TABLE_WIDTH = 112  # what all columns need; a narrower terminal wraps it


def show(
    bundle: Annotated[Path, typer.Argument(help="Made by vila-edge export.")],
    ctx_size: Annotated[int, typer.Option("-c", "--ctx-size", help="Plan the memory of this context alone.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What a bundle is, how it was made, what its parts take, and the memory that it needs here.

    Manifest, sizes and headers are checked, contents are not: vila-edge verify does that.
    """
    found = describe(bundle, ctx_size)
    if json_output:
        print(json.dumps(found, ensure_ascii=False))
        return
    for title, lines in (("model", _model_lines(found)), ("made", _made_lines(found))):
        for number, (key, value) in enumerate(lines):
            print(f"{title if not number else '':<8}{key:<14}{value}")
    out = Console(width=max(console.width, TABLE_WIDTH), highlight=False)
    out.print(_size_table(found["size"]))
    out.print(_memory_table(found["memory"]))
    print_note(_machine_line(found))
    print_note(f"contents were not read: {PROGRAM} verify {bundle} does that")


def describe(bundle: Path, ctx_size: int = 0) -> dict[str, Any]:
    """What `--json` prints. Sizes in bytes. Raises BundleError or UsageError."""
    from vila_edge.bundle import KV_SCALES_FILE, WEIGHTS, file_problems, read_manifest
    from vila_edge.caches import PREFILL_CHUNK
    from vila_edge.engine.cuda_plan import cuda_plan, runs_on_kernels
    from vila_edge.engine.gpu_plan import gpu_plan
    from vila_edge.engine.plan import Backend, available_memory, largest_context, plan, tiles_at_once
    from vila_edge.inventory import take_inventory
    from vila_edge.tensorfile import TensorFile
    from vila_edge.visual import TOWER_BATCH

    manifest = read_manifest(bundle)
    for _, problem in file_problems(bundle, manifest.files, contents=False):
        raise problem
    cfg, longest = manifest.config, manifest.config.llm.context_length
    if not 0 <= ctx_size <= longest:
        raise UsageError(f"--ctx-size {ctx_size}: this model has 1 to {longest:,}")
    inventory = take_inventory(
        cfg, {name: TensorFile(bundle / name) for name in manifest.files if name.startswith(f"{WEIGHTS}/")}
    )
    wrong = [message for _, message in inventory.problems] + [f"{name}: missing" for name in inventory.missing]
    if wrong:
        raise BundleError(f"{bundle}: {wrong[0]}", f"{PROGRAM} verify {bundle} shows all that is wrong")
    contexts = [ctx_size] if ctx_size else sorted({min(context, longest) for context in (*CONTEXTS, longest)})
    tiles = tiles_at_once(cfg, TOWER_BATCH)
    backends: list[Backend] = ["onnxruntime", "onnxruntime, int8", "numpy"]
    if KV_SCALES_FILE not in manifest.files:
        backends.remove("onnxruntime, int8")
    plans = [
        plan(cfg, inventory.parts, backend, context, PREFILL_CHUNK, tiles)
        for backend in backends
        for context in contexts
    ]
    gpu: list[Backend] = ["tensorrt", "onnxruntime-cuda"]
    if CUDA_DECODER not in manifest.files:
        gpu.remove("onnxruntime-cuda")
    plans += [
        gpu_plan(cfg, inventory.parts, backend, context, PREFILL_CHUNK, tiles)
        for backend in gpu
        for context in contexts
    ]
    if runs_on_kernels(cfg, inventory.parts):
        kernels: list[Backend] = ["cuda", "cuda, int8"]
        if KV_SCALES_FILE not in manifest.files:
            kernels.remove("cuda, int8")
        plans += [
            cuda_plan(cfg, inventory.parts, backend, context, tiles) for backend in kernels for context in contexts
        ]
    available = available_memory()
    total = sum(entry.size for entry in manifest.files.values()) + (bundle / "manifest.json").stat().st_size
    ours = [memory for memory in plans if memory.backend == "onnxruntime"]
    return {
        "name": manifest.name,
        "bundle_sha256": manifest.digest,
        "parameters": sum(part.numbers for part in inventory.parts.values()),
        "tokens_per_image": cfg.tokens_per_image,
        "config": dataclasses.asdict(cfg),
        "quantization": manifest.quantization,
        "provenance": manifest.provenance,
        "license": manifest.license,
        "parity": manifest.parity,
        "size": {
            "components": _components(inventory.parts.values()),
            "other_bytes": total - inventory.parameter_bytes,
            "total_bytes": total,
            "parameter_bytes": manifest.quantization.get("parameter_bytes"),
        },
        "memory": [
            dataclasses.asdict(memory)
            | {"fits": memory.total <= available if available is not None and memory.measured else None}
            for memory in plans
        ],
        "tiles_per_image": tiles,
        "available_bytes": available,
        "largest_context": None if available is None else largest_context(available, ours),
    }


def _components(parts: Any) -> list[dict[str, Any]]:
    """Numbers, bytes and forms of each part of the model, in the order of the walk."""
    from vila_edge.inventory import COMPONENTS, component

    rows = []
    for name in COMPONENTS:
        mine = [part for part in parts if component(part.name) == name]
        numbers, size = sum(part.numbers for part in mine), sum(part.size for part in mine)
        by_form: dict[str, int] = {}
        for part in mine:
            by_form[part.form] = by_form.get(part.form, 0) + part.numbers
        forms = sorted(by_form, key=lambda form: -by_form[form])
        rows.append({"component": name, "parameters": numbers, "bytes": size, "forms": forms})
    return rows


def _model_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    config = found["config"]
    tower, llm, profile = config["vision_tower"], config["llm"], config["profile"]
    heads, shared = llm["num_attention_heads"], llm["num_key_value_heads"]
    return [
        ("name", f"{found['name']}, sha256 {found['bundle_sha256'][:12]}"),
        ("era", f"{profile['era']}, template {profile['template']}, {profile['token_order']} tokens"),
        (
            "vision tower",
            f"{tower['model_type'].partition('_')[0]}, {tower['num_hidden_layers']} blocks of {tower['hidden_size']}, "
            f"{tower['image_size']} pixels in patches of {tower['patch_size']}",
        ),
        ("projector", config["mm_projector"]["mm_projector_type"]),
        (
            "LLM",
            f"{llm['model_type']}, {llm['num_hidden_layers']} blocks of {llm['hidden_size']} and "
            f"{llm['intermediate_size']}, {heads} heads{'' if heads == shared else f' on {shared}'}, "
            f"{llm['vocab_size']:,} tokens",
        ),
        ("parameters", _billions(found["parameters"])),
        (
            "images",
            f"{config['preprocess']['image_aspect_ratio']}, {found['tokens_per_image']} tokens for an image or tile, "
            f"up to {found['tiles_per_image']} at once",
        ),
        ("context", f"{llm['context_length']:,} positions"),
    ]


def _made_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """How the bundle was made. A bundle by hand need not say all of it."""
    from vila_edge.export.gate import KL

    said, made, parity = found["quantization"], found["provenance"], found["parity"]
    if said.get("bits"):
        kind = "symmetric" if said.get("symmetric") else "asymmetric"
        quantization = (
            f"{said.get('method')}, {said['bits']} bits, {kind}, groups of {said.get('group_size')}; "
            f"lm_head {said.get('lm_head')}, vision {said.get('vision')}"
        )
    else:
        quantization = str(said.get("dtype", "unknown"))
    versions = ", ".join(f"{key} {made[key]}" for key in ("vila_edge", "torch", "onnx") if key in made)
    llm = parity.get("llm", {})
    agreement = (
        f"same most likely token in {llm['top1_agreement']:.1%} of positions, {KL} {llm['mean_kl']:.2g}, "
        f"on {parity.get('prompts')} held-out prompts"
        if {"top1_agreement", "mean_kl"} <= llm.keys()
        else "unknown"
    )
    return [
        ("quantisation", quantization),
        ("calibration", str(made.get("calibration", "unknown"))),
        ("checkpoint", f"sha256 {str(made.get('checkpoint_sha256', 'unknown'))[:12]}"),
        ("versions", versions or "unknown"),
        ("licence", found["license"] or "not said"),
        ("parity", agreement),
    ]


def _size_table(size: dict[str, Any]) -> Table:
    table = Table(title="on the disk")
    for column in ("component", "parameters", "MB", "bits a parameter", "stored as"):
        table.add_column(column, justify="left" if column in ("component", "stored as") else "right")
    for row in size["components"]:
        bits = f"{8 * row['bytes'] / row['parameters']:.2f}" if row["parameters"] else "-"
        table.add_row(
            row["component"], _billions(row["parameters"]), _mb(row["bytes"]), bits, ", ".join(row["forms"]) or "tied"
        )
    table.add_row("everything else", "", _mb(size["other_bytes"]), "", "tokenizer, graphs, tables, headers, manifest")
    least = size["parameter_bytes"]
    ratio = f"{size['total_bytes'] / least:.3f} of what the parameters alone take" if least else ""
    table.add_row("total", "", _mb(size["total_bytes"]), "", ratio)
    return table


def _memory_table(plans: list[dict[str, Any]]) -> Table:
    table = Table(
        title="memory, MB (a plan: docs/bundle.md); int8: a kv_cache in 8 bits; on a GPU: estimates, not measured"
    )
    for column in ("backend", "context", "weights", "loading", "kv_cache", "prefill", "images", "peak", "fits here"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for row in plans:
        parts = (row[key] for key in ("weights", "loading", "kv_cache", "prefill", "images", "total"))
        fits = {None: "unknown", True: "yes", False: "NO"}[row["fits"]] if row["measured"] else "not measured"
        table.add_row(row["backend"], f"{row['context']:,}", *map(_mb, parts), fits)
    return table


def _machine_line(found: dict[str, Any]) -> str:
    available = found["available_bytes"]
    if available is None:
        return "how much memory is available here is unknown"
    largest = found["largest_context"]
    if not largest:
        return f"{_mb(available)} MB are available here: none of these contexts fits on onnxruntime"
    return f"{_mb(available)} MB are available here: a context of {largest:,} fits on onnxruntime"


def _billions(numbers: int) -> str:
    return f"{numbers / 1e9:.2f} B" if numbers >= 1e8 else f"{numbers / 1e6:.2f} M"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"
