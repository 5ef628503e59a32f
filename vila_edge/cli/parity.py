"""vila-edge parity CASE_DIR..."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vila_edge.cli.console import console, print_note, print_warning
from vila_edge.errors import UsageError

if TYPE_CHECKING:
    from vila_edge.config import VilaConfig
    from vila_edge.engine.protocol import Engine
    from vila_edge.export.eras import Choices
    from vila_edge.export.parity import PromptParity
    from vila_edge.tokenizer import Tokenizer

TABLE_WIDTH = 112  # what all columns need; a narrower terminal wraps it
BACKENDS = ("numpy", "torch", "onnxruntime")

Model = tuple["VilaConfig", "Tokenizer", "Engine"]


def parity(
    cases: Annotated[list[Path], typer.Argument(help="Folders with checkpoint/, images/ and <prompt>.json, .npz.")],
    backend: Annotated[str, typer.Option(help="numpy, torch or onnxruntime.")] = "numpy",
    bundle: Annotated[
        Path | None, typer.Option(help="Run this bundle in the place of each case's own checkpoint.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference allowed; pixel_values have their own, 1e-6.")
    ] = 1e-4,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    era: Annotated[str | None, typer.Option(help="v1.0, vila1.5 or nvila, if the files do not tell.")] = None,
    token_order: Annotated[str | None, typer.Option(help="row_major or column_major.")] = None,
    template: Annotated[str | None, typer.Option(help="Of prompts that do not name one.")] = None,
    vision_tower: Annotated[Path | None, typer.Option(help="Folder of the tower, if it is elsewhere (v1.0).")] = None,
) -> None:
    """Compare with what an original implementation computed: golden cases, stage by stage.

    Exit code 1 if a prompt's text or token ids differ, or a stage is further off than it may be.
    """
    if backend not in BACKENDS:
        raise UsageError(f"--backend {backend}: expected one of {', '.join(BACKENDS)}")
    if not tolerance > 0:
        raise UsageError(f"--tolerance {tolerance}: expected a positive number")
    try:
        from vila_edge.export.eras import Choices
        from vila_edge.export.parity import case_prompts, measure
    except ModuleNotFoundError as error:
        raise UsageError(
            f"parity needs the package {error.name!r}, which is not installed", "pip install 'vila-edge[export]'"
        ) from None
    choices = Choices(era, token_order, template, vision_tower)
    found: list[tuple[Path, str, list[PromptParity]]] = []
    for case in cases:
        prompts = case_prompts(case)
        with _model(case, backend, bundle, choices) as (cfg, tokenizer, engine):
            found.append((case, engine.backend, [measure(case, name, cfg, tokenizer, engine) for name in prompts]))
    passed = all(prompt.passed(tolerance) for _, _, measured in found for prompt in measured)
    if json_output:
        print(json.dumps(_as_json(found, tolerance, passed), ensure_ascii=False))
    else:
        for case, name, measured in found:
            Console(width=max(console.width, TABLE_WIDTH)).print(_table(case, name, measured, tolerance))
        print_note("all equal" if passed else "NOT EQUAL")
    if not passed:
        raise typer.Exit(1)


@contextlib.contextmanager
def _model(case: Path, backend: str, bundle: Path | None, choices: Choices) -> Iterator[Model]:
    """Config, tokenizer and engine for a case."""
    if bundle is not None:
        if backend == "torch":
            raise UsageError("--backend torch runs checkpoints, not bundles", "use numpy or onnxruntime")
        from vila_edge.pipeline import load

        pipeline = load(bundle, backend)
        yield pipeline.config, pipeline.tokenizer, pipeline.engine
        return
    from vila_edge.export.checkpoint import Checkpoint

    checkpoint = Checkpoint(case / "checkpoint", choices)
    for warning in checkpoint.warnings:
        print_warning(warning)
    cfg, tokenizer = checkpoint.config, checkpoint.tokenizer()
    if backend == "onnxruntime":
        from vila_edge.engine.onnxruntime import OnnxruntimeEngine
        from vila_edge.export.weights import exact_bundle

        with tempfile.TemporaryDirectory() as folder:
            yield cfg, tokenizer, OnnxruntimeEngine(exact_bundle(checkpoint, Path(folder)))
        return
    params = checkpoint.parameters()
    if backend == "numpy":
        from vila_edge.reference.engine import numpy_engine

        yield cfg, tokenizer, numpy_engine(cfg, params)
        return
    from vila_edge.reference.torch_engine import numpy_parameters_engine

    yield cfg, tokenizer, numpy_parameters_engine(cfg, params)


def _table(case: Path, backend: str, measured: list[PromptParity], tolerance: float) -> Table:
    from vila_edge.export.parity import STAGES

    table = Table(title=f"{case.name} on {backend}: largest difference")
    for column in ("prompt", "text", "ids", *STAGES, ""):
        table.add_column(column, justify="left" if column == "prompt" else "right")
    for prompt in measured:
        cells = ["-" if value is None else f"{value:.1e}" for value in prompt.differences.values()]
        flags = [{None: "-", True: "equal", False: "DIFFERS"}[flag] for flag in (prompt.text_equal, prompt.ids_equal)]
        table.add_row(prompt.prompt, *flags, *cells, "ok" if prompt.passed(tolerance) else "FAILED")
    return table


def _as_json(found: list[tuple[Path, str, list[PromptParity]]], tolerance: float, passed: bool) -> dict[str, Any]:
    from vila_edge.export.parity import PIXEL_TOLERANCE

    return {
        "passed": passed,
        "tolerance": tolerance,
        "pixel_tolerance": PIXEL_TOLERANCE,
        "cases": [
            {
                "case": str(case),
                "backend": backend,
                "passed": all(prompt.passed(tolerance) for prompt in measured),
                "prompts": [
                    {
                        "prompt": prompt.prompt,
                        "passed": prompt.passed(tolerance),
                        "text_equal": prompt.text_equal,
                        "ids_equal": prompt.ids_equal,
                        **{stage: _finite(value) for stage, value in prompt.differences.items()},
                    }
                    for prompt in measured
                ],
            }
            for case, backend, measured in found
        ],
    }


def _finite(value: float | None) -> float | str | None:
    """JSON has no infinity: a shape that differs, or a value that is not finite, is said in words."""
    return "not comparable" if value == float("inf") else value
