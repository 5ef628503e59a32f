"""Our kernels and torch on one GPU, in one run: `vila-edge bench kernels` with torch beside it.

    python -m benchmarks.gpu_kernels [--model VILA1.5-3B] [--torch-python PYTHON] [--json FILE] [--markdown FILE]

PYTHON is an interpreter with a torch for CUDA and numpy; by default this one. Each measures in a process of its own, one
behind the other. Without such a torch its columns are left out and its targets are "not measured": the reason is said.
Run this from the repository. `gpu_peers/torch_gpu.py` says what torch is asked for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu_peers.processes import run_ours, run_peer
from vila_edge.bench.kernels.report import headline, markdown, sheets
from vila_edge.cli.bench_kernels import TABLE_WIDTH
from vila_edge.cli.results import check_results, give_results


def main(
    model: Annotated[list[str] | None, typer.Option("-m", "--model", help="May be repeated; all by default.")] = None,
    repeat: Annotated[int, typer.Option("-r", "--repeat", min=1, help="Samples of each measurement.")] = 20,
    torch_python: Annotated[str, typer.Option(help="An interpreter with a torch for CUDA.")] = sys.executable,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown")] = None,
) -> None:
    check_results(json_file, markdown_file)
    found = ours(model or [], repeat)
    found["torch"] = beside(torch_python, model or [], repeat)
    give_results(found, sheets(found), markdown(found), TABLE_WIDTH, json_file, markdown_file)
    print(headline(found))


def ours(models: list[str], repeat: int) -> dict[str, Any]:
    """What `vila-edge bench kernels` writes. Raises SystemExit with its exit code if it fails."""
    chosen = [part for name in models for part in ("--model", name)]
    return run_ours(["bench", "kernels", "--repeat", str(repeat), *chosen])


def beside(python: str, models: list[str], repeat: int) -> dict[str, Any]:
    """What torch measures, or `absent` and why."""
    return run_peer(python, "benchmarks.gpu_peers.torch_gpu", {"models": models, "repeat": repeat})


if __name__ == "__main__":
    typer.run(main)
