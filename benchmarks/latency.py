"""Where the time of a reply goes, for one bundle or for several side by side in one run.

    python benchmarks/latency.py BUNDLE [BUNDLE ...] [-i IMAGE]... [--json FILE]

Repetitions take turns between the bundles, so that a busy machine slows all of them. Medians are printed, and
each bundle's times as ratios to the first one's: absolute times on a shared machine mean little.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import vila_edge
from vila_edge.pipeline import Pipeline
from vila_edge.sampler import Sampling

STAGES = ("preprocess_ms", "vision_ms", "projector_ms", "prefill_ms", "ms_per_token")


def main(
    bundles: Annotated[list[Path], typer.Argument()],
    image: Annotated[list[Path] | None, typer.Option("-i", "--image")] = None,
    prompt: Annotated[str, typer.Option("-p", "--prompt")] = "What is in the image?",
    tokens: Annotated[int, typer.Option("-n", "--tokens", help="Tokens to decode; stop tokens are ignored.")] = 64,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions")] = 7,
    threads: Annotated[int | None, typer.Option("-t", "--threads")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    pipelines = [vila_edge.load(bundle, threads=threads) for bundle in bundles]
    for pipeline in pipelines:
        pipeline.stop_ids = frozenset()
    samples: list[list[dict[str, float]]] = [[] for _ in pipelines]
    for repetition in range(repetitions + 1):
        for found, pipeline in zip(samples, pipelines, strict=True):
            measured = measure(pipeline, prompt, image or [], tokens)
            if repetition:  # the first one warms up
                found.append(measured)
    medians = [{stage: statistics.median(s[stage] for s in found) for stage in STAGES} for found in samples]
    Console().print(make_table(bundles, pipelines, medians))
    if json_file:
        json_file.write_text(json.dumps(report(bundles, pipelines, samples, tokens), indent=2) + "\n")


def measure(pipeline: Pipeline, prompt: str, images: list[Path], tokens: int) -> dict[str, float]:
    """One reply with nothing cached, in milliseconds."""
    pipeline.forget_images()
    timings = pipeline.generate(prompt, images, Sampling(max_new_tokens=tokens)).timings
    values = timings.as_dict() | {"ms_per_token": timings.decode_ms / max(1, timings.decode_steps)}
    return {stage: float(values[stage]) for stage in STAGES}


def make_table(bundles: list[Path], pipelines: list[Pipeline], medians: list[dict[str, float]]) -> Table:
    table = Table(title=f"Medians in ms (ratio to the first bundle), {pipelines[0].engine.backend}")
    table.add_column("stage")
    for bundle in bundles:
        table.add_column(bundle.name, justify="right")
    for stage in STAGES:
        first = medians[0][stage]
        cells = (f"{m[stage]:.3f} ({m[stage] / first:.2f}x)" if first else f"{m[stage]:.3f}" for m in medians)
        table.add_row(stage.removesuffix("_ms"), *cells)
    return table


def report(
    bundles: list[Path], pipelines: list[Pipeline], samples: list[list[dict[str, float]]], tokens: int
) -> list[dict[str, Any]]:
    return [
        {
            "bundle": bundle.name,
            "bundle_sha256": pipeline.bundle_digest,
            "backend": pipeline.engine.backend,
            "tokens": tokens,
            "samples": found,
        }
        for bundle, pipeline, found in zip(bundles, pipelines, samples, strict=True)
    ]


if __name__ == "__main__":
    typer.run(main)
