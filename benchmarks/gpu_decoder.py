"""Our decoder and torch's on one GPU, in one run: `vila-edge bench decoder` with torch beside it.

    python -m benchmarks.gpu_decoder [--model VILA1.5-8B] [--torch-python PYTHON] [--json FILE] [--markdown FILE]

PYTHON is an interpreter with a torch for CUDA and numpy; by default this one. Each measures in a process of its own, one
behind the other. Without such a torch its columns are left out and its targets are "not measured": the reason is said.
Run this from the repository. `gpu_peers/torch_decoder.py` says what torch is asked for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu_peers.processes import run_ours, run_peer
from vila_edge.bench.decoder.report import headline, markdown, sheets
from vila_edge.cli.bench_decoder import TABLE_WIDTH
from vila_edge.cli.results import check_results, give_results


def main(
    model: Annotated[list[str] | None, typer.Option("-m", "--model", help="May be repeated; all by default.")] = None,
    context: Annotated[list[int] | None, typer.Option("-c", "--context", help="May be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option("-b", "--batch", help="May be repeated.")] = None,
    repeat: Annotated[int, typer.Option("-r", "--repeat", min=1, help="Samples of each measurement.")] = 5,
    torch_python: Annotated[str, typer.Option(help="An interpreter with a torch for CUDA.")] = sys.executable,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown")] = None,
) -> None:
    check_results(json_file, markdown_file)
    found = ours({"--model": model, "--context": context, "--batch": batch, "--repeat": [repeat]})
    found["torch"] = beside(torch_python, found)
    give_results(found, sheets(found), markdown(found), TABLE_WIDTH, json_file, markdown_file)
    print(headline(found))


def ours(options: dict[str, Any]) -> dict[str, Any]:
    """What `vila-edge bench decoder` writes. Raises SystemExit with its exit code if it fails."""
    given = [part for option, values in options.items() for value in values or () for part in (option, str(value))]
    return run_ours(["bench", "decoder", *given])


def beside(python: str, found: dict[str, Any]) -> dict[str, Any]:
    """What torch measures of the same models and lengths, or `absent` and why."""
    same = ("contexts", "batches", "prompt_tokens", "new_tokens", "repeat")
    job = {name: found["options"][name] for name in same}
    models = list(dict.fromkeys(row["model"] for row in found["models"]))
    return run_peer(python, "benchmarks.gpu_peers.torch_decoder", {"models": models, **job})


if __name__ == "__main__":
    typer.run(main)
